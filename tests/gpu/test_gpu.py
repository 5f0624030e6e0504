"""What only a GPU can show: the engine there, no host sync in a step, out of memory, the README's size."""

import gc
import logging

import pytest
import torch
from engines import configured
from oracles import relative_error

from chitu_core.environment import Environment
from chitu_diffusion.engine import Engine
from chitu_diffusion.task import (
    DiffusionTask,
    DiffusionTaskStatus,
    DiffusionTaskType,
    DiffusionUserParams,
    TaskPool,
)

pytestmark = pytest.mark.gpu

PROMPT = "a red circle moves right on a blue background"


@pytest.fixture
def make_engine(tmp_path):
    engines = []

    def make(*overrides: str) -> Engine:
        config = configured(f"output.root_dir={tmp_path}", *overrides)
        engines.append(Engine(config, TaskPool(), Environment()))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def submit(engine: Engine, **params) -> DiffusionTask:
    task = DiffusionTask.from_user_request(DiffusionUserParams(**({"prompt": PROMPT, "seed": 5} | params)))
    engine.pool.add(task)
    return task


def finish(engine: Engine) -> None:
    while not engine.pool.all_finished():
        engine.step()


def latents_from(engine: Engine, noise: torch.Tensor) -> torch.Tensor:
    """The final latents of the demo clip from given noise, since CPU and GPU draw different numbers."""
    task = submit(engine)
    engine.step()
    engine.generator._start_denoise(task, engine.log)
    task.buffer.latents = noise.to(engine.device)
    while task.task_type != DiffusionTaskType.VAEDecode:
        engine.step()
    return task.buffer.latents.cpu()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-4), ("float16", 2e-2), ("bfloat16", 1e-1)])
def test_the_demo_clip_is_the_same_on_gpu_and_cpu(make_engine, dtype, limit):
    # fp32 without TF32 differs by the order of sums; 20 guided steps amplify the rounding of half types
    noise = torch.randn(16, 5, 12, 20, generator=torch.Generator().manual_seed(0))
    on_cpu = latents_from(make_engine("infer.op_impl=cpu"), noise)
    on_gpu = latents_from(make_engine(f"infer.dtype={dtype}"), noise)
    error = relative_error(on_gpu, on_cpu)
    print(f"{dtype}: {error:.2e}")
    assert error < limit


def test_the_auto_dtype_is_bfloat16(make_engine):
    engine = make_engine()
    task = submit(engine, num_inference_steps=2)
    finish(engine)
    assert (task.status, task.result.dtype) == (DiffusionTaskStatus.Completed, "bfloat16")
    assert task.result.peak_memory.device_gib > 0
    assert set(task.result.seconds) == {"TextEncode", "Denoise", "VAEDecode", "total"}


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_a_denoising_step_never_waits_for_the_device(make_engine, solver):
    engine = make_engine()
    submit(engine, sample_solver=solver, num_inference_steps=6)
    for _ in range(2):  # encoding, and the step that uploads timesteps and builds the text keys and values
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(task.status == DiffusionTaskStatus.Running for task in engine.pool.unfinished())
    finish(engine)


def test_out_of_memory_fails_the_task_and_leaves_the_engine_usable(make_engine, monkeypatch):
    # pytest keeps the traceback that is logged, and with it the tensors of its frames
    monkeypatch.setattr(logging.getLogger("chitu_diffusion.engine"), "disabled", True)
    engine = make_engine()
    gc.collect()  # what the engines of other tests held counts too
    torch.cuda.empty_cache()
    limit = 2**30
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        big = submit(engine, width=1920, height=1088, num_frames=81, num_inference_steps=1)
        small = submit(engine, num_inference_steps=2)
        finish(engine)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert big.status == DiffusionTaskStatus.Failed
    assert "out of memory" in big.error_message
    assert "smaller size" in big.error_message
    assert small.status == DiffusionTaskStatus.Completed, small.error_message


def test_memory_is_flat_over_many_requests(make_engine):
    engine = make_engine()
    held = []
    for seed in range(6):
        submit(engine, seed=seed, num_inference_steps=2)
        finish(engine)
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[1]


def test_the_example_of_the_readme_runs_at_its_own_size(make_engine):
    engine = make_engine()
    task = submit(engine, num_inference_steps=50, height=480, width=848, num_frames=81, guidance_scale=7.0)
    finish(engine)
    assert task.status == DiffusionTaskStatus.Completed, task.error_message
    print(task.result.seconds, task.result.peak_memory)


def test_timers_are_cuda_events_and_only_on_request(make_engine, tmp_path):
    engine = make_engine("output.enable_timer_dump=true")
    submit(engine, num_inference_steps=3)
    finish(engine)
    engine.close()
    (csv_file,) = tmp_path.glob("*/time_stats.csv")
    names = [line.split(",")[1] for line in csv_file.read_text().splitlines()]
    assert names == ["Timer Name", "TextEncode", "denoise", "VaeDecode", "overall"]
