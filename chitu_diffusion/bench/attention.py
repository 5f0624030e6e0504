"""`chitu bench attention`: every backend at the shapes of a model, as a table, JSON and an SVG plot.

Inputs are random normal, the worst case for a kernel that skips blocks. What a video loses by an
approximation is not measured here.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from chitu_core import attention
from chitu_core.config import Config
from chitu_diffusion.bench._measure import HEADER, SEED, WARM_UP, Bench, Measurement, Row, Shape, figures
from chitu_diffusion.bench._plot import Bar, Panel, draw
from chitu_diffusion.bench._setup import (
    Machine,
    check_counts,
    command,
    compose_config,
    machine,
    make_folder,
    resolved,
    size_name,
)
from chitu_diffusion.spec import ModelSpec
from chitu_diffusion.survey import dtype_name, pick_device, pick_dtype

_VAE_STRIDE = (4, 8, 8)  # pixels of (frames, rows, columns) to a latent
_CHOOSERS = ("flash_attn", "sage")  # each takes the best of its versions, which have rows of their own


@dataclass(frozen=True)
class Table:
    """All backends at one shape."""

    shape: Shape
    rows: tuple[Row, ...]


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
    make_folder(options)
    device = pick_device("torch")
    dtype = pick_dtype(config.infer.dtype, device)
    ratio = config.infer.attn_config.sparsity_ratio
    where = machine(device, command(options, "attention", add_arguments))
    sys.stdout.write(
        f"{config.models.name} {size}, {dtype_name(dtype)}, {options.repeats} calls, {where.device}\n"
    )
    tables = []
    for shape in shapes:
        sys.stdout.write(f"\n{shape}\n{HEADER}\n")
        bench = Bench(shape, device, dtype, options.repeats, ratio)
        tables.append(Table(shape, bench.rows(names)))
    report = Report(
        environment=where,
        model=config.models.name,
        size=size,
        dtype=dtype_name(dtype),
        seed=SEED,
        warm_up=WARM_UP,
        repeats=options.repeats,
        sparsity_ratio=ratio,
        tables=tuple(tables),
    )
    _write(report, options.out / f"attention_{report.model}_{size}")
    return 0 if any(row.measured for table in tables for row in table.rows) else 1


def _check(options: argparse.Namespace) -> None:
    check_counts(options, ("heads", "head_dim", "length", "repeats"))
    if options.length is not None and (options.size or options.frames):
        raise ValueError(f"--length={options.length} contradicts --size and --frames; give one or the other")


def _config(options: argparse.Namespace) -> Config:
    """The configuration of the model, without weights."""
    chosen = {
        "infer.dtype": options.dtype,
        "infer.attn_config.sparsity_ratio": options.sparsity_ratio,
    }
    overrides = [f"{key}={value}" for key, value in chosen.items() if value is not None]
    return compose_config(options.model, overrides, no_weights=True)


def _shapes(options: argparse.Namespace, config: Config) -> tuple[str, tuple[Shape, Shape]]:
    """What the size is called, and the shapes of self-attention and cross-attention."""
    model = config.models
    heads = options.heads or model.transformer.num_heads
    head_dim = options.head_dim or model.transformer.dim // model.transformer.num_heads
    if options.length is None:
        asked = resolved(options.size, options.frames, model)
        spec = ModelSpec(
            (), _VAE_STRIDE, model.transformer.patch_size, model.vae.z_dim, model.encoder.text_len
        )
        length = spec.seq_len(spec.latent_shape(asked.num_frames, asked.height, asked.width))
        size = size_name(asked, options.frames)
    else:
        length, size = options.length, f"L{options.length}"
    self_shape = Shape("self-attention", heads, head_dim, length, length)
    return size, (self_shape, Shape("cross-attention", heads, head_dim, length, model.encoder.text_len))


def _backends(text: str | None) -> tuple[str, ...]:
    """Names without aliases, each once; all of them, less those that only choose, for None."""
    if text is None:
        return tuple(name for name in attention.names() if name not in _CHOOSERS)
    asked = [word.strip() for word in text.split(",") if word.strip()]
    if not asked:
        raise ValueError(f"--backends={text!r}: names no backend; choose from {', '.join(attention.names())}")
    found = (name if name == "auto" else attention.canonical(name, "--backends") for name in asked)
    return tuple(dict.fromkeys(found))


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
