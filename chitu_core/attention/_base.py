"""What every attention backend is: a callable value that a model holds as `self_attn.attention`.

A backend file has `class Backend(Attention)`. It is made for one `Place` and one variant; `unavailable` says
beforehand, without raising, why it could not run there.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where attention will run: the device, its compute capability (None on a CPU), dtype and head dim."""

    device_type: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int

    def __str__(self) -> str:
        where = self.device_type if self.capability is None else "sm_{}{}".format(*self.capability)
        return f"{where}, {str(self.dtype).removeprefix('torch.')}, head dim {self.head_dim}"


class Attention(ABC):
    """Full softmax attention, scaled by 1/sqrt(D), without mask or dropout."""

    is_exact: ClassVar[bool] = True  # False for a kernel that approximates; results then name it

    def __init__(self, name: str) -> None:
        self.name = name  # what logs and results call it

    @classmethod
    @abstractmethod
    def unavailable(cls, variant: str, place: Place) -> str | None:
        """Why this backend cannot run at `place`, naming package, reason and remedy; None when it can."""

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend q [B, S, H, D] to k and v [B, N, H, D]; returns [B, S, H, D] in the dtype of q."""


class LseAttention(Attention):
    """Attention that can also say how much each query saw, so that parts of a sequence can be merged."""

    @abstractmethod
    def with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the natural log of each query's softmax denominator, fp32 [B, H, S]."""
