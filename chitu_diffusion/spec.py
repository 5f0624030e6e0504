"""Facts of a loaded model that the engine needs and that no tensor states: experts, strides, shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from chitu_core.config import SamplerConfig


@dataclass(frozen=True)
class Expert:
    """One transformer of a model, for timesteps >= `min_timestep`; `guidance_index` counts from low noise."""

    name: str
    guidance_index: int
    min_timestep: int


@dataclass(frozen=True)
class ModelSpec:
    """What one model is: its experts from high noise to low, and how pixels, latents and tokens relate."""

    experts: tuple[Expert, ...]
    vae_stride: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    latent_channels: int
    text_len: int

    def select_expert(self, timestep: int) -> Expert:
        """The expert for a timestep: the first in order whose range holds it."""
        return next(expert for expert in self.experts if timestep >= expert.min_timestep)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[C, T, h, w] of a video of 4n + 1 frames."""
        return self.latent_channels, *latent_size(self.vae_stride, num_frames, height, width)

    def seq_len(self, latent_shape: tuple[int, int, int, int]) -> int:
        """Tokens that the transformer sees for a latent."""
        _, *size = latent_shape
        return count_tokens(self.patch_size, size)


def latent_size(
    stride: tuple[int, int, int], num_frames: int, height: int, width: int
) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a video, by the frames, rows and columns that make one."""
    stride_t, stride_h, stride_w = stride
    return (num_frames - 1) // stride_t + 1, height // stride_h, width // stride_w


def count_tokens(patch_size: tuple[int, int, int], latent: Sequence[int]) -> int:
    """Tokens of latent frames, rows and columns, of so many of each."""
    return prod(side // patch for side, patch in zip(latent, patch_size, strict=True))


def experts_of(sampler: SamplerConfig) -> tuple[Expert, ...]:
    """One expert, or two split at the boundary: high noise first; guidance values come as (low, high)."""
    if not sampler.boundary:
        return (Expert("dit", 0, 0),)
    # a timestep is high noise from boundary x num_train_timesteps on; rounded, for 0.9 x 1000 in floats
    boundary = ceil(round(sampler.boundary[0] * sampler.num_train_timesteps, 6))
    return (Expert("high_noise", 1, boundary), Expert("low_noise", 0, 0))
