"""What `quant=fp8` costs in accuracy, on a CPU, where products of fp8 values are emulated exactly in fp32.

The packaged demo model, which is trained: the error of its velocity when one kind of layer, one block or all
are fp8, and what is left of it in finished videos. Then random weights with outlier channels, where a scale a
row is compared with a scale a tensor. bfloat16 is measured beside, for scale. Speed is not measured here.
Usage: python docs/benchmarks/fp8_error.py [--out docs/benchmarks/fp8_error.json]
"""

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from shapeworld import canonical, compare, judge, rows, sample_attrs

from chitu_core import weights
from chitu_core.config import load
from chitu_core.environment import Environment
from chitu_core.ops.fp8 import Fp8Linear
from chitu_core.ops.rows import FP8, FP8_MAX
from chitu_diffusion.engine import Engine
from chitu_diffusion.models._layers import FeedForward
from chitu_diffusion.models.wan import WanConfig, WanDiT
from chitu_diffusion.quantisation import QUANTISED, kept_blocks
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskPool

STEPS, STEPS_SEEN = 20, (0, 5, 10, 15, 19)
PROMPTS = (
    "a red circle moves right on a blue background",
    "a green square moves up on a white background",
)
VIDEOS, DRAW = 8, 20261120  # the judge's held-out prompts, drawn with this seed
SHARE, FACTORS = 0.01, (1, 20)  # of channels that are outliers, and how much larger those are
RANDOM = WanConfig(256, 1024, 4, 8, 256, 192, 512, 16, 16, (1, 2, 2), 1e-6)
RANDOM_LATENT, RANDOM_WORDS, RANDOM_TIMES = (1, 16, 5, 12, 20), 24, (999, 750, 500, 250)
WHOLE = (
    "all layers, all blocks",
    "the same with a scale a tensor",
    "quant=fp8",
    "quant=fp8 in bfloat16",
    "bfloat16",
)

Make = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True)
class Point:
    """One call of the transformer: latent [1, C, T, h, w], timestep, encoded text [1, n, text_dim]."""

    latent: Tensor
    timestep: Tensor
    text: Tensor


@dataclass(frozen=True)
class Clip:
    """What one request made: final latents [C, T, h, w] and video [3, F, H, W] in [-1, 1]."""

    latents: Tensor
    video: Tensor


def build_engine(outputs: str, *overrides: str) -> Engine:
    """The demo model on the CPU, fp32 where `overrides` do not say otherwise."""
    with initialize_config_module("chitu_core.config", version_base="1.3"):
        words = ["models=demo", "infer.op_impl=cpu", f"output.root_dir={outputs}", *overrides]
        config = load(compose("serve_config", words))
    return Engine(config, TaskPool(), Environment())


def run(engine: Engine, prompt: str, seed: int) -> tuple[list[Point], Clip]:
    """One request at the model's own size: what the transformer saw in `STEPS_SEEN`, and the result."""
    task = DiffusionTask.from_user_request(
        DiffusionUserParams(prompt=prompt, seed=seed, num_inference_steps=STEPS)
    )
    engine.pool.add(task)
    engine.step()
    buffer, points = task.buffer, []
    while buffer.current_step < STEPS:
        if buffer.current_step in STEPS_SEEN:
            timestep = buffer.timesteps[buffer.current_step]
            points.append(Point(buffer.latents[None].clone(), timestep, buffer.text_embeddings[None]))
        engine.step()
    latents = buffer.latents.clone()
    with torch.inference_mode():
        video = torch.cat(list(engine.pipeline.vae.decode(latents)), dim=1).float().clamp(-1, 1)
    engine.step()
    assert task.result is not None, task.error_message
    return points, Clip(latents, video)


@torch.inference_mode()
def velocities(dit: WanDiT, points: Sequence[Point]) -> list[Tensor]:
    """The conditional velocity at each point, the text projected by this network too."""
    return [dit(point.latent, point.timestep, dit.encode_text(point.text)) for point in points]


def fp8_by_row(linear: nn.Linear) -> Fp8Linear:
    """The layer of the product, with these weights."""
    made = Fp8Linear(linear.in_features, linear.out_features)
    for leaf, parameter in linear.named_parameters():
        made.receive(leaf, parameter.data)
    return made


class Fp8ByTensor(nn.Linear):
    """The same with one scale for the whole weight and one for all tokens.

    `weight` is fp32 with values that fp8 can hold, so the operation before leaves quantising to this layer.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight.data, self.bias.data = rounded_by_tensor(linear.weight.data), linear.bias.data

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]."""
        return F.linear(rounded_by_tensor(x), self.weight, self.bias)


class UnfusedFeedForward(FeedForward):
    """The feed-forward layer by layer; the packaged one reaches past its first layer to the weights."""

    def __init__(self, *layers: nn.Module) -> None:
        nn.Sequential.__init__(self, *layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, d] to the same."""
        return nn.Sequential.forward(self, x)


def rounded_by_tensor(x: Tensor) -> Tensor:
    """x as fp8 with one scale, and back in fp32."""
    scale = x.abs().amax().clamp_min(1e-12) / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() * scale


@contextmanager
def swapped(
    dit: WanDiT, blocks: Sequence[int], layers: Sequence[str] = QUANTISED, make: Make = fp8_by_row
) -> Iterator[None]:
    """These layers of these blocks as `make` makes them, for a while."""
    undo = []
    for index in blocks:
        block = dit.block_list()[index]
        for name in layers:
            owner_name, _, leaf = name.rpartition(".")
            owner, linear = block.get_submodule(owner_name), block.get_submodule(name)
            undo.append((owner, leaf, linear))
            owner.register_module(leaf, make(linear))
        if make is Fp8ByTensor:
            undo.append((block, "ffn", block.ffn))
            block.register_module("ffn", UnfusedFeedForward(*block.ffn))
    try:
        yield
    finally:
        for owner, leaf, module in reversed(undo):
            owner.register_module(leaf, module)


def in_bfloat16(dit: WanDiT) -> WanDiT:
    """A copy whose parameters have the number formats of `infer.dtype=bfloat16`."""
    copy = deepcopy(dit)
    for name, parameter in copy.named_parameters():
        parameter.data = parameter.data.to(WanDiT.weight_dtype(name, torch.bfloat16))
    return copy


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float | list[float]]:
    """Relative L2 at every point, their mean and maximum."""
    each = [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
    return {"mean": statistics.mean(each), "max": max(each), "each": each}


def of_the_demo_model(outputs: str) -> dict[str, object]:
    """Errors of the velocity of the trained demo model, by layer and by block."""
    engine = build_engine(outputs)
    points = [point for seed, prompt in enumerate(PROMPTS) for point in run(engine, prompt, seed)[0]]
    dit = engine.pipeline.experts["dit"]
    exact = velocities(dit, points)
    every = range(len(dit.blocks))
    first, last = every[0], every[-1]
    inner = sorted(set(every) - kept_blocks(len(dit.blocks)))

    def cost(
        blocks: Sequence[int], layers: Sequence[str] = QUANTISED, make: Make = fp8_by_row
    ) -> dict[str, float | list[float]]:
        with swapped(dit, blocks, layers, make):
            return errors(velocities(dit, points), exact)

    def keeping(blocks: Sequence[int], layer: str | None) -> dict[str, float | list[float]]:
        rest, layers = sorted(set(every) - set(blocks)), [name for name in QUANTISED if name != layer]
        block = dit.block_list()[0]
        num_fp8, num_all = (
            sum(block.get_submodule(name).weight.numel() for name in names) for names in (layers, QUANTISED)
        )
        share = 1 - num_fp8 * len(rest) / (num_all * len(every))
        return cost(rest, layers) | {"share of the products that stay": share}

    found = {
        "prompts": PROMPTS,
        "steps": STEPS_SEEN,
        "one layer, all blocks": {name: cost(every, [name]) for name in QUANTISED},
        "all layers, one block": {str(index): cost([index]) for index in every},
        "kept": {
            f"blocks {list(blocks)}, layer {layer}": keeping(blocks, layer)
            for layer in (None, "self_attn.o")
            for blocks in ((), (first,), (last,), (first, last), (last - 1, last))
        },
        "all layers, all blocks": cost(every),
        "the same with a scale a tensor": cost(every, make=Fp8ByTensor),
        "quant=fp8": cost(inner),
    }
    halved = in_bfloat16(dit)
    found["bfloat16"] = errors(velocities(halved, points), exact)
    with swapped(halved, inner):
        found["quant=fp8 in bfloat16"] = errors(velocities(halved, points), exact)
    engine.close()
    return found


def of_videos(outputs: str) -> dict[str, object]:
    """Final latents and frames of whole requests, against fp32, and what the judge sees in them."""
    wanted = sample_attrs(VIDEOS, torch.Generator().manual_seed(DRAW), split="heldout")
    prompts = [canonical(row) for row in rows(wanted)]
    kinds = {
        "fp32": (),
        "quant=fp8": ("quant=fp8",),
        "quant=fp8 in bfloat16": ("quant=fp8", "infer.dtype=bfloat16"),
        "bfloat16": ("infer.dtype=bfloat16",),
    }
    clips, found = {}, {}
    for kind, overrides in kinds.items():
        engine = build_engine(outputs, *overrides)
        clips[kind] = [run(engine, prompt, seed)[1] for seed, prompt in enumerate(prompts)]
        engine.close()
        pairs = list(zip(clips[kind], clips["fp32"], strict=True))
        verdict = compare(judge(torch.stack([clip.video for clip in clips[kind]])), wanted)
        found[kind] = {
            "latents": errors([a.latents for a, _ in pairs], [b.latents for _, b in pairs]),
            "psnr": [psnr(a.video, b.video) for a, b in pairs],
            "judge": {key: int(verdict[key].sum()) for key in ("color", "bg", "dir", "shape", "all")},
        }
    return {"prompts": prompts, "kinds": found}


def psnr(a: Tensor, b: Tensor) -> float | None:
    """Peak signal-to-noise ratio of two videos in [-1, 1], dB; None where they are equal."""
    error = float((a.double() - b.double()).square().mean())
    return 10 * math.log10(4 / error) if error else None


def of_random_weights() -> dict[str, object]:
    """Errors of the velocity of a small random transformer, without outlier channels and with them."""
    with torch.device("meta"):
        dit = WanDiT(RANDOM)
    found = {}
    every = range(RANDOM.num_layers)
    for factor in FACTORS:
        weights.randomise(dit, device=torch.device("cpu"), dtype_of=lambda _: torch.float32, seed=0)
        dit.requires_grad_(False)
        add_outliers(dit, factor)
        draw = torch.Generator().manual_seed(1)
        text = torch.randn(1, RANDOM_WORDS, RANDOM.text_dim, generator=draw)
        points = [
            Point(torch.randn(RANDOM_LATENT, generator=draw), torch.tensor(t), text) for t in RANDOM_TIMES
        ]
        exact = velocities(dit, points)
        row = {"bfloat16": errors(velocities(in_bfloat16(dit), points), exact)}
        for name, make in (("a scale a row", fp8_by_row), ("a scale a tensor", Fp8ByTensor)):
            with swapped(dit, every, make=make):
                row[name] = errors(velocities(dit, points), exact)
        found[f"{factor:g}"] = row
    return found


def add_outliers(dit: WanDiT, factor: float) -> None:
    """Multiply 1 % of the input channels of the blocks' linear layers and norms by `factor`."""
    draw = torch.Generator().manual_seed(2)
    for name, parameter in dit.blocks.named_parameters():
        if name.endswith("weight"):
            channels = torch.randperm(parameter.shape[-1], generator=draw)
            parameter.data[..., channels[: round(SHARE * len(channels))]] *= factor


def measure() -> dict[str, object]:
    """All three, and what they hold for."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as outputs:
        result = {
            "demo model, velocity": of_the_demo_model(outputs),
            "demo model, videos": of_videos(outputs),
            "random weights, velocity, by factor of the outliers": of_random_weights(),
        }
    return result | {"environment": environment(), "seconds": round(time.perf_counter() - begin, 1)}


def environment() -> dict[str, object]:
    """What the numbers hold for."""
    return {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": shlex.join(["python", *sys.argv]),
    }


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    velocity, videos = result["demo model, velocity"], result["demo model, videos"]["kinds"]
    lines = ["| fp8 in the demo model | mean | largest |", "|---|---|---|"]
    for group in ("one layer, all blocks", "all layers, one block", "kept"):
        lines += [error_row(f"{group}: {name}", found) for name, found in velocity[group].items()]
    for name in WHOLE:
        lines.append(error_row(name, velocity[name]))
    lines += [
        "",
        "| videos | latents, mean | largest | PSNR, mean | smallest | judge |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in videos.items():
        values = [value for value in found["psnr"] if value is not None]
        decibels = f"{statistics.mean(values):.1f} | {min(values):.1f}" if values else " | "
        right = ", ".join(f"{key} {count}" for key, count in found["judge"].items())
        lines.append(f"{error_row(name, found['latents'])} {decibels} | {right} |")
    lines += ["", "| random weights | mean | largest |", "|---|---|---|"]
    for factor, kinds in result["random weights, velocity, by factor of the outliers"].items():
        lines += [error_row(f"outliers times {factor}: {name}", found) for name, found in kinds.items()]
    return "\n".join([*lines, "", f"{result['seconds']} s", ""])


def error_row(name: str, found: dict[str, Any]) -> str:
    """A row of a table: mean and maximum."""
    return f"| {name} | {found['mean']:.2e} | {found['max']:.2e} |"


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description="what quant=fp8 costs in accuracy, on a CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    result = measure()
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result), end="")


if __name__ == "__main__":
    main()
