"""Renders docs/configuration.md from the schema, the YAML files, the launcher's keys and the environment.

`python -m chitu_core.config.reference` prints the page. Nothing is written; defaults are never typed here."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf

from chitu_core import attention, launch_settings
from chitu_core.config import HYDRA_DUMP_MODES, PAIRINGS, QUANTISATIONS, Config, ModelConfig
from chitu_core.config.infer import DTYPES, STREAM_DTYPES, VAE_DTYPES
from chitu_core.config.model import LATENT_CHANNELS, MAX_FPS
from chitu_core.environment import LOGGING_LEVELS, Environment

_FOLDER = Path(__file__).parent
_LONGEST_CELL = 40  # a longer default stands under its table

_NAMES = attention.names()

LEGAL = {  # where the field's own text does not say it
    "models.type": "diffusion-wan",
    "models.vae.z_dim": str(LATENT_CHANNELS),
    "models.transformer.patch_size": "frames 1, rows and columns 1 or 2",
    "models.sampler.sample_steps": "1 to `num_train_timesteps`",
    "models.sampler.sample_shift": "above 0",
    "models.sampler.guidance_scale": "one value more than `boundary` has",
    "models.sampler.boundary": "one value or none",
    "models.video.fps": f"1 to {MAX_FPS}",
    "infer.attn_type": ", ".join(["auto", *_NAMES, *attention.ALIASES]),
    "infer.cross_attn_type": ", ".join(["auto", *(name for name in _NAMES if name not in attention.LOSSY)]),
    "infer.compile": "off, auto, on",
    "infer.use_cuda_graph": "off, auto, on",
    "infer.vae_dtype": ", ".join(VAE_DTYPES),
    "infer.vae_chunk": "auto, 1 or more",
    "infer.prompt_cache_mb": "0 or more",
    "infer.max_reqs": "1 or more",
    "infer.diffusion.up_limit": "1 or more",
    "infer.diffusion.low_mem_level": "auto, 0, 1, 2, 3, 4",
    "infer.diffusion.stream_dtype": ", ".join(STREAM_DTYPES),
    "eval.pairing": ", ".join(PAIRINGS),
    "output.hydra_dump_mode": ", ".join(HYDRA_DUMP_MODES),
    "quant": ", ".join(["null", *QUANTISATIONS]),
    "float_16bit_variant": ", ".join(["null", *DTYPES]),
}

_EXPORTED = {
    "launch.tag": "environment `CHITU_RUN_TAG`",
    "launch.srun.partition": "`srun --partition`, environment `SRUN_PARTITION`",
    "launch.srun.cpus_per_gpu": "`srun --cpus-per-gpu`, environment `SRUN_CPUS_PER_GPU`",
    "launch.srun.mem_per_gpu": "`srun --mem-per-gpu`, in MB, environment `SRUN_MEM_PER_GPU`",
    "launch.srun.job_name": "`srun --job-name`, after the user's name, environment `SRUN_JOB_NAME`",
    "launch.srun.gres": "`srun --gres`; null asks for `gpu:<gpus_per_node>`, none for nothing",
    "launch.srun.extra": "more arguments of srun, as they are",
    "runtime.chitu_debug": "environment `CHITU_DEBUG`",
    "runtime.cuda_launch_blocking": "environment `CUDA_LAUNCH_BLOCKING`",
    "parallel.cfp": "`infer.diffusion.cfg_size` and `cp_size`; nothing for `auto`",
    "overrides": "themselves, last",
}

_HEAD = """# Configuration

<!-- Generated: python -m chitu_core.config.reference > docs/configuration.md -->

Every key of the configuration, with its default, type and meaning. This page is generated from the code.

* On the command line: `chitu generate "a prompt" infer.dtype=float32 models.sampler.sample_shift=5`.
* In Python: `compose(config_name="wan", overrides=["infer.dtype=float32"])`, or assign before `chitu_init`:
  `args.models.ckpt_dir = "..."`.
* In a file: your own `config/wan.yaml`, which begins with the packaged configuration
  (see [Python API](python_api.md#the-configuration)).

All three pass one check. A wrong type or an illegal value is a `ValueError` that names key and value,
before any model is read; an unknown key is refused by it or, on the command line, by Hydra.

There are three kinds of values. `models.*` belongs to a checkpoint. The other keys of this page belong to a
launch. What is asked for one video is a [`DiffusionUserParams`](python_api.md#diffusionuserparams), and is
not configured here."""

_MODELS = """`models=NAME` picks one of these files, and the columns are its values:
{names}.

`models` and its parts say how a checkpoint is found, and what a request gets that does not say otherwise.
**The sizes of the networks are read from the checkpoint.** Keys marked "for debug.skip_model_load alone"
are used only without a checkpoint, but must always be legal: sizes of 1 or more that fit each other. Where a
transformer differs from these values, a warning names the keys."""

_WORDS = """Flags take `1`, `true`, `yes`, `on`, `0`, `false`, `no` or `off`. An unset or empty variable
takes its default. A value that cannot be read is a `ValueError` naming the variable."""

_LAUNCHER = """The file that `bash run.sh` and `chitu run` read (see [Launcher](launcher.md)). A key that is
left out or null takes the value of the second column; where it says "not passed on", the default above
holds. The launcher checks the form of a value. Whether this version has what it asks for is checked by the
script that it starts."""


@dataclass(frozen=True)
class Variable:
    """A documented environment variable and the field of `Environment` that it fills."""

    name: str
    field: str
    meaning: str


VARIABLES = (
    Variable("CHITU_DEBUG", "debug", "log at DEBUG, and show no progress bar"),
    Variable("CHITU_RUN_TAG", "run_tag", "prefix of the run directory's name"),
    Variable(
        "CHITU_PYTHON_BIN", "python_bin", "Python that the launcher starts; unset: the one that runs it"
    ),
    Variable("CHITU_CURRENT_OUTPUT_DIR", "current_output_dir", "run directory to use in place of a new one"),
    Variable(
        "CHITU_PROGRESS_INTERVAL",
        "progress_interval",
        "denoising steps between two progress lines, 1 or more",
    ),
    Variable("CHITU_LOGGING_LEVEL", "logging_level", f"of standard error: {', '.join(LOGGING_LEVELS)}"),
    Variable("CHITU_LOG_RANK0_ONLY", "log_rank0_only", "other ranks than 0 log warnings only"),
    Variable("CHITU_ENABLE_STAGE_COLOR", "enable_stage_color", "colour the stages' names on a terminal"),
    Variable(
        "CONFIG_PATH", "config_path", "Hydra folder that `tests/test_generate.py` takes for the packaged one"
    ),
    Variable(
        "CONFIG_NAME", "config_name", "Hydra file that `tests/test_generate.py` takes for `serve_config`"
    ),
    Variable("RANK", "rank", "this process among all; it must be below `WORLD_SIZE`"),
    Variable("LOCAL_RANK", "local_rank", "the GPU that this process takes"),
    Variable("WORLD_SIZE", "world_size", "processes; set by torchrun, or by the launcher under srun"),
    Variable("LOCAL_WORLD_SIZE", "local_world_size", "processes on this machine; unset: `WORLD_SIZE`"),
    Variable("MASTER_ADDR", "master_addr", "where rank 0 is; needed where `WORLD_SIZE` is above 1"),
    Variable("MASTER_PORT", "master_port", "1 to 65535; needed where `WORLD_SIZE` is above 1"),
)


def page() -> str:
    """The text of docs/configuration.md."""
    serve = _read(_FOLDER / "serve_config.yaml")
    models = {file.stem: _read(file) for file in model_files()}
    names = ", ".join(f"`{name}`" for name in models)
    picked = next(item["models"] for item in serve["defaults"] if "models" in item)
    intro = _MODELS.format(names=f"{names}; `{picked}` when nothing is said")
    parts = [_HEAD, "## models", intro]
    parts += _sections(ModelConfig, "models", models)
    parts += _sections(Config, "", {"default": serve})
    parts += ["## Environment variables", _WORDS, _variables()]
    parts += ["## system_config.yaml", _LAUNCHER, _launcher()]
    return "\n\n".join(parts) + "\n"


def model_files() -> list[Path]:
    """The packaged model files, in the order of the columns."""
    return sorted((_FOLDER / "models").glob("*.yaml"), key=lambda file: (file.stem != "demo", file.stem))


def _read(file: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _sections(record: type, prefix: str, columns: Mapping[str, dict[str, Any]]) -> list[str]:
    """The table of a dataclass's own values, then the sections of its parts; `models` has its own columns."""
    plain = [part for part in fields(record) if not is_dataclass(part.type)]
    nested = [part for part in fields(record) if is_dataclass(part.type) and part.type is not ModelConfig]
    texts = []
    for part in nested:
        assert isinstance(part.type, type)
        inner = {name: values[part.name] for name, values in columns.items()}
        path = f"{prefix}.{part.name}".lstrip(".")
        texts += [f"{'###' if prefix else '##'} {path}", f"{part.metadata['doc'].capitalize()}."]
        texts += _sections(part.type, path, inner)
    own = [_table(record, [part.name for part in plain], prefix, columns)] if plain else []
    return own + texts if prefix else [*texts, "## Other keys", *own]


def _table(record: type, keys: list[str], prefix: str, columns: Mapping[str, dict[str, Any]]) -> str:
    """One row a key; one column a model, or a single one where all agree."""
    all_agree = all(len({_literal(values[key]) for values in columns.values()}) == 1 for key in keys)
    shown = {"default": next(iter(columns.values()))} if all_agree else columns
    parts = {part.name: part for part in fields(record)}
    notes: dict[str, str] = {}
    rows = []
    for key in keys:
        path, kind = f"{prefix}.{key}".lstrip("."), _type(parts[key].type)
        defaults = [_cell(_literal(values[key]), notes) for values in shown.values()]
        meaning = parts[key].metadata["doc"] + (f". Legal: {LEGAL[path]}" if path in LEGAL else "")
        rows.append([f"`{path}`", *defaults, kind, meaning])
    table = _rows(["key", *shown, "type", "meaning"], rows)
    return "\n\n".join([table, *(f"{mark} stands for `{text}`" for text, mark in notes.items())])


def _cell(literal: str, notes: dict[str, str]) -> str:
    """The literal, or a mark where it is too long for a table; `notes` maps the text to its mark."""
    if len(literal) <= _LONGEST_CELL or literal.startswith("https:"):
        return f"`{literal}`"
    return notes.setdefault(literal, f"({len(notes) + 1})")


def _literal(value: Any) -> str:
    """A value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return str(value) or '""'


def _type(annotation: Any) -> str:
    """A field's type in words that fit YAML."""
    if annotation is Any:
        return "list of str, or str"
    if annotation is type(None):
        return "null"
    arguments = [part for part in get_args(annotation) if part is not Ellipsis]
    if annotation in (bool, int, float, str):
        return str(annotation.__name__)
    if str(annotation).startswith("tuple"):
        return f"list of {_type(arguments[0])}"
    return " or ".join(_type(part) for part in arguments)


def _variables() -> str:
    defaults = Environment()
    rows = []
    for variable in VARIABLES:
        value = getattr(defaults, variable.field)
        rows.append(
            [
                f"`{variable.name}`",
                "unset" if value in (None, "") else f"`{_literal(value)}`",
                variable.meaning,
            ]
        )
    return _rows(["variable", "default", "meaning"], rows)


def _launcher() -> str:
    rows = []
    for key in launch_settings.KEYS:
        default = "not passed on" if key.default is None else f"`{_literal(key.default)}`"
        becomes = f"`{key.hydra}`" if key.hydra else _EXPORTED.get(key.path, "")
        rows.append([f"`{key.path}`", default, key.kind[1], becomes])
    return _rows(["key", "when left out", "legal values", "becomes"], rows)


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(page())
