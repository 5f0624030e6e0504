"""Which task takes the next step. A policy sees unfinished tasks, oldest first, and never a tensor."""

import math
from collections.abc import Callable, Sequence

from chitu_diffusion.task import DiffusionTask, DiffusionTaskStatus, TaskPool

Choose = Callable[[Sequence[DiffusionTask]], DiffusionTask]


class DiffusionScheduler:
    """Picks one task a step by `policy`: `fifo`, `priority`, `round_robin`; override `schedule` for another.

    At most `max_reqs` tasks are begun and unfinished at once, so that memory for denoising state is
    bounded; one, if `one_by_one`, which runs to its end before another begins. A task waits until its cache
    fits beside those of the begun ones, in `cache_limit` bytes. With data parallelism each replica is asked
    for by itself, with the tasks that it may run. Raises ValueError for an unknown policy.
    """

    def __init__(
        self,
        policy: str = "fifo",
        max_reqs: int = 8,
        cache_limit: float = math.inf,
        *,
        one_by_one: bool = False,
    ) -> None:
        policies: dict[str, Choose] = {
            "fifo": lambda tasks: tasks[0],
            "priority": _highest_priority,
            "round_robin": self._next_role,
        }
        if policy not in policies:
            raise ValueError(
                f"infer.schedule_policy={policy!r} is unknown; choose one of {', '.join(policies)}"
            )
        self.policy = policy
        self.max_reqs = 1 if one_by_one else max_reqs
        self.cache_limit = cache_limit
        self._choose = policies[policy]
        self._last_role: str | None = None

    def schedule(self, pool: TaskPool) -> list[str]:
        """The id of the task to advance, in a list; an empty list when there is nothing to do."""
        tasks = pool.unfinished()
        begun = [task for task in tasks if task.is_running()]
        room = self.cache_limit - sum(task.cache_bytes for task in begun)
        may_begin = len(begun) < self.max_reqs
        eligible = [task for task in tasks if task.is_running() or (may_begin and task.cache_bytes <= room)]
        return [self._choose(eligible).task_id] if eligible else []

    def can_schedule(self, pool: TaskPool) -> bool:
        """Whether any task is unfinished."""
        return bool(pool.unfinished())

    def get_pending_count(self, pool: TaskPool) -> int:
        """How many tasks have not begun."""
        return sum(task.status == DiffusionTaskStatus.Pending for task in pool.unfinished())

    get_queue_length = get_pending_count

    def get_scheduler_info(self, pool: TaskPool) -> dict[str, object]:
        """Policy, limit and counts, for logs and monitoring."""
        running = sum(task.is_running() for task in pool.unfinished())
        pending = self.get_pending_count(pool)
        return {"policy": self.policy, "max_reqs": self.max_reqs, "pending": pending, "running": running}

    def _next_role(self, tasks: Sequence[DiffusionTask]) -> DiffusionTask:
        """Serve roles in turn, each by its oldest task; a role's turn comes after the one served last."""
        roles = list(dict.fromkeys(_role(task) for task in tasks))
        turn = (roles.index(self._last_role) + 1) % len(roles) if self._last_role in roles else 0
        self._last_role = roles[turn]
        return next(task for task in tasks if _role(task) == roles[turn])


def _highest_priority(tasks: Sequence[DiffusionTask]) -> DiffusionTask:
    # of equals, max keeps the first, which is the oldest
    return max(tasks, key=lambda task: task.user_params.priority if task.user_params else 0)


def _role(task: DiffusionTask) -> str:
    return task.req.get_role() if task.req else ""
