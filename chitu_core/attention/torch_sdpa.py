"""Exact attention by torch SDPA: runs on any device, and is the reference for the other backends."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from chitu_core.attention._base import Attention


class Backend(Attention):
    """torch picks the kernel: cuDNN, flash, memory-efficient or plain matrix products."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # SDPA wants heads before sequence
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)
