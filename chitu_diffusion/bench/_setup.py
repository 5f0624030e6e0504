"""What every measurement needs before it begins: options, a configuration, an engine; and its file after.

One process measures one GPU, or the CPU; several ranks are left out.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.errors import MissingConfigException

from chitu_core.config import Config, ModelConfig, load
from chitu_core.environment import Environment
from chitu_diffusion.engine import Engine
from chitu_diffusion.params import DiffusionUserParams
from chitu_diffusion.resolve import ResolvedParams, resolve
from chitu_diffusion.survey import dtype_name
from chitu_diffusion.task import TaskPool

DEFAULT_MODEL = "Wan2.1-T2V-1.3B"
_PACKAGES = ("triton", "flash-attn", "flash_attn_3", "flash-attn-4", "sageattention", "spas_sage_attn")
_OWN_OPTIONS = {"models": "--model"}  # a key: the option that is meant for it


@dataclass(frozen=True)
class Machine:
    """Where it was measured, with what, when."""

    device: str
    capability: str | None
    driver: str | None
    cuda: str | None
    cudnn: int | None
    torch: str
    python: str
    packages: dict[str, str | None]
    command: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What every JSON file says first."""

    environment: Machine
    model: str
    size: str  # WxH, WxHxF where --frames was given, or L and the number of text tokens
    dtype: str  # of matrix products
    weights: str  # "random", or the checkpoint
    overrides: tuple[str, ...]  # of the configuration, as the command line gave them


@dataclass(frozen=True)
class Subject:
    """What a report is about."""

    config: Config
    device: torch.device
    dtype: torch.dtype  # of matrix products


@dataclass(frozen=True)
class Video:
    """The size of what is computed, and what it is called."""

    width: int
    height: int
    num_frames: int
    name: str


def add_common(parser: argparse.ArgumentParser, *, repeats: int | None = None, has_size: bool = True) -> None:
    """Declare what all verbs but `attention` share; `--repeats` where it has a default."""
    parser.add_argument("words", nargs="*", metavar="key=value", help="configuration overrides")
    parser.add_argument("--model", metavar="NAME", default=DEFAULT_MODEL, help=f"{DEFAULT_MODEL}, demo, ...")
    if has_size:
        parser.add_argument("--size", metavar="WxH", help="pixels, multiples of 16; the model's own")
        parser.add_argument("--frames", type=int, metavar="N", help="4n + 1; the model's own")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, metavar="N", default=repeats, help=f"timed; {repeats}")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(), help="for the files")


def check_counts(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise ValueError for a count among the options that is below 1."""
    for name in names:
        value = vars(options)[name]
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be at least 1")


def config_of(options: argparse.Namespace, extra: Sequence[str] = ()) -> Config:
    """The configuration of `--model` and all overrides, then `extra`.

    Weights are random unless the overrides name a checkpoint or the model has a packaged one. Raises
    ValueError for a word that is no override and for one that an option stands for.
    """
    words = [*options.words, *extra]
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if "=" not in word and not word.startswith("~"):
            raise ValueError(f"{word!r} is not an override; write key=value, such as infer.attn_type=sdpa")
        if key in _OWN_OPTIONS:
            raise ValueError(f"{word}: use {_OWN_OPTIONS[key]} for it")
    return compose_config(options.model, words)


def compose_config(model: str | None, overrides: Sequence[str], *, no_weights: bool = False) -> Config:
    """The configuration of a model, the default one for None; `no_weights` where none are read anyway.

    Raises ValueError for an unknown model and for what the configuration refuses.
    """
    chosen = [] if model is None else [f"models={model}"]
    is_packaged = model == "demo" and not no_weights
    if not is_packaged and not any(word.lstrip("+").startswith("models.ckpt_dir=") for word in overrides):
        chosen.append("debug.skip_model_load=true")
    try:
        with initialize_config_module("chitu_core.config", version_base=None):
            return load(compose("serve_config", overrides=[*chosen, *overrides]))
    except MissingConfigException as error:
        known = ", ".join(error.options or ())
        raise ValueError(f"--model={model}: unknown; choose one of {known}") from error


def resolved(size: str | None, frames: int | None, model: ModelConfig) -> ResolvedParams:
    """A request of that size with the model's defaults. Raises ValueError for a size that is none."""
    return resolve(DiffusionUserParams(size=pixels(size), num_frames=frames), model)


def video_of(options: argparse.Namespace, model: ModelConfig) -> Video:
    """What `--size` and `--frames` ask for. Raises ValueError naming the value and the remedy."""
    asked = resolved(options.size, options.frames, model)
    name = size_name(asked, options.frames)
    return Video(asked.width, asked.height, asked.num_frames, name)


def size_name(asked: ResolvedParams, frames: int | None) -> str:
    """WxH, and the frames too where they were asked for."""
    return f"{asked.width}x{asked.height}" + (f"x{asked.num_frames}" if frames else "")


def pixels(size: str | None) -> tuple[int, int] | None:
    """Width and height of WxH; raises ValueError for other text."""
    if size is None:
        return None
    found = re.fullmatch(r"(\d+)[xX](\d+)", size)
    if found is None:
        raise ValueError(f"--size={size}: write WIDTHxHEIGHT, such as 832x480")
    return int(found[1]), int(found[2])


def build_engine(config: Config) -> Engine:
    """An engine of one process. Raises ValueError where several were started, and what an engine raises."""
    environment = Environment.read()
    if environment.world_size > 1:
        remedy = "start chitu bench once, without torchrun or srun"
        raise ValueError(f"WORLD_SIZE={environment.world_size}: one process is measured; {remedy}")
    return Engine(config, TaskPool(), environment)


def subject_of(engine: Engine) -> Subject:
    """The facts of an engine that a report needs."""
    return Subject(engine.config, engine.device, engine.dtype)


def heading(
    options: argparse.Namespace, verb: str, declare: Callable[..., None], size: str, subject: Subject
) -> dict[str, Any]:
    """The fields of `Report`, as keywords of a subclass."""
    config = subject.config
    is_random, checkpoint = config.debug.skip_model_load, config.models.ckpt_dir
    return {
        "environment": machine(subject.device, command(options, verb, declare)),
        "model": config.models.name,
        "size": size,
        "dtype": dtype_name(subject.dtype),
        "weights": "random" if is_random else checkpoint or "packaged",
        "overrides": tuple(options.words),
    }


def machine(device: torch.device, command: str) -> Machine:
    """The environment of a measurement on `device`."""
    on_gpu = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        capability="{}.{}".format(*torch.cuda.get_device_capability(device)) if on_gpu else None,
        driver=_driver() if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
        cudnn=torch.backends.cudnn.version() if on_gpu else None,
        torch=torch.__version__,
        python=platform.python_version(),
        packages={name: installed(name) for name in _PACKAGES},
        command=command,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _driver() -> str | None:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text("utf-8")) if file.is_file() else None
    return found[0] if found else None


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command(options: argparse.Namespace, verb: str, declare: Callable[..., None]) -> str:
    """The command line that gives these options, which `declare` adds to a parser."""
    parser = argparse.ArgumentParser(add_help=False)
    declare(parser)
    words = ["chitu", "bench", verb]
    for name, default in vars(parser.parse_args([])).items():
        value = vars(options)[name]
        if name == "words" or value == default:
            continue
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join([*words, *vars(options).get("words", ())])


def make_folder(options: argparse.Namespace) -> None:
    """Make `--out` before the minutes of measuring. Raises OSError where that cannot be."""
    options.out.mkdir(parents=True, exist_ok=True)


def write_report(report: Report, verb: str, out: Path) -> Path:
    """Write the JSON file into `out`, in place of one of the same name, and say where it is."""
    path = out / f"{verb}_{report.model}_{report.size}.json"
    path.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    say(f"\n{path}")
    return path


def say(line: str) -> None:
    """A line of the report on standard output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
