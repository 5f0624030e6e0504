"""Attention: what a name means, what auto takes, that exact backends are exact and graphs stay whole."""

import logging
import sys
import types

import pytest
import torch
from oracles import relative_error
from torch.nn.functional import scaled_dot_product_attention

from chitu_core import attention
from chitu_core.attention import Place, _select
from chitu_core.attention.flash_attn import Backend as FlashAttention

CPU = Place("cpu", None, torch.float32, 64)
HOPPER = Place("cuda", (9, 0), torch.bfloat16, 128)


def inputs(length=37, other=37, heads=3, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sizes = [(2, length, heads, dim), (2, other, heads, dim), (2, other, heads, dim)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def by_formula(q, k, v):
    """Output and LSE in fp64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


EXACT_HERE = [name for name in attention.names() if attention.unavailable(name, CPU) is None]


def test_the_reference_backends_run_on_a_cpu():
    assert {"sdpa", "sdpa_math"} <= set(EXACT_HERE)


@pytest.mark.parametrize("name", EXACT_HERE)
@pytest.mark.parametrize(("length", "other"), [(37, 37), (8, 130), (1, 1)])
def test_every_backend_that_runs_here_is_exact(name, length, other):
    q, k, v = inputs(length, other)
    backend = attention.create(name, CPU)
    out, lse = by_formula(q, k, v)
    assert relative_error(backend(q, k, v), out) < 1e-6  # fp32
    merged, theirs = backend.with_lse(q, k, v)
    assert relative_error(merged, out) < 1e-6
    torch.testing.assert_close(theirs.double(), lse, atol=1e-5, rtol=1e-5)
    assert (theirs.shape, theirs.dtype) == ((2, 3, length), torch.float32)


@pytest.mark.parametrize("name", EXACT_HERE)
def test_a_compiled_call_stays_one_graph(name):
    backend = attention.create(name, CPU)
    q, k, v = inputs()

    def model(q, k, v):
        return backend(q + 1, k, v) * 2

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), model(q, k, v))


def test_the_list_of_those_that_give_an_lse_is_what_the_classes_say():
    for name in attention.names():
        file, _ = _select._VARIANTS.get(name, (name, ""))
        backend = _select.plugins.load("chitu_core.attention", file, "Backend", "attention")
        assert issubclass(backend, attention.LseAttention) == (name in attention.GIVES_LSE), name
        assert backend.is_exact == (name not in attention.LOSSY), name


SPELLINGS = {
    "flash": "flash_attn",
    "flash_4": "fa4",
    "fa3": "fa3",
    "flash_2": "fa2",
    "cudnn": "sdpa_cudnn",
    "torch_sdpa": "sdpa",
    "torch": "sdpa",
    "ref": "sdpa_math",
    "sparse": "sparge",
    "sage": "sage",
}


@pytest.mark.parametrize(("alias", "name"), SPELLINGS.items())
def test_documented_spellings_mean_one_backend(alias, name):
    assert attention.canonical(alias, "infer.attn_type") == name


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"infer.attn_type='fash' is unknown; choose one of auto, sdpa, .*fa4.*sparge"
    ):
        attention.choose("fash", CPU, key="infer.attn_type")


def test_a_named_backend_that_cannot_run_says_what_is_missing_and_what_is_there():
    with pytest.raises(
        RuntimeError, match=r"infer.attn_type='fa4' cannot run: FlashAttention 4 needs an NVIDIA GPU.*"
    ):
        attention.choose("fa4", CPU, key="infer.attn_type")
    with pytest.raises(RuntimeError, match=r"available here: sdpa"):
        attention.choose("sparge", CPU, key="infer.attn_type")


def test_cross_attention_never_takes_a_lossy_backend():
    with pytest.raises(ValueError, match=r"infer.cross_attn_type='sage' approximates"):
        attention.choose("sage", HOPPER, key="infer.cross_attn_type", cross=True)


def present(monkeypatch, *found: str) -> None:
    """Pretend that exactly these backends can run."""
    monkeypatch.setattr(_select, "unavailable", lambda name, place: None if name in found else "not there")


@pytest.mark.parametrize(
    ("capability", "found", "taken"),
    [
        ((9, 0), ("fa4", "fa3", "sdpa_cudnn", "sage", "sdpa"), "fa4"),
        ((9, 0), ("fa2", "sdpa_cudnn", "sage", "sparge", "sdpa"), "sdpa_cudnn"),
        ((9, 0), ("sage", "sparge", "sdpa"), "sdpa"),
        ((8, 0), ("fa2", "sdpa_flash", "sdpa"), "fa2"),
        ((8, 0), ("sage", "sdpa_flash", "sdpa"), "sdpa_flash"),
        ((8, 9), ("fa2", "sage", "sdpa_flash", "sdpa"), "fa2"),
        ((10, 0), ("fa4", "sdpa_cudnn", "sdpa"), "fa4"),
        ((12, 0), ("sage", "sdpa_cudnn", "sdpa"), "sdpa_cudnn"),
        ((7, 5), ("fa2", "sage", "sdpa"), "sdpa"),
        (None, ("sdpa",), "sdpa"),
    ],
)
def test_auto_takes_the_fastest_exact_backend_of_the_capability(
    monkeypatch, caplog, capability, found, taken
):
    present(monkeypatch, *found)
    place = Place("cpu" if capability is None else "cuda", capability, torch.bfloat16, 128)
    monkeypatch.setattr(logging.getLogger("chitu_core"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="chitu_core"):
        assert attention.choose("auto", place, key="infer.attn_type") == taken
    assert f"infer.attn_type=auto takes {taken}" in caplog.text


def test_no_ranking_holds_a_lossy_backend_and_only_hopper_is_measured():
    for capability, ranks in attention.RANKING.items():
        assert not {rank.name for rank in ranks} & attention.LOSSY
        assert any(rank.is_measured for rank in ranks) == (capability == (9, 0))


class StandIn:
    """A FlashAttention function that notes its arguments and computes by the formula."""

    def __init__(self, flag: str) -> None:
        self.flag = flag
        self.calls: list[dict] = []

    def __call__(self, q, k, v, **options):
        assert q.ndim == 4
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        self.calls.append(options)
        out, lse = by_formula(q, k, v)
        extra = (None,) if self.flag == "return_attn_probs" else ()
        return (out.to(q.dtype), lse.float(), *extra)


@pytest.fixture
def stand_ins(monkeypatch):
    made = {}
    names = {"flash_attn": "return_attn_probs", "flash_attn_interface": "return_attn_probs"}
    for module, flag in {**names, "flash_attn.cute": "return_lse"}.items():
        fake = types.ModuleType(module)
        fake.flash_attn_func = made[module] = StandIn(flag)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    return made


@pytest.mark.parametrize(
    ("version", "module", "flag"),
    [
        ("2", "flash_attn", "return_attn_probs"),
        ("3", "flash_attn_interface", "return_attn_probs"),
        ("4", "flash_attn.cute", "return_lse"),
    ],
)
def test_flash_attention_is_called_as_its_version_wants(stand_ins, version, module, flag):
    backend = FlashAttention(version, HOPPER)
    q, k, v = inputs(dtype=torch.bfloat16)
    k = k.transpose(-1, -2).contiguous().transpose(-1, -2)  # last axis not contiguous
    out, lse = by_formula(q, k, v)
    assert relative_error(backend(q, k, v), out) < 1e-2  # the stand-in rounds its output to bf16
    torch.testing.assert_close(backend.with_lse(q, k, v)[1].double(), lse, atol=1e-5, rtol=1e-5)
    assert stand_ins[module].calls == [{flag: True}] * 2
    assert backend.name == f"fa{version}"


def test_flash_attention_takes_the_newest_version_for_the_gpu(stand_ins, monkeypatch):
    assert FlashAttention("", HOPPER).name == "fa4"
    assert FlashAttention("", Place("cuda", (8, 0), torch.float16, 128)).name == "fa2"
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert FlashAttention("", HOPPER).name == "fa3"


@pytest.mark.parametrize(
    ("version", "place", "reason"),
    [
        (
            "4",
            Place("cuda", (8, 0), torch.bfloat16, 128),
            "made for compute capability 9.0 to 11.9, this is sm_80",
        ),
        ("3", Place("cuda", (10, 0), torch.bfloat16, 128), "made for compute capability 9.0 to 9.0"),
        ("4", Place("cuda", (9, 0), torch.float32, 128), "takes float16 or bfloat16, this is sm_90, float32"),
        ("4", Place("cuda", (9, 0), torch.bfloat16, 256), "takes head dims up to 128"),
        ("2", CPU, "needs an NVIDIA GPU, this is cpu"),
    ],
)
def test_flash_attention_says_why_it_does_not_fit(stand_ins, version, place, reason):
    assert reason in FlashAttention.unavailable(version, place)


def test_a_missing_flash_attention_names_its_package_and_extra(monkeypatch):
    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, None)
    reason = FlashAttention.unavailable("4", HOPPER)
    assert "flash-attn-4 (pip install 'chitu-diffusion[flash]') is not installed" in reason
    every = FlashAttention.unavailable("", HOPPER)
    assert all(f"version {version}: " in every for version in "432")


def test_flash_attention_compiles_to_one_graph(stand_ins):
    backend = FlashAttention("4", HOPPER)
    q, k, v = inputs(dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: backend(q, k, v) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), backend(q, k, v) + 1)


def test_sdpa_is_what_torch_computes():
    q, k, v = inputs()
    expected = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    assert torch.equal(attention.create("sdpa", CPU)(q, k, v), expected)
