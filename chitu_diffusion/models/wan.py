"""The Wan 2.1 and 2.2 text-to-video transformer. Parameter names are those of the released checkpoints.

Number formats follow the reference: matrix products in the weights' dtype; residual stream, norms,
modulation, time embedding and head in float32. A linear layer says by the dtype of its weight what it takes,
and the operation before it gives that. It knows no device, no rank and no cache: attention is a value
(`self_attn.attention`), and so is how a block is called; `shard=` and `around=` come with the call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from chitu_core.attention._base import Attention
from chitu_core.attention.torch_sdpa import Backend
from chitu_core.ops.rows import Rows, gate_residual, gate_residual_norm, layer_norm, qk_norm_rope
from chitu_diffusion.models._layers import FeedForward, LayerNorm, RMSNorm, rope_tables, time_sinusoid
from chitu_diffusion.seam import Around, Run, bind, inline
from chitu_diffusion.sequence import NO_SHARD, SequenceShard

FLOAT32_PARTS = frozenset(
    {"modulation", "norm3", "norm_q", "norm_k", "time_embedding", "time_projection", "head"}
)


@dataclass(frozen=True)
class WanConfig:
    """Sizes of one transformer, as its checkpoint states them."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int
    text_dim: int
    text_len: int
    in_dim: int
    out_dim: int
    patch_size: tuple[int, int, int]
    eps: float

    def block_flops(self, tokens: int) -> "BlockFlops":
        """Operations of one block over `tokens` video tokens, the text's keys and values made before."""
        return BlockFlops(
            linear=2
            * tokens
            * (6 * self.dim**2 + 2 * self.dim * self.ffn_dim),  # q k v o, and q o of the text
            self_attention=4 * tokens**2 * self.dim,
            cross_attention=4 * tokens * self.text_len * self.dim,
        )


class BlockFlops(NamedTuple):
    """Multiplications and additions, two a pair."""

    linear: int
    self_attention: int
    cross_attention: int


@dataclass(frozen=True)
class TextCache:
    """Keys and values of the text for every block's cross-attention: [B, text_len, H, D] each."""

    layers: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class LayerCondition:
    """What one block is conditioned on; tensors only, so that one compiled graph serves all blocks."""

    modulation: Tensor  # [6, d] fp32, of the time
    rope: tuple[Tensor, Tensor]  # [S, 1, D / 2] fp32
    text: tuple[Tensor, Tensor]  # [B, text_len, H, D]


@dataclass(frozen=True)
class Condition:
    """What the whole transformer is conditioned on during one forward pass."""

    time: Tensor  # [d] fp32
    modulation: Tensor  # [6, d] fp32
    rope: tuple[Tensor, Tensor]
    text: TextCache

    def split(self, shard: SequenceShard) -> "Condition":
        """The same for the tokens of one rank."""
        cos, sin = self.rope
        return replace(self, rope=(shard.split(cos, dim=0), shard.split(sin, dim=0)))

    def at(self, layer: int) -> LayerCondition:
        """The part that block `layer` sees."""
        return LayerCondition(self.modulation, self.rope, self.text.layers[layer])


class SelfAttention(nn.Module):
    """Full attention over all tokens, with QK norm over the whole width and rotary positions."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(config.dim, 3 * config.dim), nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.attention: Attention = Backend()

    def forward(self, x: Rows, rope: tuple[Tensor, Tensor], run: Run = inline) -> Tensor:
        """x [B, S, d] as `qkv` takes it to [B, S, d] in the dtype of matrix products."""
        qkv = self.qkv(x)  # [B, S, 3 d]
        q, k = qk_norm_rope(qkv, self.norm_q.weight, self.norm_k.weight, rope, self.norm_q.eps)
        v = qkv.chunk(3, dim=-1)[2].unflatten(-1, q.shape[-2:])  # [B, S, H, D]
        out = run("attention", lambda qkv: self.attention(*qkv), (q, k, v))
        return self.o(out.flatten(-2))


class CrossAttention(nn.Module):
    """Attention from the tokens to the text; its keys and values depend on the text alone."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.attention: Attention = Backend()

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projected text [B, text_len, d] to keys and values [B, text_len, H, D]."""
        heads = (self.num_heads, -1)
        v = self.v(text).unflatten(-1, heads)
        return self.norm_k(self.k(text)).unflatten(-1, heads), v

    def forward(self, x: Rows, text: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, S, d] as `q` takes it to [B, S, d] in the dtype of matrix products."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        return self.o(self.attention(q, *text).flatten(-2))


TextCall = Callable[[CrossAttention, Tensor], tuple[Tensor, Tensor]]  # how the above `encode_text` is called


class WanBlock(nn.Module):
    """Self-attention and feed-forward, modulated and gated by the time, with cross-attention between."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(config.dim)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, cond: LayerCondition, run: Run = inline) -> Tensor:
        """x [B, S, d] fp32 to the same: three sub-layers, each reusable before its gate.

        A sub-layer is handed its normalised input, which is computed together with the sum before it.
        """
        table = self.modulation[0] + cond.modulation  # [6, d] fp32
        shift1, scale1, gate1, shift2, scale2, gate2 = table
        takes = (self.self_attn.qkv.weight.dtype, self.cross_attn.q.weight.dtype, self.ffn.takes)

        n = layer_norm(x, 1 + scale1, shift1, self.eps, takes[0])
        y = run("self_attn", lambda n: self.self_attn(n, cond.rope, run), n)
        norm3 = self.norm3
        x, n = gate_residual_norm(x, y, gate1, norm3.weight, norm3.bias, self.eps, takes[1])
        y = run("cross_attn", lambda n: self.cross_attn(n, cond.text), n)
        x, n = gate_residual_norm(x, y, None, 1 + scale2, shift2, self.eps, takes[2])
        return gate_residual(x, run("ffn", self.ffn, n), gate2)


class BlockCall(Protocol):
    """How a block is called: its own forward, or a compiled form of it."""

    def __call__(self, block: WanBlock, x: Tensor, cond: LayerCondition, run: Run) -> Tensor:
        """x [B, S, d] fp32 to the same."""


class Head(nn.Module):
    """Modulated norm and projection to the pixels of a patch, in fp32."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.head = nn.Linear(config.dim, config.out_dim * _volume(config.patch_size))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, S, d] fp32 and the time embedding [d] fp32 to [B, S, patch volume * out_dim] fp32."""
        shift, scale = self.modulation[0] + time
        return self.head(layer_norm(x, 1 + scale, shift, self.eps, x.dtype))


class WanDiT(nn.Module):
    """Predicts the flow velocity (noise - clean) of a latent video at a noise level, given text.

    Source: the Wan 2.1 report (arXiv:2503.20314, section 4.2) and the released checkpoints.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.call_block: BlockCall = WanBlock.__call__
        self.call_text: TextCall = CrossAttention.encode_text

    @staticmethod
    def parts_of(name: str) -> tuple[str, ...]:
        """The checkpoint's tensors whose rows, one after another, make a parameter: q, k and v are packed."""
        owner, packed, leaf = name.partition(".self_attn.qkv.")
        return tuple(f"{owner}.self_attn.{part}.{leaf}" for part in "qkv") if packed else (name,)

    @staticmethod
    def weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
        """How a parameter is stored: fp32 where it is used in fp32, else in the dtype of matrix products."""
        return torch.float32 if FLOAT32_PARTS.intersection(name.split(".")) else dtype

    def encode_text(self, text: Tensor) -> TextCache:
        """Encoder output [B, n, text_dim], n <= text_len, to what every step of a prompt reuses.

        The rows from n to text_len are zeros before the projection and take part in attention, as in
        training.
        """
        dtype = self.patch_embedding.weight.dtype
        padded = F.pad(text.to(dtype), (0, 0, 0, self.config.text_len - text.shape[1]))
        projected = self.text_embedding(padded)  # [B, text_len, d]
        return TextCache(tuple(self.call_text(block.cross_attn, projected) for block in self.block_list()))

    def forward(
        self,
        latent: Tensor,
        t: Tensor,
        text: TextCache,
        *,
        shard: SequenceShard = NO_SHARD,
        around: Around | None = None,
    ) -> Tensor:
        """Velocity of `latent` [B, in_dim, T, h, w] at integer timestep `t` (0-dimensional), fp32 [B,
        out_dim, T, h, w].

        h and w must be multiples of the patch size. All videos of a batch share the timestep.
        """
        x, cond, grid = self.embed(latent, t, text)
        x, cond = shard.split(x), cond.split(shard)
        run = bind(around, cond.modulation)
        x = run("blocks", lambda x: self.run_blocks(x, cond, run), x)
        return self.unpatchify(shard.join(self.head(x, cond.time)), grid)

    def embed(
        self, latent: Tensor, t: Tensor, text: TextCache
    ) -> tuple[Tensor, Condition, tuple[int, int, int]]:
        """Tokens [B, S, d] fp32, their condition, and the grid of tokens (frames, rows, columns)."""
        pt, ph, pw = self.config.patch_size
        frames, rows, columns = latent.shape[-3] // pt, latent.shape[-2] // ph, latent.shape[-1] // pw
        grid = (frames, rows, columns)
        patches = rearrange(latent, "b c (f i) (r j) (w k) -> b (f r w) (c i j k)", i=pt, j=ph, k=pw)
        weight = self.patch_embedding.weight.flatten(1)
        x = F.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias).float()
        time = self.time_embedding(time_sinusoid(t, self.config.freq_dim))  # [d] fp32
        modulation = self.time_projection(time).unflatten(-1, (6, -1))
        rope = rope_tables(grid, self.config.dim // self.config.num_heads, latent.device)
        return x, Condition(time, modulation, rope, text), grid

    def run_blocks(self, x: Tensor, cond: Condition, run: Run) -> Tensor:
        """All blocks in order, x [B, S, d] fp32 to the same."""
        for layer, block in enumerate(self.block_list()):
            here = run.at(layer)
            call = partial(self.call_block, block, cond=cond.at(layer), run=here.inside_block())
            x = here("block", call, x)
        return x

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, S, pt * ph * pw * C], channel fastest, to [B, C, T, h, w]."""
        (frames, rows, columns), (pt, ph, pw) = grid, self.config.patch_size
        sizes = {"f": frames, "r": rows, "w": columns, "i": pt, "j": ph, "k": pw}
        return rearrange(x, "b (f r w) (i j k c) -> b c (f i) (r j) (w k)", **sizes)

    def time_signal(self, t: Tensor) -> Tensor:
        """Time modulation [N, 6, d] fp32 of timesteps t [N] at once: what a reuse schedule may depend on."""
        time = self.time_embedding(time_sinusoid(t, self.config.freq_dim))
        return self.time_projection(time).unflatten(-1, (6, -1))

    def block_list(self) -> Sequence[WanBlock]:
        """The blocks in order, as what they are."""
        return self.blocks  # type: ignore[return-value]  # nn.ModuleList is a sequence of blocks


def _volume(patch_size: tuple[int, int, int]) -> int:
    frames, rows, columns = patch_size
    return frames * rows * columns
