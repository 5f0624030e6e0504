"""Fused operations on a GPU: agreement with their definitions at the widths of the models, fp8 layers."""

import pytest
import torch
from oracles import relative_error
from torch.nn import functional as F

from chitu_core.ops import rows
from chitu_core.ops.fp8 import Fp8Linear
from chitu_core.ops.rows import FP8

pytestmark = pytest.mark.gpu

EPS = 1e-6
ROWS = 1001  # not a multiple of anything
WIDTHS = [(1536, 12), (5120, 40), (256, 4), (96, 3)]


@pytest.fixture
def draw():
    generator = torch.Generator("cuda").manual_seed(0)

    def make(*shape, dtype=torch.float32):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    return make


@pytest.mark.parametrize(("width", "_heads"), WIDTHS)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 5e-4)]
)
def test_norms_and_residuals_are_their_formulas(draw, width, _heads, dtype, limit):
    x, y = draw(1, ROWS, width) * 3 + 1, draw(1, ROWS, width, dtype=dtype)
    weight, bias, gate = (draw(width) for _ in range(3))

    def norm(stream):
        return F.layer_norm(stream, (width,), weight.double(), bias.double(), EPS)

    assert relative_error(rows.layer_norm(x, weight, bias, EPS, dtype), norm(x.double())) < limit
    for row in (None, gate):
        total, normed = rows.gate_residual_norm(x, y, row, weight, bias, EPS, dtype)
        expected = x.double() + y.double() * (1 if row is None else row.double())
        assert relative_error(total, expected) < 1e-6
        assert torch.equal(rows.gate_residual(x, y, row), total)
        assert relative_error(normed, norm(expected)) < limit


@pytest.mark.parametrize(("width", "heads"), WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q_and_k_are_those_of_the_definition(draw, width, heads, dtype, monkeypatch):
    qkv, q_weight, k_weight = draw(2, ROWS, 3 * width, dtype=dtype), draw(width), draw(width)
    rope = (draw(ROWS, 1, width // heads // 2), draw(ROWS, 1, width // heads // 2))
    fused = [*rows.qk_norm_rope(qkv, q_weight, k_weight, rope, EPS), rows.rms_norm(qkv, draw(3 * width), EPS)]
    assert all(x.is_contiguous() for x in fused)
    monkeypatch.setattr(rows, "HAS_TRITON", False)
    defined = rows.qk_norm_rope(qkv, q_weight, k_weight, rope, EPS)
    for actual, expected in zip(fused, defined, strict=False):
        assert relative_error(actual, expected) < (
            1e-6 if dtype == torch.float32 else 2e-4
        )  # few bits differ


@pytest.mark.parametrize("width", [1536, 5120, 8960, 13_824, 96])
@pytest.mark.parametrize("gelu", [False, True])
def test_fp8_rows_are_those_of_the_definition(draw, width, gelu):
    x = draw(ROWS, width, dtype=torch.bfloat16)
    x[5] = 0
    fused = rows.quantise(x, gelu)
    defined = rows.quantise_rows(F.gelu(x.float(), approximate="tanh") if gelu else x)
    assert relative_error(fused.scales, defined.scales) < 1e-6
    assert (
        fused.values.float() != defined.values.float()
    ).float().mean() < 1e-4  # a tie that falls the other way
    weight, bias = draw(width), draw(width)
    normed = rows.layer_norm(x.float(), weight, bias, EPS, FP8)
    expected = rows.quantise_rows(F.layer_norm(x.float(), (width,), weight, bias, EPS))
    assert (normed.values.float() != expected.values.float()).float().mean() < 1e-4
    _, summed = rows.gate_residual_norm(x.float() * 0, x, None, weight, bias, EPS, FP8)
    assert torch.equal(summed.values.float(), normed.values.float())


def test_gelu_in_the_product_is_gelu_after_it(draw):
    x, weight, bias = draw(1, ROWS, 512), draw(1024, 512) * 512**-0.5, draw(1024)
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    half = (t.bfloat16() for t in (x, weight, bias))
    assert relative_error(rows.linear_gelu(*half), expected) < 5e-3  # bf16 operands
    assert relative_error(rows.linear_gelu(x, weight, bias), expected) < 1e-5


@pytest.mark.parametrize("is_fast", [True, False])
def test_an_fp8_product_is_that_of_its_values_on_any_stream(draw, is_fast):
    layer = Fp8Linear(13_824, 512, is_fast)
    layer.receive("weight", draw(512, 13_824, dtype=torch.bfloat16))
    layer.receive("bias", draw(512, dtype=torch.bfloat16))
    x = rows.quantise(draw(1, ROWS, 13_824, dtype=torch.bfloat16))
    product = x.values.double() * x.scales @ (layer.weight.double() * layer.weight_scales.view(-1, 1)).t()
    here = layer(x)
    assert relative_error(here, product + layer.bias.double()) < 4e-3  # the result is bf16
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = layer(x)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(here, there)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = layer(x)
    recorded.zero_()
    graph.replay()
    assert torch.equal(here, recorded)
