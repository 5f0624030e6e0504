"""`chitu bench flexcache` on the demo model and few tokens: its table, its files, its refusals, what it fits.

Speed itself is not tested.
"""

import argparse
import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import shapeworld
import torch

from chitu_diffusion.bench import flexcache
from chitu_diffusion.bench._cache_fit import SHARES, calibrate, choose_threshold, fit_changes, yaml_of
from chitu_diffusion.bench._cache_merge import read as read_report
from chitu_diffusion.bench._cache_report import table
from chitu_diffusion.bench._cache_runs import make
from chitu_diffusion.bench._cache_scores import Similarity, load_judge
from chitu_diffusion.bench._cache_trace import Observed, Trace, course_of, model_of, trace
from chitu_diffusion.bench._scatter import Mark, scatter
from chitu_diffusion.bench._setup import build_engine, compose_config
from chitu_diffusion.cli import main
from chitu_diffusion.flex_cache._base import Course, Model, Step
from chitu_diffusion.flex_cache._calibration import NOTHING, packaged, read
from chitu_diffusion.flex_cache.strategy import magcache, teacache
from chitu_diffusion.media import to_pixels
from chitu_diffusion.resolve import resolve, sampler_of
from chitu_diffusion.seam import Site
from chitu_diffusion.task import DiffusionUserParams

SIZE = ("--size", "32x32", "--frames", "5", "--steps", "12", "--warmup", "1", "--cooldown", "1")
CPU = "infer.op_impl=cpu"
NAME = "flexcache_demo_32x32x5"
JUDGE = Path(__file__).parents[1] / "shapeworld.py"
CAPTIONS = ("a red circle moves right on a blue background", "a green square moves up on a white background")
ROWS = ("exact", "taylorseer 1", "easycache 1")
FORWARDS = 24  # of 12 steps with two branches


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """At these sizes a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bench(out, *words):
    return main(["bench", "flexcache", *SIZE, *words, "--out", str(out), CPU])


def report_of(out, name=NAME):
    return json.loads((out / f"{name}.json").read_text("utf-8"))


def options_of(*words):
    parser = argparse.ArgumentParser()
    flexcache.add_arguments(parser)
    return parser.parse_intermixed_args(words)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(CAPTIONS) + "\n", "utf-8")
    return str(file)


@pytest.fixture(scope="module")
def asked(prompts):
    strategies = ("--strategies", "taylorseer,easycache", "--ratios", "1")
    return (*strategies, "--prompts", prompts, "--judge", str(JUDGE))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, asked):
    """The folder of one run over both prompts."""
    out = tmp_path_factory.mktemp("whole")
    assert bench(out, *asked) == 0
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory, asked):
    """The folder of the same in two shards."""
    out = tmp_path_factory.mktemp("shards")
    for place in range(2):
        assert bench(out, *asked, "--shard", f"{place}/2") == 0
    return out


def test_every_strategy_is_held_against_the_exact_clips(whole):
    report = report_of(whole)
    assert (report["model"], report["steps"], report["forwards"]) == ("demo", 12, FORWARDS)
    assert (report["guidance"], report["prompts"], report["seeds"]) == ([4.0], list(CAPTIONS), [1])
    exact, taylorseer, easycache = (row["summary"] for row in report["rows"])
    assert exact["speed_up"] == 1
    assert exact["forwards"] == FORWARDS
    assert taylorseer["forwards"] == 8  # steps 0, 1, 6 and 11, two branches each
    assert taylorseer["share"] == pytest.approx(1 / 3)
    assert 8 <= easycache["forwards"] < FORWARDS  # at most four reused steps in a row
    for found in (taylorseer, easycache):
        assert found["clips"] == 2
        assert found["speed_up"] == pytest.approx(exact["dit_s"] / found["dit_s"])
        assert 5 < found["scores"]["psnr"] < 60
        assert 0 < found["scores"]["ssim"] < 1
    assert "psnr" not in exact["scores"]
    for found in (exact, taylorseer):
        assert set(found["scores"]) >= {"shape", "colour", "direction", "background", "iou", "path_err"}


def test_the_csv_has_the_means_of_every_row(whole):
    with (whole / f"{NAME}.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["strategy"], line["ratio"]) for line in lines] == [
        ("exact", ""),
        ("taylorseer", "1.0"),
        ("easycache", "1.0"),
    ]
    means = report_of(whole)["rows"][1]["summary"]
    assert float(lines[1]["psnr"]) == means["scores"]["psnr"]
    assert float(lines[1]["dit_s"]) == means["dit_s"]
    assert (lines[1]["kinds"], lines[1]["forwards"]) == ("blocks", "8.0")


def test_the_plot_has_a_mark_and_a_label_for_every_strategy(whole):
    svg = ElementTree.parse(whole / f"{NAME}.svg").getroot()
    texts = {node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert set(ROWS[1:]) <= texts
    assert "exact" not in texts
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}circle"))) == 2


def test_joined_shards_have_the_quality_of_one_run(whole, shards, tmp_path, capsys):
    assert main(["bench", "flexcache", "--merge", str(shards), "--out", str(tmp_path)]) == 0
    one, joined, first = report_of(whole), report_of(tmp_path), report_of(shards, f"{NAME}_shard0of2")
    assert [row["clips"] for row in joined["rows"]] == [row["clips"] for row in one["rows"]]
    assert [row["dit_s"] for row in joined["rows"]] == [row["dit_s"] for row in first["rows"]]
    assert (joined["shard"], joined["timed"]) == (None, "shard 0/2")
    assert "times of shard 0/2" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".svg"}
    assert {path.name for path in shards.iterdir()} == {f"{NAME}_shard{place}of2.json" for place in (0, 1)}


def test_times_of_a_run_of_its_own_go_before_those_of_a_shard(shards, tmp_path, asked):
    for path in shards.glob("*.json"):
        shutil.copy(path, tmp_path)
    strategies = asked[:4]
    assert bench(tmp_path, *strategies, "--time-only", "--shard", "0/4") == 0
    times = report_of(tmp_path, f"{NAME}_times")
    assert all(clip["scores"] == {} for row in times["rows"] for clip in row["clips"])
    assert len(times["rows"][0]["dit_s"]) == 1
    assert main(["bench", "flexcache", "--merge", str(tmp_path), "--out", str(tmp_path)]) == 0
    joined = report_of(tmp_path)
    assert joined["timed"] == "a run with --time-only"
    assert [row["dit_s"] for row in joined["rows"]] == [row["dit_s"] for row in times["rows"]]


def test_shards_that_do_not_make_a_run_are_refused(shards, tmp_path, capsys):
    join = ["bench", "flexcache", "--merge", str(tmp_path), "--out", str(tmp_path)]
    assert main(join) == 1
    assert "holds no shard" in capsys.readouterr().err
    shutil.copy(shards / f"{NAME}_shard1of2.json", tmp_path)
    assert main(join) == 1
    assert "needs each of 2 shards once, and holds 1/2" in capsys.readouterr().err
    other = report_of(shards, f"{NAME}_shard0of2") | {"warmup": 2}
    (tmp_path / f"{NAME}_shard0of2.json").write_text(json.dumps(other), "utf-8")
    assert main(join) == 1
    assert "differ in warmup" in capsys.readouterr().err
    (tmp_path / f"{NAME}_shard0of2.json").write_text("{}", "utf-8")
    assert main(join) == 1
    assert "no report of chitu bench flexcache" in capsys.readouterr().err


def test_a_strategy_that_refuses_the_model_is_a_row_with_its_reason(tmp_path, capsys):
    file = tmp_path / "calibration.yaml"
    file.write_text(
        "teacache:\n  steps: 12\n  shift: 3.0\n  thresholds: [0.1, 0.2]\n  experts: {}\n", "utf-8"
    )
    limits = (f"infer.diffusion.flexcache_calibration={file}", "infer.diffusion.flexcache_max_gb=1.0e-4")
    words = ("--strategies", "magcache,pab,taylorseer", "--ratios", "0.5", "--keep-videos", *limits)
    words += ("--seed", "7", "--shard", "1/4")
    assert bench(tmp_path, *words) == 0
    exact, magcache_row, pab, taylorseer = report_of(tmp_path, f"{NAME}_shard1of4")["rows"]
    assert "demo has no calibration for it" in magcache_row["reason"]
    assert "flexcache_max_gb" in pab["reason"]
    assert (magcache_row["clips"], pab["summary"]) == ([], None)
    assert taylorseer["summary"]["clips"] == len(exact["clips"]) == 1
    assert magcache_row["reason"] in capsys.readouterr().out
    assert (tmp_path / "videos" / "taylorseer_0.5_1_7.mp4").stat().st_size > 0
    assert magcache_row["reason"] in table(read_report(tmp_path / f"{NAME}_shard1of4.json"))


@pytest.mark.parametrize(
    ("words", "said", "remedy"),
    [
        (["--strategies", "bestcache"], "--strategies=bestcache", "teacache"),
        (["--ratios", "0"], "--ratios=0", "above 0"),
        (["--ratios", "half"], "--ratios=half", "0.5,1"),
        (["--seeds", "x"], "--seeds=x", "whole numbers"),
        (["--prompts", "none.txt"], "--prompts=none.txt", "one prompt a line"),
        (["--shard", "2/2"], "--shard=2/2", "I below N"),
        (["--shard", "0/9"], "--shard=0/9", "at most the 4 prompts"),
        (["--steps", "10"], "leave nothing of 10 steps", "raise --steps"),
        (["infer.diffusion.enable_flexcache=false"], "enable_flexcache", "leave it out"),
        (["--warmup", "-1"], "--warmup=-1", "0 or more"),
        (["--calibrate", "--shard", "0/2"], "--calibrate", "leave out --shard"),
        (["--calibrate", "--model", "Wan2.1-T2V-1.3B"], "--calibrate", "models.ckpt_dir=DIR"),
        (["--calibrate", "--ratios", "1"], "--calibrate", "leave out --ratios"),
        (["--merge", "nowhere", "--steps", "9"], "--merge=nowhere", "leave out --steps"),
        (["--merge", "nowhere", "infer.dtype=float32"], "--merge=nowhere", "leave out key=value"),
        (["--time-only", "--judge", str(JUDGE)], "--judge", "give one"),
        (["--judge", "none.py"], "--judge=none.py", "parse, judge and compare"),
        (["--merge", "nowhere"], "--merge=nowhere", "--shard I/N"),
    ],
)
def test_a_bad_option_is_refused_with_the_way_out(tmp_path, words, said, remedy):
    with pytest.raises(ValueError, match=r".") as caught:
        flexcache.run(options_of(*words, "--out", str(tmp_path / "out")))
    assert said in str(caught.value)
    assert remedy in str(caught.value)
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_similarity_is_the_mean_over_the_frames_that_differ(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    similarity = Similarity(torch.device("cpu"))
    assert "pip install" in similarity.missing["lpips"]
    reference = np.full((3, 16, 16, 3), 100, np.uint8)
    frames = reference.copy()
    frames[1] += 10
    found = similarity.scores(frames, reference)
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 10))
    assert set(found) == {"psnr", "ssim"}
    assert similarity.scores(reference, reference) == {"psnr": None, "ssim": 1.0}


def test_a_judge_finds_what_a_clean_clip_shows():
    judge = load_judge(JUDGE, CAPTIONS)
    wanted = {key: torch.tensor([value]) for key, value in shapeworld.parse(CAPTIONS[0]).items()}
    video = shapeworld.render(wanted, generator=torch.Generator().manual_seed(0))
    frames = to_pixels(video[0]).numpy()
    found = judge.scores(frames, CAPTIONS[0])
    assert [found[name] for name in ("shape", "colour", "direction", "background")] == [1, 1, 1, 1]
    assert found["iou"] > 0.9  # antialiased edges
    assert judge.scores(frames, CAPTIONS[1])["shape"] == 0
    with pytest.raises(ValueError, match="finds no shape, colour"):
        load_judge(JUDGE, ["a cat walks on grass"])


def steps_of(sigmas, expert="dit"):
    return tuple(
        Step(index, int(1000 * sigma), sigma, following, expert)
        for index, (sigma, following) in enumerate(zip(sigmas, (*sigmas[1:], 0.0), strict=True))
    )


@pytest.fixture
def course():
    """50 steps, ten of them forced, of a model with one expert."""
    return Course(
        Model("tiny", 4, ("dit",), NOTHING), steps_of(np.linspace(1, 0.02, 50)), 5, 5, 3.0, 0, torch.float32
    )


@pytest.fixture
def observed(course):
    """A residual that shrinks by a hundredth a step and changes as a known polynomial says."""
    changes = np.linspace(0.02, 0.2, 49)
    sigmas = tuple(step.sigma for step in course.steps)
    residuals = tuple(np.polyval(POLYNOMIAL, changes))
    return {"dit": Observed(sigmas, tuple(changes), residuals, (0.99,) * 49, (0.98,) * 49)}


POLYNOMIAL = (900.0, -300.0, 30.0, 0.5, 0.02)  # above 0 from 0 on


def test_a_fit_finds_the_polynomial_that_made_its_points():
    changes = np.linspace(0.02, 0.2, 49)
    fit = fit_changes(changes, np.polyval(POLYNOMIAL, changes))
    assert fit.coefficients == pytest.approx(POLYNOMIAL, rel=1e-6)  # float64, nine digits are kept
    assert fit.lowest < 0.02 < 0.2 < fit.highest


@pytest.mark.parametrize("seed", range(8))
def test_a_fit_is_above_zero_wherever_it_says_something(seed):
    draw = np.random.default_rng(seed)
    changes = np.sort(draw.uniform(0.01, 0.2, 10))
    fit = fit_changes(changes, draw.choice([0.001, 1.0], 10))  # leaps that a polynomial overshoots
    assert all(fit(place) is not None for place in np.linspace(fit.lowest, fit.highest, 500))


@pytest.mark.parametrize(("points", "degree"), [(1, 0), (3, 0), (4, 1), (6, 2), (10, 4), (40, 4)])
def test_a_fit_of_few_points_has_a_lower_degree(points, degree):
    changes = np.linspace(0.02, 0.2, points)
    assert len(fit_changes(changes, np.polyval(POLYNOMIAL, changes)).coefficients) - 1 == degree


def test_the_threshold_is_the_smallest_that_comes_nearest():
    def schedule(threshold):
        return [True] * (8 if threshold < 0.5 else 4) + [False] * 4

    assert choose_threshold(0.5, schedule) == (0.501, 4)
    assert choose_threshold(0.9, schedule) == (0.0001, 8)


def test_thresholds_compute_the_shares_that_they_are_for(course, observed):
    chosen = calibrate(observed, course)
    tea, mag = chosen.calibration.teacache, chosen.calibration.magcache
    measured = dataclasses.replace(course, model=Model("tiny", 4, ("dit",), chosen.calibration))
    changes = [-1.0, *observed["dit"].signal_changes]
    for threshold, share in zip(tea.thresholds, SHARES, strict=True):
        fresh = teacache.schedule(measured, changes, teacache.Knobs(threshold))
        assert sum(fresh) / 50 == pytest.approx(share, abs=0.04)  # two steps; schedules leap
    ratios = [1.0, *observed["dit"].cond]
    for threshold, most, least in zip(mag.thresholds, mag.max_reuses, (32, 22), strict=True):
        fresh = magcache.schedule(measured, ratios, magcache.Knobs(threshold, most, mag.retention))
        assert sum(fresh) == least  # 15 are forced; of the other 35 each second one, or each fifth
    assert any("degree 4 over 45 steps" in remark for remark in chosen.remarks)


def test_a_calibration_reads_back_as_it_was_chosen(course, observed, tmp_path):
    chosen = calibrate(observed, course)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml_of(chosen, ["about it"]), "utf-8")
    found = read(file)
    assert found.teacache == chosen.calibration.teacache
    assert found.magcache.thresholds == chosen.calibration.magcache.thresholds
    assert found.magcache.experts["dit"].cond == (0.99,) * 49
    assert found.magcache.experts["dit"].uncond == (0.98,) * 49
    assert file.read_text("utf-8").startswith("# about it\n# teacache, dit: degree 4")
    model = Model("tiny", 4, ("dit",), found)
    low, high = (teacache.Strategy.complete(teacache.Knobs(), ratio, model) for ratio in (0.5, 1))
    assert 0 < low.threshold < high.threshold
    assert [magcache.Strategy.complete(magcache.Knobs(), ratio, model).max_reuses for ratio in (0.5, 1)] == [
        2,
        4,
    ]


def test_too_few_steps_for_a_fit_are_refused(course, observed):
    one = observed["dit"]
    few = Observed(one.sigmas[:5], *(values[:4] for values in list(vars(one).values())[1:]))
    with pytest.raises(ValueError, match="expert dit needs more than 5 steps"):
        calibrate({"dit": few}, course)


def test_a_trace_measures_how_residuals_change_by_branch():
    tracing, x = Trace(), torch.zeros(1, 6, 4)
    first = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 0.9, 0.9 * 1.2):
        for branch, size in (("cond", 1), ("uncond", 2)):
            tracing.branch = branch
            residual = first * factor * size
            out = tracing.around(Site("blocks"), lambda x, r=residual: x + r, x, x)
            assert torch.equal(out, residual)
    for branch in ("cond", "uncond"):
        assert [float(value) for value in tracing.ratios[branch]] == pytest.approx([0.9, 1.2])
        assert [float(value) for value in tracing.changes[branch]] == pytest.approx([0.1, 0.2], rel=1e-4)


def test_a_traced_run_is_the_one_that_an_engine_makes(tmp_path):
    config = compose_config("demo", [CPU])
    engine, settings = build_engine(config), config.models.sampler
    request = DiffusionUserParams(
        prompt=CAPTIONS[0], size=(32, 32), num_frames=5, num_inference_steps=4, seed=3
    )
    params, pipeline = resolve(request, config.models), engine.pipeline
    sampler = sampler_of(params, settings)
    with torch.inference_mode():
        course = course_of(params, settings, pipeline.spec, model_of("demo", pipeline))
        traces, latents = trace(params, course, pipeline, sampler)
        frames = torch.cat([to_pixels(part) for part in pipeline.vae.decode(latents, 1)]).numpy()
    request = DiffusionUserParams(**(vars(request) | {"save_path": str(tmp_path / "video.mp4")}))
    made = make(engine, request, wants_frames=True)
    engine.close()
    assert np.array_equal(made.frames, frames)
    assert {key: len(values) for key, values in traces["dit"].ratios.items()} == {"cond": 3, "uncond": 3}


def test_a_calibration_run_writes_what_strategies_take(tmp_path, capsys):
    words = ("--calibrate", "--seeds", "1,2", "--prompts", str(tmp_path / "prompts.txt"))
    (tmp_path / "prompts.txt").write_text(CAPTIONS[0], "utf-8")
    assert bench(tmp_path, *words) == 0
    file = tmp_path / "demo.yaml"
    assert f"infer.diffusion.flexcache_calibration={file}" in capsys.readouterr().out
    assert "2 clips" in file.read_text("utf-8")
    found = read(file)
    assert (found.teacache.steps, found.teacache.shift) == (12, 3.0)
    assert len(found.magcache.experts["dit"].cond) == 11
    model = Model("demo", 8, ("dit",), found)
    for strategy in (teacache, magcache):
        assert strategy.Strategy.complete(strategy.Knobs(), 0.5, model).threshold > 0


def test_the_demo_model_ships_with_a_calibration():
    found = packaged("demo")
    assert (found.teacache.steps, found.teacache.shift) == (50, 3.0)
    model = Model("demo", 8, ("dit",), found)
    for strategy in (teacache, magcache):
        low, high = (strategy.Strategy.complete(strategy.Knobs(), r, model).threshold for r in (0.5, 1))
        assert 0 < low < high
    fit = found.teacache.experts["dit"]
    assert all(fit(place) is not None for place in np.linspace(fit.lowest, fit.highest, 200))


def test_a_plot_takes_one_mark_or_none_and_escapes_its_label():
    for marks in ([Mark("a<b", "a", 1.0, 30.0)], []):
        svg = ElementTree.fromstring(scatter(marks, "t & t", ("x", "y"), "c"))
        texts = [node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert "t & t" in texts
        assert ("a<b" in texts) is bool(marks)
