"""The shortest time in which a GPU could do a forward of the transformer.

A floor is the time of its operations at rates that were measured with one kernel alone: no whole network can
be faster with the same arithmetic in 16 bits. It is no estimate of what can be reached.
"""

from dataclasses import dataclass

from chitu_diffusion.models.wan import WanConfig

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
