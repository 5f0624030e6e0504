"""Fused row-wise operations: definitions against fp64, kernels in the interpreter, code for every GPU.

The interpreter must be chosen before triton is imported, so one child process measures every case. It cuts
numbers off where a GPU rounds them to bf16 and fp8, so those are compared within one step of the type.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import relative_error
from torch.nn import functional as F

from chitu_core.ops import rows
from chitu_core.ops.fp8 import Fp8Linear
from chitu_core.ops.rows import FP8, Quantised

ROOT = Path(__file__).parents[2]
EPS = 1e-6
WIDTHS = [64, 96, 256, 320]  # powers of two, and others
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dequantised(x: Quantised) -> torch.Tensor:
    return x.values.float() * x.scales.view(*x.values.shape[:-1], 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_is_the_formula(width):
    x, weight, bias = draw(2, 5, width) * 3 + 100, draw(width, seed=1), draw(width, seed=2)
    expected = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), EPS)
    assert relative_error(rows.layer_norm(x, weight, bias, EPS, torch.float32), expected) < 1e-5  # mean 100
    assert rows.layer_norm(x, weight, bias, EPS, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("gate", [None, 3], ids=["no_gate", "gate"])
def test_gate_residual_norm_is_the_sum_and_its_norm(gate):
    x, y, weight, bias = (
        draw(2, 5, 96),
        draw(2, 5, 96, seed=1, dtype=torch.bfloat16),
        draw(96, seed=2),
        draw(96),
    )
    row = None if gate is None else draw(96, seed=gate)
    total, normed = rows.gate_residual_norm(x, y, row, weight, bias, EPS, torch.float32)
    expected = x.double() + y.double() * (1 if row is None else row.double())
    assert relative_error(total, expected) < 1e-7
    assert relative_error(rows.gate_residual(x, y, row), expected) < 1e-7
    assert relative_error(normed, F.layer_norm(expected, (96,), weight.double(), bias.double(), EPS)) < 1e-6


@pytest.mark.parametrize(("heads", "width"), [(4, 64), (3, 96), (1, 320)])
def test_q_and_k_are_normalised_over_all_heads_and_rotated(heads, width):
    qkv, q_weight, k_weight = draw(2, 7, 3 * width), draw(width, seed=1), draw(width, seed=2)
    angles = draw(7, 1, width // heads // 2, seed=3).double()
    rope = (angles.cos().float(), angles.sin().float())
    q, k = rows.qk_norm_rope(qkv, q_weight, k_weight, rope, EPS)
    for actual, part, weight in ((q, 0, q_weight), (k, 1, k_weight)):
        x = qkv.double()[..., part * width : (part + 1) * width]
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        turned = torch.view_as_complex(x.view(2, 7, heads, -1, 2)) * torch.polar(
            torch.ones_like(angles), angles
        )
        assert relative_error(actual, torch.view_as_real(turned).flatten(-2)) < 1e-6


def test_rms_norm_and_gelu_are_their_formulas():
    x, weight = draw(2, 5, 96), draw(96, seed=1)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert relative_error(rows.rms_norm(x, weight, EPS), expected) < 1e-6
    matrix, bias = draw(160, 96, seed=2), draw(160, seed=3)
    y = x.double() @ matrix.double().t() + bias.double()
    gelu = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    assert relative_error(rows.linear_gelu(x, matrix, bias), gelu) < 1e-6
    quantised = rows.quantise(y.float(), gelu=True)
    assert relative_error(dequantised(quantised), gelu) < 0.04  # 3 bits of mantissa: at most 1/16 a value


def test_a_quantised_row_fills_the_range_and_keeps_its_own_scale():
    x = draw(3, 4, 64) * torch.tensor([1e-6, 1.0, 1e4]).view(3, 1, 1)  # rows of very different size
    x[1, 2] = 0
    quantised = rows.quantise(x)
    assert quantised.values.dtype == FP8
    assert quantised.scales.shape == (12, 1)
    largest = quantised.values.float().abs().amax(-1)
    assert torch.equal(largest, torch.where(x.abs().amax(-1) == 0, 0.0, 448.0))
    error = (dequantised(quantised) - x).abs() / x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    assert error.max() <= 1 / 28 + 1e-6  # half a step of e4m3 just below its largest value: 16 / 448


def test_an_fp8_layer_multiplies_what_it_quantised():
    linear = torch.nn.Linear(64, 96)
    layer = Fp8Linear(64, 96)
    layer.receive("weight", linear.weight.data)
    layer.receive("bias", linear.bias.data)
    x = draw(2, 5, 64)
    weight = dequantised(Quantised(layer.weight.data, layer.weight_scales.view(-1, 1)))
    expected = F.linear(dequantised(rows.quantise(x)).double(), weight.double(), linear.bias.double())
    assert relative_error(layer(x), expected) < 1e-6
    assert torch.equal(layer(x), layer(rows.quantise(x)))  # whoever quantises
    assert relative_error(layer(x), linear(x)) < 0.05
    assert (layer.weight.dtype, layer(x).dtype) == (FP8, torch.float32)
    assert set(layer.state_dict()) == {"weight", "bias"}


CHILD = """
import json, torch
from chitu_core.ops import _kernels, rows

def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

def error(actual, expected):
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())

def pairs(actual, expected):
    if isinstance(expected, rows.Quantised):
        return [(actual[0].float(), expected.values.float()), (actual[1], expected.scales)]
    return [(actual[0] if isinstance(actual, tuple) else actual, expected)]

worst = {}
def note(name, actual, expected):
    for number, (a, e) in enumerate(pairs(actual, expected)):
        assert a.shape == e.shape and a.dtype == e.dtype, (name, a.shape, e.shape, a.dtype, e.dtype)
        key = f"{name}.{'values scales'.split()[number]}"
        worst[key] = max(worst.get(key, 0.0), error(a, e))

for width in WIDTHS:
    x, w, b = draw(2, 3, width) * 3 + 1, draw(width, seed=1), draw(width, seed=2)
    y, gate = draw(2, 3, width, seed=3, dtype=torch.bfloat16), draw(width, seed=4)
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", rows.FP8)):
        operands = (x, w, b, 1e-6, dtype)
        note(f"layer_norm {kind}", _kernels.layer_norm(*operands), rows.layer_norm(*operands))
        for g in (None, gate):
            total, *normed = _kernels.gate_residual_norm(x, y, g, w, b, 1e-6, dtype)
            expected_total, expected = rows.gate_residual_norm(x, y, g, w, b, 1e-6, dtype)
            note(f"gate_residual_norm {kind}", tuple(normed), expected)
            note("gate_residual_norm total fp32", total, expected_total)
            note("gate_residual fp32", _kernels.gate_residual(x, y, g), expected_total)
    note("rms_norm fp32", _kernels.rms_norm(x, w, 1e-6), rows.rms_norm(x, w, 1e-6))
    qkv, rope = draw(2, 5, 3 * width), tuple(draw(2, 5, 1, 16, seed=5))
    expected = rows.qk_norm_rope(qkv, w, b, rope, 1e-6)
    for a, e in zip(_kernels.qk_norm_rope(qkv, w, b, *rope, 1e-6), expected):
        note("qk_norm_rope fp32", a.view(e.shape), e)
    for gelu in (False, True):
        note(f"quantise {gelu} fp8", _kernels.quantise(x, gelu), rows.quantise(x, gelu))
print(json.dumps(worst))
"""


@needs_triton
def test_kernels_agree_with_their_definitions_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    script = CHILD.replace("WIDTHS", str(WIDTHS))
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    limits = {"fp32": 1e-6, "bf16": 1e-2, "fp8": 0.1}
    for name, error in json.loads(child.stdout).items():
        kind = "fp32" if name.endswith("scales") else name.partition(".")[0].split()[-1]
        assert error < limits[kind], f"{name}: {error}"


def signature(**pointers):
    return {name: f"*{kind}" for name, kind in pointers.items()} | {"width": "i32"}


def kernels(capability):
    """Every kernel with the arguments of a 1.3B block: name, signature, constants."""
    base = {"BLOCK": 2048}
    norm = {"x": "fp32", "weight": "fp32", "bias": "fp32", "out": "bf16", "scales": "fp32"}
    gated = norm | {"y": "bf16", "gate": "fp32", "total": "fp32"}
    rope = {"x": "bf16", "q_weight": "fp32", "k_weight": "fp32", "cos": "fp32", "sin": "fp32"}
    rope |= {"q_out": "bf16", "k_out": "bf16"}
    counts = {"row_stride": "i32", "length": "i32", "pairs": "i32", "eps": "fp32"}
    eps = {"eps": "fp32"}
    for is_fp8 in (False, True)[: 2 if capability >= 89 else 1]:
        out = {"out": "fp8e4nv"} if is_fp8 else {}
        yield "layer_norm_kernel", signature(**norm | out) | eps, base | {"QUANTISE": is_fp8}
        flags = {"HAS_GATE": True, "HAS_NORM": True, "QUANTISE": is_fp8}
        yield "gate_residual_kernel", signature(**gated | out) | eps, base | flags
    for has_rope in (False, True):
        yield "rms_norm_rope_kernel", signature(**rope) | counts, base | {"HAS_ROPE": has_rope}
    if capability >= 89:
        pointers = signature(x="bf16", out="fp8e4nv", scales="fp32")
        yield "quantise_kernel", pointers, {"BLOCK": 8192, "TAIL": 1024, "GELU": True}


@needs_triton
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_kernels_compile_ahead_of_time(capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from chitu_core.ops import _kernels

    for name, arguments, constants in kernels(capability):
        kernel = vars(_kernels)[name]
        types = {arg: "constexpr" if arg in constants else arguments[arg] for arg in kernel.arg_names}
        places = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
        source = ASTSource(fn=kernel, signature=types, constexprs=places)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert len(made.asm["cubin"]) > 0, name
