"""Tasks and the pool that holds them: who asked for what, how far it is, and how it ended.

Only an engine changes a task's status; everybody else sets a wish (`cancel`) that its next step carries out.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from chitu_core.timing import Span
from chitu_diffusion import serialization
from chitu_diffusion.flex_cache._base import FlexCache
from chitu_diffusion.params import DiffusionUserParams, FlexCacheParams
from chitu_diffusion.resolve import ResolvedParams
from chitu_diffusion.result import TaskResult
from chitu_diffusion.samplers._flow import FlowSampler

__all__ = [
    "DiffusionTask",
    "DiffusionTaskBuffer",
    "DiffusionTaskPool",
    "DiffusionTaskStatus",
    "DiffusionTaskType",
    "DiffusionUserParams",
    "DiffusionUserRequest",
    "FlexCacheParams",
    "TaskPool",
]


class DiffusionTaskType(Enum):
    """The stage that a task's next step belongs to."""

    TextEncode = 1
    VAEEncode = 2
    Denoise = 3
    VAEDecode = 4
    Terminate = 5


class DiffusionTaskStatus(Enum):
    """Where a task stands."""

    Pending = 1
    Running = 2
    Completed = 3
    Failed = 4
    Cancelled = 5


_FINISHED = (DiffusionTaskStatus.Completed, DiffusionTaskStatus.Failed, DiffusionTaskStatus.Cancelled)
_PHASES = {
    DiffusionTaskType.TextEncode: "encoding",
    DiffusionTaskType.VAEEncode: "encoding",
    DiffusionTaskType.Denoise: "denoising",
    DiffusionTaskType.VAEDecode: "decoding",
}
_PHASE_NAMES = ("pending", "encoding", "denoising", "decoding", "finished", "failed", "cancelled")


@dataclass(frozen=True)
class DiffusionUserRequest:
    """A user's parameters under the id that logs and files know them by; ValueError for anything else."""

    request_id: str
    params: DiffusionUserParams | None = None
    init_image: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.request_id, str) or not self.request_id:
            raise ValueError(f"request_id={self.request_id!r}: must be text that is not empty")
        if not isinstance(self.params, DiffusionUserParams | None):
            raise ValueError(f"params={self.params!r}: must be DiffusionUserParams, or None")

    def get_role(self) -> str:
        """The user's label."""
        return self.params.role if self.params else "user"

    def get_prompt(self) -> str:
        """The prompt, "" where there is none."""
        return (self.params.prompt if self.params else None) or ""

    def get_n_prompt(self) -> str:
        """The negative prompt that the user gave, "" where there is none."""
        return (self.params.negative_prompt if self.params else None) or ""


@dataclass
class DiffusionTaskBuffer:
    """What a task holds between its steps; freed when it ends, but for `save_path`."""

    text_embeddings: Tensor | None = None  # [n, text_dim]
    negative_embeddings: Tensor | None = None  # [n, text_dim]
    seq_len: int | None = None  # tokens that the transformer sees
    seed_g: torch.Generator | None = None  # drew the noise
    sampler: FlowSampler | None = None
    latents: Tensor | None = None  # [C, T, h, w] fp32
    timesteps: Tensor | None = None  # int64 [N], on the device
    current_step: int = 0
    text_caches: dict[str, Any] = field(default_factory=dict)  # by branch, of the expert in `expert`
    expert: str | None = None
    flexcache: FlexCache | None = None  # after the last step it keeps no tensor
    spans: list[tuple[str, Span]] = field(default_factory=list)  # (stage, interval)
    save_path: str | None = None


class DiffusionTask:
    """One video on its way: a request, the stage of its next step, and what it holds meanwhile."""

    _made = itertools.count()  # by this process: ranks that make the same tasks give them the same ids

    def __init__(
        self,
        task_id: str,
        task_type: DiffusionTaskType | None = None,
        req: DiffusionUserRequest | None = None,
        buffer: DiffusionTaskBuffer | None = None,
        signal_data: dict[str, Any] | None = None,
    ) -> None:
        self.task_id = task_id
        self.task_type = task_type or DiffusionTaskType.TextEncode
        self.req = req
        self.buffer = buffer or DiffusionTaskBuffer()
        self.signal_data = signal_data
        self.status = DiffusionTaskStatus.Pending
        self.error_message: str | None = None
        self.params: ResolvedParams | None = None  # complete; set when the task enters an engine's pool
        self.cache_bytes = 0  # that its cache may take on a rank, once the request is complete
        self.result: TaskResult | None = None
        self.warnings: list[str] = []
        self.cancel_requested = False
        self.replica: int | None = None  # the copy of the mesh that runs it, from the first step on
        self.created_at = time.time()
        self.started_at: float | None = None
        self.finished_at: float | None = None

    @classmethod
    def from_user_request(cls, params: DiffusionUserParams | DiffusionUserRequest) -> "DiffusionTask":
        """A pending task for `params`, under a new id of eight hexadecimal digits.

        The id is a hash of how many were made before and of the parameters, so that ranks that run the same
        script find the same ids.

        Raises ValueError for anything else than parameters or a request.
        """
        if isinstance(params, DiffusionUserRequest):
            return cls(params.request_id, req=params)
        if not isinstance(params, DiffusionUserParams):
            raise ValueError(f"params={params!r}: give DiffusionUserParams or a DiffusionUserRequest")
        seen = f"{next(cls._made)} {params!r}".encode(errors="surrogatepass")
        task_id = blake2b(seen, digest_size=4).hexdigest()
        return cls(task_id, req=DiffusionUserRequest(task_id, params))

    @classmethod
    def create_terminate_signal(
        cls, task_id: str | None = None, reason: str = "Normal shutdown"
    ) -> "DiffusionTask":
        """A task that asks the engine to stop."""
        now = time.time()
        signal_id = task_id or f"terminate_signal_{int(now * 1000)}"
        return cls(signal_id, DiffusionTaskType.Terminate, signal_data={"reason": reason, "timestamp": now})

    @property
    def user_params(self) -> DiffusionUserParams | None:
        """What the user said."""
        return self.req.params if self.req else None

    @property
    def current_step(self) -> int:
        """Denoising steps done."""
        return self.buffer.current_step

    @property
    def phase(self) -> str:
        """pending, encoding, denoising, decoding, finished, failed or cancelled."""
        if self.status == DiffusionTaskStatus.Running:
            return _PHASES[self.task_type]
        return "finished" if self.status == DiffusionTaskStatus.Completed else self.status.name.lower()

    def serialize(self, device: torch.device | str = "cpu") -> Tensor:
        """The task as a 1-D uint8 tensor on `device`; what it carries is said in serialization.py."""
        return serialization.serialize(self, device)

    @staticmethod
    def deserialize(message: Tensor) -> "DiffusionTask":
        """The task in a message of `serialize`. Raises ValueError for any other tensor."""
        return serialization.deserialize(message)

    @staticmethod
    def create_empty_serialization(size: int, device: torch.device | str = "cpu") -> Tensor:
        """`size` zero bytes on `device`, to receive a message into."""
        return serialization.empty(size, device)

    def is_terminate_signal(self) -> bool:
        """Whether this task asks the engine to stop."""
        return self.task_type == DiffusionTaskType.Terminate

    def is_finished(self) -> bool:
        """Whether the task has ended, well or not."""
        return self.is_terminate_signal() or self.status in _FINISHED

    is_completed = is_finished

    def is_running(self) -> bool:
        """Whether the task has begun and not ended."""
        return self.status == DiffusionTaskStatus.Running and not self.is_terminate_signal()

    def get_elapsed_time(self) -> float:
        """Seconds from the first step to the end, or to now; 0 before the first step."""
        if self.started_at is None:
            return 0.0
        return (self.finished_at or time.time()) - self.started_at


class TaskPool:
    """All tasks of an engine by id, in the order in which they came."""

    def __init__(self) -> None:
        self.pool: dict[str, DiffusionTask] = {}
        self.id_list: list[str] = []
        self.pending_queue: list[DiffusionTask] = []
        self._admit: Callable[[DiffusionTask], None] | None = None

    def attach(self, admit: Callable[[DiffusionTask], None] | None) -> None:
        """Name what completes a new task's request (an engine's), or None when the engine goes."""
        self._admit = admit

    def reset(self) -> None:
        """Forget all tasks, queued ones too."""
        self.pool.clear()
        self.id_list.clear()
        self.pending_queue.clear()

    def is_empty(self) -> bool:
        """Whether no task is known."""
        return not self.pool

    def all_finished(self) -> bool:
        """Whether every task has ended; True for an empty pool."""
        return all(task.is_finished() for task in self.pool.values())

    def add(self, task: DiffusionTask) -> bool:
        """Take a task in; False if its id is known. Raises ValueError if it does not fit the model."""
        if task.task_id in self.pool:
            return False
        if self._admit is not None and not task.is_terminate_signal():
            self._admit(task)
        self.pool[task.task_id] = task
        self.id_list.append(task.task_id)
        return True

    def enqueue(self, task: DiffusionTask) -> None:
        """Hold a task back until `add_all_queued`."""
        self.pending_queue.append(task)

    def add_all_queued(self) -> None:
        """Take in every task that was held back."""
        while self.pending_queue:
            self.add(self.pending_queue.pop(0))

    def remove(self, task_id: str) -> None:
        """Forget a task and free what it holds. Raises ValueError for an unknown id or a running task."""
        task = self.pool.get(task_id)
        if task is None:
            raise ValueError(f"task_id={task_id!r} is not in the pool")
        if task.is_running():
            raise ValueError(f"task_id={task_id!r} is running; cancel it first")
        del self.pool[task_id]
        self.id_list.remove(task_id)
        task.buffer = DiffusionTaskBuffer(save_path=task.buffer.save_path)

    def cancel(self, task_id: str) -> bool:
        """Wish a task away; the next step carries it out. False if it is unknown or has ended."""
        task = self.pool.get(task_id)
        if task is None or task.is_finished():
            return False
        task.cancel_requested = True
        return True

    def get(self, task_id: str) -> DiffusionTask | None:
        """The task of an id."""
        return self.pool.get(task_id)

    def share(self, replica: int) -> "TaskPool":
        """The tasks that one copy of the mesh may run: its own, and those that none has begun."""
        share = TaskPool()
        share.pool = {key: task for key, task in self.pool.items() if task.replica in (None, replica)}
        share.id_list = [task_id for task_id in self.id_list if task_id in share.pool]
        return share

    def unfinished(self) -> list[DiffusionTask]:
        """Tasks that have not ended, oldest first."""
        return [self.pool[task_id] for task_id in self.id_list if not self.pool[task_id].is_finished()]

    def get_pending_tasks(self) -> list[str]:
        """Ids of the tasks that have not begun, oldest first."""
        return [task.task_id for task in self.unfinished() if task.status == DiffusionTaskStatus.Pending]

    def get_statistics(self) -> dict[str, int]:
        """How many tasks are in each phase."""
        phases = [task.phase for task in self.pool.values() if not task.is_terminate_signal()]
        return {name: phases.count(name) for name in _PHASE_NAMES}


class DiffusionTaskPool:
    """The process's own task pool: the methods of one `TaskPool`, by name."""

    instance = TaskPool()
    pool, id_list, pending_queue = instance.pool, instance.id_list, instance.pending_queue
    reset, is_empty, all_finished = instance.reset, instance.is_empty, instance.all_finished
    add, enqueue, add_all_queued = instance.add, instance.enqueue, instance.add_all_queued
    remove, cancel, get = instance.remove, instance.cancel, instance.get
    get_pending_tasks, get_statistics = instance.get_pending_tasks, instance.get_statistics
