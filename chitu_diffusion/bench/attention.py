"""`chitu bench attention`: every backend at the shapes of a model, as a table, JSON and an SVG plot.

Inputs are random normal, the worst case for a kernel that skips blocks. What a video loses by an
approximation is not measured here.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from hydra.errors import MissingConfigException

from chitu_core import attention
from chitu_core.config import Config, load
from chitu_diffusion.bench._measure import HEADER, SEED, WARM_UP, Bench, Measurement, Row, Shape, figures
from chitu_diffusion.bench._plot import Bar, Panel, draw
from chitu_diffusion.params import DiffusionUserParams
from chitu_diffusion.prepare import pick_device, pick_dtype
from chitu_diffusion.resolve import resolve
from chitu_diffusion.spec import ModelSpec

_VAE_STRIDE = (4, 8, 8)  # pixels of (frames, rows, columns) to a latent
_CHOOSERS = ("flash_attn", "sage")  # each takes the best of its versions, which have rows of their own
_PACKAGES = ("triton", "flash-attn", "flash_attn_3", "flash-attn-4", "sageattention", "spas_sage_attn")


@dataclass(frozen=True)
class Table:
    """All backends at one shape."""

    shape: Shape
    rows: tuple[Row, ...]


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


@dataclass(frozen=True)
class Report:
    """The JSON file."""

    environment: Machine
    model: str
    size: str  # WxH, WxHxF or the number of tokens
    dtype: str
    seed: int
    warm_up: int
    repeats: int
    sparsity_ratio: float
    tables: tuple[Table, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `chitu bench attention`."""
    parser.add_argument("--model", metavar="NAME", help="whose heads and sizes; no weights are read")
    parser.add_argument("--size", metavar="WxH", help="pixels, multiples of 16")
    parser.add_argument("--frames", type=int, metavar="N", help="4n + 1")
    parser.add_argument("--backends", metavar="A,B", help="names or aliases; all when left out")
    parser.add_argument("--heads", type=int, metavar="N", help="in place of the model's")
    parser.add_argument("--head-dim", type=int, metavar="D", help="in place of the model's")
    parser.add_argument("--length", type=int, metavar="L", help="tokens, in place of --size and --frames")
    parser.add_argument("--sparsity-ratio", type=float, metavar="R", help="of sparge")
    parser.add_argument("--dtype", metavar="NAME", help="bfloat16, float16 or float32")
    parser.add_argument("--repeats", type=int, metavar="N", default=7, help="timed calls of each backend")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path(), help="for the JSON file and the plot"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print the tables and write both files; 0 when at least one backend was measured, else 1.

    Raises ValueError naming option, value and remedy, and OSError where `--out` cannot be written.
    """
    _check(options)
    config = _config(options)
    size, shapes = _shapes(options, config)
    names = _backends(options.backends)
    options.out.mkdir(parents=True, exist_ok=True)  # before the minutes of measuring
    device = pick_device("torch")
    dtype = pick_dtype(config.infer.dtype, device)
    ratio = config.infer.attn_config.sparsity_ratio
    machine = _machine(device, _command(options))
    sys.stdout.write(
        f"{config.models.name} {size}, {_word(dtype)}, {options.repeats} calls, {machine.device}\n"
    )
    tables = []
    for shape in shapes:
        sys.stdout.write(f"\n{shape}\n{HEADER}\n")
        bench = Bench(shape, device, dtype, options.repeats, ratio)
        tables.append(Table(shape, bench.rows(names)))
    report = Report(
        environment=machine,
        model=config.models.name,
        size=size,
        dtype=_word(dtype),
        seed=SEED,
        warm_up=WARM_UP,
        repeats=options.repeats,
        sparsity_ratio=ratio,
        tables=tuple(tables),
    )
    _write(report, options.out / f"attention_{report.model}_{size}")
    return 0 if any(row.measured for table in tables for row in table.rows) else 1


def _check(options: argparse.Namespace) -> None:
    for name in ("heads", "head_dim", "length", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be at least 1")
    if options.length is not None and (options.size or options.frames):
        raise ValueError(f"--length={options.length} contradicts --size and --frames; give one or the other")


def _config(options: argparse.Namespace) -> Config:
    """The configuration of the model, without weights."""
    chosen = {
        "models": options.model,
        "infer.dtype": options.dtype,
        "infer.attn_config.sparsity_ratio": options.sparsity_ratio,
        "debug.skip_model_load": True,
    }
    overrides = [f"{key}={value}" for key, value in chosen.items() if value is not None]
    try:
        with initialize_config_module("chitu_core.config", version_base=None):
            return load(compose("serve_config", overrides=overrides))
    except MissingConfigException as error:
        known = ", ".join(error.options or ())
        raise ValueError(f"--model={options.model}: unknown; choose one of {known}") from error


def _shapes(options: argparse.Namespace, config: Config) -> tuple[str, tuple[Shape, Shape]]:
    """What the size is called, and the shapes of self-attention and cross-attention."""
    model = config.models
    heads = options.heads or model.transformer.num_heads
    head_dim = options.head_dim or model.transformer.dim // model.transformer.num_heads
    if options.length is None:
        asked = resolve(DiffusionUserParams(size=_pixels(options.size), num_frames=options.frames), model)
        spec = ModelSpec(
            (), _VAE_STRIDE, model.transformer.patch_size, model.vae.z_dim, model.encoder.text_len
        )
        length = spec.seq_len(spec.latent_shape(asked.num_frames, asked.height, asked.width))
        size = f"{asked.width}x{asked.height}" + (f"x{asked.num_frames}" if options.frames else "")
    else:
        length, size = options.length, f"L{options.length}"
    self_shape = Shape("self-attention", heads, head_dim, length, length)
    return size, (self_shape, Shape("cross-attention", heads, head_dim, length, model.encoder.text_len))


def _pixels(size: str | None) -> tuple[int, int] | None:
    if size is None:
        return None
    found = re.fullmatch(r"(\d+)[xX](\d+)", size)
    if found is None:
        raise ValueError(f"--size={size}: write WIDTHxHEIGHT, such as 832x480")
    return int(found[1]), int(found[2])


def _backends(text: str | None) -> tuple[str, ...]:
    """Names without aliases, each once; all of them, less those that only choose, for None."""
    if text is None:
        return tuple(name for name in attention.names() if name not in _CHOOSERS)
    asked = [word.strip() for word in text.split(",") if word.strip()]
    if not asked:
        raise ValueError(f"--backends={text!r}: names no backend; choose from {', '.join(attention.names())}")
    found = (name if name == "auto" else attention.canonical(name, "--backends") for name in asked)
    return tuple(dict.fromkeys(found))


def _machine(device: torch.device, command: str) -> Machine:
    on_gpu = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        capability="{}.{}".format(*torch.cuda.get_device_capability(device)) if on_gpu else None,
        driver=_driver() if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
        cudnn=torch.backends.cudnn.version() if on_gpu else None,
        torch=torch.__version__,
        python=platform.python_version(),
        packages={name: _installed(name) for name in _PACKAGES},
        command=command,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _driver() -> str | None:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text("utf-8")) if file.is_file() else None
    return found[0] if found else None


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _command(options: argparse.Namespace) -> str:
    """The command line that gives these options."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    words = ["chitu", "bench", "attention"]
    for name, default in vars(parser.parse_args([])).items():
        if getattr(options, name) != default:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return shlex.join(words)


def _write(report: Report, stem: Path) -> None:
    """The JSON file and the plot."""
    panels = []
    for table in report.tables:
        found = [(row.name, row.measured) for row in table.rows if row.measured]
        bars = (Bar(name, m.tflops, _label(m), m.is_exact) for name, m in found)
        panels.append(Panel(f"{report.model}, {table.shape}", tuple(bars)))
    where = report.environment
    legend = "blue: exact, orange: approximates"
    caption = f"{where.device}, torch {where.torch}, {report.dtype}, {where.date[:10]}; {legend}"
    texts = {".json": json.dumps(asdict(report), indent=2) + "\n", ".svg": draw(panels, caption)}
    sys.stdout.write("\n")
    for suffix, text in texts.items():
        path = stem.with_name(stem.name + suffix)  # with_suffix would cut a model's version
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path}\n")


def _label(measured: Measurement) -> str:
    speed, time = figures(measured.tflops), figures(measured.median_ms)
    return f"{speed} TFLOP/s, {time} ms, error {measured.error:.2g}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
