"""A Hydra main that makes videos, and a test of itself.

    python tests/test_generate.py [models=NAME models.ckpt_dir=DIR infer.attn_type=... output.root_dir=...]

`run.sh` starts it. CONFIG_PATH and CONFIG_NAME put another Hydra configuration in the place of the packaged
one.
"""

import json
import subprocess
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from chitu_core.environment import Environment
from chitu_diffusion import (
    DiffusionTask,
    DiffusionTaskPool,
    DiffusionUserParams,
    chitu_generate,
    chitu_init,
    chitu_run_eval,
    chitu_start,
    chitu_terminate,
)

PROMPTS = {
    "demo": [
        "a red circle moves right on a blue background",
        "a green ring stays still on a white background",
    ]
}
OTHER_PROMPTS = ["A cat walking on grass."]


def generate(args: DictConfig) -> None:
    """Make the prompts' videos and print their paths, then their scores if `eval.eval_type` asks for any;
    exit with 1 when a video fails, or cannot begin."""
    environment = Environment.read()
    try:
        chitu_init(args)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"Error: {error}" if environment.local_rank == 0 else 1) from error
    chitu_start()
    tasks = []
    for seed, prompt in enumerate(PROMPTS.get(args.models.name, OTHER_PROMPTS), start=42):
        tasks.append(DiffusionTask.from_user_request(DiffusionUserParams(prompt=prompt, seed=seed)))
        DiffusionTaskPool.add(tasks[-1])
    while not DiffusionTaskPool.all_finished():
        chitu_generate()
    chitu_terminate()
    for task in tasks if environment.rank == 0 else []:
        print(task.buffer.save_path or f"{task.phase}: {task.error_message}")
    for record in chitu_run_eval():
        if environment.rank == 0:
            print(record.line)
    if any(task.result is None for task in tasks):
        raise SystemExit(1)


def run_script(*overrides: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(__file__).resolve()), *overrides]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_script_makes_videos_and_leaves_a_whole_run_directory(tmp_path):
    overrides = [
        "models.sampler.sample_steps=2",
        "models.video.num_frames=5",
        "output.enable_timer_dump=true",
    ]
    finished = run_script("output.root_dir=results", *overrides, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    videos = [tmp_path / line for line in finished.stdout.split("\n") if line]
    (run_dir,) = (tmp_path / "results").iterdir()
    assert {video.parent for video in videos} == {run_dir}
    assert [video.name for video in videos] == [
        "a_red_circle_moves_right_on_a_blue_background_seed42_step2.mp4",
        "a_green_ring_stays_still_on_a_white_background_seed43_step2.mp4",
    ]
    assert run_dir.name.startswith("a_red_circle_moves_right_on_a_bl_")
    assert run_dir.name.endswith("_demo")
    left = {path.name for path in run_dir.iterdir()} - {video.name for video in videos}
    records = {video.with_suffix(".json").name for video in videos}
    files = {"run.log", "run_config.yaml", "run_meta.json", "request_params.json", "time_stats.csv", ".hydra"}
    assert left == files | records
    requests = json.loads((run_dir / "request_params.json").read_text())["requests"]
    assert [request["params"]["seed"] for request in requests] == [42, 43]
    assert (run_dir / ".hydra" / "overrides.yaml").is_file()
    assert "[PERF]" in (run_dir / "run.log").read_text()
    assert not (tmp_path / "outputs").exists() or not any((tmp_path / "outputs").rglob("*.yaml"))


def test_the_script_scores_its_videos_against_an_earlier_run(tmp_path):
    """The launch of an exact run and of a quantised one; tests/unit/test_eval.py has the numbers."""
    few = ["models.sampler.sample_steps=2", "models.video.num_frames=5"]
    assert run_script("output.root_dir=exact", *few, cwd=tmp_path).returncode == 0
    (exact,) = (tmp_path / "exact").iterdir()
    asked = ["quant=fp8", "eval.eval_type=[psnr,ssim,fvd]", f"eval.reference_path={exact}"]
    finished = run_script("output.root_dir=fast", *few, *asked, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    *_, psnr, ssim, fvd = finished.stdout.splitlines()
    assert psnr.startswith("psnr: ")
    assert float(psnr.split()[1]) > 20
    assert float(ssim.removeprefix("ssim: ")) > 0.8
    assert fvd.startswith("fvd: skipped: ")
    (fast,) = (tmp_path / "fast").iterdir()
    for folder in (tmp_path / "eval_out", fast / "eval"):
        summary = json.loads((folder / "summary.json").read_text())
        assert [metric["status"] for metric in summary["metrics"]] == ["success", "success", "skipped"]
        assert len(summary["pairs"]) == 2
        assert (folder / "report.html").is_file()


def test_hydra_dump_mode_off_leaves_no_dump(tmp_path):
    overrides = ["models.sampler.sample_steps=1", "models.video.num_frames=1", "output.hydra_dump_mode=off"]
    finished = run_script("output.root_dir=results", *overrides, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert not list(tmp_path.rglob(".hydra"))


def test_an_unknown_metric_fails_before_anything_is_built(tmp_path):
    finished = run_script("eval.eval_type=psrn", cwd=tmp_path)
    assert finished.returncode == 1
    assert "Error: eval.eval_type=psrn: choose from fid" in finished.stderr
    assert not list(tmp_path.rglob("*.mp4"))


def test_an_unknown_override_fails_before_anything_is_built(tmp_path):
    finished = run_script("infer.no_such_key=1", cwd=tmp_path)
    assert finished.returncode != 0
    assert "no_such_key" in finished.stderr
    assert not list(tmp_path.rglob("*.mp4"))


if __name__ == "__main__":
    environment = Environment.read()
    path = environment.config_path
    config_path = "pkg://chitu_core.config" if path is None else str(Path(path).resolve())
    hydra.main(config_path, environment.config_name or "serve_config", version_base=None)(generate)()
