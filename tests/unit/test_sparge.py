"""SpargeAttn: its wrapper, called with a stand-in for the package that computes by the formula."""

import sys
from types import ModuleType

import pytest
import torch
from oracles import relative_error
from torch.nn.functional import scaled_dot_product_attention

from chitu_core.attention import sparge
from chitu_core.attention._base import LseAttention, Place

ADA = Place("cuda", (8, 9), torch.bfloat16, 128)


class Sparge(ModuleType):
    """Checks what it is called with, remembers top-k, and answers in float16 as the package may."""

    def __init__(self):
        super().__init__("spas_sage_attn")
        self.topk = []

    def spas_sage2_attn_meansim_topk_cuda(self, q, k, v, *, topk, is_causal, tensor_layout):
        assert (is_causal, tensor_layout) == (False, "NHD")
        assert all(t.is_contiguous() for t in (q, k, v))
        self.topk.append(topk)
        q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).half()


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setitem(sys.modules, "spas_sage_attn", Sparge())
    return sys.modules["spas_sage_attn"]


def inputs(length=130, other=200):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, 2, 64, generator=generator).bfloat16() for n in (length, other, other)]


def test_the_package_gets_its_layout_and_the_share_to_keep(package):
    q, k, v = inputs()
    backend = sparge.Backend("", ADA, sparsity_ratio=0.25)
    out = backend(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)))
    heads_first = (t.float().transpose(1, 2) for t in (q, k, v))
    assert relative_error(out, scaled_dot_product_attention(*heads_first).transpose(1, 2)) < 4e-3  # bfloat16
    assert (out.dtype, out.is_contiguous(), package.topk) == (torch.bfloat16, True, [0.75])


def test_it_approximates_and_has_no_lse(package):
    assert not sparge.Backend.is_exact
    assert not issubclass(sparge.Backend, LseAttention)


@pytest.mark.parametrize(("length", "other"), [(127, 200), (200, 127)])
def test_a_short_sequence_is_refused(package, length, other):
    backend = sparge.Backend("", ADA, sparsity_ratio=0.5)
    with pytest.raises(ValueError, match="sparge needs at least 128 tokens, got 127; use a larger size"):
        backend(*inputs(length, other))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(
        ValueError, match=r"infer\.attn_config\.sparsity_ratio must be at least 0 and below 1, got"
    ):
        sparge.Backend("", ADA, sparsity_ratio=ratio)


def test_a_compiled_call_stays_one_graph(package):
    backend = sparge.Backend("", ADA, sparsity_ratio=0.5)
    q, k, v = inputs()

    def model(q, k, v):
        return backend(q + 1, k, v) * 2

    torch._dynamo.reset()
    compiled = torch.compile(
        model, fullgraph=True, backend="aot_eager"
    )  # runs the fake; needs no C++ compiler
    torch.testing.assert_close(compiled(q, k, v), model(q, k, v), atol=1e-2, rtol=1e-2)  # bfloat16


def test_the_operator_keeps_its_promises(package):
    torch.library.opcheck(sparge._attend, (*inputs(), 0.5), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (Place("cpu", None, torch.bfloat16, 128), "needs an NVIDIA GPU, this is cpu; use sdpa"),
        (Place("cuda", (7, 5), torch.float16, 128), "compute capability 8.0 or higher, this is sm_75"),
        (Place("cuda", (8, 9), torch.float32, 128), "takes float16 or bfloat16, this is sm_89, float32"),
        (
            Place("cuda", (8, 9), torch.float16, 96),
            "takes head dim 64 or 128, this is sm_89, float16, head dim 96",
        ),
    ],
)
def test_an_unfit_place_is_refused_with_its_reason(package, place, reason):
    assert reason in sparge.Backend.unavailable("", place)
    assert sparge.Backend.unavailable("", ADA) is None


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "spas_sage_attn", None)
    reason = sparge.Backend.unavailable("", ADA)
    assert reason.startswith("the package spas_sage_attn is not installed (")
    assert "pip install 'chitu-diffusion[sparge]'" in reason


def test_a_package_without_the_top_k_interface_is_not_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "spas_sage_attn", ModuleType("spas_sage_attn"))
    assert "spas_sage2_attn_meansim_topk_cuda" in sparge.Backend.unavailable("", ADA)
