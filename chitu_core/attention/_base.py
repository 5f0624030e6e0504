"""What every attention backend is: a callable value that a model holds as `self_attn.attention`."""

from abc import ABC, abstractmethod

from torch import Tensor


class Attention(ABC):
    """Full softmax attention, scaled by 1/sqrt(D), without mask or dropout."""

    is_exact = True  # False for a kernel that approximates; results then name it

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend q [B, S, H, D] to k and v [B, N, H, D]; returns [B, S, H, D] in the dtype of q."""
