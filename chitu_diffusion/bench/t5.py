"""`chitu bench t5`: encoding one prompt that fills the text, 512 tokens.

A guided request encodes two, once.
"""

import argparse
from dataclasses import dataclass

from chitu_diffusion.bench._measure import figures
from chitu_diffusion.bench._setup import (
    Report,
    add_common,
    check_counts,
    heading,
    make_folder,
    say,
    write_report,
)
from chitu_diffusion.bench._work import Measured, measure, open_work, t5_encode


@dataclass(frozen=True, kw_only=True)
class T5Report(Report):
    """The JSON file."""

    tokens: int
    measured: Measured
    flops: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `chitu bench t5`."""
    add_common(parser, repeats=7, has_size=False)
    parser.set_defaults(size=None, frames=None)


def run(options: argparse.Namespace) -> int:
    """Measure, print and write the file. Raises ValueError naming option, value and remedy."""
    check_counts(options, ("repeats",))
    make_folder(options)
    opened = open_work(options, lambda *of: (t5_encode(*of), of[0].spec.text_len))
    work, tokens = opened.made
    measured = measure(work, opened.subject.device, options.repeats)
    head = heading(options, "t5", add_arguments, f"L{tokens}", opened.subject)
    report = T5Report(**head, tokens=tokens, measured=measured, flops=work.flops)
    where = f"{report.weights} weights, {report.environment.device}"
    say(f"{report.model} text encoder, {tokens} tokens, {report.dtype}, {where}")
    say(f"encode       {measured.timing}")
    say(f"             {figures(measured.tflops)} TFLOP/s of {figures(work.flops / 1e12)} TFLOP")
    write_report(report, "t5", options.out)
    return 0
