"""DiTango beside exact ring attention: milliseconds of guided steps of Wan2.1-T2V-1.3B, 832x480, 81 frames.

    torchrun --nproc_per_node 4 docs/benchmarks/ditango_h100.py --out FILE.json
    torchrun --nproc_per_node 2 docs/benchmarks/ditango_h100.py --tiny  # a rehearsal on CPUs

All ranks share one sequence (infer.diffusion.cfg_size=1), with infer.diffusion.up_limit 1 and 2. bf16, eager,
attention by cuDNN. A time is of one denoising step with both branches, by CUDA events on rank 0 after a
barrier; every run is made twice and the second counts. The file is written after every run. Weights are
random, so the shares of reused groups are no forecast for a trained model, and nothing is said of quality:
read milliseconds against shares.
"""

import argparse
import json
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from torch import Tensor
from torch import distributed as dist

from chitu_core.config import load
from chitu_core.distributed import ParallelMesh, open_mesh, plan_degrees
from chitu_core.environment import Environment
from chitu_core.timing import Span
from chitu_core.weights import randomise
from chitu_diffusion.attention_plan import plan_attention
from chitu_diffusion.flex_cache._base import Course, Model, Services, Step
from chitu_diffusion.flex_cache._calibration import NOTHING
from chitu_diffusion.flex_cache.strategy.ditango import Knobs, Strategy
from chitu_diffusion.guidance import BOTH, guided_prediction
from chitu_diffusion.models.wan import WanDiT
from chitu_diffusion.samplers.unipc import Sampler
from chitu_diffusion.survey import pick_device, pick_dtype, survey

# of a rehearsal or not: model, latent [C, T, h, w]
SIZES = {True: ("demo", (16, 5, 12, 20)), False: ("Wan2.1-T2V-1.3B", (16, 21, 60, 104))}
RATIOS = (None, 0.5, 1.0)  # None: exact, without a strategy
GUIDANCE, SHIFT, TRAIN_STEPS = 5.0, 5.0, 1000
FORCED = 2  # steps at either end


class Network:
    """A transformer with random weights and a request's inputs, the same on every rank."""

    def __init__(self, model: str, shape: tuple[int, ...], device: torch.device) -> None:
        overrides = [f"models={model}", "debug.skip_model_load=true"]
        with initialize_config_module("chitu_core.config", version_base=None):
            config = load(compose("serve_config", overrides=overrides))
        dtype = pick_dtype("auto", device)
        self.infer, self.found = config.infer, survey(config, device, dtype)
        self.config = self.found.sizes.dit
        with torch.device("meta"):
            self.dit = WanDiT(self.config)
        dtype_of = partial(WanDiT.weight_dtype, dtype=dtype)
        randomise(self.dit, device=device, dtype_of=dtype_of, seed=0)
        draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        rows = (1, self.config.text_len, self.config.text_dim)
        self.latent, self.texts = draw(shape), {name: self.dit.encode_text(draw(rows)) for name in BOTH}
        self.tokens = self.latent[0].numel() // math.prod(self.config.patch_size)


class Runs:
    """Denoising runs of one transformer on a mesh."""

    def __init__(self, network: Network, mesh: ParallelMesh, device: torch.device) -> None:
        self.network, self.mesh, self.device, self.shard = network, mesh, device, mesh.tokens()
        infer = replace(network.infer, attn_type="sdpa_cudnn" if device.type == "cuda" else "sdpa")
        layers, degrees = network.config.num_layers, mesh.degrees
        plan = plan_attention(infer, network.found.place, layers, degrees.ring).spread(mesh, self.shard)
        plan.install(network.dit)
        self.services = Services(mesh.agreement(), lambda *_: network.latent, plan.chosen)
        self.model = Model("random", layers, ("only",), NOTHING, degrees.ring, degrees.ulysses)

    def strategy(self, sampler: Sampler, group_size: int, ratio: float) -> Strategy:
        levels = zip(sampler.timesteps, sampler.sigmas, sampler.sigmas[1:], strict=False)
        steps = tuple(Step(index, *level, "only") for index, level in enumerate(levels))
        dtype = self.network.found.place.dtype
        course = Course(self.model, steps, FORCED, FORCED, SHIFT, self.network.tokens, dtype)
        return Strategy(course, Strategy.complete(Knobs(group_size), ratio, self.model), self.services)

    def run(self, count: int, group_size: int, ratio: float | None) -> dict:
        """Times of the steps of one run; exact without a ratio."""
        sampler, latent, rows = Sampler(count, SHIFT, TRAIN_STEPS), self.network.latent, []
        cache = None if ratio is None else self.strategy(sampler, group_size, ratio)
        for index, timestep in enumerate(sampler.timesteps):
            time = torch.tensor(timestep, device=self.device)
            compute = partial(guided_prediction, partial(self.predict, cache, latent, time), GUIDANCE)
            dist.all_reduce(torch.zeros(1))  # a barrier on the host
            row, step = {"kind": "exact"}, partial(self.step, cache, index, compute, latent)
            with Span(self.device) as span:
                velocity = step(row)
            latent = sampler.step(velocity, latent)
            rows.append(row | {"ms": round(span.milliseconds(), 3)})
        return summary(rows, cache) | {"finite": bool(latent.isfinite().all())}

    def step(
        self, cache: Strategy | None, index: int, compute: Callable, latent: Tensor, row: dict
    ) -> Tensor:
        """The velocity of a step; what was decided goes into `row`."""
        if cache is None:
            return compute().guided
        cache.enter_step(index)
        row["kind"] = "forced" if cache.is_forced else "anchor" if cache.is_anchor else "selective"
        before = counts(cache)
        velocity = cache.velocity(compute, latent)
        computed, reused = (now - then for now, then in zip(counts(cache), before, strict=True))
        row["reused"] = round(reused / (computed + reused), 4)
        return velocity

    def predict(self, cache: Strategy | None, latent: Tensor, time: Tensor, branch: str) -> Tensor:
        if cache is not None:
            cache.enter_branch(branch)
        text = self.network.texts[branch]
        return self.network.dit(latent[None], time, text, shard=self.shard, around=cache)[0]


def counts(cache: Strategy) -> tuple[int, int]:
    return cache.tally.computed["attention"], cache.tally.reused["attention"]


def summary(rows: list[dict], cache: Strategy | None) -> dict:
    """Milliseconds of a step: mean of all, median by kind; the share of (layer, group) pairs reused."""
    found: dict = {"mean_ms": round(statistics.mean(row["ms"] for row in rows), 3)}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        found[f"{kind}_ms"] = statistics.median(row["ms"] for row in rows if row["kind"] == kind)
    if cache is not None:
        computed, reused = counts(cache)
        found |= {"reused": round(reused / (computed + reused), 4), "settings": asdict(cache.knobs)}
        found |= {"peak_kept_gb": round(cache.kept.peak_bytes / 1e9, 4)}
    return found | {"steps": rows}


def cases(world: int) -> list[tuple[int, int]]:
    """up_limit and group size, where so many ranks can be cut so."""
    wanted = [(up_limit, size) for up_limit in (1, 2) for size in (1, 2) if size % up_limit == 0]
    return [(up_limit, size) for up_limit, size in wanted if world % size == 0 and world // size >= 2]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="on CPUs, with small sizes")
    parser.add_argument("--steps", type=int, default=16, help="of a run (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options, environment = parser.parse_args(), Environment.read()
    if not cases(environment.world_size):
        raise SystemExit("ranks must be cut into two groups at least; start several by torchrun")
    logging.disable(logging.WARNING)  # every rank would say that weights are random
    device = pick_device("cpu" if options.tiny else "torch", environment.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    network = Network(*SIZES[options.tiny], device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    record: dict = {"device": name, "torch": torch.__version__, "world": environment.world_size}
    record |= {"tokens": network.tokens, "steps": options.steps, "forced_at_either_end": FORCED}
    meshes: dict[int, ParallelMesh] = {}
    with torch.inference_mode():
        for up_limit, group_size in cases(environment.world_size):
            if up_limit not in meshes:
                heads = network.config.num_heads
                degrees = plan_degrees(environment.world_size, heads, up_limit, needs_cfg=True, cfg=1)
                meshes[up_limit] = open_mesh(degrees, environment, device)
            runs = Runs(network, meshes[up_limit], device)
            for ratio in RATIOS:
                case = f"up_limit {up_limit}, " + ("exact" if ratio is None else f"{group_size=}, {ratio=}")
                if case in record:
                    continue
                found = [runs.run(options.steps, group_size, ratio) for _ in range(2)][-1]
                record[case] = {"degrees": str(runs.mesh.degrees)} | found
                if environment.rank == 0:
                    print(case, {key: value for key, value in found.items() if key != "steps"}, flush=True)
                    if options.out is not None:
                        options.out.write_text(json.dumps(record, indent=1) + "\n")
    for mesh in meshes.values():
        mesh.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
