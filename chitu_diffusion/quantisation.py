"""Which linear layers `quant` makes fp8, and which stay as they are, with the reason of each.

The choice is data: `QUANTISED` and `KEPT`. What it costs is in docs/quantisation.md.
"""

import logging
from dataclasses import dataclass

import torch
from torch import nn

from chitu_core.ops.fp8 import ALIGNMENT, LOWEST_CAPABILITY, Fp8Linear
from chitu_diffusion.models.wan import WanConfig, WanDiT

logger = logging.getLogger(__name__)

QUANTISED = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


@dataclass(frozen=True)
class Kept:
    """Linear layers that stay in the dtype of matrix products."""

    layers: str
    reason: str


KEPT = (
    Kept(
        "outside the blocks",
        "below 1 % of the FLOPs; embeddings, time and head are fp32 in the reference too",
    ),
    Kept("cross_attn.k, cross_attn.v", "computed once per prompt, not once per step"),
    Kept(
        "first and last block",
        "nearest to input and output, where published recipes keep blocks (arXiv:2606.00957)",
    ),
)


def kept_blocks(num_layers: int) -> frozenset[int]:
    """Blocks whose layers all stay; a network of fewer than four blocks has no inner ones to speak of."""
    return frozenset({0, num_layers - 1}) if num_layers > 3 else frozenset()


def kept_share(size: WanConfig) -> float:
    """Share of the FLOPs of a forward's linear layers (per token, inside blocks) that is not fp8."""
    return len(kept_blocks(size.num_layers)) / size.num_layers


def check_quantisation(device: torch.device, dtype: torch.dtype, size: WanConfig) -> None:
    """Raises ValueError where fp8 cannot run: an older GPU, another dtype, or widths it cannot take."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LOWEST_CAPABILITY:
            found, needed = (".".join(map(str, pair)) for pair in (capability, LOWEST_CAPABILITY))
            raise ValueError(
                f"quant=fp8 needs compute capability {needed}, this GPU has {found}; leave quant=null"
            )
        if dtype != torch.bfloat16:
            raise ValueError(
                f"quant=fp8 gives bfloat16, but infer.dtype is {dtype}; set infer.dtype=bfloat16"
            )
    for key, width in (("dim", size.dim), ("ffn_dim", size.ffn_dim)):
        if width % ALIGNMENT:
            raise ValueError(
                f"quant=fp8 needs widths in multiples of {ALIGNMENT}, {key} is {width}; leave quant=null"
            )


def quantise_layers(dit: WanDiT, uses_fast_accumulation: bool) -> None:
    """Put fp8 layers into a network on the meta device; its loader then fills them."""
    inner = put_fp8_layers(dit, uses_fast_accumulation)
    logger.info(
        "quant=fp8: %s of blocks %d to %d; %.0f %% of the blocks' linear FLOPs stay as they are (%s)",
        ", ".join(QUANTISED),
        inner[0],
        inner[-1],
        100 * kept_share(dit.config),
        "; ".join(f"{kept.layers}: {kept.reason}" for kept in KEPT),
    )


def put_fp8_layers(dit: WanDiT, uses_fast_accumulation: bool = True) -> list[int]:
    """The same without a word in the log; the indices of the blocks that now have them."""
    kept = kept_blocks(len(dit.blocks))
    inner = [index for index in range(len(dit.blocks)) if index not in kept]
    for block in (dit.block_list()[index] for index in inner):
        for name in QUANTISED:
            owner_name, _, leaf = name.rpartition(".")
            owner, linear = block.get_submodule(owner_name), block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            with torch.device("meta"):
                made = Fp8Linear(linear.in_features, linear.out_features, uses_fast_accumulation)
            owner.register_module(leaf, made)
    return inner
