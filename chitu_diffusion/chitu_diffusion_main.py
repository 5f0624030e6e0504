"""The six functions that a script calls: init, start, generate, terminate, is_terminated, run_eval."""

from typing import Any

from chitu_core import logging as chitu_logging
from chitu_core.config import load
from chitu_core.environment import Environment
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.engine import BackendState
from chitu_diffusion.eval._records import EvalRecord
from chitu_diffusion.eval.manager import check_types
from chitu_diffusion.run_eval import evaluate_run
from chitu_diffusion.task import DiffusionTaskPool


def chitu_init(args: Any, logging_level: int | None = None) -> None:
    """Check a composed configuration and build the process's engine: networks, scheduler, generator.

    Args:
        args: what Hydra composed, or a nested dict with the same keys.
        logging_level: of both packages on standard error; by default DEBUG where CHITU_DEBUG is on, else
            CHITU_LOGGING_LEVEL.

    Raises:
        ValueError: for a bad key or value, or a checkpoint that is not what it must be.
        RuntimeError: when an engine exists already.
    """
    environment = Environment.read()
    chitu_logging.setup(environment, logging_level)
    config = load(args)
    check_types(config.eval.eval_type)
    DiffusionBackend.build(config, DiffusionTaskPool.instance, environment)


def chitu_start() -> None:
    """Declare the engine running. Raises RuntimeError before `chitu_init`."""
    DiffusionBackend.current().start()


def chitu_generate() -> None:
    """Advance one task by one stage step: an encoding, one denoising step, or a decoding.

    Returns at once when no task is unfinished. A task that fails says so in its `status` and `error_message`.
    Raises RuntimeError before `chitu_init`.
    """
    DiffusionBackend.current().step()


def chitu_terminate() -> None:
    """Cancel unfinished tasks, write the run's last files and free all networks; `chitu_init` may follow."""
    DiffusionBackend.stop()


def chitu_is_terminated() -> bool:
    """Whether the engine has ended; False before the first `chitu_init`."""
    return DiffusionBackend.state == BackendState.Terminated


def chitu_run_eval() -> tuple[EvalRecord, ...]:
    """Score the finished videos with the metrics of `eval.eval_type`; call it on every rank, best after
    `chitu_terminate`, which frees the networks.

    Writes ./eval_out (./vbench_out for vbench), and copies into the run directory's eval/. Returns a record
    of each metric, the same on all ranks; what is missing or goes wrong is said there and not raised.
    Raises RuntimeError before the first `chitu_init`.
    """
    if DiffusionBackend.engine is None:
        raise RuntimeError("there is no engine; call chitu_init first")
    return evaluate_run(DiffusionBackend.engine, Environment.read())
