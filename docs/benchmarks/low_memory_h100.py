"""Device memory and time of every low-memory level, random weights, one GPU.

    python docs/benchmarks/low_memory_h100.py OUT.json CASE ...

A case is MODEL:WIDTHxHEIGHTxFRAMES:LEVEL:STEPS[:GIB], LEVEL a number or auto; GIB limits what torch may
take, as on a smaller card. A request of so many steps is made and written; peaks are what its tensors took,
by stage, `reserved_gib` is what torch took of the GPU, times are by CUDA events. `flat:MODEL:LEVEL` makes
twenty small requests and notes memory after each. `decode:WIDTHxHEIGHTxFRAMES` decodes and writes a latent
whole and in tiles, in turns, once kernels are chosen: medians of three, and the wait for the first pictures.
"""

import argparse
import gc
import json
import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module

from chitu_core import memory, weights
from chitu_core.config import VideoSize, load
from chitu_core.environment import Environment
from chitu_diffusion import DiffusionTask, DiffusionUserParams
from chitu_diffusion.engine import Engine
from chitu_diffusion.media import VideoWriter, to_pixels
from chitu_diffusion.task import TaskPool
from chitu_diffusion.vaes._tile_plan import plan_tiles
from chitu_diffusion.vaes._tiles import decode_tiled
from chitu_diffusion.vaes.wan import WanVAE, wan21

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args()
    memory.grow_segments()  # as an engine does; the limits below are the first use of the GPU
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": {}}
    for case in options.cases:
        try:
            kind = case.partition(":")[0]
            found = {"flat": _flat, "decode": _decode}.get(kind, _measure)(case)
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
    reserved = 0.0
    while not task.is_finished():
        stage = task.task_type.name
        torch.cuda.reset_peak_memory_stats()
        engine.step()
        peaks[stage] = max(peaks.get(stage, 0.0), torch.cuda.max_memory_allocated() / GIB)
        reserved = max(reserved, torch.cuda.max_memory_reserved() / GIB)
    if task.result is None:
        raise RuntimeError(task.error_message)
    config, result = engine.config.infer.diffusion, task.result
    return {
        "level": config.low_mem_level,
        "resident_gb": config.resident_gb,
        "reserved_gib": round(reserved, 3),
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


@torch.inference_mode()
def _decode(case: str) -> dict[str, Any]:
    """Seconds of decoding and writing, and of those until the first pictures, whole and in tiles."""
    video = VideoSize.parse(case.partition(":")[2], "CASE")
    device = torch.device("cuda")
    _limit(None)
    with torch.device("meta"):
        vae = WanVAE(wan21(96))
    weights.randomise(vae, device=device, dtype_of=lambda _: torch.float32, seed=1)
    sides = video.height // 8, video.width // 8
    latent = torch.randn(16, (video.num_frames + 3) // 4, *sides, device=device)
    plan = plan_tiles(vae.decoder, *sides, 256, 192)
    ways = {
        "whole": lambda: map(to_pixels, vae.decode(latent)),
        "tiles": lambda: decode_tiled(vae, latent, plan, 1, to_pixels),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(4):
        for name, pictures in ways.items():
            seconds[name].append(_write(pictures(), (video.width, video.height)))
    medians = {
        name: [round(statistics.median(column), 3) for column in zip(*rows[1:], strict=True)]
        for name, rows in seconds.items()
    }
    return {"tiles": len(plan.tiles), "work": round(plan.work, 3), "seconds_and_first": medians}


def _write(pictures: Iterator[torch.Tensor], size: tuple[int, int]) -> tuple[float, float]:
    torch.cuda.synchronize()
    begin, first = time.perf_counter(), 0.0
    with VideoWriter(Path("decode.mp4"), 16, size) as writer:
        for part in pictures:
            first = first or time.perf_counter() - begin
            writer.put(part)
    return time.perf_counter() - begin, first


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
