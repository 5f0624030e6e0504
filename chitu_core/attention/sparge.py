"""SpargeAttn: SageAttention 2 over a fixed share of the key blocks, those whose pooled scores are highest.

Gives no LSE, so parts of a sequence cannot be merged. Written from the package's source, and unverified until
somebody runs it. Leaves out the package's cumulative-mass mode and its offline tuning per head.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from chitu_core.attention._base import Attention, Place

_MIN_LENGTH = 128
_INSTALL = "pip install 'chitu-diffusion[sparge]' and build it (docs/attention.md)"


class Backend(Attention):
    """SpargeAttn by top-k; option `sparsity_ratio`, the share of key blocks left out, in [0, 1).

    Raises ValueError for another ratio. Source: SpargeAttn (arXiv:2502.18137).
    """

    is_exact = False

    def __init__(self, variant: str, place: Place, *, sparsity_ratio: float, **options: Any) -> None:
        super().__init__("sparge")
        if not 0 <= sparsity_ratio < 1:
            raise ValueError(
                f"infer.attn_config.sparsity_ratio must be at least 0 and below 1, got {sparsity_ratio}; "
                "0.5 leaves out half of the key blocks"
            )
        self._kept = 1.0 - sparsity_ratio

    @classmethod
    def unavailable(cls, variant: str, place: Place) -> str | None:
        """See `Attention`."""
        if place.capability is None:
            return f"SpargeAttn needs an NVIDIA GPU, this is {place.device_type}; use sdpa"
        if place.capability < (8, 0):
            return f"SpargeAttn needs compute capability 8.0 or higher, this is {place}; use sdpa"
        if place.dtype not in (torch.float16, torch.bfloat16):
            return f"SpargeAttn takes float16 or bfloat16, this is {place}; use sdpa, or another infer.dtype"
        if place.head_dim not in (64, 128):
            return f"SpargeAttn takes head dim 64 or 128, this is {place}; use sdpa"
        try:
            _function()
        except (
            ImportError,
            AttributeError,
            OSError,
        ) as error:  # OSError: a library of the package is not found
            return f"the package spas_sage_attn is not installed ({error}); {_INSTALL}"
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`. Raises ValueError for fewer than 128 queries or keys."""
        length = min(q.shape[1], k.shape[1])
        if length < _MIN_LENGTH:
            raise ValueError(
                f"infer.attn_type=sparge needs at least {_MIN_LENGTH} tokens, got {length}; "
                "use a larger size, or infer.attn_type=auto"
            )
        return _attend(q, k, v, self._kept)


@torch.library.custom_op("chitu::sparge", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, kept: float) -> Tensor:
    """NOTE: some versions of the package answer in float16, whatever they were given."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    out = _function()(q, k, v, topk=kept, is_causal=False, tensor_layout="NHD")
    return out.to(q.dtype).contiguous()


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kept: float) -> Tensor:
    return q.new_empty(q.shape)


def _function() -> Any:
    return importlib.import_module("spas_sage_attn").spas_sage2_attn_meansim_topk_cuda
