"""What a Wan transformer block is made of besides attention: norms, feed-forward, rotary tables, sinusoid.

The operations themselves are `chitu_core.ops`; tables and sinusoid are computed in float64, kept in float32.
"""

import torch
from torch import Tensor, nn

from chitu_core.ops.rows import FP8, Rows, linear_gelu, quantise, rms_norm

ROPE_THETA = 10000.0


class LayerNorm(nn.Module):
    """Weight and bias of a layer norm, fp32; it is computed together with what comes before it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))


class RMSNorm(nn.Module):
    """Weight of an RMS norm over the whole width, before it is split into heads, fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * weight for x [B, S, d], in its dtype; the statistics are fp32."""
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Sequential):
    """Linear, GELU, linear, where GELU is part of the product before it or of the quantisation after it."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))

    @property
    def takes(self) -> torch.dtype:
        """What the first layer takes: `FP8`, or the dtype of matrix products."""
        weight = self[0].weight
        assert isinstance(weight, Tensor)
        return weight.dtype

    def forward(self, x: Rows) -> Tensor:
        """x [B, S, d] as the first layer takes it to [B, S, d] in the dtype of matrix products."""
        up, gelu, down = self
        if isinstance(x, Tensor):
            assert isinstance(up, nn.Linear)
            return down(linear_gelu(x, up.weight, up.bias))
        hidden = up(x)
        return down(quantise(hidden, gelu=True) if down.weight.dtype == FP8 else gelu(hidden))


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
