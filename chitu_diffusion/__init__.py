"""Smart-Diffusion: text to video with Wan diffusion transformers."""

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.chitu_diffusion_main import (
    chitu_generate,
    chitu_init,
    chitu_is_terminated,
    chitu_run_eval,
    chitu_start,
    chitu_terminate,
)
from chitu_diffusion.scheduler import DiffusionScheduler
from chitu_diffusion.task import (
    DiffusionTask,
    DiffusionTaskPool,
    DiffusionTaskStatus,
    DiffusionTaskType,
    DiffusionUserParams,
    DiffusionUserRequest,
    FlexCacheParams,
)

__all__ = [
    "DiffusionBackend",
    "DiffusionScheduler",
    "DiffusionTask",
    "DiffusionTaskPool",
    "DiffusionTaskStatus",
    "DiffusionTaskType",
    "DiffusionUserParams",
    "DiffusionUserRequest",
    "FlexCacheParams",
    "chitu_generate",
    "chitu_init",
    "chitu_is_terminated",
    "chitu_run_eval",
    "chitu_start",
    "chitu_terminate",
]
