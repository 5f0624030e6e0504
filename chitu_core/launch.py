"""Reads system_config.yaml, checks it, and starts the user's script with Hydra overrides: what run.sh runs.

Values are items of an argument list and never pass a shell. This version starts one process on this machine;
a launcher of several (srun, torchrun) is one more entry of BACKENDS. Source: reference/mission.md 2.3-2.4."""

import argparse
import difflib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chitu_core.environment import Environment

Kind = tuple[Callable[[Any], bool], str]  # what a value may be, as a test and in words
Settings = Mapping[str, Any]  # path in system_config.yaml -> checked value, None where nothing was said


class Key(NamedTuple):
    """One key of system_config.yaml; `hydra` is the override it becomes, None where only this file reads it.
    Without a default it is passed on only if the file sets it: Hydra's own default speaks."""

    path: str
    kind: Kind
    hydra: str | None = None
    default: Any = None


FLAG: Kind = (lambda value: isinstance(value, bool), "true or false")
COUNT: Kind = (lambda value: type(value) is int and value >= 1, "an integer of 1 or more")
LEVEL: Kind = (lambda value: type(value) is int and 0 <= value <= 4, "an integer from 0 to 4")
DEGREE: Kind = (lambda value: value == "auto" or (type(value) is int and value in (1, 2)), "1, 2 or auto")
BACKEND: Kind = (lambda value: value in BACKENDS, "auto or local")
TEXT: Kind = (lambda value: isinstance(value, str), "a text (in quotes if YAML reads it otherwise)")
TEXTS: Kind = (lambda value: isinstance(value, list) and all(map(TEXT[0], value)), "a list of texts")

KEYS = (
    Key("launch.tag", TEXT, default=""),
    Key("launch.backend", BACKEND, default="auto"),
    Key("launch.num_nodes", COUNT, default=1),
    Key("launch.gpus_per_node", COUNT, default=1),
    Key("launch.python_script", TEXT, default="tests/test_generate.py"),
    Key("launch.enable_launch_log", FLAG, default=False),
    Key("launch.srun.partition", TEXT),  # files in use hold the srun keys: checked, and unused without srun
    Key("launch.srun.cpus_per_gpu", COUNT),
    Key("launch.srun.mem_per_gpu", COUNT),
    Key("launch.srun.job_name", TEXT),
    Key("runtime.chitu_debug", FLAG, default=True),
    Key("runtime.cuda_launch_blocking", FLAG, default=False),
    Key("model.name", TEXT, "models", "demo"),
    Key("model.ckpt_dir", TEXT, "models.ckpt_dir"),
    Key("parallel.cfp", DEGREE, default="auto"),  # becomes cfg_size and cp_size
    Key("infer.up_limit", COUNT, "infer.diffusion.up_limit"),
    Key("infer.attn_type", TEXT, "infer.attn_type"),
    Key("infer.low_mem_level", LEVEL, "infer.diffusion.low_mem_level"),
    Key("infer.enable_flexcache", FLAG, "infer.diffusion.enable_flexcache"),
    Key("eval.eval_type", TEXTS, "eval.eval_type"),
    Key("eval.reference_path", TEXT, "eval.reference_path"),
    Key("output.root_dir", TEXT, "output.root_dir", "outputs"),
    Key("output.enable_run_log", FLAG, "output.enable_run_log"),
    Key("output.enable_timer_dump", FLAG, "output.enable_timer_dump"),
    Key("output.hydra_dump_mode", TEXT, "output.hydra_dump_mode"),
    Key("overrides", TEXTS, default=[]),
)
WITHOUT_CHECKPOINT = "demo"  # the one model whose weights come with the package
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
PLAIN_TEXT = re.compile(r"(?!(?:null|true|false|nan|inf)\Z)[a-z_/.][\w./@+-]*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """A launch that passed every check."""

    settings: Settings
    config_file: Path
    script: Path
    python: str
    log_file: Path | None


def local_command(plan: Plan) -> list[str]:
    """The script as one process on this machine."""
    return [plan.python, str(plan.script), *hydra_overrides(plan.settings)]


BACKENDS: dict[str, Callable[[Plan], list[str]]] = {"auto": local_command, "local": local_command}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher and return its exit status: the script's own, or 1 after an `Error:` line on stderr.
    Raises SystemExit(2) for a command line that cannot be read, SystemExit(0) after --help."""
    config, options = _parse(argv)
    with ExitStack() as stack:
        try:
            plan = make_plan(config, options, Environment.read(), datetime.now())
            log = None if plan.log_file is None else stack.enter_context(_open_log(plan.log_file))
        except ValueError as error:
            sys.stderr.write(f"Error: {' '.join(str(error).split())}\n")
            return 1
        command = BACKENDS[plan.settings["launch.backend"]](plan)
        _tell(f"{summary(plan)}Command: {shlex.join(command)}\n".encode(errors="backslashreplace"), log)
        return _run(command, os.environ | _exports(plan), log)


def make_plan(config: str, options: Settings, environment: Environment, now: datetime) -> Plan:
    """Check the configuration file and the command line, which wins. Raises ValueError naming the key."""
    config_file = _find(config, Path(), Path(__file__).parents[1])
    if config_file is None:
        raise ValueError(f"config file {config} does not exist; name one that does")
    said = {**_read(config_file), **options}
    settings = {key.path: _check(key, said.get(key.path)) for key in KEYS}
    settings["launch.tag"] = settings["launch.tag"] or environment.run_tag
    _check_together(settings)
    script = _find(settings["launch.python_script"], Path(), config_file.parent)
    if script is None:
        raise ValueError(f"launch.python_script {settings['launch.python_script']} is no file; name a script")
    python = environment.python_bin or sys.executable
    if shutil.which(python) is None:
        raise ValueError(f"CHITU_PYTHON_BIN {python} is not a program; unset it, or name a Python")
    log_file = Path(settings["output.root_dir"]) / f"launch_{now:%Y%m%d_%H%M%S}.log"
    is_logged = settings["launch.enable_launch_log"]
    return Plan(settings, config_file, script, python, log_file if is_logged else None)


def summary(plan: Plan) -> str:
    """The Launch Summary, one `name: value` a line."""
    settings, cfp = plan.settings, plan.settings["parallel.cfp"]
    total = settings["launch.num_nodes"] * settings["launch.gpus_per_node"]
    tag = f"  run_tag: {settings['launch.tag']}\n" if settings["launch.tag"] else ""
    return f"""Launch Summary
  config_file: {plan.config_file}
  backend: {settings["launch.backend"]}
  num_nodes: {settings["launch.num_nodes"]}
  gpus_per_node: {settings["launch.gpus_per_node"]}
  total_gpus: {total}
  cfp(cfg-parallel): {cfp}
  cp(context-parallel): {"auto" if cfp == "auto" else total // cfp}
  model: {settings["model.name"]}
  ckpt_dir: {settings["model.ckpt_dir"] or "packaged"}
  python_script: {plan.script}
  runtime_python: {plan.python}
{tag}  log_file: {plan.log_file or "disabled (launch.enable_launch_log=false)"}
"""


def hydra_overrides(settings: Settings) -> list[str]:
    """The settings as Hydra overrides, then the user's own `overrides` as they are."""
    passed = [(key.hydra, settings[key.path]) for key in KEYS if key.hydra]
    total, cfp = settings["launch.num_nodes"] * settings["launch.gpus_per_node"], settings["parallel.cfp"]
    if cfp != "auto":
        passed += [("infer.diffusion.cfg_size", cfp), ("infer.diffusion.cp_size", total // cfp)]
    overrides = [f"{name}={quote(value)}" for name, value in passed if value is not None]
    return overrides + list(settings["overrides"])


def quote(value: bool | int | str | list[str]) -> str:
    """`value` in Hydra's override grammar, so that Hydra and OmegaConf read back an equal value: quotes,
    backslashes and `${` in a text stay what they are."""
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(quote, value))}]"
    if PLAIN_TEXT.fullmatch(value):
        return value
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # OmegaConf: \${ starts no interpolation
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)  # Hydra: \' is a quote; a backslash counts only before quotes
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", text) + "'"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message}; see -h\n")


def _parse(argv: Sequence[str] | None) -> tuple[str, Settings]:
    """The configuration file's name, and the options given, under their paths in that file."""
    parser = _Parser(prog="run.sh", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("config", nargs="?", default="system_config.yaml", help="YAML file (%(default)s)")
    for path, metavar in (("launch.num_nodes", "N"), ("launch.gpus_per_node", "N"), ("parallel.cfp", "1|2")):
        option = "--" + path.rpartition(".")[2].replace("_", "-")
        parser.add_argument(option, dest=path, type=int, metavar=metavar, help=f"in place of {path}")
    options = vars(parser.parse_args(argv))
    return options.pop("config"), options


def _find(name: str, *folders: Path) -> Path | None:
    candidates = (folder / Path(name).expanduser() for folder in folders)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read(config_file: Path) -> Settings:
    try:
        content = OmegaConf.to_container(OmegaConf.load(config_file), resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cannot read {config_file}: {error}") from error
    return _flatten(content, "")


def _flatten(section: Any, prefix: str) -> Settings:
    if not isinstance(section, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the file'} must hold keys and values, got {section!r}")
    paths = [key.path for key in KEYS]
    flat: dict[str, Any] = {}
    for name, value in section.items():
        path = f"{prefix}{name}"
        if path in paths:
            flat[path] = value
        elif any(known.startswith(f"{path}.") for known in paths):
            flat |= _flatten({} if value is None else value, f"{path}.")
        else:
            near = difflib.get_close_matches(path, paths, n=1)
            raise ValueError(f"unknown key {path}; {f'did you mean {near[0]}?' if near else 'remove it'}")
    return flat


def _check(key: Key, value: Any) -> Any:
    if key.path == "output.hydra_dump_mode" and value is False:
        return "off"  # YAML reads a bare `off` as false
    if key.path == "eval.eval_type" and isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip().lower() not in ("", "none")]
    if key.path in ("model.ckpt_dir", "output.root_dir", "eval.reference_path") and isinstance(value, str):
        value = os.path.expanduser(value) or None  # an empty path would be the current directory
    if value is None:
        return key.default
    holds, words = key.kind
    if not holds(value):
        raise ValueError(f"{key.path} must be {words}, got {value!r}")
    return value


def _check_together(settings: Settings) -> None:
    total, cfp = settings["launch.num_nodes"] * settings["launch.gpus_per_node"], settings["parallel.cfp"]
    limit = "this version runs one process: set num_nodes, gpus_per_node and cfp to 1"
    if cfp != "auto" and total % cfp:
        raise ValueError(f"total GPUs ({total}) must be divisible by parallel.cfp ({cfp}); {limit}")
    if total > 1:
        raise ValueError(f"num_nodes x gpus_per_node is {total}, not supported yet; {limit}")
    given, model = settings["model.ckpt_dir"], settings["model.name"]
    if given is None and model != WITHOUT_CHECKPOINT:
        raise ValueError(f"model.ckpt_dir must be set for {model}; name its folder, or owner/name of the hub")
    if given is not None and not Path(given).is_dir() and not HUB_ID.fullmatch(given):
        raise ValueError(f"model.ckpt_dir {given!r} is not a directory; name the folder of the checkpoint")


def _exports(plan: Plan) -> dict[str, str]:
    exports = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # whatever job this shell is part of
    exports |= {"CHITU_PYTHON_BIN": plan.python, "CHITU_RUN_TAG": plan.settings["launch.tag"]}
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
        # Ctrl-C reaches the script by itself, in the terminal's group; here it must not end the wait.
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
