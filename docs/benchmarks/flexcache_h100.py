"""What a reused step costs: every cache strategy on Wan2.1-T2V-1.3B, 832x480x81, random weights, one GPU.

    python docs/benchmarks/flexcache_h100.py OUT.json [--steps 12] [--size 832x480] [--frames 81]

Settings are such that every second step is reused, whatever the weights. A step is a step of the generator:
both branches, guidance and sampler, by CUDA events. Waits of the host are counted by torch's check.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module

from chitu_core.config import load
from chitu_core.environment import Environment
from chitu_diffusion import DiffusionTask, DiffusionTaskType, DiffusionUserParams, FlexCacheParams
from chitu_diffusion.engine import Engine
from chitu_diffusion.flex_cache._calibration import PACKAGED
from chitu_diffusion.task import TaskPool

ALWAYS = 1e9
RUNS: dict[str, dict[str, Any]] = {
    "meancache": {"fresh_steps": 17},
    "easycache": {"threshold": ALWAYS, "max_reuses": 1},
    "magcache": {"threshold": ALWAYS, "max_reuses": 1},
    "teacache": {"threshold": ALWAYS, "max_reuses": 1},
    "taylorseer": {"interval": 2},
    "fbcache": {"threshold": ALWAYS, "max_reuses": 1},
    "dbcache": {"threshold": ALWAYS, "max_reuses": 1},
    "blockdance": {"boundary": 0.6, "group": 2, "start": 0.1},
    "pab": {"self_range": 2, "cross_range": 2},
}


@dataclass(frozen=True)
class Run:
    """One denoising: milliseconds and waits by step, codes of decisions, and what was held."""

    times_ms: list[float]
    waits: list[int]
    codes: dict[int, int]
    kept_gb: float
    peak_gib: float


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        engine = _engine(options, _calibration(Path(folder), options.model))
        _denoise(engine, options, None)  # kernels are compiled
        exact = _denoise(engine, options, None)
        rows = {"none": _row(exact)}
        for name, knobs in RUNS.items():
            rows[name] = _row(_denoise(engine, options, FlexCacheParams(name, 1.0, 2, 1, knobs)))
        attention = engine.pipeline.attention.name
        engine.close()
    for name, row in rows.items():
        print(name, row)
    what = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "model": options.model}
    what |= {"size": options.size, "frames": options.frames, "attention": attention}
    options.out.write_text(json.dumps(what | {"strategies": rows}, indent=2) + "\n", "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--model", default="Wan2.1-T2V-1.3B")
    return parser.parse_args()


def _calibration(folder: Path, model: str) -> Path:
    """The model's own MagCache, and a TeaCache that takes any change as the estimate: weights are random."""
    text = (PACKAGED / f"{model}.yaml").read_text("utf-8")
    fit = "teacache:\n  steps: 50\n  shift: 5.0\n  thresholds: [1.0, 2.0]\n"
    fit += "  experts:\n    dit: {coefficients: [1.0, 0.0], range: null}\n"
    path = folder / "calibration.yaml"
    path.write_text(fit + text[text.index("magcache:") :], "utf-8")
    return path


def _engine(options: argparse.Namespace, calibration: Path) -> Engine:
    overrides = [
        f"models={options.model}",
        "debug.skip_model_load=true",
        "infer.diffusion.enable_flexcache=true",
        f"infer.diffusion.flexcache_calibration={calibration}",
    ]
    with initialize_config_module("chitu_core.config", version_base=None):
        return Engine(load(compose("serve_config", overrides=overrides)), TaskPool(), Environment.read())


def _denoise(engine: Engine, options: argparse.Namespace, reuse: FlexCacheParams | None) -> Run:
    """A request up to its decoding, which is called off."""
    width, height = map(int, options.size.split("x"))
    params = DiffusionUserParams(
        prompt="a cat walks on grass",
        width=width,
        height=height,
        num_frames=options.frames,
        num_inference_steps=options.steps,
        seed=1,
        flexcache_params=reuse,
        save_path="flexcache.mp4",
    )
    task = DiffusionTask.from_user_request(params)
    engine.pool.add(task)
    engine.step()  # the text
    torch.cuda.reset_peak_memory_stats()
    waits = []
    while task.task_type == DiffusionTaskType.Denoise and not task.is_finished():
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            engine.step()
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(one.message) for one in found))
    if task.is_finished():
        raise SystemExit(task.error_message)
    cache = task.buffer.flexcache
    run = Run(
        [span.milliseconds() for stage, span in task.buffer.spans if stage == "Denoise"],
        waits,
        {} if cache is None else cache.tally.codes,
        0.0 if cache is None else cache.kept.peak_bytes / 1e9,
        torch.cuda.max_memory_allocated() / 2**30,
    )
    engine.pool.cancel(task.task_id)
    engine.step()
    return run


def _row(run: Run) -> dict[str, Any]:
    """Medians of computed and of reused steps; the first one of a run, and the last with its check of the
    latents, are left out."""
    steps = range(1, len(run.times_ms) - 1)
    reused = [step for step in steps if run.codes.get(step, 0) > 1]
    computed = [step for step in steps if step not in reused]
    usual = statistics.median(run.times_ms[step] for step in computed)
    row: dict[str, Any] = {"computed_ms": round(usual, 2), "peak_gib": round(run.peak_gib, 3)}
    row |= {"waits_computed": max(run.waits[step] for step in computed)}
    if reused:
        again = statistics.median(run.times_ms[step] for step in reused)
        row |= {"reused_ms": round(again, 3), "share": round(again / usual, 5), "reused_steps": len(reused)}
        row |= {"waits_reused": max(run.waits[step] for step in reused), "kept_gb": round(run.kept_gb, 3)}
    return row


if __name__ == "__main__":
    main()
