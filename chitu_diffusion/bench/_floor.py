"""Operations of each network by formula, and the shortest time in which a GPU could do them.

Counted are multiplications and additions of matrix products, convolutions and attention, two a pair. A floor
is their time at rates that were measured with one kernel alone: no whole network can be faster with the same
arithmetic in 16 bits. It is no estimate of what can be reached.
"""

from dataclasses import dataclass

from chitu_diffusion.encoders.umt5 import UMT5Config
from chitu_diffusion.models.wan import WanConfig
from chitu_diffusion.vaes.wan import WanVAEConfig

# Bytes of element-wise work for each channel of a token in one block, read and written once by fused kernels
# on an fp32 residual stream x and 16-bit operands: modulated norm (read x 4, write 2), q and k norm with
# rotation (4 + 4), gated residual with the norm of cross-attention (4 + 2 + 4 + 2), q norm of cross-attention
# (2 + 2), its residual with the modulated norm (4 + 2 + 4 + 2), last gated residual (4 + 2 + 4). GELU counts
# as a part of its matrix product.
BYTES_PER_CHANNEL = 6 + 8 + 12 + 4 + 12 + 10


@dataclass(frozen=True)
class Ceiling:
    """Rates of one GPU: TFLOP/s of bf16 matrix products and attention, TB/s of copies; where they are from.

    `attention` has one rate for a number of tokens; the nearest one counts.
    """

    matrix_tflops: float
    attention_tflops: tuple[tuple[int, float], ...]
    copy_tbs: float
    source: str


_MEASURED = (
    "random normal bf16 numbers, torch 2.11.0+cu130: the best matrix product of the 1.3B model, and "
    "FlashAttention 4 at 32,760 tokens, 12 heads and at 75,600 tokens, 40 heads"
)
_ATTENTION = ((32_760, 703.0), (75_600, 657.0))
CEILINGS = {  # by the name that the driver gives
    "NVIDIA H200": Ceiling(790.0, _ATTENTION, 4.3, f"H200, {_MEASURED}; copies at 4.3 TB/s"),
    "NVIDIA H100 80GB HBM3": Ceiling(
        790.0, _ATTENTION, 3.0, f"compute rates of the H200, the same chip: {_MEASURED}; copies at 3.0 TB/s"
    ),
}


@dataclass(frozen=True)
class DitWork:
    """What one forward of the transformer has to do: operations, and bytes of element-wise work.

    Left out, below 1 % together: embeddings, head, and the text's keys and values, made once a prompt.
    """

    self_attention_flops: int
    linear_flops: int
    cross_attention_flops: int
    elementwise_bytes: int

    @property
    def flops(self) -> int:
        """All operations."""
        return self.self_attention_flops + self.linear_flops + self.cross_attention_flops


@dataclass(frozen=True)
class DitFloor:
    """The shortest time of each part, in milliseconds, one after the other."""

    self_attention_ms: float
    linear_ms: float
    cross_attention_ms: float
    memory_ms: float

    @property
    def total_ms(self) -> float:
        """The sum."""
        return self.self_attention_ms + self.linear_ms + self.cross_attention_ms + self.memory_ms


def dit_work(size: WanConfig, tokens: int) -> DitWork:
    """Work of one forward, one branch of one step, of `tokens` video tokens."""
    layers, block = size.num_layers, size.block_flops(tokens)
    return DitWork(
        self_attention_flops=layers * block.self_attention,
        linear_flops=layers * block.linear,
        cross_attention_flops=layers * block.cross_attention,
        elementwise_bytes=BYTES_PER_CHANNEL * size.dim * tokens * layers,
    )


def dit_floor(work: DitWork, tokens: int, ceiling: Ceiling) -> DitFloor:
    """The shortest time of that work on a GPU."""
    attention = min(ceiling.attention_tflops, key=lambda rate: abs(rate[0] - tokens))[1]
    return DitFloor(
        self_attention_ms=work.self_attention_flops / attention / 1e9,
        linear_ms=work.linear_flops / ceiling.matrix_tflops / 1e9,
        cross_attention_ms=work.cross_attention_flops / attention / 1e9,
        memory_ms=work.elementwise_bytes / ceiling.copy_tbs / 1e9,
    )


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
