"""`chitu bench profile`: where the time of one call goes, by group of kernels, and the longest kernels.

On a GPU kernels are counted by their time on it; on a CPU operators by their own time, without what they
call. Times are those of one call under torch.profiler, which costs the host more than the device.
"""

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from chitu_diffusion.bench._setup import (
    Report,
    add_common,
    heading,
    make_folder,
    say,
    write_report,
)
from chitu_diffusion.bench._work import Work, dit_forward, first_call, open_work, t5_encode, vae_decode, wait

LONGEST = 15
_NAME_WIDTH = 76
_WORKS = {"dit": dit_forward, "vae": vae_decode, "t5": t5_encode}
# The first pattern that is found in a lower-case name is its group. NOTE the order: cuDNN's attention kernels
# are named after the convolution that they began as, and Inductor names a kernel after all that it fused.
GROUPS = {
    "communication": r"nccl|all_?gather|all_?reduce|all_?to_?all|sendrecv",
    "attention": r"flash|fmha|sdpa|attention|attn|sage|sparge",
    "matrix products": r"gemm|gemv|cublas|nvjet|cutlass(?!.*fprop)|matmul|scaled_mm|triton_tem|splitk"
    r"|^aten::(_int_)?(addmm|mm|bmm|baddbmm|linear|mkldnn_linear|dot|mv)$|^mkl::|^mkldnn::_linear",
    "convolution": r"conv|fprop|dgrad|wgrad|winograd",
    "element-wise and norms": r"^triton|elementwise(?!.*copy)|norm|reduce|softmax|rope|rotary|modulat"
    r"|residual|gate|gelu|silu|quant|upsample|pad|^aten::(_fused|add|sub|mul|div|lerp|pow|sqrt|rsqrt|square|mean"
    r"|sum|exp|sin|cos|neg|abs|clamp|where|eq|ne|max|min|tanh|sigmoid|masked_fill|arange|fill|zero|index|embedding)",
    "copies": r"copy|memcpy|memset|catarray|nchwto|nhwcto|(?<!aten::)transpose|^aten::(cat|clone)$",
}
OTHER = "other"


@dataclass(frozen=True)
class Row:
    """A group or a kernel: its time, how often it ran, and its share of the whole."""

    name: str
    ms: float
    calls: int
    share: float


@dataclass(frozen=True, kw_only=True)
class ProfileReport(Report):
    """The JSON file."""

    what: str  # dit, vae or t5
    attention: str
    is_gpu: bool  # kernels; operators otherwise
    total_ms: float  # of all rows; kernels that run at once count twice
    groups: tuple[Row, ...]
    longest: tuple[Row, ...]
    trace: str  # file for chrome://tracing or Perfetto


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `chitu bench profile`."""
    add_common(parser)
    parser.add_argument("--what", metavar="NAME", default="dit", help=f"one of {', '.join(_WORKS)}; dit")


def run(options: argparse.Namespace) -> int:
    """Profile one call, print the tables and write both files. Raises ValueError naming option and remedy."""
    if options.what not in _WORKS:
        raise ValueError(f"--what={options.what}: choose one of {', '.join(_WORKS)}")
    make_folder(options)
    opened = open_work(options, _WORKS[options.what])
    size, subject = opened.video.name, opened.subject
    verb = "profile" if options.what == "dit" else f"profile_{options.what}"
    trace = options.out / f"{verb}_{subject.config.models.name}_{size}.json.gz"
    kernels = _profile(opened.made, subject.device, str(trace))
    total = sum(row.ms for row in kernels)
    report = ProfileReport(
        **heading(options, "profile", add_arguments, size, subject),
        what=options.what,
        attention=opened.attention,
        is_gpu=subject.device.type == "cuda",
        total_ms=total,
        groups=grouped(kernels),
        longest=tuple(kernels[:LONGEST]),
        trace=str(trace),
    )
    _print(report)
    write_report(report, verb, options.out)
    say(str(trace))
    return 0


def group_of(name: str) -> str:
    """The group of a kernel or an operator."""
    lower = name.lower()
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, lower)), OTHER)


def grouped(kernels: Iterable[Row]) -> tuple[Row, ...]:
    """The kernels by group, all groups, longest first."""
    sums = dict.fromkeys([*GROUPS, OTHER], (0.0, 0, 0.0))
    for row in kernels:
        ms, calls, share = sums[group_of(row.name)]
        sums[group_of(row.name)] = (ms + row.ms, calls + row.calls, share + row.share)
    rows = (Row(name, *values) for name, values in sums.items())
    return tuple(sorted(rows, key=lambda row: row.ms, reverse=True))


def _profile(work: Work, device: torch.device, trace: str) -> list[Row]:
    """Every kernel of one call after two that are not profiled, longest first; the trace goes to a file."""
    for _ in range(2):
        first_call(work.run, device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        work.run()
        wait(device)
    profiler.export_chrome_trace(trace)
    sums: dict[str, tuple[float, int]] = {}
    for event in profiler.events() or ():
        ms = _own_ms(event, device)
        if ms is not None:
            before, calls = sums.get(event.name, (0.0, 0))
            sums[event.name] = (before + ms, calls + 1)
    total = sum(ms for ms, _ in sums.values())
    rows = (Row(name, ms, calls, ms / total) for name, (ms, calls) in sums.items())
    return sorted(rows, key=lambda row: row.ms, reverse=True)


def _own_ms(event: FunctionEvent, device: torch.device) -> float | None:
    """The time of a kernel on the GPU, or of an operator on the CPU; None for anything else."""
    if device.type == "cpu":
        return event.self_cpu_time_total / 1000
    if event.device_type.name != "CUDA" or event.is_user_annotation:
        return None
    return event.time_range.elapsed_us() / 1000


def _print(report: ProfileReport) -> None:
    what = f"{report.what}, {report.dtype}, attention {report.attention}, {report.weights} weights"
    say(f"{report.model} {report.size}, {what}, {report.environment.device}")
    unit = "kernels" if report.is_gpu else "operators"
    say(f"{report.total_ms:,.2f} ms in {unit} of one call")
    for title, rows in (("group", report.groups), (f"longest {unit}", report.longest)):
        say(f"\n{title:<{_NAME_WIDTH}}{'ms':>12}{'calls':>8}{'share':>8}")
        for row in rows:
            name = row.name if len(row.name) < _NAME_WIDTH else f"{row.name[: _NAME_WIDTH - 4]}..."
            say(f"{name:<{_NAME_WIDTH}}{row.ms:>12,.3f}{row.calls:>8}{row.share:>8.1%}")
