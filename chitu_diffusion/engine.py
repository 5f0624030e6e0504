"""One engine: the networks of a model, a pool of tasks, and `step`, which advances one task by one step."""

import logging
import time
from contextlib import ExitStack
from enum import Enum

import torch

from chitu_core import memory
from chitu_core.config import Config
from chitu_core.environment import Environment
from chitu_diffusion.generator import Generator
from chitu_diffusion.prepare import Pipeline, build_pipeline, pick_device, pick_dtype
from chitu_diffusion.resolve import remarks, resolve
from chitu_diffusion.run_folder import RunFolder
from chitu_diffusion.scheduler import DiffusionScheduler
from chitu_diffusion.stage_log import StageLog
from chitu_diffusion.task import DiffusionTask, DiffusionTaskBuffer, DiffusionTaskStatus, TaskPool

logger = logging.getLogger(__name__)

_ADVICE = "ask for a smaller size, fewer frames, or infer.max_reqs=1"


class BackendState(Enum):
    """The life of an engine."""

    Uninitialized = 0
    Initialized = 1
    Running = 2
    Terminating = 3
    Terminated = 4


class Engine:
    """Everything that one process runs, built from one configuration. Two engines do not see each other."""

    def __init__(self, config: Config, pool: TaskPool, environment: Environment) -> None:
        """Build all networks. Raises ValueError for a configuration or a checkpoint that cannot work."""
        if environment.world_size > 1:
            raise ValueError(f"WORLD_SIZE={environment.world_size}: this version runs in one process")
        self.config = config
        self.pool = pool
        self.scheduler = DiffusionScheduler(config.infer.schedule_policy, config.infer.max_reqs)
        self.log = StageLog(environment, config.output.enable_timer_dump)
        self.device = pick_device(config.infer.op_impl, environment.local_rank)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.folder = RunFolder(config, environment)
        with ExitStack() as undo:
            undo.callback(self.folder.end_log)  # the run's log listens from here on
            logger.info("model %s on %s, matrix products in %s", config.models.name, self.device, self.dtype)
            pipeline = build_pipeline(config, self.device, self.dtype)
            undo.pop_all()
        self.generator: Generator | None = Generator(pipeline, config, self.device, self.dtype, self.folder)
        self.state = BackendState.Initialized
        self._adopt()

    @property
    def pipeline(self) -> Pipeline:
        """The networks. Raises RuntimeError once the engine is closed."""
        return self._generator().pipeline

    def start(self) -> None:
        """Declare the engine running; `step` does so too."""
        self._generator()
        self.state = BackendState.Running

    @torch.inference_mode()
    def step(self) -> None:
        """Carry out wishes, then advance one task by one stage step; return if there is nothing to do.

        A task that raises becomes Failed with its message, and the next call goes on with the others.
        """
        generator = self._generator()
        self.state = BackendState.Running
        for task in self.pool.pool.values():
            if task.is_terminate_signal() and task.status == DiffusionTaskStatus.Pending:
                # ended, so that an engine built later does not obey it too
                self._finish(task, DiffusionTaskStatus.Completed, None)
                self.close()
                return
        for task in self.pool.unfinished():
            if task.cancel_requested:
                self._finish(task, DiffusionTaskStatus.Cancelled, "cancelled")
        for task_id in self.scheduler.schedule(self.pool):
            self._advance(self.pool.pool[task_id], generator)

    def close(self) -> None:
        """Cancel what is unfinished, write the run's last files and let go of all networks."""
        if self.generator is None:
            return
        self.state = BackendState.Terminating
        for task in self.pool.unfinished():
            self._finish(task, DiffusionTaskStatus.Cancelled, "terminated")
        self.pool.attach(None)
        timer, self.generator = self.generator.timer, None
        try:
            self.folder.close(timer)
        finally:  # a full disk must not keep the next engine from being built
            self._free()
            self.state = BackendState.Terminated

    def _generator(self) -> Generator:
        if self.generator is None:
            raise RuntimeError("this engine is terminated; call chitu_init for a new one")
        return self.generator

    def _adopt(self) -> None:
        """Complete the requests of tasks that came before the engine, and of those to come."""
        for task in self.pool.unfinished():
            try:
                self._admit(task)
            except ValueError as error:
                self._finish(task, DiffusionTaskStatus.Failed, str(error))
        self.pool.attach(self._admit)

    def _admit(self, task: DiffusionTask) -> None:
        """Complete a task's request. Raises ValueError if it does not fit the model."""
        if task.req is None or task.req.params is None:
            raise ValueError(
                f"task_id={task.task_id!r} has no request; make it with DiffusionTask.from_user_request"
            )
        if task.req.init_image is not None:
            raise ValueError(
                f"init_image: {self.config.models.name} makes video from text alone; leave it out"
            )
        task.params = resolve(task.req.params, self.config.models)
        flexcache_is_enabled = self.config.infer.diffusion.enable_flexcache
        for remark in remarks(task.params, self.config.models, flexcache_is_enabled):
            self.log.warning(task.task_id, remark)
            task.warnings.append(remark)

    def _advance(self, task: DiffusionTask, generator: Generator) -> None:
        task.status = DiffusionTaskStatus.Running
        task.started_at = task.started_at or time.time()
        failure, ran_out = None, False
        try:
            if generator.step(task, self.log):
                self._finish(task, DiffusionTaskStatus.Completed, None)
        except Exception as error:  # the one place where a task's failure becomes its status
            logger.exception("task_id=%s failed", task.task_id)
            ran_out = memory.is_out_of_memory(error)
            failure = f"{type(error).__name__}: {error}"
        if failure is not None:  # NOTE outside of `except`, where the traceback would keep the tensors alive
            message = f"out of memory; {_ADVICE} ({failure})" if ran_out else failure
            self._finish(task, DiffusionTaskStatus.Failed, message)
            self._free()

    def _finish(self, task: DiffusionTask, status: DiffusionTaskStatus, message: str | None) -> None:
        """End a task and free what it holds, but for the path of its video and its step count."""
        task.status = status
        task.error_message = message
        task.finished_at = time.time()
        task.buffer = DiffusionTaskBuffer(
            current_step=task.buffer.current_step, save_path=task.buffer.save_path
        )

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
