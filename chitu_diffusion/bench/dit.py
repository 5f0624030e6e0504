"""`chitu bench dit`: one forward of the transformer, beside the shortest time that the GPU allows.

A forward is one branch of one denoising step; a guided step takes two. Several ranks are left out.
"""

import argparse
import shlex
from dataclasses import asdict, dataclass

import torch

from chitu_diffusion.bench._floor import CEILINGS, Ceiling, DitFloor, DitWork, dit_floor, dit_work
from chitu_diffusion.bench._measure import figures
from chitu_diffusion.bench._setup import (
    Report,
    Video,
    add_common,
    check_counts,
    heading,
    make_folder,
    say,
    write_report,
)
from chitu_diffusion.bench._work import (
    Measured,
    Opened,
    Work,
    dit_forward,
    measure,
    open_work,
    relative_error,
)
from chitu_diffusion.models.wan import WanConfig
from chitu_diffusion.prepare import Pipeline


@dataclass(frozen=True)
class Deviation:
    """Relative L2 of the velocity against that of the same weights under other overrides."""

    against: str
    relative_l2: float


@dataclass(frozen=True, kw_only=True)
class DitReport(Report):
    """The JSON file."""

    attention: str
    tokens: int
    measured: Measured
    work: DitWork
    ceiling: Ceiling | None  # None: nothing is known of this GPU, or the dtype is not one of 16 bits
    floor: DitFloor | None
    share: float | None  # of the floor: 1 is as fast as can be
    deviation: Deviation | None


@dataclass(frozen=True)
class _Forward:
    work: Work
    size: WanConfig
    tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `chitu bench dit`."""
    add_common(parser, repeats=5)
    parser.add_argument(
        "--error-against", metavar="OVERRIDES", help="measure the error against these overrides, in quotes"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print and write the file. Raises ValueError naming option, value and remedy."""
    check_counts(options, ("repeats",))
    make_folder(options)
    against = None if options.error_against is None else shlex.split(options.error_against)
    expected = None if against is None else open_work(options, dit_forward, against).made.sample()
    opened = open_work(options, _make)
    made = opened.made
    measured = measure(made.work, opened.subject.device, options.repeats)
    deviation = None
    if expected is not None:
        deviation = Deviation(options.error_against, relative_error(made.work.sample(), expected))
    report = _report(options, opened, measured, deviation)
    _print(report)
    write_report(report, "dit", options.out)
    return 0


def _make(pipeline: Pipeline, device: torch.device, video: Video) -> _Forward:
    spec, dit = pipeline.spec, next(iter(pipeline.experts.values()))
    tokens = spec.seq_len(spec.latent_shape(video.num_frames, video.height, video.width))
    return _Forward(dit_forward(pipeline, device, video), dit.config, tokens)


def _report(
    options: argparse.Namespace, opened: Opened[_Forward], measured: Measured, deviation: Deviation | None
) -> DitReport:
    made = opened.made
    head = heading(options, "dit", add_arguments, opened.video.name, opened.subject)
    work = dit_work(made.size, made.tokens)
    ceiling = CEILINGS.get(head["environment"].device) if opened.subject.dtype.itemsize == 2 else None
    floor = None if ceiling is None else dit_floor(work, made.tokens, ceiling)
    return DitReport(
        **head,
        attention=opened.attention,
        tokens=made.tokens,
        measured=measured,
        work=work,
        ceiling=ceiling,
        floor=floor,
        share=None if floor is None else floor.total_ms / measured.timing.median_ms,
        deviation=deviation,
    )


def _print(report: DitReport) -> None:
    where, measured = report.environment, report.measured
    say(
        f"{report.model} {report.size}, {report.tokens:,} tokens, {report.dtype}, attention "
        f"{report.attention}, {report.weights} weights, {where.device}"
    )
    say(f"forward      {measured.timing}")
    say(f"speed        {figures(measured.tflops)} TFLOP/s of {figures(report.work.flops / 1e12)} TFLOP")
    peak = measured.peak_memory
    if peak.device_gib is not None:
        say(f"peak memory  {peak.device_gib:.2f} GiB, of which weights and inputs {measured.weights_gib:.2f}")
    if report.deviation is not None:
        say(f"error        {report.deviation.relative_l2:.3g} against {report.deviation.against!r}")
    say(f"\n{'floor':<18}{'work':>12}{'ms':>12}")
    floors = {} if report.floor is None else asdict(report.floor)
    work = asdict(report.work)
    for name in ("self_attention", "linear", "cross_attention"):
        _row(name, f"{figures(work[f'{name}_flops'] / 1e12)} TFLOP", floors.get(f"{name}_ms"))
    _row("memory", f"{figures(report.work.elementwise_bytes / 1e9)} GB", floors.get("memory_ms"))
    if report.floor is None or report.share is None:
        why = (
            "rates are of 16-bit numbers" if report.dtype == "float32" else f"known are {', '.join(CEILINGS)}"
        )
        say(f"no share of the floor: no rates for {where.device} in {report.dtype}; {why}")
    else:
        _row("total", f"{figures(report.work.flops / 1e12)} TFLOP", report.floor.total_ms)
        say(f"{report.share:.1%} of the floor's speed")


def _row(name: str, work: str, milliseconds: float | None) -> None:
    shown = "" if milliseconds is None else f"{milliseconds:,.2f}"
    say(f"{name.replace('_', '-'):<18}{work:>12}{shown:>12}")
