"""Evaluation at the end of a run and from the shell: what is written where, the page, the exit status."""

import json
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from clips import noise, write_clip

from chitu_core.environment import Environment
from chitu_diffusion import DiffusionBackend, chitu_run_eval, run_eval
from chitu_diffusion.cli import main
from chitu_diffusion.eval._page import page
from chitu_diffusion.eval._records import EvalRecord
from chitu_diffusion.run_eval import evaluate_run

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page and fails if tags do not nest, or if it would fetch something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.said = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        assert tag not in ("script", "link")
        if tag == "img":
            assert values["src"].startswith("data:image/png;base64,iVBOR")
            self.images.append(values["alt"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two clips in generated/ and reference/, one of them changed; the current folder is theirs."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("one", 0), ("two", 1)):
        write_clip(tmp_path / "reference" / f"{name}.mkv", noise(seed))
        write_clip(tmp_path / "generated" / f"{name}.mkv", noise(seed) + 2 * (name == "two"))
    return tmp_path


def test_the_shell_prints_a_line_a_metric_and_writes_everything_to_out(folders, capsys):
    status = main(["eval", "generated", "--reference", "reference", "--metrics", "psnr,SSIM", "--out", "x"])
    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "psnr: 42.1102 dB (1 of 2 videos are identical to their reference)"
    assert lines[1].startswith("ssim: 0.99")
    assert lines[2] == f"page: {folders / 'x' / 'report.html'}"
    names = sorted(path.name.partition("_")[0] for path in (folders / "x").iterdir())
    assert names == ["psnr", "report.html", "ssim", "summary.json"]
    assert not (folders / "eval_out").exists()
    assert sorted(path.name for path in folders.iterdir()) == ["generated", "reference", "x"]


def test_a_place_that_cannot_be_written_is_refused_before_a_metric_runs(folders, capsys, monkeypatch):
    (folders / "file").write_text("")
    monkeypatch.setattr(run_eval, "evaluate", lambda *_: pytest.fail("a metric runs"))
    assert main(["eval", "generated", "--reference", "reference", "--out", "file"]) == 1
    assert "--out: cannot write into file" in capsys.readouterr().err


def test_a_run_directory_gets_copies(folders):
    (folders / "generated" / "run_meta.json").write_text("{}")
    assert main(["eval", "generated", "--reference", "reference", "--metrics", "psnr,vbench"]) == 0
    ours, copies = folders / "eval_out", folders / "generated" / "eval"
    summary = json.loads((ours / "summary.json").read_text())
    assert [metric["status"] for metric in summary["metrics"]] == ["success", "skipped"]
    assert summary["num_videos"] == len(summary["pairs"]) == 2
    assert {path.name for path in copies.iterdir()} == {
        path.name for folder in (ours, folders / "vbench_out") for path in folder.iterdir()
    }
    assert (copies / "report.html").read_text() == (ours / "report.html").read_text()


def test_json_prints_the_records(folders, capsys):
    assert main(["eval", "generated", "--reference", "reference", "--metrics", "psnr", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert list(record) == ["type", "status", "message", "result"]
    assert record["result"]["metric"] == "psnr"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["generated", "--metrics", "psnr"], 1),  # skipped alone
        (["generated", "--reference", "reference", "--metrics", "psnr,vbench"], 0),
        (["nowhere"], 1),
        (["generated", "--metrics", "none"], 1),
    ],
)
def test_the_exit_status_says_whether_a_score_came(folders, words, status):
    assert main(["eval", *words]) == status


def test_the_page_nests_shows_pictures_and_says_everything(folders):
    write_clip(folders / "generated" / "three.mkv", noise(3))
    main(["eval", "generated", "--reference", "reference", "--metrics", "psnr,ssim,fid", "--out", "x"])
    text = (folders / "x" / "report.html").read_text()
    shown = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert len(shown.images) == 2 * 3 * 3  # videos, frames, pictures
    assert shown.images[:3] == ["generated, 1 of 6", "reference, 1 of 6", "difference, 1 of 6"]
    assert shown.said.rindex("one.mkv") > shown.said.rindex("two.mkv")  # the worst first
    for words in ("42.1102 dB", "identical", "three.mkv", "eval.weights_dir", "amplified 4 times"):
        assert words in shown.said, words


def test_what_a_name_holds_cannot_become_markup():
    record = EvalRecord("<b>", "skipped", "\udcff<script>alert(1)</script>")
    shown = Page(page("<i>", {"generated": "a&b"}, [record], []))
    assert "<script>alert(1)</script>" in shown.said


def engine_with(tmp_path, *results, metrics=("psnr",), run_dir=None):
    """What `evaluate_run` needs of an engine that is closed."""
    config = SimpleNamespace(
        eval_type=metrics,
        reference_path=str(tmp_path / "reference"),
        pairing="match",
        weights_dir=None,
        vbench_python=None,
    )
    tasks = {str(place): SimpleNamespace(result=result) for place, result in enumerate(results)}
    return SimpleNamespace(
        config=SimpleNamespace(eval=config),
        pool=SimpleNamespace(pool=tasks),
        folder=SimpleNamespace(path=run_dir),
        device="cpu",
    )


def finished(path):
    return SimpleNamespace(video_path=str(path), prompt="a cat", seed=1, step=2)


def test_a_run_evaluates_its_finished_tasks_alone(folders, caplog):
    ours = folders / "generated"
    write_clip(ours / "not_of_this_run.mkv", noise(5))
    engine = engine_with(
        folders,
        finished(ours / "one.mkv"),
        None,
        finished(ours / "gone.mkv"),
        finished(ours / "two.mkv"),
        run_dir=ours,
    )
    (record,) = evaluate_run(engine, Environment())
    assert [video["video_name"] for video in record.result["per_video"]] == ["one.mkv", "two.mkv"]
    assert (ours / "eval" / "summary.json").is_file()
    assert (folders / "eval_out" / "report.html").is_file()


def test_the_named_output_directory_gets_the_copies_where_no_run_directory_was_made(folders):
    engine = engine_with(folders, finished(folders / "generated" / "one.mkv"))
    evaluate_run(engine, Environment(current_output_dir=folders / "here"))
    assert (folders / "here" / "eval" / "report.html").is_file()


@pytest.mark.parametrize("missing", ["all", "folder"])
def test_a_run_without_videos_or_with_scattered_ones_fails_its_metrics(folders, missing):
    paths = {"all": ["gone.mkv"], "folder": ["generated/one.mkv", "reference/two.mkv"]}[missing]
    (record,) = evaluate_run(
        engine_with(folders, *(finished(folders / path) for path in paths)), Environment()
    )
    assert record.status == "failed"
    words = {
        "all": "there is no finished video",
        "folder": "lie in 2 folders; give all requests one save_dir",
    }
    assert words[missing] in record.message


def test_no_metric_writes_nothing(folders):
    assert evaluate_run(engine_with(folders, metrics=()), Environment()) == ()
    assert not (folders / "eval_out").exists()


def test_without_an_engine_there_is_nothing_to_evaluate(monkeypatch):
    monkeypatch.setattr(type(DiffusionBackend), "engine", None)
    with pytest.raises(RuntimeError, match="call chitu_init first"):
        chitu_run_eval()
