"""Operations of the text encoder and the VAE by formula, from their sizes alone.

Counted are multiplications and additions of matrix products, convolutions and attention, two a pair. Those of
a transformer are `WanConfig.block_flops`.
"""

from chitu_diffusion.encoders.umt5 import UMT5Config
from chitu_diffusion.vaes.wan import WanVAEConfig


def umt5_flops(size: UMT5Config, tokens: int) -> int:
    """Operations of encoding one text."""
    linear = 2 * tokens * (4 * size.dim * size.attention_dim + 3 * size.dim * size.ffn_dim)
    return size.num_layers * (linear + 4 * tokens**2 * size.attention_dim)


def decoder_flops(size: WanVAEConfig, latent_frames: int, rows: int, columns: int) -> int:
    """Operations of decoding latent frames of rows x columns that follow others, at four frames each.

    The first of a clip gives one frame and takes less: `decode_flops`.
    """
    return sum(_decoder_frames(size, latent_frames, rows, columns, is_first=False))


def decode_flops(size: WanVAEConfig, latent_frames: int, rows: int, columns: int) -> int:
    """Operations of decoding a clip of latent frames of rows x columns."""
    first = sum(_decoder_frames(size, 1, rows, columns, is_first=True))
    return first + decoder_flops(size, latent_frames - 1, rows, columns)


def _decoder_frames(size: WanVAEConfig, frames: int, rows: int, columns: int, *, is_first: bool) -> list[int]:
    """One number a layer, in the order of the decoder; a causal convolution has no border in time."""
    width = size.base_dim * size.dim_mult[-1]
    places = frames * rows * columns
    layers = [_conv(size.z_dim, size.z_dim, 1) * places, _conv(size.z_dim, width, 27) * places]
    layers += _middle(width, frames, rows * columns)
    for level, mult in reversed(list(enumerate(size.dim_mult))):
        for _ in range(size.num_res_blocks + 1):
            layers.append(_residual(width, size.base_dim * mult) * places)
            width = size.base_dim * mult
        if level > 0:
            if size.temporal_downsample[level - 1] and not is_first:
                layers.append(_conv(width, 2 * width, 3) * places)
                places *= 2
            places *= 4
            layers.append(_conv(width, width // 2, 9) * places)
            width //= 2
    return [*layers, _conv(width, 3, 27) * places]


def encode_flops(size: WanVAEConfig, latent_frames: int, rows: int, columns: int) -> int:
    """Operations of encoding a clip that becomes latent frames of rows x columns."""
    later = sum(_encoder_frames(size, latent_frames - 1, rows, columns, is_first=False))
    return later + sum(_encoder_frames(size, 1, rows, columns, is_first=True))


def _encoder_frames(
    size: WanVAEConfig, latent_frames: int, rows: int, columns: int, *, is_first: bool
) -> list[int]:
    """One number a layer, in the order of the encoder."""
    period, *scales = size.stride
    places = latent_frames * rows * columns * scales[0] * scales[1] * (1 if is_first else period)
    width = size.base_dim
    layers = [_conv(3, width, 27) * places]
    for level, mult in enumerate(size.dim_mult):
        for _ in range(size.num_res_blocks):
            layers.append(_residual(width, size.base_dim * mult) * places)
            width = size.base_dim * mult
        if level < len(size.temporal_downsample):
            places //= 4
            layers.append(_conv(width, width, 9) * places)
            if size.temporal_downsample[level] and not is_first:
                places //= 2
                layers.append(_conv(width, width, 3) * places)
    layers += _middle(width, latent_frames, rows * columns)
    moments = 2 * size.z_dim
    return [*layers, _conv(width, moments, 27) * places, _conv(moments, moments, 1) * places]


def _conv(channels_in: int, channels_out: int, kernel: int) -> int:
    """Operations for one output position; `kernel` counts the weights of a pair of channels."""
    return 2 * channels_in * channels_out * kernel


def _residual(width_in: int, width_out: int) -> int:
    shortcut = _conv(width_in, width_out, 1) if width_in != width_out else 0
    return _conv(width_in, width_out, 27) + _conv(width_out, width_out, 27) + shortcut


def _middle(width: int, frames: int, positions: int) -> list[int]:
    """Two residual blocks, and attention over the positions of each frame."""
    around = _conv(width, 4 * width, 1) * frames * positions  # to q, k, v and back
    attention = 4 * frames * positions**2 * width
    return [2 * _residual(width, width) * frames * positions, around, attention]
