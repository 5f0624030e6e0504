"""What a Wan transformer block is made of besides linear layers: norms, rotary positions, the time sinusoid.

Everything here computes in float32; the caller casts to the dtype of the matrix products.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_THETA = 10000.0


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, for x [B, S, d] fp32 and one row [d] of modulation.

    One row serves all tokens, so the modulation can be the affine part of the norm: one pass over x.
    """
    return F.layer_norm(x, x.shape[-1:], weight=1 + scale, bias=shift, eps=eps)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias, in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, d] fp32 to the same."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the whole width, before it is split into heads, in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, d] of any dtype to fp32 [B, S, d]."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps)


def time_sinusoid(t: Tensor, dim: int) -> Tensor:
    """Timesteps t of any shape to fp32 [*t.shape, dim]: all cosines, then all sines, with angles in fp64."""
    half = dim // 2
    frequencies = ROPE_THETA ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double().unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def rope_tables(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, 1, head_dim / 2] fp32 for the tokens of a grid (frames, rows, columns), angles in
    fp64.

    The pairs of a head are shared out to the axes, the larger part to time, and each axis has its own full
    range of frequencies (Wan 2.1 report, section 4.2; the split follows the released model).
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    parts = []
    for axis, (size, count) in enumerate(zip(grid, (pairs - 2 * spatial, spatial, spatial), strict=True)):
        powers = torch.arange(count, dtype=torch.float64, device=device) / count
        positions = torch.arange(size, dtype=torch.float64, device=device)
        angles = torch.outer(positions, ROPE_THETA**-powers)
        shape = [1, 1, 1, count]
        shape[axis] = size
        parts.append(
            torch.stack((angles.cos(), angles.sin())).float().view(2, *shape).expand(2, *grid, count)
        )
    cos, sin = torch.cat(parts, dim=-1).view(2, -1, 1, pairs)
    return cos, sin


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the adjacent pairs of x [B, S, H, D] fp32 by the angles of `rope` ([S, 1, D / 2] each)."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
