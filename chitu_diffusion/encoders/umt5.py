"""The UMT5 encoder: a pre-norm transformer with a relative position bias of its own in every layer.

The whole encoder runs in the dtype of its weights; the softmax and the factor of the RMS norm are fp32, as in
the official Wan code. Parameter names are the official checkpoint keys. No decoder, no dropout.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder: `attention_dim` is the width of all heads together, `num_buckets` the rows of a
    bias table, half for each direction; distances from `max_distance` tokens on share the last bucket."""

    vocab_size: int
    dim: int
    attention_dim: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.attention_dim % self.num_heads:
            raise ValueError(
                f"text encoder attention_dim must be a multiple of num_heads = {self.num_heads}, got "
                f"{self.attention_dim}; check the text encoder's config.json"
            )


# how a block is called: with x [B, L, dim], which it returns the same, buckets and padding
BlockCall = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]


class UMT5Encoder(nn.Module):
    """Token ids to text embeddings (Chung et al. 2023, arXiv:2304.09151; Wan's `T5Encoder`)."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.eps)
        self.call_block: BlockCall = Block.__call__

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode int64 `ids` [B, L] to [B, L, dim] in the weights' dtype, on the device of `ids`.

        `mask` [B, L], bool or int, is 1 at tokens and 0 at padding, which no token then attends to; the rows
        of padding hold values without a meaning. None: every id is a token.
        """
        buckets = relative_buckets(ids.shape[1], self.config, ids.device)
        is_padding = None if mask is None else (mask == 0)[:, None, None, :]  # [B, 1, 1, L], along the keys
        x: Tensor = self.token_embedding(ids.to(self.token_embedding.weight.device)).to(ids.device)
        for block in self.blocks:
            x = self.call_block(block, x, buckets, is_padding)
        encoded: Tensor = self.norm(x)
        return encoded


class Block(nn.Module):
    """Self-attention and a gated feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attn = SelfAttention(config)
        self.pos_embedding = RelativeBias(config)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.ffn = GatedFeedForward(config)

    def forward(self, x: Tensor, buckets: Tensor, is_padding: Tensor | None) -> Tensor:
        bias: Tensor = self.pos_embedding(buckets)
        if is_padding is not None:
            bias = bias.masked_fill(is_padding, torch.finfo(bias.dtype).min)
        x = x + self.attn(self.norm1(x), bias)
        x = x + self.ffn(self.norm2(x))
        return x


class SelfAttention(nn.Module):
    """Multi-head attention without biases and without the factor 1/sqrt(head_dim), as T5 was trained."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.k = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.v = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.o = nn.Linear(config.attention_dim, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, L, D]
            for linear in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(-1, -2) + bias  # [B, H, L, L]
        weights = scores.float().softmax(-1).to(v.dtype)
        attended: Tensor = self.o((weights @ v).transpose(1, 2).flatten(2))
        return attended


class RelativeBias(nn.Module):
    """A learned score per head and bucket of the distance from query to key."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        bias: Tensor = self.embedding(buckets)  # [L, L, H]
        return bias.permute(2, 0, 1).unsqueeze(0)  # [1, H, L, L]


class GatedFeedForward(nn.Module):
    """fc2(fc1(x) * gelu(gate(x))), without biases."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(config.dim, config.ffn_dim, bias=False), TanhGELU())
        self.fc1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x) * self.gate(x))
        return out


class TanhGELU(nn.Module):
    """GELU by its tanh formula, in single operations so that bf16 rounds where the official code does."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, cast to the weight's dtype, times the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        factor = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * factor).to(self.weight.dtype)


def relative_bucket(distance: int, config: UMT5Config) -> int:
    """Bucket of `distance`, key index minus query index: exact while near, logarithmic up to `max_distance`;
    keys after the query use the second half (Raffel et al. 2020, arXiv:1910.10683, section 2.1)."""
    half = config.num_buckets // 2
    exact = half // 2
    offset = half if distance > 0 else 0
    distance = abs(distance)
    if distance < exact:
        return offset + distance
    position = math.log(distance / exact) / math.log(config.max_distance / exact)
    return offset + min(half - 1, exact + int(position * (half - exact)))


def relative_buckets(length: int, config: UMT5Config, device: torch.device) -> Tensor:
    """Bucket of every pair of query i and key j, int64 [length, length], on `device`."""
    # NOTE: logarithms are taken on the host in double precision: no device rounds a border its way
    table = [relative_bucket(distance, config) for distance in range(1 - length, length)]
    position = torch.arange(length, device=device)
    return torch.tensor(table, device=device)[position[None, :] - position[:, None] + length - 1]
