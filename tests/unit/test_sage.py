"""SageAttention: its wrappers with stand-ins for the packages, and our kernel under Triton's interpreter.

The interpreter must be chosen before triton is imported, so one child process measures every case.
"""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from oracles import relative_error

from chitu_core.attention import sage
from chitu_core.attention._base import Place

HOPPER = Place("cuda", (9, 0), torch.bfloat16, 128)
ADA = Place("cuda", (8, 9), torch.bfloat16, 128)
LENGTHS = [(1, 1), (63, 63), (64, 64), (65, 65), (300, 300), (65, 300), (300, 1)]
LOG2_E = 1.4426950408889634


def by_formula(q, k, v):
    """Attention and LSE in fp64: [B, S, H, D] and [B, H, S]."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def blockwise_int8(x, rows, factor):
    """The package's quantisation, in torch: one scale for each block of rows of a head."""
    out, scales = torch.empty(x.shape, dtype=torch.int8), []
    for start in range(0, x.shape[1], rows):
        block = x[:, start : start + rows].float() * factor
        scale = block.abs().amax((1, 3), keepdim=True) / 127
        out[:, start : start + rows] = (block / scale.clamp(min=1e-30)).round()
        scales.append(scale[:, 0])  # [B, H, 1]
    return out, torch.stack(scales, 2)


def per_block_int8(q, k, sm_scale=None, tensor_layout="HND"):
    assert tensor_layout == "NHD"
    assert q.is_contiguous()
    assert k.is_contiguous()
    factor = (sm_scale or q.shape[-1] ** -0.5) * LOG2_E
    return *blockwise_int8(q, 128, factor), *blockwise_int8(k, 64, 1.0)


def random_inputs(length, other, dtype, dim):
    """Normal values; keys have a large mean, as those of real models do."""
    generator = torch.Generator().manual_seed(length + other)
    q, k, v = (torch.randn(2, n, 2, dim, generator=generator).to(dtype) for n in (length, other, other))
    return q, k + 3 * torch.randn(1, 1, 2, dim, generator=generator).to(dtype), v


def exact_inputs(length, other, dtype, dim):
    """Integers over a power of two, the largest 127 in every block, keys of mean 0: exact in int8."""
    generator = torch.Generator().manual_seed(length + other)
    q, k = (torch.randint(-7, 8, (2, n, 2, dim), generator=generator) for n in (length, other // 2))
    q[..., 0], k[..., 1] = 127, 127
    k = torch.cat([k, -k, 0 * k[:, :1]], 1)[:, :other] if other > 1 else torch.zeros(2, 1, 2, dim)
    v = torch.randn(2, other, 2, dim, generator=generator)
    return (q / 16).to(dtype), (k / 16).to(dtype), v.to(dtype)


def measure(has_package):
    """Errors of version 1 for every case, printed as JSON; run in a process of its own."""
    if not has_package:
        stand_in("sageattention", sys.modules)
        stand_in("sageattention.quant_per_block", sys.modules, per_block_int8=per_block_int8)
    backend, found = sage.Backend("1", ADA), {}
    for inputs in (random_inputs, exact_inputs):
        for length, other in LENGTHS:
            dim = 64 if length == other else 128
            dtype = torch.bfloat16 if inputs is random_inputs else torch.float16
            q, k, v = inputs(length, other, dtype, dim)
            before = k.clone()
            actual, lse = backend.with_lse(q, k, v)
            expected, expected_lse = by_formula(q, k, v)
            found[f"{inputs.__name__} {length} {other}"] = {
                "error": relative_error(actual, expected),
                "lse_error": (lse - expected_lse).abs().max().item(),
                "is_k_kept": torch.equal(k, before),
                "is_like_q": actual.dtype == q.dtype
                and actual.shape == q.shape
                and lse.dtype == torch.float32,
            }
    sys.stdout.write(json.dumps(found))


def stand_in(name, modules, **members):
    modules[name] = ModuleType(name)
    vars(modules[name]).update(members)


@pytest.fixture(scope="module", params=["a stand-in quantises", "sageattention 1.0.6 quantises"])
def measured(request):
    has_package = request.param.startswith("sageattention")
    for package in ("triton", "sageattention")[: 1 + has_package]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    root = Path(__file__).parents[2]
    paths = [root, root / "tests", root / "tests/unit", os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, "-c", f"import test_sage; test_sage.measure({has_package})"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "only 0-dimensional arrays" in child.stderr:
        pytest.skip("the interpreter of this triton cannot loop under this numpy; triton 3.7 can")
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize(("length", "other"), LENGTHS)
def test_the_int8_kernel_is_near_exact_attention_at_any_length(measured, length, other):
    case = measured[f"random_inputs {length} {other}"]
    assert case["error"] < 2e-2  # 8 bits for q and k: a score of deviation 1 is off by about 1e-2
    assert case["lse_error"] < 2e-2  # the largest of such errors, not their mean
    assert case["is_like_q"]


@pytest.mark.parametrize(("length", "other"), LENGTHS)
def test_the_int8_kernel_is_exact_where_int8_is(measured, length, other):
    case = measured[f"exact_inputs {length} {other}"]
    assert case["error"] < 2e-3  # fp16 weights and output: 2^-11 each
    assert case["lse_error"] < 1e-4  # fp32 sums


def test_the_callers_keys_stay_as_they_are(measured):
    assert all(case["is_k_kept"] for case in measured.values())


@pytest.mark.parametrize(("capability", "dim"), [(80, 64), (89, 128), (90, 128), (120, 128)])
def test_the_int8_kernel_compiles_for_every_gpu_generation(capability, dim):
    """The interpreter forgives what the compiler does not; ptxas comes with triton, so no GPU is needed."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from chitu_core.attention import _int8

    pointers = ["*i8", "*fp32", "*i8", "*fp32", "*fp16", "*bf16", "*bf16", "*bf16", "*fp32"]
    types = [*pointers, "i32", "i32", "fp32", *["constexpr"] * 4]
    source = triton.compiler.ASTSource(
        _int8._kernel,
        dict(zip(_int8._kernel.arg_names, types, strict=True)),
        constexprs={"HEADS": 12, "D": dim, "M": 128, "N": 64},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    options = {"num_warps": _int8.warps(dim, divmod(capability, 10)), "num_stages": _int8.STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared < 99 * 1024  # bytes a block may have on capability 8.6, 8.9 and 12.0


class SecondVersion(ModuleType):
    """A package that looks like SageAttention 2 and computes by SDPA, checking what it is called with."""

    def __init__(self):
        super().__init__("sageattention")
        self.sageattn_qk_int8_pv_fp16_cuda = None
        self.asked = []

    def sageattn(self, q, k, v, *, tensor_layout, is_causal, sm_scale, return_lse):
        assert (tensor_layout, is_causal, sm_scale) == ("NHD", False, None)
        assert all(t.is_contiguous() and t.dtype == torch.bfloat16 for t in (q, k, v))
        self.asked.append(return_lse)
        out, lse = by_formula(q, k, v)
        out = out.to(q.dtype)  # strided: the wrapper must not pass that on
        return (out, lse.float()) if return_lse else out


@pytest.fixture
def version_2(monkeypatch):
    package = SecondVersion()
    monkeypatch.setitem(sys.modules, "sageattention", package)
    return package


@pytest.fixture
def version_1(monkeypatch):
    """Stand-ins for the package and for our kernel, which undoes the quantisation and computes in fp64."""

    def attend(q, k, v, *, exact_q, k_mean):
        restored = [
            x.float() * scale.repeat_interleave(rows, 2)[:, :, : x.shape[1]].transpose(1, 2)
            for (x, scale), rows in ((q, 128), (k, 64))
        ]
        restored[0] /= LOG2_E * exact_q.shape[-1] ** -0.5
        out, lse = by_formula(*restored, v)
        shift = torch.einsum("bshd,bnhd->bhs", exact_q.float(), k_mean.float())
        return out.to(exact_q.dtype).contiguous(), (lse + shift * exact_q.shape[-1] ** -0.5).float()

    modules = {}
    stand_in("sageattention", modules)
    stand_in("sageattention.quant_per_block", modules, per_block_int8=per_block_int8)
    stand_in("chitu_core.attention._int8", modules, attend=attend)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_version_1_quantises_smoothed_keys_and_corrects_the_lse(version_1):
    q, k, v = random_inputs(65, 130, torch.bfloat16, 64)
    before = k.clone()
    backend = sage.Backend("1", ADA)
    out, lse = backend.with_lse(q, k.transpose(1, 2).contiguous().transpose(1, 2), v)
    expected, expected_lse = by_formula(q, k, v)
    assert relative_error(out, expected) < 2e-2  # int8
    torch.testing.assert_close(lse.double(), expected_lse, atol=4e-2, rtol=0)  # int8
    assert torch.equal(k, before)
    assert torch.equal(backend(q, k, v), out)


def test_version_2_is_called_with_contiguous_tensors_in_its_layout(version_2):
    q, k, v = random_inputs(65, 130, torch.bfloat16, 64)
    expected, expected_lse = by_formula(q, k, v)
    backend = sage.Backend("", HOPPER)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert backend.name == "sage2"
    assert relative_error(backend(*strided), expected) < 4e-3  # bfloat16 rounding of the output
    out, lse = backend.with_lse(q, k, v)
    assert relative_error(out, expected) < 4e-3
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-5)  # fp32
    assert version_2.asked == [False, True]


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_compiled_call_stays_one_graph(request, version):
    request.getfixturevalue(f"version_{version}")
    backend = sage.Backend(version, ADA)
    q, k, v = random_inputs(65, 130, torch.bfloat16, 64)

    def model(q, k, v):
        out, lse = backend.with_lse(q + 1, k, v)
        return backend(q, k, v) + out, lse * 2

    torch._dynamo.reset()
    compiled = torch.compile(
        model, fullgraph=True, backend="aot_eager"
    )  # runs the fakes; needs no C++ compiler
    for actual, expected in zip(compiled(q, k, v), model(q, k, v), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)  # bfloat16 sums in another order


@pytest.mark.parametrize("version", ["1", "2"])
def test_the_operators_keep_their_promises(request, version):
    request.getfixturevalue(f"version_{version}")
    inputs = random_inputs(65, 130, torch.bfloat16, 64)
    operators = {"1": [sage._attend_1], "2": [sage._attend_2, sage._attend_2_with_lse]}
    for operator in operators[version]:
        torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


def test_the_best_version_present_is_taken(version_2):
    assert sage.Backend("", ADA).name == "sage2"
    del version_2.sageattn_qk_int8_pv_fp16_cuda
    assert "is version 1; build it from" in sage.Backend.unavailable("2", ADA)


def test_version_1_is_taken_where_only_it_is_present(version_1):
    assert sage.Backend("", ADA).name == "sage1"
    assert [sage.Backend.unavailable(version, ADA) for version in ("", "1")] == [None, None]


def test_hopper_is_told_once_that_version_1_is_slower(version_1, caplog):
    with caplog.at_level(logging.WARNING, "chitu_core"):
        sage.Backend("1", HOPPER)
        sage.Backend("1", ADA)
    (record,) = caplog.records
    assert "12.6 ms (15.4 ms by the package's own kernel) against cuDNN's 11.3 ms" in record.message
    assert "infer.attn_type=auto" in record.message


@pytest.mark.parametrize(
    ("variant", "place", "reason"),
    [
        ("", Place("cpu", None, torch.bfloat16, 128), "needs an NVIDIA GPU, this is cpu; use sdpa"),
        ("1", Place("cuda", (7, 5), torch.float16, 128), "compute capability 8.0 or higher, this is sm_75"),
        ("2", Place("cuda", (10, 0), torch.float16, 128), "2 has no kernels for sm_100"),
        ("2", Place("cuda", (8, 9), torch.float32, 128), "takes float16 or bfloat16, this is sm_89, float32"),
        (
            "1",
            Place("cuda", (8, 9), torch.float16, 96),
            "1 takes head dim 64 or 128, .* head dim 96; use sdpa",
        ),
        ("2", Place("cuda", (8, 9), torch.float16, 80), "2 takes head dim 64 or 96 or 128, .* head dim 80"),
    ],
)
def test_an_unfit_place_is_refused_with_its_reason(version_2, variant, place, reason):
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(sage.Backend.unavailable(variant, place))


@pytest.mark.parametrize(
    ("variant", "remedy"),
    [
        ("", "pip install 'chitu-diffusion[sage]'"),
        ("1", "pip install 'chitu-diffusion[sage]'"),
        ("2", "build it from"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, variant, remedy):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    reason = sage.Backend.unavailable(variant, ADA)
    assert reason.startswith("the package sageattention is not installed (")
    assert remedy in reason


def test_version_1_without_triton_says_so(version_1, monkeypatch):
    monkeypatch.setitem(sys.modules, "chitu_core.attention._int8", None)
    reason = sage.Backend.unavailable("1", ADA)
    assert reason.startswith("sage1 needs sageattention 1.0.6 and triton")
    assert reason.endswith("pip install 'chitu-diffusion[sage]'")
