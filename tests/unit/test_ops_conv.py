"""Fused operations on clips: definitions against fp64, kernels in Triton's interpreter and compiler.

The interpreter is chosen before Triton is imported, so its tests run in a process that the first test starts.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import relative_error
from torch import Tensor
from torch.nn import functional as F

from chitu_core.ops import conv as ops

FP32 = 1e-6  # relative L2: only the order of sums differs
FP16 = 1e-3  # one rounding to fp16 is 2.8e-4
EPS = 1e-26

triton = pytest.importorskip("triton")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process of its own")
compiled = pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(frames: int, height: int, width: int, dim: int) -> Tensor:
    """An input [T + 2, H + 2, W + 2, C] with zeros around each frame."""
    return F.pad(random(frames + 2, height, width, dim), (0, 0, 1, 1, 1, 1))


def norm_silu_fp64(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return F.silu(x / x.square().mean(-1, keepdim=True).add(EPS).sqrt() * weight.double())


def conv3d_fp64(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv3d(x[None].permute(0, 4, 1, 2, 3).double(), weight.double(), bias.double())
    return y[0].permute(1, 2, 3, 0)


@pytest.mark.skipif(IS_INTERPRETED, reason="it starts this process")
def test_the_kernels_agree_with_the_definitions_where_triton_interprets_them():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "in_the_interpreter",
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "skipped" not in run.stdout, run.stdout


@pytest.mark.parametrize("halo", [0, 1])
def test_norm_and_silu_fill_the_inside_and_zero_the_rest(halo):
    x, weight = random(2, 3, 5, 24), 1 + 0.1 * random(24, seed=1)
    x[0, 1, 2] = 0  # of a pixel of zeros the norm is zero
    out = torch.full((2, 3 + 2 * halo, 5 + 2 * halo, 24), torch.nan)
    ops.rms_norm_silu(x, weight, EPS, out)
    inside = out[:, halo : halo + 3, halo : halo + 5]
    assert relative_error(inside, norm_silu_fp64(x, weight)) <= FP32
    assert torch.equal(inside, F.silu(F.rms_norm(x, (24,), weight, EPS)))
    assert torch.equal(out, F.pad(inside, (0, 0, halo, halo, halo, halo)))


def test_norm_and_silu_write_a_part_of_a_tensor():
    x, weight, whole = random(2, 3, 5, 24), random(24, seed=1), torch.zeros(4, 3, 7, 24)
    ops.rms_norm_silu(x, weight, EPS, whole[2:, :, 1:6])
    assert relative_error(whole[2:, :, 1:6], norm_silu_fp64(x, weight)) <= FP32
    assert not whole[:2].any()
    assert not whole[:, :, ::6].any()


@pytest.mark.parametrize("shape", [(2, 4, 5, 24), (2, 3, 5, 23), (1, 3, 5, 24)])
def test_norm_and_silu_refuse_an_output_of_another_shape(shape):
    with pytest.raises(AssertionError):
        ops.rms_norm_silu(random(2, 3, 5, 24), random(24), EPS, torch.empty(shape))


@pytest.mark.parametrize("with_add", [False, True])
@pytest.mark.parametrize("sides", [(1, 1, 1), (1, 3, 5), (3, 4, 2)])
def test_products_of_shifted_rows_are_the_convolution(sides, with_add):
    x, weight, bias = padded(*sides, 6), random(5, 6, 3, 3, 3, seed=1), random(5, seed=2)
    add = random(*sides, 5, seed=3) if with_add else None
    y = ops.shifted_conv3d(x, ops.flat_taps(weight), bias, add)
    expected = conv3d_fp64(x, weight, bias)
    assert y.is_contiguous()
    assert relative_error(y, expected if add is None else expected + add) <= FP32


@pytest.mark.parametrize("sides", [(1, 1), (3, 5), (4, 2)])
def test_a_folded_convolution_is_the_one_after_doubling(sides):
    x, weight, bias = random(2, *sides, 6), random(4, 6, 3, 3, seed=1), random(4, seed=2)
    y = ops.conv2d_nearest2x(x, ops.fold_nearest2x(weight), bias)
    doubled = x.permute(0, 3, 1, 2).double().repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(doubled, weight.double(), bias.double(), padding=1).permute(0, 2, 3, 1)
    assert y.is_contiguous()
    assert relative_error(y, expected) <= FP32


def test_a_cpu_leaves_convolutions_to_the_library():
    assert not ops.prefers_shifted(torch.empty(1, 1, 1, 96, dtype=torch.bfloat16), 96)


@interpreted
@pytest.mark.parametrize("dim", [48, 96, 192])
@pytest.mark.parametrize("halo", [0, 1])
def test_norm_and_silu_in_the_interpreter(halo, dim):
    from chitu_core.ops import _conv_kernels as kernels

    x, weight = random(2, 5, 7, dim), 1 + 0.1 * random(dim, seed=1)
    whole = torch.full((4, 5 + 2 * halo, 9 + 2 * halo, dim), torch.nan)
    out = whole[2:, :, 1 : 8 + 2 * halo]  # rows that are not adjacent, as in a strip
    expected = torch.empty_like(out)
    ops.rms_norm_silu(x, weight, EPS, expected)
    kernels.rms_norm_silu(x, weight, EPS, out, halo)
    assert relative_error(out, expected) <= FP32
    assert whole[:2].isnan().all()
    assert whole[:, :, [0, -1]].isnan().all()


@interpreted
@pytest.mark.parametrize("with_add", [False, True])
@pytest.mark.parametrize(
    ("dims", "sides"),
    [
        ((64, 96), (2, 5, 37)),
        ((32, 32), (1, 3, 5)),
        ((96, 96), (3, 9, 8)),
        ((96, 3), (2, 5, 37)),
        ((32, 1), (1, 3, 5)),
    ],
)
def test_the_convolution_in_the_interpreter(dims, sides, with_add):  # in fp16: it multiplies no bf16
    from chitu_core.ops import _conv_kernels as kernels

    dim_in, dim_out = dims
    x, weight = padded(*sides, dim_in).half(), random(dim_out, dim_in, 3, 3, 3, seed=1).half() / 32
    bias, add = random(dim_out, seed=2).half(), random(*sides, dim_out, seed=3).half() if with_add else None
    y = kernels.shifted_conv3d(x, ops.flat_taps(weight), bias, add)
    expected = conv3d_fp64(x, weight, bias)
    assert y.shape == (*sides, dim_out)
    assert relative_error(y, expected if add is None else expected + add) <= FP16


@interpreted
def test_interleaving_in_the_interpreter():
    from chitu_core.ops import _conv_kernels as kernels

    y, bias = random(2, 4, 6, 4 * 24), random(24, seed=1)
    assert torch.equal(kernels.interleave2x(y, bias), ops.interleave2x(y, bias))


@interpreted
@pytest.mark.parametrize("with_add", [False, True])
@pytest.mark.parametrize("dim", [24, 96])
def test_bias_and_residual_in_the_interpreter(dim, with_add):
    from chitu_core.ops import _conv_kernels as kernels

    y, bias, add = random(2, 5, 7, dim), random(dim, seed=1), random(2, 5, 7, dim, seed=2)
    expected = y + bias + add if with_add else y + bias
    assert torch.equal(kernels.add_bias(y, bias, add if with_add else None), expected)


def compile_for(kernel, capability: int, types: dict[str, str], values: dict[str, int], **options: int):
    """Compile a kernel without a device; pointers and long strides are multiples of 16, as at run time."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    wide = {
        (names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] in "*s"
    }
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr").lstrip("s") for name in names},
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs=wide,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@compiled
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_norm_and_silu_compile_to_loads_of_16_bytes(capability, dtype):
    from chitu_core.ops import _conv_kernels as kernels

    types = dict.fromkeys(("x", "weight", "out"), f"*{dtype}") | {"eps": "fp32"}
    types |= dict.fromkeys(("pixels", "height", "width"), "i32")
    types |= dict.fromkeys(("frame_stride", "row_stride", "pixel_stride"), "si32")
    values = {"DIM": 96, "HALO": 1, "PIXELS": 32, "BLOCK": 128}
    ptx = compile_for(kernels.rms_norm_silu_kernel, capability, types, values, num_warps=4).asm["ptx"]
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx


@compiled
@pytest.mark.parametrize("has_add", [False, True])
def test_the_convolution_compiles_for_hopper_and_fits_its_shared_memory(has_add):
    from chitu_core.ops import _conv_kernels as kernels

    types = {"x": "tensordesc<bf16[256,32]>", "taps": "tensordesc<bf16[128,32]>"}
    types |= dict.fromkeys(("bias", "add", "out"), "*bf16") | dict.fromkeys(
        ("pixels", "height", "width"), "i32"
    )
    values = {"DIM": 96, "DIM_OUT": 96, "HAS_ADD": has_add, "PIXELS": 256, "BLOCK": 128, "CHANNELS": 32}
    binary = compile_for(kernels.shifted_conv3d_kernel, 90, types, values, num_warps=8, num_stages=4)
    assert "wgmma.mma_async" in binary.asm["ptx"]
    assert "cp.async.bulk.tensor" in binary.asm["ptx"]
    assert binary.metadata.shared <= 227 * 1024


@compiled
def test_the_convolution_to_few_channels_compiles_for_hopper():
    from chitu_core.ops import _conv_kernels as kernels

    types = {
        "x": "tensordesc<bf16[256,32]>",
        "lines": "tensordesc<bf16[32,32]>",
        "parts": "*fp32",
        "pixels": "i32",
    }
    values = {"DIM": 96, "COUNT": 27, "PIXELS": 256, "BLOCK": 32, "CHANNELS": 32}
    binary = compile_for(kernels.line_products_kernel, 90, types, values, num_warps=4, num_stages=4)
    assert "wgmma.mma_async" in binary.asm["ptx"]
    assert 3 * binary.metadata.shared <= 227 * 1024  # three programs share a core
    types = {"parts": "*fp32", "bias": "*bf16", "out": "*bf16"} | dict.fromkeys(
        ("pixels", "height", "width"), "i32"
    )
    compile_for(kernels.sum_lines_kernel, 90, types, {"DIM_OUT": 3, "PIXELS": 512}, num_warps=4)
