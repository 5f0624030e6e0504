"""The keys of system_config.yaml: what each may be, what it becomes, and the file itself, read and checked.

What a machine can do (srun, GPUs) is not asked here; launch_backends.py does. Source: mission.md 2.3."""

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Kind = tuple[Callable[[Any], bool], str]  # what a value may be, as a test and in words
Settings = Mapping[str, Any]  # path in system_config.yaml -> checked value, None where nothing was said


class Key(NamedTuple):
    """One key of system_config.yaml; `hydra` is the override it becomes, None where the launcher reads it.
    Without a default it is passed on only if the file sets it: Hydra's own default speaks."""

    path: str
    kind: Kind
    hydra: str | None = None
    default: Any = None


BACKEND_NAMES = ("auto", "srun", "torchrun", "local")
FLAG: Kind = (lambda value: isinstance(value, bool), "true or false")
COUNT: Kind = (lambda value: type(value) is int and value >= 1, "an integer of 1 or more")
LEVEL: Kind = (
    lambda value: value == "auto" or (type(value) is int and 0 <= value <= 4),
    "an integer from 0 to 4, or auto",
)
DEGREE: Kind = (lambda value: value == "auto" or (type(value) is int and value in (1, 2)), "1, 2 or auto")
BACKEND: Kind = (lambda value: value in BACKEND_NAMES, "auto, srun, torchrun or local")
TEXT: Kind = (
    lambda value: isinstance(value, str) and "\0" not in value,
    "a text (in quotes if YAML reads it otherwise)",
)
TEXTS: Kind = (lambda value: isinstance(value, list) and all(map(TEXT[0], value)), "a list of texts")

KEYS = (
    Key("launch.tag", TEXT, default=""),
    Key("launch.backend", BACKEND, default="auto"),
    Key("launch.num_nodes", COUNT, default=1),
    Key("launch.gpus_per_node", COUNT, default=1),
    Key("launch.python_script", TEXT, default="tests/test_generate.py"),
    Key("launch.enable_launch_log", FLAG, default=False),
    Key("launch.srun.partition", TEXT, default="debug"),
    Key("launch.srun.cpus_per_gpu", COUNT, default=24),
    Key("launch.srun.mem_per_gpu", COUNT, default=242144),  # MB
    Key("launch.srun.job_name", TEXT, default="chitu"),
    Key("launch.srun.gres", TEXT),  # None: gpu:<gpus_per_node>
    Key("launch.srun.extra", TEXTS, default=[]),
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
    Key("eval.pairing", TEXT, "eval.pairing"),
    Key("eval.weights_dir", TEXT, "eval.weights_dir"),
    Key("eval.vbench_python", TEXT, "eval.vbench_python"),
    Key("output.root_dir", TEXT, "output.root_dir", "outputs"),
    Key("output.enable_run_log", FLAG, "output.enable_run_log"),
    Key("output.enable_timer_dump", FLAG, "output.enable_timer_dump"),
    Key("output.hydra_dump_mode", TEXT, "output.hydra_dump_mode"),
    Key("overrides", TEXTS, default=[]),
)
PATHS = (
    "model.ckpt_dir",
    "output.root_dir",
    "eval.reference_path",
    "eval.weights_dir",
    "eval.vbench_python",
)
WITHOUT_CHECKPOINT = "demo"  # the one model whose weights come with the package
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
PLAIN_TEXT = re.compile(r"(?!(?:null|true|false|nan|inf)\Z)[a-z_/.][\w./@+-]*", re.ASCII | re.IGNORECASE)


def read_settings(config_file: Path, options: Settings) -> dict[str, Any]:
    """Every key with its checked value: from `options`, else from the file, else its default.
    Raises ValueError naming the key, the value and a remedy."""
    said = {**_read(config_file), **options}
    settings = {key.path: _check(key, said.get(key.path)) for key in KEYS}
    _check_checkpoint(settings["model.ckpt_dir"], settings["model.name"])
    context_parallel(settings)
    return settings


def rank_count(settings: Settings) -> int:
    """All ranks of the launch, one a GPU."""
    total: int = settings["launch.num_nodes"] * settings["launch.gpus_per_node"]
    return total


def overridden(settings: Settings, key: str) -> str | None:
    """What the last of `overrides` for a key of the engine says, None where there is none."""
    override = re.compile(rf"\s*(?:\+\+?)?{re.escape(key)}\s*=(.*)", re.DOTALL)
    texts = [found[1].strip() for text in settings["overrides"] if (found := override.fullmatch(text))]
    return texts[-1] if texts else None


def data_parallel(settings: Settings) -> int:
    """`infer.dp_size` as `overrides` set it, else 1. Raises ValueError if it is no integer of 1 or more."""
    text = overridden(settings, "infer.dp_size")
    if text is None:
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"overrides: infer.dp_size must be an integer of 1 or more, got {text!r}")
    return int(text)


def context_parallel(settings: Settings) -> int | None:
    """The ranks that share one sequence, as parallel.cfp fixes them; None for auto, where the engine plans.
    Raises ValueError naming the legal values if the ranks cannot be shared out."""
    cfp, total, dp = settings["parallel.cfp"], rank_count(settings), data_parallel(settings)
    if cfp == "auto":
        return None
    size: int = total // (cfp * dp)
    if total == size * cfp * dp:
        return size
    replicas = "" if dp == 1 else f" x infer.dp_size ({dp})"
    legal = "1 or auto"
    if total % dp:
        sizes = ", ".join(str(size) for size in range(1, total + 1) if total % size == 0)
        legal = f"infer.dp_size one of {sizes}"
    raise ValueError(
        f"total GPUs ({total}) must be divisible by parallel.cfp ({cfp}){replicas}; legal: {legal}"
    )


def hydra_overrides(settings: Settings) -> list[str]:
    """The settings as Hydra overrides, then the user's own `overrides` as they are."""
    passed = [(key.hydra, settings[key.path]) for key in KEYS if key.hydra]
    if (size := context_parallel(settings)) is not None:
        passed += [("infer.diffusion.cfg_size", settings["parallel.cfp"]), ("infer.diffusion.cp_size", size)]
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
    if key.path in PATHS and isinstance(value, str):
        value = os.path.expanduser(value) or None  # an empty path would be the current directory
    if value is None:
        return key.default
    holds, words = key.kind
    if not holds(value):
        raise ValueError(f"{key.path} must be {words}, got {value!r}")
    return value


def _check_checkpoint(given: str | None, model: str) -> None:
    if given is None and model != WITHOUT_CHECKPOINT:
        raise ValueError(f"model.ckpt_dir must be set for {model}; name its folder, or owner/name of the hub")
    if given is not None and not Path(given).is_dir() and not HUB_ID.fullmatch(given):
        raise ValueError(f"model.ckpt_dir {given!r} is not a directory; name the folder of the checkpoint")
