"""What this rank knows of all tasks, kept equal on all ranks: requests, orders and reports, written down.

Rank 0's pool is the one that counts. Other ranks have copies, made by the same script or by an order.
"""

import time

from chitu_core.config import Config
from chitu_core.distributed import ParallelMesh
from chitu_diffusion.cache_plan import CachePlan
from chitu_diffusion.memory_gate import MemoryGate
from chitu_diffusion.orders import Orders, Report, Run
from chitu_diffusion.resolve import remarks, resolve
from chitu_diffusion.result import TaskResult
from chitu_diffusion.stage_log import StageLog
from chitu_diffusion.task import (
    DiffusionTask,
    DiffusionTaskBuffer,
    DiffusionTaskStatus,
    DiffusionTaskType,
    DiffusionUserParams,
    TaskPool,
)

_ORPHAN = "rank 0 does not know this task; add it on rank 0, or on every rank alike"


class Ledger:
    """The tasks of one engine; it alone changes a task's status."""

    def __init__(
        self,
        pool: TaskPool,
        mesh: ParallelMesh,
        config: Config,
        log: StageLog,
        *,
        cache_plan: CachePlan,
        gate: MemoryGate,
    ) -> None:
        self.pool = pool
        self.cache_plan = cache_plan
        self.gate = gate
        self.mesh = mesh
        self.config = config
        self.log = log

    def adopt(self) -> None:
        """Complete the requests of tasks that came before the engine, and of those to come."""
        for task in self.pool.unfinished():
            try:
                self.admit(task)
            except ValueError as error:
                self.finish(task, DiffusionTaskStatus.Failed, str(error))
        self.pool.attach(self.admit)

    def admit(self, task: DiffusionTask) -> None:
        """Complete a task's request. Raises ValueError if it does not fit the model."""
        if task.req is None or task.req.params is None:
            raise ValueError(
                f"task_id={task.task_id!r} has no request; make it with DiffusionTask.from_user_request"
            )
        if task.req.init_image is not None:
            raise ValueError(
                f"init_image: {self.config.models.name} makes video from text alone; leave it out"
            )
        self._complete(task, task.req.params)
        params, plan = task.params, self.cache_plan
        assert params is not None
        found = remarks(params, self.config.models, plan.is_enabled, self.mesh.degrees.cfg)
        for remark in (*found, *plan.remarks(params)):
            if self.mesh.rank == 0:
                self.log.warning(task.task_id, remark)
            task.warnings.append(remark)
        refusal = plan.refusal(params) or self.gate.refusal(params, task.cache_bytes)
        if refusal is not None:
            self.finish(task, DiffusionTaskStatus.Failed, refusal)

    def _complete(self, task: DiffusionTask, asked: DiffusionUserParams) -> None:
        task.params = self.cache_plan.complete(resolve(asked, self.config.models))
        task.cache_bytes = self.cache_plan.footprint(task.params)

    def accept(self, orders: Orders) -> None:
        """Bring this rank's pool to where rank 0's is."""
        for task_id in orders.cancelled:
            self._finish_if_known(task_id, DiffusionTaskStatus.Cancelled, "cancelled")
        for task_id, reason in orders.refused.items():
            self._finish_if_known(task_id, DiffusionTaskStatus.Failed, reason)
        for replica, run in enumerate(orders.runs):
            if run is not None:
                task = self._task_of(run)
                task.replica, task.status = replica, DiffusionTaskStatus.Running
                task.started_at = task.started_at or time.time()
        if orders.is_idle:
            for task in self.pool.unfinished():
                self.finish(task, DiffusionTaskStatus.Failed, _ORPHAN)

    def _task_of(self, run: Run) -> DiffusionTask:
        """This rank's copy of a task, made or completed from the request that comes with the first step."""
        request = run.request() if self.mesh.degrees.world > 1 else None
        if request is not None and request.params is not None:
            if run.task_id not in self.pool.pool:
                self.pool.add(DiffusionTask(run.task_id, req=request))
            task = self.pool.pool[run.task_id]
            self._complete(task, request.params)  # a seed that was drawn is rank 0's
            # one that was serialized amid its run has its tensors on one rank: all begin it anew, alike
            task.task_type, task.buffer = DiffusionTaskType.TextEncode, DiffusionTaskBuffer()
        return self.pool.pool[run.task_id]

    def record(self, orders: Orders, reports: list[Report]) -> None:
        """Make every rank's copies of the tasks say what the ranks that ran them said."""
        for replica, run in enumerate(orders.runs):
            if run is None:
                continue
            task = self.pool.pool[run.task_id]
            ranks = self.mesh.replica_ranks(replica)
            failures = [(rank, reports[rank].failure) for rank in ranks if reports[rank].failure is not None]
            self._follow(task, reports[ranks[0]], is_own=replica == self.mesh.place.dp)
            if failures:
                rank, failure = failures[0]
                where = f"rank {rank}: " if len(ranks) > 1 else ""
                self.finish(task, DiffusionTaskStatus.Failed, f"{where}{failure}")
            elif reports[ranks[0]].is_complete:
                self.finish(task, DiffusionTaskStatus.Completed, None)
        for report in reports:
            for task_id in report.wishes:
                self.pool.cancel(task_id)

    def _follow(self, task: DiffusionTask, leader: Report, *, is_own: bool) -> None:
        """Take over from the leader's report what this rank cannot know."""
        assert leader.stage is not None
        task.task_type = DiffusionTaskType[leader.stage]
        task.buffer.current_step, task.buffer.save_path = leader.current_step, leader.save_path
        if leader.result is not None and task.result is None:
            task.result = TaskResult.from_record(leader.result)
        if leader.is_complete and not is_own and self.mesh.rank == 0:
            self.log.saved(task.task_id, leader.save_path or "")

    def _finish_if_known(self, task_id: str, status: DiffusionTaskStatus, message: str) -> None:
        task = self.pool.get(task_id)
        if task is not None and not task.is_finished():
            self.finish(task, status, message)

    def finish(self, task: DiffusionTask, status: DiffusionTaskStatus, message: str | None) -> None:
        """End a task and free what it holds, but for its step count; if it is complete, path and result stay.

        A task whose record could not be written, or that another rank could not end, has failed though its
        video is there.
        """
        is_complete = status == DiffusionTaskStatus.Completed
        task.result = task.result if is_complete else None
        task.status = status
        task.error_message = message
        task.finished_at = time.time()
        task.buffer = DiffusionTaskBuffer(
            current_step=task.buffer.current_step, save_path=task.buffer.save_path if is_complete else None
        )
