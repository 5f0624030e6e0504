"""The process's engine, by name: one field, and the documented attributes read through it."""

from chitu_core.config import Config
from chitu_core.environment import Environment
from chitu_core.memory import peak
from chitu_diffusion.engine import BackendState, Engine
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.wan import WanDiT
from chitu_diffusion.scheduler import DiffusionScheduler
from chitu_diffusion.task import TaskPool


class _Facade(type):
    """Documented attributes of `DiffusionBackend`, none of them stored."""

    engine: Engine | None = None

    @property
    def state(cls) -> BackendState:
        """Uninitialized before the first `chitu_init`, then the engine's own."""
        return BackendState.Uninitialized if cls.engine is None else cls.engine.state

    @property
    def args(cls) -> Config:
        """The checked configuration."""
        return cls.current().config

    @property
    def model_pool(cls) -> list[WanDiT]:
        """The transformers, high noise first."""
        return list(cls.current().pipeline.experts.values())

    @property
    def scheduler(cls) -> DiffusionScheduler:
        """What picks the next task."""
        return cls.current().scheduler

    @property
    def generator(cls) -> Generator:
        """What advances a task."""
        generator = cls.current().generator
        assert generator is not None
        return generator

    def current(cls) -> Engine:
        """The living engine. Raises RuntimeError before `chitu_init` and after `chitu_terminate`."""
        if cls.engine is None or cls.engine.state == BackendState.Terminated:
            raise RuntimeError("there is no engine; call chitu_init first")
        return cls.engine

    def build(cls, config: Config, pool: TaskPool, environment: Environment) -> None:
        """Make the process's engine. Raises RuntimeError while there is one."""
        if cls.state not in (BackendState.Uninitialized, BackendState.Terminated):
            raise RuntimeError("chitu_init was called before; call chitu_terminate first")
        cls.engine = Engine(config, pool, environment)

    def stop(cls) -> None:
        """End the engine, if there is one."""
        if cls.engine is not None:
            cls.engine.close()

    def memory_used(cls, message: str) -> str:
        """One line with the peaks of device and host memory."""
        used = peak(cls.current().device)
        device = "no device" if used.device_gib is None else f"device peak {used.device_gib:.2f} GiB"
        return f"{message}: {device}, host peak {used.host_gib:.2f} GiB"


class DiffusionBackend(metaclass=_Facade):
    """The process's engine under the documented names; it holds nothing but the engine."""
