"""Device memory and time of every low-memory level, random weights, one GPU.

    python docs/benchmarks/low_memory_h100.py OUT.json CASE ...

A case is MODEL:WIDTHxHEIGHTxFRAMES:LEVEL:STEPS[:GIB], LEVEL a number or auto; GIB limits what torch may
allocate, as on a smaller card. A request of so many steps is made and written; peaks are those of torch's
allocator, by stage, times by CUDA events. `flat:MODEL:LEVEL` makes twenty small requests and notes memory
after each.
"""

import argparse
import gc
import json
import resource
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module

from chitu_core.config import VideoSize, load
from chitu_core.environment import Environment
from chitu_diffusion import DiffusionTask, DiffusionUserParams
from chitu_diffusion.engine import Engine
from chitu_diffusion.task import TaskPool

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args()
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": {}}
    for case in options.cases:
        try:
            found = _flat(case) if case.startswith("flat:") else _measure(case)
        except (RuntimeError, ValueError) as error:
            found = {"failed": f"{type(error).__name__}: {error}"[:600]}
        record["cases"][case] = found
        print(case, {key: value for key, value in found.items() if key != "plan"}, flush=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        _free()


def _measure(case: str) -> dict[str, Any]:
    model, size, level, steps, *limit = case.split(":")
    _limit(float(limit[0]) * GIB if limit else None)
    begin = time.perf_counter()
    engine = _engine(model, level, size)
    built_s = time.perf_counter() - begin
    try:
        return {"built_s": round(built_s, 1), **_request(engine, size, int(steps))}
    finally:
        engine.close()


def _request(engine: Engine, size: str, steps: int) -> dict[str, Any]:
    width, height, frames = map(int, size.split("x"))
    params = DiffusionUserParams(
        prompt="a cat walks on grass",
        width=width,
        height=height,
        num_frames=frames,
        num_inference_steps=steps,
        seed=1,
        save_path="low_memory.mp4",
    )
    task = DiffusionTask.from_user_request(params)
    engine.pool.add(task)
    peaks: dict[str, float] = {}
    while not task.is_finished():
        stage = task.task_type.name
        torch.cuda.reset_peak_memory_stats()
        engine.step()
        peaks[stage] = max(peaks.get(stage, 0.0), torch.cuda.max_memory_allocated() / GIB)
    if task.result is None:
        raise RuntimeError(task.error_message)
    config, result = engine.config.infer.diffusion, task.result
    return {
        "level": config.low_mem_level,
        "resident_gb": config.resident_gb,
        "peak_gib": {stage: round(peak, 3) for stage, peak in peaks.items()},
        "seconds": result.seconds,
        "host_peak_gib": result.peak_memory.host_gib,
        "plan": None if result.memory_plan is None else asdict(result.memory_plan),
    }


def _flat(case: str) -> dict[str, Any]:
    """Memory after each of twenty requests."""
    _, model, level = case.split(":")
    _limit(None)
    engine = _engine(model, level, "256x256x5")
    rows, seconds = [], []
    try:
        for _ in range(20):
            begin = time.perf_counter()
            _request(engine, "256x256x5", 2)
            gc.collect()
            seconds.append(time.perf_counter() - begin)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            host = pages * resource.getpagesize() / GIB
            rows.append((round(torch.cuda.memory_allocated() / GIB, 4), round(host, 3)))
    finally:
        engine.close()
    return {"device_and_host_gib": rows, "median_s": round(statistics.median(seconds), 3)}


def _engine(model: str, level: str, size: str) -> Engine:
    video = VideoSize.parse(size, "CASE")
    overrides = [
        f"models={model}",
        "debug.skip_model_load=true",
        f"infer.diffusion.low_mem_level={level}",
        "infer.prompt_cache_mb=0",
    ]
    with initialize_config_module("chitu_core.config", version_base=None):
        config = load(compose("serve_config", overrides=overrides))
    return Engine(config, TaskPool(), Environment.read(), expected=[video])


def _limit(num_bytes: float | None) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if num_bytes is None else num_bytes / total)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
