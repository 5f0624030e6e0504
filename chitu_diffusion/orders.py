"""What ranks tell each other at every step, as JSON: the orders of rank 0, and a report of each rank.

Tensors never travel here, nor does a task once its ranks know it: each has its own copy and moves it alike.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from chitu_diffusion.params import DiffusionUserParams
from chitu_diffusion.task import DiffusionTask, DiffusionUserRequest


@dataclass(frozen=True)
class Run:
    """One step of a task; its request comes with the first one."""

    task_id: str
    request_id: str | None = None
    params: dict[str, Any] | None = None  # fields of DiffusionUserParams, the seed among them

    @classmethod
    def of(cls, task: DiffusionTask) -> "Run":
        """The next step of a task that rank 0 knows."""
        if task.replica is not None:
            return cls(task.task_id)
        assert task.req is not None
        assert task.req.params is not None
        assert task.params is not None
        return cls(task.task_id, task.req.request_id, asdict(replace(task.req.params, seed=task.params.seed)))

    def request(self) -> DiffusionUserRequest | None:
        """The request as rank 0 completed it; None after the first step."""
        if self.request_id is None or self.params is None:
            return None
        return DiffusionUserRequest(self.request_id, DiffusionUserParams(**self.params))


@dataclass(frozen=True)
class Orders:
    """What all ranks do in one step."""

    runs: tuple[Run | None, ...] = ()  # by replica
    cancelled: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)  # task: why it cannot begin
    run_dir: str | None = None  # where videos go that have no place of their own
    is_last: bool = False  # the engine ends

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (any(self.runs) or self.cancelled or self.refused or self.is_last)

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> "Orders":
        """From JSON."""
        content = json.loads(text)
        content["runs"] = tuple(None if run is None else Run(**run) for run in content["runs"])
        content["cancelled"] = tuple(content["cancelled"])
        return cls(**content)


@dataclass(frozen=True)
class Report:
    """What one rank did in one step."""

    failure: str | None = None
    is_complete: bool = False
    stage: str | None = None  # of the task's next step
    current_step: int = 0
    save_path: str | None = None
    result: dict[str, Any] | None = None  # a finished task's record, from the rank that wrote it
    wishes: tuple[str, ...] = ()  # tasks that somebody on this rank wants cancelled

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> "Report":
        """From JSON."""
        content = json.loads(text)
        content["wishes"] = tuple(content["wishes"])
        return cls(**content)
