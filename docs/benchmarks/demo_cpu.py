"""The packaged demo clip on two CPU cores: this engine and diffusers.WanPipeline in one process, in turn.

Same weights, seed and noise levels. Times go from the prompt to float frames in memory; writing the mp4 comes
on top and is timed by itself. Loading is not timed. Needs diffusers, as `pip install -e .[dev]` brings it.
Usage: python docs/benchmarks/demo_cpu.py [rounds]
"""

import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from hydra import compose, initialize_config_module
from safetensors.torch import load_file
from torch import Tensor

from chitu_core.config import load
from chitu_core.environment import Environment
from chitu_diffusion.engine import Engine
from chitu_diffusion.samplers.unipc import Sampler
from chitu_diffusion.task import DiffusionTask, DiffusionTaskType, DiffusionUserParams, TaskPool

DEMO = Path(__file__).parents[2] / "chitu_diffusion" / "demo"
RESULT = Path(__file__).with_suffix(".json")
PROMPT, NEGATIVE, SEED = "a red circle moves right on a blue background", "", 42
HEIGHT, WIDTH, FRAMES, STEPS, GUIDANCE, SHIFT = 96, 160, 17, 20, 4.0, 3.0
THREADS = 2


@dataclass(frozen=True)
class Seconds:
    """One clip: each stage, and their sum. `decode` ends with float frames on the host."""

    text: float
    denoise: float
    decode: float
    total: float


@dataclass(frozen=True)
class Clip:
    """What one run made: latents [C, T, h, w] and frames [F, H, W, 3] in [0, 1]."""

    seconds: Seconds
    latents: Tensor
    frames: np.ndarray
    decode_and_write: float | None = None  # seconds of the decoding that writes the mp4 while it decodes


class SameNoiseLevels(UniPCMultistepScheduler):
    """The scheduler of diffusers on the noise levels of our sampler, which are those of the Wan release."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        sigmas = np.array(Sampler(num_inference_steps, SHIFT).sigmas[:-1])
        super().set_timesteps(device=device, sigmas=sigmas)


def build_engine(outputs: Path) -> Engine:
    """Our engine on the demo model, fp32 on the CPU."""
    with initialize_config_module("chitu_core.config", version_base="1.3"):
        overrides = ["models=demo", "infer.op_impl=cpu", "infer.dtype=float32", f"output.root_dir={outputs}"]
        config = load(compose("serve_config", overrides))
    assert config.models.sampler.sample_shift == SHIFT
    return Engine(config, TaskPool(), Environment())


def run_engine(engine: Engine) -> Clip:
    """Make the clip step by step; decode once into memory and once more, as users do, into the file."""
    params = DiffusionUserParams(
        prompt=PROMPT, negative_prompt=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=SEED,
    )  # fmt: skip
    task = DiffusionTask.from_user_request(params)
    marks = [time.perf_counter()]
    engine.pool.add(task)
    engine.step()
    marks.append(time.perf_counter())
    while task.task_type == DiffusionTaskType.Denoise and not task.is_finished():
        engine.step()
    marks.append(time.perf_counter())
    latents = task.buffer.latents
    assert latents is not None, task.error_message
    with torch.inference_mode():
        video = torch.cat(list(engine.pipeline.vae.decode(latents)), dim=1)  # [3, F, H, W] in [-1, 1]
        frames = (video / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).numpy()
    marks.append(time.perf_counter())
    engine.step()
    end = time.perf_counter()
    assert task.result is not None, task.error_message
    return Clip(stages(marks), latents, frames, end - marks[-1])


def build_pipeline() -> WanPipeline:
    """diffusers on the same folder in fp32, with the weights of its transformer read here.

    NOTE `WanTransformer3DModel.from_pretrained` needs accelerate; the module and its numbers are the same.
    """
    folder = DEMO / "transformer"
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    transformer.load_state_dict(state)
    scheduler = SameNoiseLevels(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    pipeline = WanPipeline.from_pretrained(
        DEMO, transformer=transformer.float().eval(), scheduler=scheduler, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_pipeline(pipeline: WanPipeline) -> Clip:
    """Make the clip in one call; the transformer's first call and the last step tell the stages apart."""
    first_calls: list[float] = []
    steps: list[tuple[float, Tensor]] = []

    def note_call(*_: object) -> None:
        first_calls.append(time.perf_counter())

    def note_step(
        _pipeline: object, _index: int, _timestep: object, kept: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        steps.append((time.perf_counter(), kept["latents"]))
        return {}

    hook = pipeline.transformer.register_forward_pre_hook(note_call)
    start = time.perf_counter()
    frames = pipeline(
        prompt=PROMPT, negative_prompt=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=note_step,
    ).frames[0]  # fmt: skip
    end = time.perf_counter()
    hook.remove()
    return Clip(stages([start, first_calls[0], steps[-1][0], end]), steps[-1][1][0], frames)


def stages(marks: list[float]) -> Seconds:
    """From four points in time to three stages and their sum."""
    text, denoise, decode = (round(after - before, 4) for before, after in pairwise(marks))
    return Seconds(text, denoise, decode, round(marks[-1] - marks[0], 4))


def median(runs: list[Clip]) -> Seconds:
    """The median of each column by itself."""
    columns = zip(*(asdict(run.seconds).values() for run in runs), strict=True)
    return Seconds(*map(statistics.median, columns))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def environment() -> dict[str, object]:
    """What the numbers hold for."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "command": shlex.join(["python", *sys.argv]),
    }


def cpu_name() -> str:
    """The model of the processor where the system tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def compare(rounds: int) -> dict[str, object]:
    """One warm-up each, then `rounds` times ours and theirs in turn."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as outputs:
        engine, pipeline = build_engine(Path(outputs)), build_pipeline()
        run_engine(engine)
        run_pipeline(pipeline)
        pairs = [(run_engine(engine), run_pipeline(pipeline)) for _ in range(rounds)]
        engine.close()
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    our_median, their_median = median(ours), median(theirs)
    writing = [run.seconds.text + run.seconds.denoise + (run.decode_and_write or 0) for run in ours]
    frames = [torch.from_numpy(run.frames) * 2 - 1 for run in (ours[-1], theirs[-1])]
    return {
        "clip": f"{HEIGHT}x{WIDTH}, {FRAMES} frames, {STEPS} UniPC steps, guidance {GUIDANCE:g}, fp32",
        "environment": environment(),
        "median_seconds": {"chitu_diffusion": asdict(our_median), "diffusers": asdict(their_median)},
        "median_seconds_of_chitu_diffusion_with_mp4": round(statistics.median(writing), 4),
        "speedup": round(their_median.total / our_median.total, 3),
        "latents_relative_l2": relative_error(ours[-1].latents, theirs[-1].latents),
        "video_relative_l2": relative_error(*frames),
        "rounds": [{"chitu_diffusion": asdict(a.seconds), "diffusers": asdict(b.seconds)} for a, b in pairs],
    }


def table(result: dict[str, Any]) -> str:
    """The medians as Markdown."""
    lines = ["| seconds | text | denoise | decode | prompt to frames |", "|---|---|---|---|---|"]
    for name, row in result["median_seconds"].items():
        lines.append("| " + " | ".join([name, *(f"{value:.3f}" for value in row.values())]) + " |")
    with_mp4 = result["median_seconds_of_chitu_diffusion_with_mp4"]
    errors = f"latents {result['latents_relative_l2']:.1e}, video {result['video_relative_l2']:.1e}"
    lines += ["", f"{result['clip']}: {result['speedup']:.2f} times as fast as diffusers."]
    lines += [f"With the mp4 written: {with_mp4:.3f} s. Relative L2: {errors}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Run, print the table and write the JSON beside this file."""
    result = compare(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(table(result))


if __name__ == "__main__":
    main()
