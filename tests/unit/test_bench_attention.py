"""`chitu bench attention` on a few tokens: its table, its files, its refusals. Speed itself is not tested."""

import argparse
import json
from xml.etree import ElementTree

import pytest
import torch

from chitu_core import attention
from chitu_diffusion.bench import attention as bench
from chitu_diffusion.bench._measure import Bench, Shape
from chitu_diffusion.bench._plot import Bar, Panel, draw

SMALL = ("--length", "96", "--heads", "2", "--head-dim", "16", "--repeats", "3")


def options_of(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


def run(out, *words):
    """The exit status and the JSON file of a run."""
    status = bench.run(options_of(*words, "--out", str(out)))
    [file] = out.glob("*.json")
    return status, json.loads(file.read_text("utf-8"))


def shapes(*words):
    options = options_of(*words)
    return bench._shapes(options, bench._config(options))


def test_a_run_measures_each_backend_at_both_shapes(tmp_path, capsys):
    status, report = run(tmp_path, *SMALL, "--backends", "sdpa,sdpa_math", "--dtype", "float32")
    assert status == 0
    assert [table["shape"]["name"] for table in report["tables"]] == ["self-attention", "cross-attention"]
    assert [table["shape"]["num_keys"] for table in report["tables"]] == [96, 512]
    for table in report["tables"]:
        assert [row["name"] for row in table["rows"]] == ["sdpa", "sdpa_math"]
        for row in table["rows"]:
            measured = row["measured"]
            assert 0 < measured["min_ms"] <= measured["median_ms"] <= measured["max_ms"]
            flops = 4 * 2 * 96 * table["shape"]["num_keys"] * 16
            assert measured["tflops"] == pytest.approx(flops / (measured["median_ms"] * 1e-3) / 1e12)
            assert measured["error"] < 1e-5  # fp32 against fp32, only the order of sums differs
            assert measured["is_exact"] is True
            assert measured["gives_lse"] is True
    printed = capsys.readouterr().out
    assert "self-attention: 96 queries, 96 keys, 2 heads of 16" in printed
    assert str(tmp_path / "attention_demo_L96.svg") in printed


def test_the_json_says_where_and_how_it_was_measured(tmp_path):
    _, report = run(tmp_path, *SMALL, "--backends", "sdpa")
    where = report["environment"]
    assert where["torch"] == torch.__version__
    assert "chitu bench attention --backends sdpa --heads 2 --head-dim 16 --length 96" in where["command"]
    assert where["date"][:2] == "20"
    assert report["repeats"] == 3
    assert report["size"] == "L96"


def test_a_backend_that_cannot_run_is_a_row_with_its_reason(tmp_path, capsys):
    status, report = run(tmp_path, *SMALL, "--backends", "sdpa,fa4", "--dtype", "float32")
    row = report["tables"][0]["rows"][1]
    assert (status, row["name"], row["measured"]) == (0, "fa4", None)
    assert "FlashAttention 4" in row["reason"]
    assert row["reason"] in capsys.readouterr().out


def test_a_run_without_any_measurement_is_a_failure(tmp_path):
    status, _ = run(tmp_path, *SMALL, "--backends", "fa4", "--dtype", "float32")
    assert status == 1


def test_a_backend_that_fails_while_it_runs_is_a_row_too(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

    monkeypatch.setattr(attention, "create", fail)
    status, report = run(tmp_path, *SMALL, "--backends", "sdpa")
    assert status == 1
    assert report["tables"][0]["rows"][0]["reason"] == "failed: OutOfMemoryError: CUDA out of memory."


def test_the_formula_is_left_out_where_its_scores_do_not_fit():
    shape = Shape("self-attention", 2, 16, 96, 96)
    measuring = Bench(shape, torch.device("cpu"), torch.float32, 1, 0.5)
    measuring._shape = Shape("self-attention", 40, 128, 10**6, 10**6)
    [row] = measuring.rows(["sdpa_math"])
    assert row.measured is None
    assert row.reason.startswith("needs about 447035 GiB")


def test_the_error_is_that_of_the_kernel():
    class Half(attention.Attention):
        is_exact = False

        @classmethod
        def unavailable(cls, variant, place):
            return None

        def __call__(self, q, k, v):
            return 0.5 * torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v))
            ).transpose(1, 2)

    measuring = Bench(Shape("self-attention", 2, 16, 300, 300), torch.device("cpu"), torch.float32, 1, 0.5)
    measured = measuring._measure(Half("half"))
    assert measured.error == pytest.approx(0.5, abs=1e-5)  # half of everything is missing; fp32 rounding
    assert (measured.is_exact, measured.gives_lse) == (False, False)


def test_bfloat16_is_measured_on_request(tmp_path):
    _, report = run(tmp_path, *SMALL, "--backends", "sdpa", "--dtype", "bfloat16")
    assert report["dtype"] == "bfloat16"
    # rounded to 8 bits: above any fp32 result, below one part in fifty
    assert 1e-4 < report["tables"][0]["rows"][0]["measured"]["error"] < 2e-2


def test_an_approximation_is_not_measured_for_cross_attention():
    measuring = Bench(Shape("cross-attention", 2, 16, 96, 512), torch.device("cpu"), torch.float32, 1, 0.5)
    assert [row.name for row in measuring.rows(["sdpa", "sage", "sparge"])] == ["sdpa"]


def test_auto_is_measured_under_the_name_that_it_takes(tmp_path):
    _, report = run(tmp_path, *SMALL, "--backends", "auto")
    place = attention.Place("cpu", None, torch.float32, 16)
    if report["environment"]["capability"] is None:
        [row] = report["tables"][0]["rows"]
        assert row["name"] == attention.choose("auto", place, key="k")


def test_all_backends_are_listed_but_those_that_only_choose():
    listed = bench._backends(None)
    assert {"sdpa", "sdpa_cudnn", "fa2", "fa3", "fa4", "sage1", "sage2"} <= set(listed)
    assert not {"flash_attn", "sage"} & set(listed)


@pytest.mark.parametrize(
    ("words", "size", "length", "heads", "head_dim"),
    [
        ([], "160x96", 5 * 6 * 10, 4, 64),
        (["--model", "Wan2.1-T2V-1.3B", "--size", "832x480"], "832x480", 32_760, 12, 128),
        (["--model", "Wan2.1-T2V-14B", "--size", "1280x720"], "1280x720", 75_600, 40, 128),
        (["--size", "64x64", "--frames", "5", "--heads", "3"], "64x64x5", 2 * 4 * 4, 3, 64),
        (["--length", "45"], "L45", 45, 4, 64),
    ],
)
def test_the_shape_is_the_models_at_its_size(words, size, length, heads, head_dim):
    named, (self_attention, cross_attention) = shapes(*words)
    assert named == size
    assert self_attention == Shape("self-attention", heads, head_dim, length, length)
    assert cross_attention == Shape("cross-attention", heads, head_dim, length, 512)


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        (["--model", "Wan3"], "--model=Wan3", "Wan2.1-T2V-14B"),
        (["--size", "big"], "--size=big", "832x480"),
        (["--size", "100x96"], "width=100", "nearest: 96 or 112"),
        (["--frames", "4"], "num_frames=4", "4n \\+ 1"),
        (["--length", "0"], "--length=0", "at least 1"),
        (["--length", "96", "--size", "64x64"], "--length=96", "give one"),
        (["--head-dim", "-1"], "--head-dim=-1", "at least 1"),
        (["--repeats", "0"], "--repeats=0", "at least 1"),
        (["--backends", "nope"], "--backends='nope'", "sdpa_math"),
        (["--backends", ","], "--backends=','", "choose from"),
        (["--dtype", "int8"], "infer.dtype=int8", "bfloat16"),
        (["--sparsity-ratio", "1"], "sparsity_ratio=1", r"\[0, 1\)"),
    ],
)
def test_a_bad_option_is_refused_with_the_way_out(tmp_path, words, key, remedy):
    with pytest.raises(ValueError, match=remedy) as caught:
        bench.run(options_of(*words, "--out", str(tmp_path / "out")))
    assert key in str(caught.value)
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_the_plot_is_well_formed_and_its_longest_bar_is_the_fastest(tmp_path):
    run(tmp_path, *SMALL, "--backends", "sdpa,sdpa_math")
    [file] = tmp_path.glob("*.svg")
    svg = ElementTree.parse(file).getroot()
    bars = [rect for rect in svg.iter("{http://www.w3.org/2000/svg}rect") if rect.get("x")]
    assert len(bars) == 4
    assert max(float(bar.get("width")) for bar in bars[:2]) == 360.0


def test_a_plot_escapes_what_xml_would_read():
    bar = Bar("a<b", 1.0, "1 & 2", True)
    texts = [
        node.text
        for node in ElementTree.fromstring(draw([Panel("t", (bar,)), Panel("none", ())], "c")).iter()
    ]
    assert "a<b" in texts
    assert "1 & 2" in texts
