"""Scores of synthetic clips against independent computations, and every way in which a metric has none."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from clips import INCEPTION, noise, write_clip, write_empty_clip, write_networks, write_sound
from scipy.linalg import sqrtm
from scipy.ndimage import uniform_filter

from chitu_core.config import EvalConfig
from chitu_core.distributed import RankChannel
from chitu_diffusion.eval._frames import spread
from chitu_diffusion.eval._report import Folders
from chitu_diffusion.eval.manager import Team, check_types, evaluate, metric_names


def settings(*metrics, **values):
    given = {"reference_path": None, "pairing": "match", "weights_dir": None, "vbench_python": None}
    return EvalConfig(eval_type=list(metrics), **{**given, **values})


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Evaluate the clips in tmp_path/generated against tmp_path/reference; the records by metric."""
    monkeypatch.chdir(tmp_path)

    def run(*metrics, **values):
        config = settings(*metrics, **{"reference_path": str(tmp_path / "reference"), **values})
        team = Team(RankChannel(None))
        records = evaluate(tmp_path / "generated", config, "cpu", Folders(), team)
        return {record.type: record for record in records}

    return run


def put(folder, **clips):
    for name, frames in clips.items():
        write_clip(folder / f"{name}.mkv", frames)


def shifted(frames, error):
    return (frames + np.int16(error)).astype(np.uint8)


def test_psnr_equals_its_formula_and_means_frames_before_videos(tmp_path, evaluated):
    one, two = noise(0, frames=2), noise(1, frames=4)
    put(tmp_path / "reference", one=one, two=two)
    first = np.stack([shifted(one[0], 1), shifted(one[1], 4)])
    put(tmp_path / "generated", one=first, two=shifted(two, 2))
    psnr = {error: 20 * math.log10(255 / error) for error in (1, 2, 4)}  # a constant error has this RMS
    result = evaluated("psnr")["psnr"].result
    scores = [video["score"] for video in result["per_video"]]
    assert scores == pytest.approx([(psnr[1] + psnr[4]) / 2, psnr[2]], abs=1e-9)
    assert result["mean_score"] == pytest.approx(sum(scores) / 2, abs=1e-9)
    assert [video["num_frames"] for video in result["per_video"]] == [2, 4]
    assert (result["unit"], result["num_videos"]) == ("dB", 2)


def test_identical_videos_have_a_null_psnr_with_a_flag_in_valid_json(tmp_path, evaluated):
    for folder in ("reference", "generated"):
        put(tmp_path / folder, one=noise(0), two=noise(1))
    records = evaluated("psnr", "ssim")
    assert records["psnr"].result["mean_score"] is None
    assert records["psnr"].result["is_identical"]
    assert records["psnr"].headline == "identical"
    assert records["ssim"].result["mean_score"] == 1
    for file in (tmp_path / "eval_out").glob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_one_identical_frame_does_not_make_a_mean_infinite(tmp_path, evaluated):
    reference = noise(0, frames=3)
    put(tmp_path / "reference", one=reference, same=reference)
    put(
        tmp_path / "generated",
        one=np.concatenate([reference[:1], shifted(reference[1:], 3)]),
        same=reference,
    )
    record = evaluated("psnr")["psnr"]
    assert record.result["mean_score"] == pytest.approx(20 * math.log10(255 / 3))
    assert [video["num_identical_frames"] for video in record.result["per_video"]] == [1, 3]
    assert not record.result["is_identical"]
    assert record.message == "1 of 2 videos are identical to their reference"


def test_ssim_equals_its_formula(tmp_path, evaluated):
    """Wang et al. 2004 with a uniform window of 7 and unbiased covariances, cut where windows leave it."""
    reference, generated = noise(0, frames=2), noise(1, frames=2)
    put(tmp_path / "reference", one=reference)
    put(tmp_path / "generated", one=generated)

    def ssim(x, y):  # [H, W] each
        x, y = x.astype(np.float64), y.astype(np.float64)
        mean_x, mean_y = uniform_filter(x, 7), uniform_filter(y, 7)
        unbiased = 49 / 48
        var_x = unbiased * (uniform_filter(x * x, 7) - mean_x**2)
        var_y = unbiased * (uniform_filter(y * y, 7) - mean_y**2)
        cov = unbiased * (uniform_filter(x * y, 7) - mean_x * mean_y)
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        map_ = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
        map_ /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
        return map_[3:-3, 3:-3].mean()

    pairs = zip(generated, reference, strict=True)
    expected = np.mean([[ssim(g[..., c], r[..., c]) for c in range(3)] for g, r in pairs])
    assert evaluated("ssim")["ssim"].result["mean_score"] == pytest.approx(expected, abs=1e-12)


def frechet(ours, theirs):
    """The distance of two sets of rows, by a matrix square root."""
    a, b = np.cov(ours.T), np.cov(theirs.T)
    root = np.real(sqrtm(a @ b))
    return np.sum((ours.mean(0) - theirs.mean(0)) ** 2) + np.trace(a + b - 2 * root)


def test_fid_and_frame_fid_equal_the_formula_over_chosen_and_over_all_frames(tmp_path, evaluated):
    ours = {"one": noise(0, frames=20), "two": noise(1, frames=3)}
    theirs = {"one": noise(2, frames=24), "two": noise(3, frames=3)}
    put(tmp_path / "generated", **ours)
    put(tmp_path / "reference", **theirs)
    records = evaluated("fid", "frame_fid", weights_dir=str(write_networks(tmp_path / "nets")))

    def rows(clips, most):
        frames = [clip[spread(len(clip), min(len(clip), most))] for clip in clips.values()]
        return np.concatenate(frames).mean(axis=(1, 2)) / 255

    for name, most, counts in (("fid", 16, [19, 19]), ("frame_fid", 99, [23, 27])):
        result = records[name].result
        assert result["score"] == pytest.approx(frechet(rows(ours, most), rows(theirs, most)), rel=1e-6), name
        assert result["num_samples"] == counts
        assert (result["num_features"], result["is_small_sample"]) == (3, False)


def test_fvd_sees_motion_that_frames_do_not_show(tmp_path, evaluated):
    reference = {name: noise(seed, frames=6) for seed, name in enumerate("abcd")}
    calm = {
        name: np.sort(clip.reshape(6, -1), axis=0).reshape(clip.shape) for name, clip in reference.items()
    }
    put(tmp_path / "reference", **reference)
    put(tmp_path / "generated", **calm)  # each pixel has the same values, in another order
    record = evaluated("fvd", weights_dir=str(write_networks(tmp_path / "nets")))["fvd"]
    assert record.result["score"] > 1e-3
    assert record.result["num_samples"] == [4, 4]
    assert record.result["backend"] == "i3d_torchscript.pt"


def test_fvd_equals_the_formula_on_rows_of_videos(tmp_path, evaluated):
    flat = {name: np.full((4, 16, 24, 3), 60 + 20 * place, np.uint8) for place, name in enumerate("abc")}
    put(tmp_path / "reference", **flat)
    put(tmp_path / "generated", **{name: clip + 10 for name, clip in flat.items()})
    score = evaluated("fvd", weights_dir=str(write_networks(tmp_path / "nets")))["fvd"].result["score"]
    assert score == pytest.approx((10 / 127.5) ** 2, rel=1e-4)  # only the mean moves; features are float32


def test_a_sample_smaller_than_the_features_is_flagged(tmp_path, evaluated):
    for folder, seed in (("generated", 0), ("reference", 1)):
        put(tmp_path / folder, one=noise(seed, frames=3))
    record = evaluated("fid", weights_dir=str(write_networks(tmp_path / "nets")))["fid"]
    assert record.result["is_small_sample"]
    assert record.message == "3 frames are few for 3 features: the distance is biased upwards"


def test_a_distance_needs_two_samples_of_each_set(tmp_path, evaluated):
    for folder, seed in (("generated", 0), ("reference", 1)):
        put(tmp_path / folder, one=noise(seed))
    record = evaluated("fvd", weights_dir=str(write_networks(tmp_path / "nets")))["fvd"]
    assert (record.status, record.message) == ("skipped", "fvd needs 2 or more videos of each set, got 1")


class Lpips:
    """Stands for the package: the mean absolute difference of what it is given."""

    def __init__(self, net, verbose):
        assert (net, verbose) == ("alex", False)

    def to(self, device, dtype):
        assert (device.type, dtype) == ("cpu", torch.float32)
        return self

    def eval(self):
        return self

    def __call__(self, x, y):
        assert x.shape[1:] == (3, 224, 224)
        assert x.dtype == torch.float32
        return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)


def test_lpips_gets_frames_of_its_size_and_range(tmp_path, evaluated, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Lpips))
    reference = np.full((3, 16, 24, 3), 100, np.uint8)
    put(tmp_path / "reference", one=reference)
    put(tmp_path / "generated", one=reference + 51)
    result = evaluated("lpips")["lpips"].result
    assert result["mean_score"] == pytest.approx(51 / 127.5, abs=1e-6)
    assert not result["higher_is_better"]


@pytest.mark.parametrize(
    ("metric", "module", "words"),
    [
        ("psnr", "skimage.metrics", "scikit-image cannot be imported"),
        ("ssim", "skimage.metrics", "scikit-image cannot be imported"),
        ("fid", "torchmetrics.image.fid", "torchmetrics cannot be imported"),
        ("lpips", "lpips", "needs a torchvision that was built for this torch"),
    ],
)
def test_a_missing_package_is_skipped_with_its_remedy(
    tmp_path, evaluated, monkeypatch, metric, module, words
):
    monkeypatch.setitem(sys.modules, module, None)
    for folder in ("generated", "reference"):
        put(tmp_path / folder, one=noise(0))
    record = evaluated(metric)[metric]
    assert record.status == "skipped"
    assert words in record.message
    assert "pip install 'chitu-diffusion[eval]'" in record.message


def test_a_package_that_fails_in_its_import_is_skipped(tmp_path, evaluated, monkeypatch):
    (tmp_path / "lpips.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    for folder in ("generated", "reference"):
        put(tmp_path / folder, one=noise(0))
    record = evaluated("lpips")["lpips"]
    assert record.status == "skipped"
    assert "torchvision::nms does not exist" in record.message


def test_weights_that_cannot_be_fetched_are_skipped(tmp_path, evaluated, monkeypatch):
    def refuse(net, verbose):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=refuse))
    for folder in ("generated", "reference"):
        put(tmp_path / folder, one=noise(0))
    record = evaluated("lpips")["lpips"]
    assert record.status == "skipped"
    assert "AlexNet's weights cannot be read (no route to host); put them" in record.message


def test_missing_and_broken_networks_are_skipped(tmp_path, evaluated):
    for folder in ("generated", "reference"):
        put(tmp_path / folder, one=noise(0))
    for metric in ("fid", "frame_fid", "fvd"):
        record = evaluated(metric)[metric]
        assert record.status == "skipped"
        assert "name its folder with eval.weights_dir" in record.message
    record = evaluated("fid", weights_dir=str(tmp_path))["fid"]
    assert (record.status, INCEPTION in record.message) == ("skipped", True)
    assert "put the TorchScript file into eval.weights_dir" in record.message
    (tmp_path / INCEPTION).write_bytes(b"no zip")
    assert "is no TorchScript file" in evaluated("fid", weights_dir=str(tmp_path))["fid"].message


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (None, "no reference videos; name their folder with eval.reference_path"),
        ("nowhere", "is not a directory"),
        ("empty", "no video has its reference"),
    ],
)
def test_a_missing_reference_is_skipped_with_its_remedy(tmp_path, evaluated, reference, words):
    put(tmp_path / "generated", one=noise(0))
    (tmp_path / "empty").mkdir()
    path = None if reference is None else str(tmp_path / reference)
    records = evaluated("psnr", "fvd", reference_path=path)
    assert {record.status for record in records.values()} == {"skipped"}
    assert all(words in record.message for record in records.values())
    assert json.loads((tmp_path / "eval_out" / "summary.json").read_text())["metrics"][0]["score"] is None


def test_an_unknown_metric_is_skipped_here_and_refused_at_start_up(tmp_path, evaluated):
    put(tmp_path / "generated", one=noise(0))
    record = evaluated("../psnr")["../psnr"]
    assert record.status == "skipped"
    assert "unknown metric; choose from fid, frame_fid, fvd, lpips, psnr, ssim, vbench" in record.message
    with pytest.raises(ValueError, match=r"eval\.eval_type=psrn: choose from fid"):
        check_types(["psnr", "psrn"])
    assert "manager" not in metric_names()


def test_no_video_at_all_fails_every_metric(tmp_path, evaluated):
    (tmp_path / "generated").mkdir()
    records = evaluated("psnr", "vbench")
    assert {record.status for record in records.values()} == {"failed"}
    assert "holds no video" in records["psnr"].message


def test_videos_of_other_lengths_and_rates_are_compared_along_their_course(tmp_path, evaluated):
    ramp = np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8)[:, None, None, None], (100, 16, 24, 3))
    put(tmp_path / "reference", one=ramp[:41])
    write_clip(tmp_path / "generated" / "one.mkv", ramp[:81:2], fps=8)
    write_clip(tmp_path / "generated" / "two.mkv", ramp[:21])
    write_clip(tmp_path / "reference" / "two.mkv", ramp[:41:2], fps=24)
    result = evaluated("psnr")["psnr"].result
    assert [video["num_frames"] for video in result["per_video"]] == [16, 16]
    assert result["per_video"][0]["note"] == "8 and 16 frames a second"
    put(tmp_path / "reference", two=ramp[:41])
    assert (
        "21 and 41 frames, compared at 16 places" in evaluated("psnr")["psnr"].result["per_video"][1]["note"]
    )


def test_videos_of_other_sizes_are_left_out_where_pixels_are_compared(tmp_path, evaluated):
    put(tmp_path / "reference", one=noise(0), two=noise(1, width=32))
    put(tmp_path / "generated", one=shifted(noise(0), 1), two=noise(1))
    records = evaluated("psnr", "frame_fid", weights_dir=str(write_networks(tmp_path / "nets")))
    psnr = records["psnr"]
    assert (psnr.status, psnr.result["num_videos"]) == ("success", 1)
    words = "generated is 24x16, reference 32x16; make them the same size"
    assert psnr.result["left_out"] == [{"video_name": "two.mkv", "message": words}]
    assert psnr.message == f"1 of 2 left out: two.mkv: {words}"
    assert records["frame_fid"].result["num_pairs"] == 2  # its network resizes
    (tmp_path / "generated" / "one.mkv").unlink()
    record = evaluated("psnr")["psnr"]
    assert (record.status, record.message) == ("skipped", f"no video could be scored: two.mkv: {words}")


def test_frames_smaller_than_the_window_of_ssim_are_left_out(tmp_path, evaluated):
    for folder in ("generated", "reference"):
        put(tmp_path / folder, one=noise(0, height=6))
    assert "must be 7 pixels or more" in evaluated("ssim")["ssim"].message


@pytest.mark.parametrize("kind", ["broken", "empty", "without frames", "sound alone"])
def test_a_video_that_cannot_be_read_is_left_out_and_alone_fails(tmp_path, evaluated, kind):
    put(tmp_path / "reference", one=noise(0), two=noise(1))
    put(tmp_path / "generated", two=shifted(noise(1), 1))
    bad = tmp_path / "generated" / "one.mkv"
    if kind == "without frames":
        write_empty_clip(bad)
    elif kind == "sound alone":
        write_sound(bad)
    else:
        bad.write_bytes(b"" if kind == "empty" else b"\x1aE\xdf\xa3" + b"junk" * 99)
    record = evaluated("psnr")["psnr"]
    assert (record.status, record.result["num_videos"]) == ("success", 1)
    assert record.result["left_out"][0]["video_name"] == "one.mkv"
    assert record.result["left_out"][0]["message"].startswith("generated/one.mkv ")
    assert "Not shown: generated/one.mkv" in (tmp_path / "eval_out" / "report.html").read_text()
    (tmp_path / "generated" / "two.mkv").unlink()
    record = evaluated("psnr")["psnr"]
    assert record.status == "failed"
    assert "no video could be scored: generated/one.mkv" in record.message


def test_an_error_in_a_metric_is_its_record_and_the_next_one_goes_on(tmp_path, evaluated, monkeypatch):
    def explode(*_, **__):
        raise ZeroDivisionError("by design")

    monkeypatch.setattr("skimage.metrics.peak_signal_noise_ratio", explode)
    put(tmp_path / "reference", one=noise(0))
    put(tmp_path / "generated", one=shifted(noise(0), 1))
    records = evaluated("psnr", "ssim")
    assert (records["psnr"].status, records["psnr"].message) == ("failed", "ZeroDivisionError: by design")
    assert records["psnr"].result is None
    assert records["ssim"].status == "success"


def test_a_result_that_is_no_number_fails(tmp_path, evaluated, monkeypatch):
    monkeypatch.setattr("skimage.metrics.structural_similarity", lambda *_, **__: float("nan"))
    put(tmp_path / "reference", one=noise(0))
    put(tmp_path / "generated", one=noise(1))
    assert evaluated("ssim")["ssim"].status == "failed"


def test_a_folder_that_cannot_be_written_is_logged_and_the_records_stay(tmp_path, evaluated, caplog):
    put(tmp_path / "reference", one=noise(0))
    put(tmp_path / "generated", one=noise(1))
    (tmp_path / "eval_out").write_text("a file in the way")
    assert evaluated("psnr")["psnr"].status == "success"
