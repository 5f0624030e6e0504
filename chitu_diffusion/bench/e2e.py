"""`chitu bench e2e`: whole requests, from the prompt to the mp4 file, through pool and engine.

All networks are loaded before. With random weights the picture is noise, the worst case for H.264.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from chitu_core.memory import MemoryPeak
from chitu_diffusion.bench._setup import (
    Report,
    Video,
    add_common,
    build_engine,
    check_counts,
    config_of,
    heading,
    make_folder,
    say,
    subject_of,
    video_of,
    write_report,
)
from chitu_diffusion.engine import Engine
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

PROMPT = "a cat walks on grass " * 40  # fills about a half of the text
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Request:
    """One finished request: seconds by the host's clock from the pool to the file, and by stage."""

    total_s: float
    stages_s: dict[str, float]
    peak_memory: MemoryPeak


@dataclass(frozen=True, kw_only=True)
class EndToEndReport(Report):
    """The JSON file."""

    attention: str
    steps: int
    guidance: tuple[float, ...]
    build_s: float  # of the engine with all networks
    warm_up: Request  # of two steps
    requests: tuple[Request, ...]
    median_s: float
    video: str  # file of the last request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `chitu bench e2e`."""
    add_common(parser, repeats=1)
    add_request(parser)


def add_request(parser: argparse.ArgumentParser) -> None:
    """Declare what a request may ask for."""
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps; the model's own")
    parser.add_argument(
        "--guidance", type=float, metavar="G", help="the model's own; 1 for one branch a step"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print and write the file. Raises ValueError naming option, value and remedy, and RuntimeError
    for a request that failed."""
    check_counts(options, ("repeats", "steps"))
    config = config_of(options)
    video = video_of(options, config.models)
    make_folder(options)
    begin = time.perf_counter()
    engine = build_engine(config)
    build_s = time.perf_counter() - begin
    file = options.out / f"e2e_{config.models.name}_{video.name}_video.mp4"
    try:
        warm_up = generate(engine, request_of(video, file, WARM_UP_STEPS, options.guidance))
        asked = request_of(video, file, options.steps, options.guidance)
        requests = tuple(generate(engine, asked) for _ in range(options.repeats))
        head = heading(options, "e2e", add_arguments, video.name, subject_of(engine))
        attention = engine.pipeline.attention.name
    finally:
        engine.close()
    scales = config.models.sampler.guidance_scale
    report = EndToEndReport(
        **head,
        attention=attention,
        steps=options.steps or config.models.sampler.sample_steps,
        guidance=scales if options.guidance is None else (options.guidance,) * len(scales),
        build_s=build_s,
        warm_up=warm_up,
        requests=requests,
        median_s=statistics.median(request.total_s for request in requests),
        video=str(file),
    )
    _print(report)
    write_report(report, "e2e", options.out)
    return 0


def request_of(video: Video, file: Path, steps: int | None, guidance: float | None) -> DiffusionUserParams:
    """A request for `video`, written to `file`."""
    return DiffusionUserParams(
        prompt=PROMPT,
        width=video.width,
        height=video.height,
        num_frames=video.num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=1,
        save_path=str(file),
    )


def generate(engine: Engine, params: DiffusionUserParams) -> Request:
    """Run one request to its end. Raises RuntimeError with the reason if it fails."""
    task = DiffusionTask.from_user_request(params)
    begin = time.perf_counter()
    engine.pool.add(task)
    while not engine.pool.all_finished():
        engine.step()
    total_s = time.perf_counter() - begin  # the file is whole, so the device has nothing left to do
    if task.result is None:
        raise RuntimeError(f"the request failed: {task.error_message}")
    return Request(total_s, task.result.seconds, task.result.peak_memory)


def _print(report: EndToEndReport) -> None:
    scales = ", ".join(f"{scale:g}" for scale in report.guidance)
    what = f"{report.steps} steps, guidance {scales}, {report.dtype}, attention {report.attention}"
    say(f"{report.model} {report.size}, {what}, {report.weights} weights, {report.environment.device}")
    warm_up = f"{WARM_UP_STEPS} steps to warm up {report.warm_up.total_s:.2f} s"
    say(f"engine built in {report.build_s:.2f} s, {warm_up}")
    for request in report.requests:
        stages = ", ".join(f"{name} {s:.2f}" for name, s in request.stages_s.items() if name != "total")
        device_gib = request.peak_memory.device_gib
        peak = "" if device_gib is None else f"; peak {device_gib:.2f} GiB"
        say(f"{request.total_s:.2f} s: {stages}{peak}")
    say(f"median of {len(report.requests)}: {report.median_s:.2f} s; {report.video}")
