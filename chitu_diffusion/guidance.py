"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): two predictions become one velocity.

Two ranks may share the branches: each predicts one, and both get both. Nobody else learns of it.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from chitu_diffusion.seam import Branch

Predict = Callable[[Branch], Tensor]

BOTH: tuple[Branch, Branch] = ("cond", "uncond")  # in the order of the ranks that share them


class Prediction(NamedTuple):
    """Velocities of one step: of the conditional branch, and with guidance."""

    guided: Tensor
    cond: Tensor


class Pair(Protocol):
    """Two ranks that share the branches."""

    index: int  # of this rank

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x of the first rank, and x of the second."""


def needs_cfg(scale: float) -> bool:
    """Whether the unconditional branch matters: not at 0 or less, nor at 1, where the formula gives cond."""
    return scale > 0 and scale != 1


def branches_of(scale: float, pair: Pair | None = None) -> tuple[Branch, ...]:
    """What this rank predicts; without guidance, both ranks of a pair do the same."""
    if not needs_cfg(scale):
        return ("cond",)
    return BOTH if pair is None else (BOTH[pair.index],)


def guided_velocity(predict: Predict, scale: float, pair: Pair | None = None) -> Tensor:
    """uncond + scale * (cond - uncond), in fp32; the conditional branch alone where guidance is off."""
    return guided_prediction(predict, scale, pair).guided


def guided_prediction(predict: Predict, scale: float, pair: Pair | None = None) -> Prediction:
    """The same with the conditional branch, which every rank of a pair learns."""
    own = [predict(branch) for branch in branches_of(scale, pair)]
    if not needs_cfg(scale):
        return Prediction(own[0], own[0])
    cond, uncond = own if pair is None else pair.both(own[0])
    return Prediction(torch.lerp(uncond, cond, scale), cond)
