"""`chitu bench` beside `attention`, on the demo model and few tokens. Speed itself is not tested."""

import argparse
import gzip
import importlib
import json
import sys

import pytest
import torch
from hydra.errors import HydraException
from torch.utils.flop_counter import FlopCounterMode

from chitu_diffusion import flops
from chitu_diffusion.bench import _work, compare, profile, vae
from chitu_diffusion.bench._floor import CEILINGS, Ceiling, dit_floor, dit_work
from chitu_diffusion.bench._setup import compose_config
from chitu_diffusion.cli import main
from chitu_diffusion.encoders.umt5 import UMT5Config, UMT5Encoder
from chitu_diffusion.models.wan import WanConfig
from chitu_diffusion.vaes.wan import WanVAE, wan21

TINY = ("--model", "demo", "--size", "32x32", "--frames", "5", "infer.op_impl=cpu")
NAME = "demo_32x32x5"
SIZES = {"text_len": 512, "freq_dim": 256, "text_dim": 4096, "in_dim": 16, "out_dim": 16}
SMALL = WanConfig(1536, 8960, 12, 30, patch_size=(1, 2, 2), eps=1e-6, **SIZES)  # the 1.3B model
LARGE = WanConfig(5120, 13824, 40, 40, patch_size=(1, 2, 2), eps=1e-6, **SIZES)  # the 14B model


@pytest.fixture(autouse=True)
def _one_thread():
    """At these sizes a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bench(out, verb, *words):
    """The JSON file of a run."""
    assert main(["bench", verb, *words, "--out", str(out)]) == 0
    [file] = (path for path in out.glob("*.json") if not path.stem.endswith("_video"))
    return json.loads(file.read_text("utf-8"))


def options_of(verb, *words):
    module = importlib.import_module(f"chitu_diffusion.bench.{verb}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module, parser.parse_intermixed_args(words)


def refused(verb, *words):
    """What a run says that cannot be."""
    module, options = options_of(verb, *words)
    with pytest.raises((ValueError, HydraException)) as caught:
        module.run(options)
    return str(caught.value)


def check_timing(timing, repeats):
    assert timing["first_s"] > 0
    assert 0 < timing["min_ms"] <= timing["median_ms"] <= timing["max_ms"]
    assert len(timing["all_ms"]) == repeats


def test_dit_reports_times_work_and_no_share_without_rates(tmp_path, capsys):
    report = bench(tmp_path, "dit", *TINY, "--repeats", "2")
    assert (tmp_path / f"dit_{NAME}.json").is_file()
    assert (report["model"], report["size"], report["dtype"]) == ("demo", "32x32x5", "float32")
    assert (report["weights"], report["overrides"]) == ("packaged", ["infer.op_impl=cpu"])
    assert (report["attention"], report["tokens"]) == ("sdpa", 2 * 2 * 2)
    check_timing(report["measured"]["timing"], 2)
    flops = sum(value for name, value in report["work"].items() if name.endswith("flops"))
    measured = report["measured"]
    assert measured["tflops"] == pytest.approx(flops / measured["timing"]["median_ms"] / 1e9)
    assert measured["peak_memory"]["host_gib"] > 0
    assert (report["ceiling"], report["floor"], report["share"]) == (None, None, None)
    where = report["environment"]
    assert where["torch"] == torch.__version__
    assert where["date"][:2] == "20"
    assert where["command"].startswith("chitu bench dit --model demo --size 32x32 --frames 5 --repeats 2")
    assert where["command"].endswith("infer.op_impl=cpu")
    assert "no share of the floor" in capsys.readouterr().out


def test_the_error_against_other_overrides_is_that_of_the_velocity(tmp_path):
    report = bench(tmp_path, "dit", *TINY, "--repeats", "1", "--error-against", "infer.dtype=bfloat16")
    assert report["deviation"]["against"] == "infer.dtype=bfloat16"
    assert 1e-4 < report["deviation"]["relative_l2"] < 5e-2  # bf16 keeps 8 bits, of which blocks lose a few


def test_overrides_behind_options_reach_the_configuration(tmp_path):
    report = bench(
        tmp_path, "dit", *TINY, "--repeats", "1", "infer.dtype=bfloat16", "infer.attn_type=sdpa_math"
    )
    assert (report["dtype"], report["attention"]) == ("bfloat16", "sdpa_math")
    assert report["overrides"] == ["infer.op_impl=cpu", "infer.dtype=bfloat16", "infer.attn_type=sdpa_math"]


def test_a_floor_is_the_work_at_measured_rates():
    work, ceiling = dit_work(SMALL, 32_760), CEILINGS["NVIDIA H200"]
    floor = dit_floor(work, 32_760, ceiling)
    assert floor.self_attention_ms == pytest.approx(281, abs=1)  # 197.8 TFLOP at 703
    assert floor.linear_ms == pytest.approx(104, abs=1)  # 82.1 TFLOP at 790
    assert floor.cross_attention_ms == pytest.approx(4.4, abs=0.1)
    assert floor.memory_ms == pytest.approx(52 * 1536 * 32_760 * 30 / 4.3e9, rel=1e-9)
    parts = (floor.self_attention_ms, floor.linear_ms, floor.cross_attention_ms, floor.memory_ms)
    assert floor.total_ms == pytest.approx(sum(parts))
    assert dit_floor(dit_work(LARGE, 75_600), 75_600, ceiling).self_attention_ms == pytest.approx(
        7126, rel=1e-3
    )


def test_the_share_of_a_known_gpu_is_its_floor_by_the_median(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CEILINGS, "CPU, 1 threads", Ceiling(0.1, ((8, 0.05),), 0.01, "invented"))
    report = bench(tmp_path, "dit", *TINY, "--repeats", "1", "infer.dtype=bfloat16")
    assert report["ceiling"]["source"] == "invented"
    assert report["floor"]["linear_ms"] == pytest.approx(report["work"]["linear_flops"] / 1e8)
    total = sum(value for name, value in report["floor"].items())
    assert report["share"] == pytest.approx(total / report["measured"]["timing"]["median_ms"])
    assert "of the floor's speed" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "tokens", "tflop"), [(SMALL, 32_760, 283), (LARGE, 75_600, 6523)])
def test_operations_of_the_transformer_are_the_published_ones(size, tokens, tflop):
    assert dit_work(size, tokens).flops / 1e12 == pytest.approx(tflop, rel=0.01)


def test_operations_of_the_decoder_are_the_published_ones():
    assert flops.decoder_flops(wan21(96), 21, 60, 104) / 1e12 == pytest.approx(284, rel=0.01)
    assert flops.decoder_flops(wan21(96), 21, 90, 160) / 1e12 == pytest.approx(660, rel=0.01)


def test_operations_of_vae_and_t5_are_those_that_torch_counts():
    network = WanVAE(wan21(8)).bfloat16()  # in bf16 it calls the operator that torch's counter knows
    latent, video = torch.randn(16, 3, 4, 6), torch.rand(3, 9, 32, 48)
    attention = 4 * 3 * (4 * 6) ** 2 * 32  # which the counter leaves out on a CPU
    with FlopCounterMode(display=False) as counter:
        list(network.decode(latent))
    # a doubled image is convolved without being made, by fewer products: ops/conv.py, `fold_nearest2x`
    folded = [(32, 5, 4, 6), (32, 9, 8, 12), (16, 9, 16, 24)]  # channels in, frames, rows, columns
    as_stated = sum(2 * 9 * dim * dim // 2 * frames * 4 * h * w for dim, frames, h, w in folded)
    as_done = sum(2 * 4 * dim * 2 * dim * frames * (h + 1) * (w + 1) for dim, frames, h, w in folded)
    weights = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]  # folding them, once a pass
    counted = counter.get_total_flops() - weights + attention - as_done + as_stated
    assert flops.decode_flops(network.config, 3, 4, 6) == counted
    with FlopCounterMode(display=False) as counter:
        network.encode(video)
    assert flops.encode_flops(network.config, 3, 4, 6) == counter.get_total_flops() + attention
    size = UMT5Config(50, 32, 48, 4, 64, 2)
    with FlopCounterMode(display=False) as counter:
        UMT5Encoder(size)(torch.randint(0, 50, (1, 20)))
    assert flops.umt5_flops(size, 20) == counter.get_total_flops()


def test_vae_reports_both_directions(tmp_path):
    report = bench(tmp_path, "vae", *TINY, "--repeats", "1", "--encode")
    assert (tmp_path / f"vae_{NAME}.json").is_file()
    assert (report["vae_dtype"], report["vae_chunk"]) == ("float32", 1)
    assert report["latent_shape"] == [16, 2, 4, 4]
    assert report["float32_error"] is None  # there is nothing to compare with
    for name in ("decode", "encode"):
        check_timing(report[name]["timing"], 1)
        assert report[f"{name}_flops"] > 0


def test_a_vae_in_16_bits_is_held_against_fp32():
    network = WanVAE(wan21(8)).bfloat16()
    latents = torch.randn(16, 5, 4, 4)
    error = vae.float32_error(network, latents)
    assert error is not None
    assert 1e-4 < error < 0.1  # 8 bits, through some thirty layers
    assert network.conv2.weight.dtype == torch.bfloat16
    assert vae.float32_error(network.float(), latents) is None


def test_t5_encodes_a_text_that_is_full(tmp_path):
    report = bench(tmp_path, "t5", "--model", "demo", "--repeats", "2", "infer.op_impl=cpu")
    assert (tmp_path / "t5_demo_L512.json").is_file()
    assert report["tokens"] == 512
    check_timing(report["measured"]["timing"], 2)
    assert report["flops"] > 0


def test_e2e_reports_each_request_by_stage(tmp_path):
    report = bench(tmp_path, "e2e", *TINY, "--repeats", "2", "--steps", "3", "--guidance", "1")
    assert (report["steps"], report["guidance"], len(report["requests"])) == (3, [1.0], 2)
    for request in report["requests"]:
        assert set(request["stages_s"]) == {"TextEncode", "Denoise", "VAEDecode", "total"}
        assert 0 < request["stages_s"]["total"] <= request["total_s"]
        assert request["peak_memory"]["host_gib"] > 0
    assert (tmp_path / f"e2e_{NAME}_video.mp4").stat().st_size > 0
    assert report["build_s"] > 0
    assert json.loads((tmp_path / f"e2e_{NAME}_video.json").read_text("utf-8"))["step"] == 3


def test_compare_takes_all_sides_in_turn(tmp_path, capsys):
    pytest.importorskip("diffusers")
    words = ("--what", "dit,vae,e2e", "--steps", "2", "--rounds", "2", "--forwards", "2")
    variants = ("--variants", "fp32: ; bf16: infer.dtype=bfloat16")
    report = bench(
        tmp_path, "compare", *TINY, *words, *variants, "--error-against", "infer.attn_type=sdpa_math"
    )
    assert report["peer"].startswith("diffusers 0.")
    assert report["peer_dtype"] == "float32"
    assert [part["what"] for part in report["parts"]] == ["dit", "vae", "e2e"]
    for part in report["parts"]:
        peer = "diffusers float32" if part["what"] == "vae" else "diffusers eager"
        assert [side["name"] for side in part["sides"]] == ["fp32", "bf16", peer]
        first = part["sides"][0]
        for side in part["sides"]:
            assert len(side["rounds_ms"]) == len(side["round_medians_ms"]) == 2
            assert all(len(each) == (1 if part["what"] == "e2e" else 2) for each in side["rounds_ms"])
            assert side["ratio"] == pytest.approx(side["median_ms"] / first["median_ms"])
            assert side["first_s"] > 0
    fp32, bf16, _ = report["parts"][0]["sides"]
    assert fp32["error"] == 0
    assert fp32["error_against"] < 1e-5  # fp32, only the order of sums differs
    assert 1e-4 < bf16["error"] < 5e-2
    assert bf16["overrides"] == ["infer.dtype=bfloat16"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("diffusers eager")  # the table is the last thing before the file
    assert lines[-1].endswith(f"compare_{NAME}.json")


def test_compare_runs_without_a_peer(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    report = bench(tmp_path, "compare", *TINY, "--peer", "none", "--rounds", "1", "--forwards", "1")
    assert report["peer"] is None
    assert [side["name"] for side in report["parts"][0]["sides"]] == ["ours"]


def test_a_peer_that_is_not_installed_is_named_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["bench", "compare", *TINY, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "pip install diffusers" in said
    assert "--peer none" in said
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_profile_sorts_operators_into_groups(tmp_path):
    report = bench(tmp_path, "profile", *TINY)
    assert {row["name"] for row in report["groups"]} == {*profile.GROUPS, profile.OTHER}
    assert sum(row["ms"] for row in report["groups"]) == pytest.approx(report["total_ms"])
    assert sum(row["share"] for row in report["groups"]) == pytest.approx(1)
    assert len(report["longest"]) == profile.LONGEST
    calls = {row["name"]: row["calls"] for row in report["groups"]}
    assert calls["attention"] >= 2 * 8  # self-attention and cross-attention of eight blocks
    assert calls["matrix products"] > 8 * 8
    assert (report["what"], report["is_gpu"]) == ("dit", False)
    with gzip.open(tmp_path / f"profile_{NAME}.json.gz") as file:
        assert json.load(file)["traceEvents"]


def test_profile_of_the_vae_finds_its_convolutions(tmp_path):
    report = bench(tmp_path, "profile", *TINY, "--what", "vae")
    assert (tmp_path / f"profile_vae_{NAME}.json.gz").is_file()
    assert report["groups"][0]["name"] == "convolution"


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object", "attention"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNN", "matrix products"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>", "matrix products"),
        (
            "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128",
            "matrix products",
        ),
        ("void cudnn::ops::nchwToNhwcKernel<float, float>", "copies"),
        ("triton_red_fused__to_copy_addcmul_native_layer_norm_3", "element-wise and norms"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
            "element-wise and norms",
        ),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies"),
        ("void at::native::CatArrayBatchedCopy_contig<...>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::addmm", "matrix products"),
        ("aten::addcmul", "element-wise and norms"),
        ("aten::as_strided", "other"),
    ],
)
def test_a_kernel_belongs_to_the_group_of_its_work(kernel, group):
    assert profile.group_of(kernel) == group


@pytest.mark.parametrize(
    ("verb", "words", "said", "remedy"),
    [
        ("dit", ["--model", "Wan3"], "--model=Wan3", "Wan2.1-T2V-14B"),
        ("dit", ["--model", "demo", "--size", "big"], "--size=big", "832x480"),
        ("vae", ["--model", "demo", "--size", "100x96"], "width=100", "nearest: 96 or 112"),
        ("profile", ["--model", "demo", "--frames", "4"], "num_frames=4", "4n + 1"),
        ("t5", ["--repeats", "0"], "--repeats=0", "at least 1"),
        ("e2e", ["--steps", "0"], "--steps=0", "at least 1"),
        ("e2e", ["quant"], "'quant' is not an override", "key=value"),
        ("dit", ["models=demo"], "models=demo", "use --model"),
        ("dit", ["infer.nothing=1"], "infer.nothing", ""),
        ("profile", ["--what", "e2e"], "--what=e2e", "dit, vae, t5"),
        ("compare", ["--what", "t5"], "--what=t5", "dit, vae, e2e"),
        ("compare", ["--peer", "vllm"], "--peer=vllm", "diffusers, none"),
        ("compare", ["--peer-mode", "fast"], "--peer-mode=fast", "eager, compile, blocks"),
        ("compare", ["--rounds", "0"], "--rounds=0", "at least 1"),
        ("compare", ["--variants", "quant=fp8"], "--variants='quant=fp8'", "name: key=value"),
        ("compare", ["--variants", "a: ; a: "], "--variants='a: ; a: '", "each once"),
        ("compare", ["--variants", "a: infer.nothing=1"], "infer.nothing", ""),
    ],
)
def test_a_bad_option_is_refused_with_the_way_out(tmp_path, verb, words, said, remedy):
    message = refused(verb, *words, "--out", str(tmp_path / "out"))
    assert said in message
    assert remedy in message


def test_two_experts_are_not_compared_as_a_whole(tmp_path):
    message = refused("compare", "--model", "Wan2.2-T2V-A14B", "--what", "e2e", "--out", str(tmp_path))
    assert "--what=e2e" in message
    assert "--what dit,vae" in message


@pytest.mark.parametrize("verb", ["dit", "vae", "t5", "e2e", "compare", "profile"])
def test_a_mistyped_option_is_a_usage_error(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", verb, "--model", "demo", "infer.dtype=float32", "--sise", "64x64"])
    assert caught.value.code == 2
    assert "--sise" in capsys.readouterr().err


def test_attention_still_takes_no_overrides(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "attention", "infer.dtype=float32"])
    assert caught.value.code == 2
    assert "infer.dtype=float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "overrides", "is_random"),
    [
        ("Wan2.1-T2V-1.3B", [], True),
        ("Wan2.1-T2V-1.3B", ["models.ckpt_dir=/weights"], False),
        ("demo", [], False),
        ("demo", ["debug.skip_model_load=true"], True),
    ],
)
def test_weights_are_random_unless_there_is_a_checkpoint(model, overrides, is_random):
    assert compose_config(model, overrides).debug.skip_model_load is is_random


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE=2" in refused("dit", *TINY)


def test_two_works_of_one_seed_are_the_same():
    _, options = options_of("dit", *TINY, "debug.skip_model_load=true")
    one, two = (_work.open_work(options, _work.dit_forward).made.sample() for _ in range(2))
    assert torch.equal(one, two)


def test_variants_are_names_with_overrides():
    found = compare.variants_of("bf16: ; fp8: quant=fp8 infer.dtype=bfloat16;")
    assert [(one.name, one.overrides) for one in found] == [
        ("bf16", ()),
        ("fp8", ("quant=fp8", "infer.dtype=bfloat16")),
    ]
