"""Bytes of the transformer and the text encoder: weights, counted on the meta device, and what a pass holds.

A pass is walked as the modules run it on a GPU, with fused operations. What a waiting frame still names
counts as alive. Left out: the VAE, which `vaes/_footprint.py` follows, what a kernel needs inside itself, and
the pools of recorded CUDA graphs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from chitu_core.distributed.degrees import Degrees
from chitu_core.ops.rows import FP8
from chitu_diffusion.encoders.umt5 import UMT5Config, UMT5Encoder
from chitu_diffusion.models.wan import WanConfig, WanDiT
from chitu_diffusion.quantisation import kept_blocks, put_fp8_layers

FP32_BYTES = 4
_TYPICAL_LAYERS = 4  # first, two inner ones, last: the least that `kept_blocks` treats as a long network
_SCALES_BYTES = FP32_BYTES  # of a token, under quant=fp8
_INDEX_BYTES = 8  # int64
_TEXT_PROJECTION = ("cross_attn.k.", "cross_attn.v.", "cross_attn.norm_k.")


@dataclass(frozen=True)
class Block:
    """Bytes of a block: what every call needs, and of that what is needed once a text alone.

    `stored` and `once_stored` are the same with matrices in float8_e4m3fn, one fp32 scale an output channel.
    """

    num_bytes: int
    stored: int
    once: int
    once_stored: int


@dataclass(frozen=True)
class Weights:
    """A network's parameters: its blocks, and the bytes outside of blocks.

    `table` of those bytes is an embedding, whose rows may be looked up on the host.
    """

    blocks: tuple[Block, ...]
    rest: int
    table: int = 0

    @property
    def in_blocks(self) -> int:
        """Bytes of all blocks."""
        return sum(block.num_bytes for block in self.blocks)

    @property
    def total(self) -> int:
        """All bytes."""
        return self.in_blocks + self.rest


def dit_weights(size: WanConfig, dtype: torch.dtype, quant: str | None = None) -> Weights:
    """Weights of a transformer whose matrix products are in `dtype`; with quant=fp8 its layers are."""
    with torch.device("meta"):
        typical = WanDiT(replace(size, num_layers=min(size.num_layers, _TYPICAL_LAYERS)))
    if quant is not None:
        put_fp8_layers(typical)
    return _spread(_weigh(typical, lambda name: WanDiT.weight_dtype(name, dtype)), size.num_layers)


def umt5_weights(size: UMT5Config, dtype: torch.dtype) -> Weights:
    """Weights of a text encoder in `dtype`."""
    with torch.device("meta"):
        typical = UMT5Encoder(replace(size, num_layers=min(size.num_layers, _TYPICAL_LAYERS)))
    weights = _spread(_weigh(typical, lambda _: dtype), size.num_layers)
    return replace(weights, table=typical.token_embedding.weight.numel() * dtype.itemsize)


def _weigh(module: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> Weights:
    blocks: dict[str, Block] = {}
    rest = 0
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        is_quantised = tensor.dtype == FP8 or name.endswith("weight_scales")
        num_bytes = tensor.numel() * (tensor.dtype if is_quantised else dtype_of(name)).itemsize
        if not name.startswith("blocks."):
            rest += num_bytes
            continue
        _, index, leaf = name.split(".", 2)
        is_matrix = leaf.endswith(".weight") and tensor.ndim == 2 and not is_quantised
        stored = tensor.numel() * FP8.itemsize + len(tensor) * FP32_BYTES if is_matrix else num_bytes
        once = leaf.startswith(_TEXT_PROJECTION)
        before = blocks.get(index, Block(0, 0, 0, 0))
        blocks[index] = Block(
            before.num_bytes + num_bytes,
            before.stored + stored,
            before.once + once * num_bytes,
            before.once_stored + once * stored,
        )
    return Weights(tuple(blocks.values()), rest)


def _spread(weights: Weights, num_layers: int) -> Weights:
    """The same with as many inner blocks as the network has: they are alike."""
    blocks = weights.blocks
    return replace(weights, blocks=blocks[:1] + blocks[1:2] * (num_layers - len(blocks)) + blocks[1:])


def text_cache_bytes(size: WanConfig, dtype: torch.dtype) -> int:
    """Keys and values of one text for all blocks."""
    return 2 * size.num_layers * size.text_len * size.dim * dtype.itemsize


def dit_bytes(
    size: WanConfig,
    dtype: torch.dtype,
    tokens: int,
    *,
    quant: str | None = None,
    degrees: Degrees | None = None,
) -> int:
    """What a forward over a video of `tokens` tokens holds at most, above weights, latents and text.

    With `degrees` the blocks see a rank's part of the tokens. The largest moment is one of the blocks', or
    the embedding of all tokens, before they are shared out.
    """
    degrees = degrees or Degrees()
    stream, rope = FP32_BYTES * size.dim, FP32_BYTES * size.dim // size.num_heads
    moments = _moments(size, dtype.itemsize, degrees, is_fp8=False)
    if quant is not None and size.num_layers > len(kept_blocks(size.num_layers)):
        moments += _moments(size, dtype.itemsize, degrees, is_fp8=True)
    own = -(-tokens // degrees.cp)
    blocks = own * (max(moments) + rope)
    patches = FP32_BYTES * size.in_dim * prod(size.patch_size)
    embedded = tokens * (patches + dtype.itemsize * size.dim + stream)
    shared_out = (tokens + own) * (stream + rope) if degrees.cp > 1 else 0
    return max(blocks, embedded, shared_out)


def _moments(size: WanConfig, e: int, degrees: Degrees, *, is_fp8: bool) -> list[int]:
    """Bytes a token at the moments of a block that can be the largest.

    Two residual streams are always alive, the first block's input and this one's, and from self-attention on
    the block's own. So is a sub-layer's normalised input `n`, and y of cross-attention until the block ends.
    """
    d, f, stream = size.dim, size.ffn_dim, FP32_BYTES * size.dim
    n = FP8.itemsize * d + _SCALES_BYTES if is_fp8 else e * d
    rows = n if is_fp8 else 0  # what an output layer makes of its input
    hidden = e * f + (FP8.itemsize * f + _SCALES_BYTES if is_fp8 else 0)
    packed, y = 5 * e * d, e * d  # packed q, k, v, and q and k normed
    return [
        2 * stream + n + packed + _attention_bytes(d, e, degrees),
        2 * stream + n + packed + e * d + rows + y,  # attention's output, and what comes of it
        3 * stream + n + y + 2 * e * d + rows + y,  # self-attention's y, cross-attention's q, output and y
        4 * stream + 2 * n + y,  # a gated residual and its norm
        3 * stream + n + y + hidden + y,
    ]


def _attention_bytes(d: int, e: int, degrees: Degrees) -> int:
    """Bytes a token inside self-attention, beyond q, k, v: its output, and what ranks exchange."""
    out = e * d
    if degrees.ring > 1:  # held and spare k, v; outputs of two chunks, both in fp32 too, and their merger
        out = 6 * e * d + 3 * FP32_BYTES * d
    if degrees.ulysses == 1:
        return out
    packing = 7 * e * d  # a copy of v, and q, k, v packed and received
    return max(packing, 3 * e * d + out)


def umt5_bytes(size: UMT5Config, dtype: torch.dtype, length: int) -> int:
    """What encoding one text of `length` tokens holds at most, above the weights."""
    e, stream = dtype.itemsize, length * size.dim * dtype.itemsize
    heads, scores = length * size.attention_dim * e, size.num_heads * length**2
    buckets, bias = length**2 * _INDEX_BYTES, e * scores
    softmax = e * scores + (FP32_BYTES if e < FP32_BYTES else 0) * scores + FP32_BYTES * scores
    product = 2 * e * scores + 2 * heads  # scores, weights; v as the product wants it, and its result
    attention = 2 * stream + 3 * heads + max(softmax, product)
    hidden = length * size.ffn_dim * e
    feed_forward = 3 * stream + 5 * hidden  # fc1, gate's input and three of its single operations
    return buckets + bias + max(attention, feed_forward)
