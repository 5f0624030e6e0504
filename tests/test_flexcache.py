"""A Hydra main that compares cache strategies with an exact run, and a test of itself.

    python tests/test_flexcache.py infer.diffusion.enable_flexcache=true [models=NAME ...]

`run.sh` starts it with launch.python_script: tests/test_flexcache.py. Every prompt is made exactly, then
with each of RUNS, into a folder of its own inside the run directory, which is scored against the exact one:
by eval.eval_type, or psnr and ssim. It is the reference, so eval.reference_path has no use here.
"""

import subprocess
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from chitu_core.environment import Environment
from chitu_diffusion import (
    DiffusionBackend,
    DiffusionTask,
    DiffusionTaskPool,
    DiffusionUserParams,
    FlexCacheParams,
    chitu_generate,
    chitu_init,
    chitu_start,
    chitu_terminate,
    cli,
)

PROMPTS = {
    "demo": [
        "a red circle moves right on a blue background",
        "a green ring stays still on a white background",
    ]
}
OTHER_PROMPTS = ["A cat walking on grass."]
RUNS = [FlexCacheParams("meancache", 0.5), FlexCacheParams("easycache", 0.5)]


def generate(args: DictConfig) -> None:
    """Make all videos, print their paths and scores; exit with 1 when a video fails, or cannot begin."""
    environment = Environment.read()
    try:
        chitu_init(args)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"Error: {error}" if environment.local_rank == 0 else 1) from error
    chitu_start()
    prompts = PROMPTS.get(args.models.name, OTHER_PROMPTS)
    engine = DiffusionBackend.current()
    root, metrics = engine.folder.open(prompts[0]), ",".join(engine.config.eval.eval_type) or "psnr,ssim"
    tasks = []
    for reuse in [None, *RUNS]:
        folder = root / ("exact" if reuse is None else f"{reuse.strategy}_{reuse.cache_ratio:g}")
        for seed, prompt in enumerate(prompts, start=42):
            params = DiffusionUserParams(
                prompt=prompt, seed=seed, save_dir=str(folder), flexcache_params=reuse
            )
            tasks.append(DiffusionTask.from_user_request(params))
            DiffusionTaskPool.add(tasks[-1])
    while not DiffusionTaskPool.all_finished():
        chitu_generate()
    chitu_terminate()
    if environment.rank > 0:
        return
    for task in tasks:
        print(task.buffer.save_path or f"{task.phase}: {task.error_message}")
    if any(task.result is None for task in tasks):
        raise SystemExit(1)
    for reuse in RUNS:
        folder = root / f"{reuse.strategy}_{reuse.cache_ratio:g}"
        out = ["--out", str(folder / "eval"), "--metrics", metrics]
        print(f"{folder.name} against exact:", flush=True)
        cli.main(["eval", str(folder), "--reference", str(root / "exact"), *out])


def test_the_script_compares_strategies_with_an_exact_run(tmp_path):
    few = [
        "models.sampler.sample_steps=12",
        "models.video.num_frames=5",
        "infer.diffusion.enable_flexcache=true",
    ]
    command = [sys.executable, str(Path(__file__).resolve()), "output.root_dir=results", *few]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    (run_dir,) = (tmp_path / "results").iterdir()
    assert len(list((run_dir / "exact").glob("*.mp4"))) == 2
    for name in ("meancache", "easycache"):
        assert len(list((run_dir / f"{name}_0.5").glob("*.mp4"))) == 2
        assert (run_dir / f"{name}_0.5" / "eval" / "report.html").is_file()
    lines = finished.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith(("psnr", "ssim"))] == [
        "psnr",
        "ssim",
    ] * 2


if __name__ == "__main__":
    environment = Environment.read()
    path = environment.config_path
    config_path = "pkg://chitu_core.config" if path is None else str(Path(path).resolve())
    hydra.main(config_path, environment.config_name or "serve_config", version_base=None)(generate)()
