"""One engine: the networks of a model, a pool of tasks, and `step`, which advances tasks by one step.

On several ranks every rank has an engine. Rank 0 gives orders at each step, all obey and report, and all
record the same: only `step` changes a task's status, so a loop that every rank runs ends everywhere alike.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from enum import Enum
from pathlib import Path

import torch
from omegaconf import OmegaConf

from chitu_core import memory
from chitu_core.config import Config, InferConfig, VideoSize
from chitu_core.distributed import Degrees, RankFailure, open_mesh, plan_degrees
from chitu_core.environment import Environment
from chitu_core.timing import Timer
from chitu_diffusion.attention_plan import AttentionPlan, plan_attention
from chitu_diffusion.cache_plan import CachePlan
from chitu_diffusion.generator import Generator
from chitu_diffusion.guidance import needs_cfg
from chitu_diffusion.ledger import Ledger
from chitu_diffusion.memory_choice import Limits
from chitu_diffusion.memory_gate import MemoryGate, least, own_limits, settle, videos_of
from chitu_diffusion.memory_setting import DIT_ON_HOST, Setting
from chitu_diffusion.orders import Orders, Report, Run
from chitu_diffusion.outputs import RequestRecord
from chitu_diffusion.prepare import Pipeline, build_pipeline
from chitu_diffusion.run_folder import RunFolder
from chitu_diffusion.scheduler import DiffusionScheduler
from chitu_diffusion.stage_log import StageLog
from chitu_diffusion.survey import Survey, pick_device, pick_dtype, spec_of, survey
from chitu_diffusion.task import DiffusionTask, DiffusionTaskStatus, TaskPool
from chitu_diffusion.warm_up import warm_up

logger = logging.getLogger(__name__)

_ADVICE = "ask for a smaller size, fewer frames, infer.max_reqs=1, or a higher infer.diffusion.low_mem_level"


class BackendState(Enum):
    """The life of an engine."""

    Uninitialized = 0
    Initialized = 1
    Running = 2
    Terminating = 3
    Terminated = 4


class Engine:
    """Everything that one process runs, built from one configuration. Two engines do not see each other."""

    def __init__(
        self,
        config: Config,
        pool: TaskPool,
        environment: Environment,
        *,
        expected: Sequence[VideoSize] = (),
    ) -> None:
        """Join the other ranks and build all networks; `low_mem_level=auto` makes room for `expected` videos.

        Raises ValueError for a configuration or a checkpoint that cannot work; what can be told without other
        ranks is told before they are joined. Raises RuntimeError for what went wrong on another rank.
        """
        self.pool = pool
        local = (environment.local_rank, environment.local_world_size)
        if config.infer.diffusion.low_mem_level != 0:
            memory.grow_segments()
        self.device = pick_device(config.infer.op_impl, *local)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.folder = RunFolder(config, environment)
        with ExitStack() as undo:
            undo.callback(self.folder.end_log)  # the run's log listens from here on
            logger.info("model %s on %s, matrix products in %s", config.models.name, self.device, self.dtype)
            found = survey(config, self.device, self.dtype)
            degrees = _plan(config, found, environment)
            attention = plan_attention(config.infer, found.place, found.sizes.dit.num_layers, degrees.ring)
            spec, dtype = spec_of(config, found.sizes), found.place.dtype
            cache_plan = CachePlan(config, spec, found.sizes.dit, degrees, dtype)
            self.mesh = open_mesh(degrees, environment, self.device)
            undo.callback(self.mesh.close)
            self.channel = self.mesh.channel()
            self._check_alike(config, attention)
            limits = self._limits()
            local_ranks = environment.local_world_size
            setting = Setting.of(config, found.sizes, found.place, degrees, local_ranks)
            videos = videos_of(config, expected)
            self.config = config = settle(config, setting, limits, videos)
            diffusion = config.infer.diffusion
            each = diffusion.resident_bytes // len(found.sizes.experts)
            gate = MemoryGate(setting, limits, diffusion.level, each)
            gate.announce(videos)
            timer = Timer(self.device, config.output.enable_timer_dump)
            pipeline = self._build(found, attention, timer)
            undo.pop_all()
        self.log = StageLog(environment, config.output.enable_timer_dump, is_quiet=not self.mesh.is_leader)
        self.scheduler = _scheduler(config.infer, cache_plan.limit_bytes)
        self.ledger = Ledger(pool, self.mesh, config, self.log, cache_plan=cache_plan, gate=gate)
        generator = Generator(
            pipeline,
            config,
            self.mesh,
            self.folder,
            self.device,
            timer=timer,
            cache_plan=cache_plan,
            gate=gate,
        )
        self._make_ready(pipeline)
        self.generator: Generator | None = generator
        self._is_amid_step = False
        self.state = BackendState.Initialized

    @torch.inference_mode()
    def _make_ready(self, pipeline: Pipeline) -> None:
        """Run what `infer.warmup` lists, take the pool over; an engine that fails at it must not be used."""
        with ExitStack() as undo:
            undo.callback(self.folder.end_log)
            undo.callback(self.mesh.abandon, "failed to start")
            with self.mesh.guard("warm-up"):
                warm_up(pipeline, self.config.infer.warmup_sizes, self.device)
            self.ledger.adopt()
            undo.pop_all()

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
        """Carry out wishes, then advance one task of each replica by one stage step; return if there is none.

        A task that raises becomes Failed with its message, and the next call goes on with the others. Every
        rank must call this; a rank above 0 waits for orders. Raises RankFailure if this rank failed where
        others wait for it: the job then ends.
        """
        generator = self._generator()
        self.state = BackendState.Running
        self._is_amid_step = True
        own = self._orders().encode() if self.mesh.rank == 0 else ""
        with self.mesh.guard("orders", everybody=True):
            orders = Orders.decode(self.channel.agree(own))
        if orders.run_dir is not None and self.mesh.rank > 0:
            self.folder.adopt(Path(orders.run_dir))
        self.ledger.accept(orders)
        if not (orders.is_last or orders.is_idle):
            report = self._advance(orders.runs[self.mesh.place.dp], generator)
            with self.mesh.guard("reports", everybody=True):
                texts = self.channel.gather(report.encode())
            reports = [Report.decode(text) for text in texts]
            self.ledger.record(orders, reports)
            if any(report.failure is not None for report in reports):
                self._free()
        self._is_amid_step = False
        if orders.is_last:
            self._end()

    def close(self) -> None:
        """Cancel what is unfinished, write the run's last files and let go of all networks.

        On a rank above 0 this waits for rank 0 to do so, and obeys it until then.
        """
        if self._is_amid_step:  # an exception left it: the ranks are out of step, and only this one can end
            self.mesh.abandon("left amid a step")
            self._end()
        elif self.generator is not None and self.mesh.rank == 0:
            self.channel.agree(Orders(is_last=True).encode())
            self._end()
        while self.generator is not None:
            self.step()

    def _end(self) -> None:
        if self.generator is None:
            return
        self.state = BackendState.Terminating
        for task in self.pool.unfinished():
            self.ledger.finish(task, DiffusionTaskStatus.Cancelled, "terminated")
        self.pool.attach(None)
        timer, self.generator = self.generator.timer, None
        try:
            if self.mesh.rank == 0:
                self.folder.close(timer)
        finally:  # a full disk must not keep the next engine from being built
            if not self._is_amid_step:
                self.mesh.close()
            self._is_amid_step = False
            self._free()
            self.state = BackendState.Terminated
        if self.mesh.rank > 0:
            self.folder.close(timer)

    def _generator(self) -> Generator:
        if self.generator is None:
            raise RuntimeError("this engine is terminated; call chitu_init for a new one")
        return self.generator

    def _build(self, found: Survey, attention: AttentionPlan, timer: Timer) -> Pipeline:
        """Make the networks on every rank, or on none."""
        pipeline, error = None, None
        try:
            pipeline = build_pipeline(self.config, found, attention, self.mesh, self.device, timer)
        except (ValueError, RuntimeError, OSError) as caught:
            error = caught
        failures = self.channel.gather("" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure:
                raise RuntimeError(f"rank {rank} cannot start: {failure}")
        assert pipeline is not None
        return pipeline

    def _limits(self) -> Limits | None:
        """The memory that every rank has free, before anything is loaded; None without a GPU."""
        own = own_limits(self.device)
        texts = self.channel.gather(json.dumps(None if own is None else asdict(own)))
        found = [None if one is None else Limits(**one) for one in map(json.loads, texts)]
        return least(found)

    def _check_alike(self, config: Config, attention: AttentionPlan) -> None:
        """Ranks that differ would compute different things without a word. Raises ValueError."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        own = {
            "configuration": OmegaConf.to_yaml(asdict(config)),
            "device": gpu,
            "torch": torch.__version__,
            "attention": attention.name,
        }
        first, *others = map(json.loads, self.channel.gather(json.dumps(own)))
        for rank, other in enumerate(others, start=1):
            differing = [key for key in own if other[key] != first[key]]
            if differing:
                raise ValueError(
                    f"rank {rank} differs from rank 0 in {', '.join(differing)}; start all alike"
                )

    def _orders(self) -> Orders:
        """What rank 0 wants done: shut down before cancel before the next task of each replica."""
        for task in self.pool.pool.values():
            if task.is_terminate_signal() and task.status == DiffusionTaskStatus.Pending:
                # ended, so that an engine built later does not obey it too
                self.ledger.finish(task, DiffusionTaskStatus.Completed, None)
                return Orders(is_last=True)
        cancelled = tuple(task.task_id for task in self.pool.unfinished() if task.cancel_requested)
        for task_id in cancelled:
            self.ledger.finish(self.pool.pool[task_id], DiffusionTaskStatus.Cancelled, "cancelled")
        runs: list[Run | None] = []
        refused: dict[str, str] = {}
        for replica in range(self.mesh.degrees.dp):
            runs.append(None)
            for task_id in self.scheduler.schedule(self.pool.share(replica)):
                task = self.pool.pool[task_id]
                try:
                    self._open_folder(task)
                except (ValueError, OSError) as error:
                    refused[task_id] = f"{type(error).__name__}: {error}"
                    self.ledger.finish(task, DiffusionTaskStatus.Failed, refused[task_id])
                    continue
                runs[replica] = Run.of(task)
                task.replica = replica
        run_dir = None if self.folder.path is None else str(self.folder.path)
        return Orders(tuple(runs), cancelled, refused, run_dir)

    def _open_folder(self, task: DiffusionTask) -> None:
        """Make the run directory, where the run's log begins, for a task whose video goes there."""
        assert task.params is not None
        if task.replica is None and task.params.save_path is None and task.params.save_dir is None:
            self.folder.open(task.params.prompt)
            self.folder.add_request(RequestRecord(task.task_id, task.params))

    def _advance(self, run: Run | None, generator: Generator) -> Report:
        """This rank's part of a step. What it raises is reported; all ranks decide if the task failed."""
        wishes = tuple(task.task_id for task in self.pool.unfinished() if task.cancel_requested)
        if run is None:
            return Report(wishes=wishes)
        task = self.pool.pool[run.task_id]
        failure, is_complete = None, False
        try:
            is_complete = generator.step(task, self.log)
        except RankFailure:
            raise
        except Exception as error:  # the one place where a task's failure becomes its status
            logger.exception("task_id=%s failed", task.task_id)
            failure = f"{type(error).__name__}: {error}"
            if memory.is_out_of_memory(error):
                failure = f"out of memory; {_ADVICE} ({failure})"
        return Report(
            failure=failure,
            is_complete=is_complete,
            stage=task.task_type.name,
            current_step=task.current_step,
            save_path=task.buffer.save_path,
            result=None if task.result is None else asdict(task.result),
            wishes=wishes,
        )

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _scheduler(infer: InferConfig, cache_limit: float) -> DiffusionScheduler:
    """From level 3 on one task at a time: each change between two would carry a transformer to the device."""
    one_by_one = infer.diffusion.level >= DIT_ON_HOST
    if one_by_one and infer.max_reqs > 1:
        level = infer.diffusion.level
        logger.info("infer.diffusion.low_mem_level=%d: a task that has begun runs to its end", level)
    policy, most = infer.schedule_policy, infer.max_reqs
    return DiffusionScheduler(policy, most, cache_limit, one_by_one=one_by_one)


def _plan(config: Config, found: Survey, environment: Environment) -> Degrees:
    """How the ranks are used, from the model's default guidance and what the user fixed."""
    infer = config.infer
    return plan_degrees(
        environment.world_size,
        found.sizes.dit.num_heads,
        infer.diffusion.up_limit,
        any(needs_cfg(scale) for scale in config.models.sampler.guidance_scale),
        dp=infer.dp_size,
        cfg=infer.diffusion.cfg_size,
        cp=infer.diffusion.cp_size,
        ranks_per_node=environment.local_world_size,
    )
