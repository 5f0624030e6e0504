"""A tiny transformer denoised with a cache strategy, on one rank or several: the generator's loop alone."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

from chitu_core.attention._parallel import spread
from chitu_core.attention.torch_sdpa import Backend
from chitu_core.distributed import Degrees
from chitu_core.distributed.mesh import ParallelMesh, _with_groups
from chitu_core.weights import randomise
from chitu_diffusion.flex_cache._base import Course, FlexCache, Model, Services, Step
from chitu_diffusion.flex_cache._calibration import (
    NOTHING,
    Calibration,
    MagCalibration,
    MagRatios,
    TeaCalibration,
    TeaFit,
)
from chitu_diffusion.guidance import guided_prediction
from chitu_diffusion.models.wan import BlockCall, WanBlock, WanConfig, WanDiT
from chitu_diffusion.params import strategy_class
from chitu_diffusion.samplers.unipc import Sampler
from chitu_diffusion.sequence import NO_SHARD

CONFIG = WanConfig(48, 96, 4, 5, 32, 24, 12, 4, 4, (1, 2, 2), 1e-6)
GRID = (5, 6, 6)  # 45 tokens, which no even number of ranks divides
SHIFT, GUIDANCE = 3.0, 4.0


def expert(seed: int = 3) -> WanDiT:
    """A transformer with random weights, norms too."""
    with torch.device("meta"):
        dit = WanDiT(CONFIG)
    randomise(dit, device=torch.device("cpu"), dtype_of=lambda _: torch.float32, seed=seed)
    return dit.eval()


def course(
    count: int,
    warmup: int = 0,
    cooldown: int = 0,
    *,
    switch: int | None = None,
    calibration=NOTHING,
    tokens=45,
) -> Course:
    """A run of `count` steps, the expert changing before step `switch`."""
    sampler = Sampler(count, SHIFT)
    names = ["dit"] * count if switch is None else ["high"] * switch + ["low"] * (count - switch)
    levels = zip(sampler.timesteps, sampler.sigmas, sampler.sigmas[1:], names, strict=False)
    steps = tuple(Step(index, t, s, after, name) for index, (t, s, after, name) in enumerate(levels))
    model = Model("tiny", CONFIG.num_layers, tuple(dict.fromkeys(names)), calibration)
    return Course(model, steps, warmup, cooldown, SHIFT, tokens, torch.float32)


def calibration(count: int, names: tuple[str, ...] = ("dit",)) -> Calibration:
    """TeaCache that takes the change itself as the estimate, MagCache with ratios of 0.98."""
    sigmas = Sampler(count, SHIFT).sigmas[:-1]
    ratios = MagRatios(tuple(sigmas), (0.98,) * (count - 1), (0.97,) * (count - 1))
    tea = TeaCalibration(count, SHIFT, (0.1, 0.3), dict.fromkeys(names, TeaFit((1.0, 0.0))))
    return Calibration("test", tea, MagCalibration((0.12, 0.24), (2, 4), 0.2, dict.fromkeys(names, ratios)))


def make(name: str, run: Course, services: Services | None = None, **knobs: object) -> FlexCache:
    """A strategy for a run; settings that are not given follow from the ratio 0.5."""
    strategy = strategy_class(name)
    complete = strategy.complete(strategy.knobs_type(**knobs), 0.5, run.model)
    return strategy(run, complete, services or Services(lambda x: x, expert_signal, Backend()))


def expert_signal(name: str, timesteps) -> Tensor:
    return expert().time_signal(torch.tensor(timesteps))


@dataclass(frozen=True)
class Ran:
    """What came of a run."""

    latents: Tensor
    computed: dict[str, int]
    reused: dict[str, int]
    codes: dict[int, int]
    peak_bytes: int


@torch.no_grad()
def denoise(
    name: str | None,
    knobs: dict[str, object],
    degrees: Degrees = Degrees(),  # noqa: B008  (frozen)
    *,
    count: int = 12,
    warmup: int = 2,
    cooldown: int = 1,
    call_block: BlockCall = WanBlock.__call__,
) -> Ran:
    """Denoise from fixed noise with a strategy, or without one, on this rank of a mesh."""
    mesh = ParallelMesh(degrees)
    if degrees.world > 1:
        mesh = _with_groups(ParallelMesh(degrees, dist.get_rank()), "gloo")
    dit, shard = expert(), mesh.tokens()
    dit.call_block = call_block
    attention = spread(Backend(), mesh, shard)
    for block in dit.block_list():
        block.self_attn.attention = attention
    length = -(-45 // degrees.cp)
    own = min(max(45 - mesh.cp_index * length, 0), length)
    run = course(count, warmup, cooldown, calibration=calibration(count), tokens=own)
    services = Services(mesh.agreement(), lambda _, ts: dit.time_signal(torch.tensor(ts)), attention)
    cache = None if name is None else make(name, run, services, **knobs)
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 4, *GRID, generator=draw)
    texts = {key: dit.encode_text(torch.randn(1, 7, 24, generator=draw)) for key in ("cond", "uncond")}
    sampler = Sampler(count, SHIFT)

    def predict(branch, x, t):
        if cache is not None:
            cache.enter_branch(branch)
        around = cache if cache is not None and cache.sites else None
        return dit(x, t, texts[branch], shard=shard or NO_SHARD, around=around)

    for step in run.steps:
        call = partial(predict, x=latents, t=torch.tensor(step.timestep))
        compute = partial(guided_prediction, call, GUIDANCE, mesh.branches())
        if cache is None:
            latents = sampler.step(compute().guided, latents)
            continue
        cache.enter_step(step.index)
        velocity, before = cache.velocity(compute, latents), latents
        latents = sampler.step(velocity, before)
        cache.leave_step(before, latents, velocity)
    if cache is None:
        return Ran(latents, {}, {}, {}, 0)
    tally = cache.tally
    return Ran(latents, dict(tally.computed), dict(tally.reused), tally.codes, cache.kept.peak_bytes)
