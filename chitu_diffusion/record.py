"""What a finished task has to say for itself: every value that was used, from request, networks and ranks."""

from dataclasses import asdict
from pathlib import Path

import torch

from chitu_core import __version__, memory
from chitu_core.distributed import ParallelMesh
from chitu_diffusion.flex_cache._base import FlexCache
from chitu_diffusion.prepare import Pipeline
from chitu_diffusion.resolve import ResolvedParams
from chitu_diffusion.result import CacheRecord, MemoryRecord, TaskResult
from chitu_diffusion.survey import dtype_name
from chitu_diffusion.task import DiffusionTask


def result_of(
    task: DiffusionTask,
    pipeline: Pipeline,
    seconds: dict[str, float],
    *,
    model: str,
    device: torch.device,
    mesh: ParallelMesh,
    flexcache: CacheRecord | None,
    memory_plan: MemoryRecord | None,
) -> TaskResult:
    """The record of a task that has run to its end on `device`; `seconds` by stage."""
    params, buffer = task.params, task.buffer
    assert params is not None
    assert buffer.timesteps is not None
    path = Path(buffer.save_path or "")
    used = [pipeline.spec.select_expert(t).name for t in buffer.timesteps.tolist()]
    return TaskResult(
        filename=path.name,
        prompt=params.prompt,
        seed=params.seed,
        step=params.num_inference_steps,
        task_id=task.task_id,
        video_path=str(path.absolute()),
        model=model,
        negative_prompt=params.negative_prompt,
        role=params.role,
        width=params.width,
        height=params.height,
        num_frames=params.num_frames,
        fps=params.fps,
        sample_solver=params.sample_solver,
        sample_shift=params.sample_shift,
        guidance_scale=params.guidance_scale,
        latent_shape=pipeline.spec.latent_shape(params.num_frames, params.height, params.width),
        seq_len=buffer.seq_len or 0,
        experts=tuple(dict.fromkeys(used)),
        attention=pipeline.attention.name,
        cross_attention=pipeline.attention.cross_name,
        dtype=dtype_name(pipeline.dtype),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        flexcache=flexcache,
        quant=pipeline.quant,
        parallel=asdict(mesh.degrees),
        approximations=(*pipeline.approximations(params), *_reuse(flexcache)),
        warnings=tuple(task.warnings),
        seconds={stage: round(value, 4) for stage, value in seconds.items()},
        peak_memory=memory.peak(device),
        memory_plan=memory_plan,
        versions={"chitu-diffusion": __version__, "torch": torch.__version__},
    )


def cache_record(params: ResolvedParams, cache: FlexCache, pictures: tuple[Path, ...]) -> CacheRecord:
    """What the strategy of a task did."""
    asked = params.flexcache
    assert asked is not None
    return CacheRecord(
        strategy=cache.name,
        cache_ratio=asked.cache_ratio,
        warmup=asked.warmup,
        cooldown=asked.cooldown,
        knobs=asdict(params.knobs),
        computed=dict(cache.tally.computed),
        reused=dict(cache.tally.reused),
        reused_steps=cache.tally.reused_steps,
        peak_gb=round(cache.kept.peak_bytes / 1e9, 4),
        pictures=tuple(str(path.absolute()) for path in pictures),
    )


def _reuse(flexcache: CacheRecord | None) -> tuple[str, ...]:
    if flexcache is None or not flexcache.reused_steps:
        return ()
    return (f"flexcache: {flexcache.strategy} reused features in {flexcache.reused_steps} steps",)
