"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): two predictions become one velocity."""

from collections.abc import Callable

import torch
from torch import Tensor

from chitu_diffusion.seam import Branch

Predict = Callable[[Branch], Tensor]


def needs_cfg(scale: float) -> bool:
    """Whether the unconditional branch matters: not at 0 or less, nor at 1, where the formula gives cond."""
    return scale > 0 and scale != 1


def guided_velocity(predict: Predict, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond), in fp32; the conditional branch alone where guidance is off."""
    cond = predict("cond")
    if not needs_cfg(scale):
        return cond
    return torch.lerp(predict("uncond"), cond, scale)
