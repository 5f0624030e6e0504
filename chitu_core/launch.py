"""Reads system_config.yaml, checks it, and starts the user's script, as one rank or many: what run.sh runs.

Keys and overrides: launch_settings.py; srun and torchrun: launch_backends.py. Source: mission.md 2.3-2.4."""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, NoReturn

from chitu_core.environment import Environment
from chitu_core.launch_backends import BACKENDS, RANK_VARIABLES, pick
from chitu_core.launch_settings import (
    Settings,
    context_parallel,
    data_parallel,
    hydra_overrides,
    rank_count,
    read_settings,
)


@dataclass(frozen=True)
class Plan:
    """A launch that passed every check."""

    settings: Settings
    config_file: Path
    script: Path
    python: str
    backend: str  # in BACKENDS: what `auto` became
    log_file: Path | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher and return its exit status: the script's own, or 1 after an `Error:` line on stderr.
    Raises SystemExit(2) for a command line that cannot be read, SystemExit(0) after --help."""
    config, options = _parse(argv)
    inherited = dict(os.environ)
    own = {name: value for name, value in inherited.items() if name not in RANK_VARIABLES}
    with ExitStack() as stack:
        try:
            plan = make_plan(config, options, Environment.read(own), datetime.now())
            log = None if plan.log_file is None else stack.enter_context(_open_log(plan.log_file))
        except ValueError as error:
            sys.stderr.write(f"Error: {' '.join(str(error).split())}\n")
            return 1
        backend = BACKENDS[plan.backend]
        program = [str(plan.script), *hydra_overrides(plan.settings)]
        command = backend.command(plan.settings, plan.python, program)
        _tell(f"{summary(plan)}Command: {shlex.join(command)}\n".encode(errors="backslashreplace"), log)
        variables = own | _exports(plan) | backend.exports(plan.settings, inherited)
        return _run(command, variables, log)


def make_plan(config: str, options: Settings, environment: Environment, now: datetime) -> Plan:
    """Check the configuration file and the command line, which wins. Raises ValueError naming the key."""
    config_file = _find(config, Path(), Path(__file__).parents[1])
    if config_file is None:
        raise ValueError(f"config file {config} does not exist; name one that does")
    settings = read_settings(config_file, options)
    settings["launch.tag"] = settings["launch.tag"] or environment.run_tag
    script = _find(settings["launch.python_script"], Path(), config_file.parent)
    if script is None:
        raise ValueError(f"launch.python_script {settings['launch.python_script']} is no file; name a script")
    python = environment.python_bin or sys.executable
    if shutil.which(python) is None:
        raise ValueError(f"CHITU_PYTHON_BIN {python} is not a program; unset it, or name a Python")
    backend = pick(settings)
    BACKENDS[backend].check(settings, python)
    log_file = Path(settings["output.root_dir"]) / f"launch_{now:%Y%m%d_%H%M%S}.log"
    is_logged = settings["launch.enable_launch_log"]
    return Plan(settings, config_file, script, python, backend, log_file if is_logged else None)


def summary(plan: Plan) -> str:
    """The Launch Summary, one `name: value` a line."""
    settings, dp = plan.settings, data_parallel(plan.settings)
    lines = {
        "config_file": plan.config_file,
        "backend": plan.backend + (" (auto)" if settings["launch.backend"] == "auto" else ""),
        "num_nodes": settings["launch.num_nodes"],
        "gpus_per_node": settings["launch.gpus_per_node"],
        "total_gpus": rank_count(settings),
        "dp(data-parallel)": dp if dp > 1 else None,
        "cfp(cfg-parallel)": settings["parallel.cfp"],
        "cp(context-parallel)": context_parallel(settings) or "auto",
        "model": settings["model.name"],
        "ckpt_dir": settings["model.ckpt_dir"] or "packaged",
        "python_script": plan.script,
        "runtime_python": plan.python,
        "run_tag": settings["launch.tag"] or None,
        "log_file": plan.log_file or "disabled (launch.enable_launch_log=false)",
    }
    shown = [f"  {name}: {value}\n" for name, value in lines.items() if value is not None]
    return "".join(["Launch Summary\n", *shown])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message}; see -h\n")


def _parse(argv: Sequence[str] | None) -> tuple[str, Settings]:
    """The configuration file's name, and the options given, under their paths in that file."""
    parser = _Parser(prog="run.sh", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("config", nargs="?", default="system_config.yaml", help="YAML file (%(default)s)")
    for path, metavar in (
        ("launch.num_nodes", "N"),
        ("launch.gpus_per_node", "N"),
        ("parallel.cfp", "1|2|auto"),
    ):
        option = "--" + path.rpartition(".")[2].replace("_", "-")
        kind = int if metavar == "N" else _degree
        parser.add_argument(option, dest=path, type=kind, metavar=metavar, help=f"in place of {path}")
    options = vars(parser.parse_args(argv))
    return options.pop("config"), options


def _degree(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _find(name: str, *folders: Path) -> Path | None:
    candidates = (folder / Path(name).expanduser() for folder in folders)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _exports(plan: Plan) -> dict[str, str]:
    """What every rank gets, whatever starts it."""
    exports = {"CHITU_PYTHON_BIN": plan.python, "CHITU_RUN_TAG": plan.settings["launch.tag"]}
    exports["CHITU_DEBUG"] = "1" if plan.settings["runtime.chitu_debug"] else "0"
    exports["PYTHONUNBUFFERED"] = "1"  # into the log's pipe Python would write in large blocks, late
    exports["HYDRA_FULL_ERROR"] = "1"
    return exports | ({"CUDA_LAUNCH_BLOCKING": "1"} if plan.settings["runtime.cuda_launch_blocking"] else {})


def _open_log(log_file: Path) -> IO[bytes]:
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        return log_file.open("ab", buffering=0)
    except OSError as error:
        raise ValueError(f"output.root_dir: cannot write {log_file} ({error.strerror})") from error


def _tell(chunk: bytes, log: IO[bytes] | None) -> None:
    sys.stdout.buffer.write(chunk)
    sys.stdout.flush()
    if log is not None:
        log.write(chunk)


def _run(command: list[str], environment: Mapping[str, str], log: IO[bytes] | None) -> int:
    """Start the command and wait for it; its exit status, or 128 + signal as shells report it."""
    pipes = (None, None) if log is None else (subprocess.PIPE, subprocess.STDOUT)
    with subprocess.Popen(command, env=environment, stdout=pipes[0], stderr=pipes[1], bufsize=0) as process:
        # Ctrl-C reaches the command by itself, in the terminal's group; here it must not end the wait.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        terminate = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        try:
            while process.stdout is not None and (chunk := process.stdout.read(65536)):
                _tell(chunk, log)
            status = process.wait()
        finally:
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, terminate)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
