"""Configurations and engines for tests, the small request that most of them make, and what becomes of it."""

from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from torch import Tensor

from chitu_core.config import Config, load
from chitu_core.environment import Environment
from chitu_diffusion.engine import Engine
from chitu_diffusion.task import (
    DiffusionTask,
    DiffusionTaskStatus,
    DiffusionTaskType,
    DiffusionUserParams,
    TaskPool,
)

SMALL: dict[str, Any] = {
    "prompt": "a red circle",
    "size": (32, 32),
    "num_frames": 5,
    "num_inference_steps": 2,
    "seed": 7,
}


def composed(*overrides: str) -> DictConfig:
    """serve_config as Hydra gives it to a script."""
    with initialize_config_module("chitu_core.config", version_base=None):
        return compose("serve_config", overrides=list(overrides))


def configured(*overrides: str) -> Config:
    """serve_config as an engine takes it."""
    return load(composed(*overrides))


def new_engine(*overrides: str, environment: Environment | None = None) -> Engine:
    """An engine with a pool of its own; on the CPU, unless an override says infer.op_impl=torch."""
    return Engine(configured("infer.op_impl=cpu", *overrides), TaskPool(), environment or Environment())


def submit(engine: Engine, **changes: Any) -> DiffusionTask:
    """The task of the small request with changes, which the engine's pool has taken."""
    task = DiffusionTask.from_user_request(DiffusionUserParams(**(SMALL | changes)))
    assert engine.pool.add(task)
    return task


def run(engine: Engine) -> None:
    """Step until all tasks have ended."""
    for _ in range(300):
        if engine.pool.all_finished():
            return
        engine.step()
    raise AssertionError("tasks did not end within 300 steps")


def clear(engine: Engine) -> None:
    """Call off what has not ended, and forget all tasks."""
    for task in engine.pool.unfinished():
        engine.pool.cancel(task.task_id)
    engine.step()
    engine.pool.reset()


def latents_of(engine: Engine, *tasks: DiffusionTask) -> list[Tensor]:
    """The last latents of tasks that are run together to their decoding, which is then called off."""
    found: dict[str, Tensor] = {}
    while len(found) < len(tasks):
        engine.step()
        for task in tasks:
            assert task.status != DiffusionTaskStatus.Failed, task.error_message
            is_denoised = task.is_running() and task.task_type == DiffusionTaskType.VAEDecode
            if is_denoised and task.task_id not in found:
                found[task.task_id] = task.buffer.latents.clone()
                engine.pool.cancel(task.task_id)
    return [found[task.task_id] for task in tasks]
