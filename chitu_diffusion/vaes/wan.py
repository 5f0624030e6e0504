"""The Wan2.1 video autoencoder: causal 3-D convolutions, 8x smaller in space and 4x in time.

A clip streams through in chunks of frames. What a later chunk needs of an earlier one is kept in a `Stream`
that is passed down, so any chunking computes the whole clip. Activations are [T, H, W, C] all through: norms
and 1x1 convolutions run over the last axis, 2-D ones take frames as a batch, nothing is transposed in memory.
A norm with its SiLU writes straight into the input of the convolution after it (`chitu_core/ops/conv.py`).
Left out: the Wan2.2 TI2V autoencoder, the posterior's variance, training.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_core.ops import conv as ops

if TYPE_CHECKING:
    from chitu_diffusion.vaes._strips import Strips  # which builds on this module

WAN21_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN21_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of a Wan VAE; `latents_mean` and `latents_std` normalise the latent per channel.

    `dim_mult` has one width multiplier per level, `temporal_downsample` one flag per step between two levels.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"vae.temporal_downsample must have {len(self.dim_mult) - 1} flags, one less than "
                f"vae.dim_mult, got {self.temporal_downsample}"
            )
        for key, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) != self.z_dim:
                raise ValueError(f"vae.{key} must have vae.z_dim = {self.z_dim} values, got {len(values)}")

    @property
    def stride(self) -> tuple[int, int, int]:
        """Video frames, rows and columns per latent frame, row and column: (4, 8, 8) for Wan2.1."""
        spatial = 2 ** len(self.temporal_downsample)
        return 2 ** sum(self.temporal_downsample), spatial, spatial


def wan21(base_dim: int, z_dim: int = 16) -> WanVAEConfig:
    """The autoencoder of Wan 2.1, of any width."""
    return WanVAEConfig(
        base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        temporal_downsample=(False, True, True),
        latents_mean=WAN21_LATENTS_MEAN,
        latents_std=WAN21_LATENTS_STD,
    )


class Stream:
    """One pass over a clip, chunk after chunk: holds the last input frames of each causal convolution.

    All that looks beyond one position happens in its methods (frames before, neighbours, attention), so a
    pass over a part of the image is another class with the same methods. `is_at_start` is cleared by whoever
    feeds the chunks, once the first one, which begins with frame 0, is through.
    """

    def __init__(self, weights: dict[nn.Module, Tensor] | None = None) -> None:
        """`weights` holds what other passes through the same network made of its weights, and gets more."""
        self.is_at_start = True
        self._past: dict[nn.Conv3d, Tensor] = {}
        self._weights = {} if weights is None else weights

    def window(self, layer: nn.Module, x: Tensor) -> Tensor:  # noqa: ARG002
        """What of [T, H, W, C] a layer that changes the resolution is to work on: all of it."""
        return x

    def remember(self, conv: nn.Conv3d, frames: Tensor) -> None:
        """Keep the last frames [T, H, W, C] that the next chunk's windows of `conv` reach back to."""
        overlap = conv.kernel_size[0] - conv.stride[0]
        self._past[conv] = frames[len(frames) - overlap :].clone()  # a view would keep the whole chunk alive

    def conv3d(
        self, conv: nn.Conv3d, x: Tensor, norm: "RMSNorm | None" = None, add: Tensor | None = None
    ) -> Tensor:
        """Convolve [T, H, W, C] causally: frames seen before, or zeros, in front, and zeros around each.

        What is convolved is SiLU(norm(x)) where there is a `norm`; `add` [T, H, W, O] is added to the result.
        """
        halo = int(self.is_shifted(conv, x, norm))
        clip, new = self.open(conv, x, 2 * halo, 2 * halo)
        write(x, norm, new)
        self.remember(conv, clip)
        if halo:
            return self.convolve_shifted(conv, clip, add)
        return ops.convolve(conv, clip, (0, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2), add)

    def open(self, conv: nn.Conv3d, x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The input of a convolution of x, wider by `rows` and `columns`, and its part for the new frames.

        The past is in front; the new frames are not yet written.
        """
        frames, height, width, dim = x.shape
        overlap = conv.kernel_size[0] - conv.stride[0]
        clip = x.new_empty(overlap + frames, height + rows, width + columns, dim)
        past = self._past.pop(conv, None)
        clip[:overlap] = 0 if past is None else past
        return clip, clip[overlap:]

    def is_shifted(self, conv: nn.Conv3d, x: Tensor, norm: "RMSNorm | None") -> bool:
        """Whether `convolve_shifted` is the faster way; only a norm writes the zeros around that it needs."""
        return (
            norm is not None and conv.kernel_size == (3, 3, 3) and ops.prefers_shifted(x, conv.out_channels)
        )

    def convolve_shifted(self, conv: nn.Conv3d, clip: Tensor, add: Tensor | None) -> Tensor:
        """Convolve a clip that holds its padding, and add."""
        assert conv.bias is not None
        return ops.shifted_conv3d(clip, self._prepared(conv, ops.flat_taps), conv.bias, add)

    def conv2d(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Convolve each frame of [T, H, W, C]; stride 2 pads one zero on the right and at the bottom."""
        if conv.stride[0] == 2:
            x = F.pad(x, (0, 0, 0, 1, 0, 1))
        y = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride, conv.padding)
        return y.permute(0, 2, 3, 1)

    def double_conv2d(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Repeat each row and column of [T, H, W, C], then convolve each frame."""
        assert conv.bias is not None
        return ops.conv2d_nearest2x(x, self._prepared(conv, ops.fold_nearest2x), conv.bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with one head over all positions of each frame, [T, H, W, C] in and out."""
        shape = q.shape
        q, k, v = (t.flatten(1, 2)[:, None] for t in (q, k, v))  # [T, 1, H W, C]
        return F.scaled_dot_product_attention(q, k, v).view(shape)

    def run(self, layers: nn.Sequential, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Apply norms and convolutions in order, and add `add` to the result of the last, a 3-D one."""
        norm: RMSNorm | None = None
        for layer in layers:
            if isinstance(layer, RMSNorm):
                norm = layer  # with the SiLU after it a part of the next convolution
            elif isinstance(layer, nn.Conv3d):
                x = self.conv3d(layer, x, norm, add if layer is layers[-1] else None)
            elif isinstance(layer, nn.Conv2d):
                x = self.conv2d(layer, x)
        return x

    def _prepared(self, conv: nn.Conv2d | nn.Conv3d, form: Callable[[Tensor], Tensor]) -> Tensor:
        """A convolution's weight in the form that an operation takes, made once a pass."""
        if conv not in self._weights:
            self._weights[conv] = form(conv.weight)
        return self._weights[conv]


def write(x: Tensor, norm: "RMSNorm | None", out: Tensor) -> None:
    """Write [T, H, W, C], or SiLU(norm(x)), into a tensor that may be wider by zeros around each frame."""
    if norm is None:
        out.copy_(x)
    else:
        ops.rms_norm_silu(x, norm.gamma.flatten(), norm.eps, out)


def pointwise(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Apply a convolution of kernel 1 to [..., C]."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class RMSNorm(nn.Module):
    """x / max(||x||, 1e-12) * sqrt(C) * gamma over the last axis; gamma is [C, 1, ...] with `ndim` axes."""

    def __init__(self, dim: int, ndim: int = 4) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * (ndim - 1)))
        self.eps = 1e-24 / dim  # ||x||^2 + 1e-24 stands for the max

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gamma.flatten(), self.eps)


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), with a 1x1x1 shortcut where the width changes."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *(RMSNorm(dim_in), nn.SiLU(), nn.Conv3d(dim_in, dim_out, 3)),
            *(RMSNorm(dim_out), nn.SiLU(), nn.Identity(), nn.Conv3d(dim_out, dim_out, 3)),
        )  # the identity keeps the checkpoint's numbers, it was a dropout
        self.shortcut = nn.Conv3d(dim_in, dim_out, 1) if dim_in != dim_out else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return stream.run(self.residual, x, add=x if self.shortcut is None else pointwise(self.shortcut, x))


class AttentionBlock(nn.Module):
    """x + attention over the positions of each frame, single head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, ndim=3)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        q, k, v = pointwise(self.to_qkv, self.norm(x)).chunk(3, dim=-1)
        return x + pointwise(self.proj, stream.attend(q, k, v))


class Downsample(nn.Module):
    """Halve rows and columns; then, if temporal, the frames after the first of the clip."""

    def __init__(self, dim: int, is_temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Identity(), nn.Conv2d(dim, dim, 3, stride=2)
        )  # 0 pads in the checkpoint
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if is_temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = stream.run(self.resample, stream.window(self, x))
        return x if self.time_conv is None else self._halve_frames(self.time_conv, x, stream)

    def _halve_frames(self, conv: nn.Conv3d, x: Tensor, stream: Stream) -> Tensor:
        if not stream.is_at_start:
            return stream.conv3d(conv, x)
        first, rest = x[:1], x[1:]
        stream.remember(conv, first)  # the first frame passes as it is, and begins the history of the others
        return torch.cat((first, stream.conv3d(conv, rest))) if len(rest) else first


class Upsample(nn.Module):
    """Double, if temporal, the frames after the first of the clip; then rows and columns. Halve channels."""

    def __init__(self, dim: int, is_temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Identity(), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )  # 0 doubles rows and columns in the checkpoint
        self.time_conv = nn.Conv3d(dim, 2 * dim, (3, 1, 1)) if is_temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = stream.window(self, x)
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, stream)
        conv = self.resample[1]
        assert isinstance(conv, nn.Conv2d)
        return stream.double_conv2d(conv, x)

    def _double_frames(self, conv: nn.Conv3d, x: Tensor, stream: Stream) -> Tensor:
        # NOTE: the first frame stays single and is not in the history of the others, which begins with zeros.
        first, rest = (x[:1], x[1:]) if stream.is_at_start else (x[:0], x)
        if not len(rest):
            return first
        pairs = stream.conv3d(conv, rest).view(*rest.shape[:3], 2, -1)  # [T, H, W, 2, C]: even and odd frames
        doubled = pairs.movedim(3, 1).flatten(0, 1)  # [2 T, H, W, C]
        return torch.cat((first, doubled)) if len(first) else doubled


def middle(dim: int) -> nn.ModuleList:
    """The layers at the lowest resolution, the only ones with attention."""
    return nn.ModuleList([ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)])


def head(dim_in: int, dim_out: int) -> nn.Sequential:
    """Norm, SiLU, convolution."""
    return nn.Sequential(RMSNorm(dim_in), nn.SiLU(), nn.Conv3d(dim_in, dim_out, 3))


def index_of(layers: Iterable[nn.Module], kind: type[nn.Module]) -> list[int]:
    """Where the layers of one kind are."""
    return [index for index, layer in enumerate(layers) if isinstance(layer, kind)]


def apply(layers: Iterable[nn.Module], x: Tensor, stream: Stream) -> Tensor:
    """Apply blocks, convolutions and sequences to [T, H, W, C] in order."""
    for layer in layers:
        if isinstance(layer, nn.Conv3d):
            x = stream.conv3d(layer, x)
        elif isinstance(layer, nn.Sequential):
            x = stream.run(layer, x)
        else:
            x = layer(x, stream)
    return x


class Encoder(nn.Module):
    """Frames [F, H, W, 3] to moments [T, H/8, W/8, 2 z].

    `fine` layers come first, down to the size of the latent; `coarse` ones, with attention, stay there.
    """

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        dim = config.base_dim
        self.conv1 = nn.Conv3d(3, dim, 3)
        self.downsamples = nn.ModuleList()
        for level, mult in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(dim, config.base_dim * mult))
                dim = config.base_dim * mult
            if level < len(config.temporal_downsample):
                self.downsamples.append(Downsample(dim, config.temporal_downsample[level]))
        self.middle = middle(dim)
        self.head = head(dim, 2 * config.z_dim)
        first = 1 + max(index_of(self.downsamples, Downsample), default=-1)  # of those at the latent's size
        self.fine = (self.conv1, *list(self.downsamples)[:first])
        self.coarse = (*list(self.downsamples)[first:], *self.middle, self.head)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return apply((*self.fine, *self.coarse), x, stream)


class Decoder(nn.Module):
    """Latent frames [T, h, w, z] to frames [F, 8 h, 8 w, 3].

    `coarse` layers, with attention, stay at the size of the latent; `fine` ones follow, up to pixels.
    """

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        dim = config.base_dim * config.dim_mult[-1]
        self.conv1 = nn.Conv3d(config.z_dim, dim, 3)
        self.middle = middle(dim)
        self.upsamples = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.dim_mult))):
            for _ in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(dim, config.base_dim * mult))
                dim = config.base_dim * mult
            if level > 0:
                self.upsamples.append(Upsample(dim, config.temporal_downsample[level - 1]))
                dim //= 2
        self.head = head(dim, 3)
        last = min(index_of(self.upsamples, Upsample), default=len(self.upsamples))
        self.coarse = (self.conv1, *self.middle, *list(self.upsamples)[:last])
        self.fine = (*list(self.upsamples)[last:], self.head)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return apply((*self.coarse, *self.fine), x, stream)


class WanVAE(nn.Module):
    """Encodes and decodes one clip. Parameters are named as in the official checkpoint; their dtype computes.

    Source: Wan-Video/Wan2.1, wan/modules/vae.py.
    """

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        """The format that convolutions compute in."""
        return self.conv2.weight.dtype

    @torch.no_grad()
    def encode(
        self, video: Tensor, strips: "Strips | None" = None, latent_frames_per_chunk: int = 1
    ) -> Tensor:
        """Encode a video [3, F, H, W] in [-1, 1] to the normalised posterior mean [z, T, H / 8, W / 8], fp32.

        The first frame is a chunk by itself. With `strips` the ranks share the work, and each returns the
        whole. Raises ValueError unless F = 4 (T - 1) + 1 and H and W are multiples of 8, and for chunks < 1.
        """
        stream, latents = Stream() if strips is None else strips.stream(), []
        for frames in self.split_video(video, latent_frames_per_chunk):
            x = frames.permute(1, 2, 3, 0)
            x = x if strips is None else strips.cut(x, self.config.stride[1])
            latents.append(self._encode_chunk(x, stream))
            stream.is_at_start = False
        mean, std = self.mean_and_std(video.device)
        latent = (torch.cat(latents) - mean) / std
        return (latent if strips is None else strips.spread(latent)).permute(3, 0, 1, 2)

    def _encode_chunk(self, x: Tensor, stream: Stream) -> Tensor:  # [F, H, W, 3] -> [T, H / 8, W / 8, z]
        period, *steps = self.config.stride
        if not x.numel():  # the strip of an idle rank
            height, width = (side // step for side, step in zip(x.shape[1:3], steps, strict=True))
            frame_num = 1 if stream.is_at_start else len(x) // period
            return x.new_empty((frame_num, height, width, self.config.z_dim), dtype=torch.float32)
        return self.posterior_mean(self.encoder(x.to(self.dtype).contiguous(), stream))

    def posterior_mean(self, x: Tensor) -> Tensor:
        """The unnormalised latent [T, h, w, z], fp32, of what the encoder gives."""
        return pointwise(self.conv1, x)[..., : self.config.z_dim].float()  # the rest is the log variance

    def split_video(self, video: Tensor, latent_frames_per_chunk: int) -> tuple[Tensor, ...]:
        """A video [3, F, H, W] in the chunks that `encode` takes; raises ValueError as it does."""
        self._check_video(video)
        _check_chunk(latent_frames_per_chunk)
        first, rest = video[:, :1], video[:, 1:]
        if not rest.shape[1]:
            return (first,)
        return first, *rest.split(self.config.stride[0] * latent_frames_per_chunk, dim=1)

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 4 or video.shape[0] != 3:
            raise ValueError(f"video must be [3, F, H, W], got {list(video.shape)}")
        period, *steps = self.config.stride
        if video.shape[1] == 0 or (video.shape[1] - 1) % period:
            raise ValueError(
                f"video frames must be {period} n + 1, got {video.shape[1]}; drop or repeat the last ones"
            )
        for axis, pixels, step in zip(("height", "width"), video.shape[2:], steps, strict=True):
            if pixels == 0 or pixels % step:
                raise ValueError(
                    f"video {axis} must be a multiple of {step}, got {pixels}; crop or resize it"
                )

    def decode(
        self, latent: Tensor, latent_frames_per_chunk: int = 1, strips: "Strips | None" = None
    ) -> Iterator[Tensor]:
        """Decode a normalised latent [z, T, h, w] to chunks [3, n, 8 h, 8 w], fp32 in [-1, 1], in order.

        The first latent frame gives one video frame, any other four; a chunk is final when it is yielded. In
        memory it is [n, 8 h, 8 w, 3], the layout of pictures. More latent frames a chunk give the same video
        by fewer and larger kernels in more memory. With `strips` a chunk is this rank's part, which may be
        empty. Raises ValueError for other shapes and for chunks < 1.
        """
        return self._decode_chunks(self.split_latent(latent, latent_frames_per_chunk), strips)

    def split_latent(self, latent: Tensor, latent_frames_per_chunk: int) -> tuple[Tensor, ...]:
        """A latent [z, T, h, w] in the chunks that `decode` takes; raises ValueError as it does."""
        if latent.ndim != 4 or latent.shape[0] != self.config.z_dim or not latent.numel():
            raise ValueError(f"latent must be [{self.config.z_dim}, T, h, w], got {list(latent.shape)}")
        _check_chunk(latent_frames_per_chunk)
        return torch.split(latent, latent_frames_per_chunk, dim=1)

    @torch.no_grad()
    def _decode_chunks(self, chunks: tuple[Tensor, ...], strips: "Strips | None") -> Iterator[Tensor]:
        mean, std = self.mean_and_std(chunks[0].device)
        stream = Stream() if strips is None else strips.stream()
        for frames in chunks:
            z = frames.permute(1, 2, 3, 0)
            z = (z if strips is None else strips.cut(z)).float() * std + mean
            yield self._decode_chunk(z, stream).permute(3, 0, 1, 2)
            stream.is_at_start = False

    def _decode_chunk(self, z: Tensor, stream: Stream) -> Tensor:  # [T, h, w, z] -> [n, 8 h, 8 w, 3]
        if not z.numel():  # the strip of an idle rank
            period, *steps = self.config.stride
            frame_num = period * len(z) - (period - 1) * stream.is_at_start
            height, width = (side * step for side, step in zip(z.shape[1:3], steps, strict=True))
            return z.new_empty(frame_num, height, width, 3)
        x = pointwise(self.conv2, z.to(self.dtype))
        return self.decoder(x, stream).float().clamp_(-1, 1)

    def mean_and_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Statistics [z] that a latent is normalised by, fp32."""
        # Made here and not at construction, which may happen on the meta device.
        mean = torch.tensor(self.config.latents_mean, dtype=torch.float32, device=device)
        return mean, torch.tensor(self.config.latents_std, dtype=torch.float32, device=device)


def _check_chunk(latent_frames_per_chunk: int) -> None:
    if latent_frames_per_chunk < 1:
        raise ValueError(f"latent_frames_per_chunk must be >= 1, got {latent_frames_per_chunk}")
