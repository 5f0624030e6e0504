"""What `chitu bench flexcache --calibrate` observes: how the residual of all blocks changes step by step.

The runs compute everything, one process, so nothing is averaged over ranks.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from chitu_core.config import SamplerConfig
from chitu_diffusion.cache_plan import steps_of
from chitu_diffusion.flex_cache._base import Course, Model
from chitu_diffusion.flex_cache._calibration import NOTHING
from chitu_diffusion.flex_cache.strategy.teacache import changes_of
from chitu_diffusion.guidance import branches_of, guided_velocity
from chitu_diffusion.models.wan import TextCache
from chitu_diffusion.prepare import Pipeline
from chitu_diffusion.resolve import ResolvedParams, sampler_of
from chitu_diffusion.samplers._flow import FlowSampler
from chitu_diffusion.seam import Branch, Compute, Site
from chitu_diffusion.spec import ModelSpec


@dataclass(frozen=True)
class Observed:
    """One expert over its N steps, means over runs; what compares a step with the one before has N - 1."""

    sigmas: tuple[float, ...]
    signal_changes: tuple[float, ...]  # of the time modulation, relative L1: what TeaCache sees
    residual_changes: tuple[float, ...]  # relative L1, mean over branches: what it estimates
    cond: tuple[float, ...]  # ratios of residual norms, mean over tokens: what MagCache takes
    uncond: tuple[float, ...]


class Trace:
    """A strategy (`seam.Around`) that computes the stack of blocks and compares its residual with the last.

    It holds the residuals of one step, [B, S, d] fp32, and of each later one two numbers on the device.
    """

    sites = frozenset({"blocks"})

    def __init__(self) -> None:
        self.changes: dict[str, list[Tensor]] = defaultdict(list)  # by branch, relative L1
        self.ratios: dict[str, list[Tensor]] = defaultdict(list)
        self.branch: Branch = "cond"
        self._before: dict[str, Tensor] = {}

    def around(self, site: Site, compute: Compute, x: Any, signal: Tensor) -> Tensor:  # noqa: ARG002
        """`compute(x)`, always."""
        out = compute(x)
        residual, before = out - x, self._before.get(self.branch)
        if before is not None:
            self.changes[self.branch].append((residual - before).abs().mean() / before.abs().mean())
            self.ratios[self.branch].append((residual.norm(dim=-1) / before.norm(dim=-1)).mean())
        self._before[self.branch] = residual
        return out

    def forget(self) -> None:
        """Let go of the last residuals."""
        self._before.clear()


def course_of(
    params: ResolvedParams,
    settings: SamplerConfig,
    spec: ModelSpec,
    model: Model,
    *,
    warmup: int = 0,
    cooldown: int = 0,
) -> Course:
    """The steps of a run, of which no strategy keeps anything."""
    steps = steps_of(sampler_of(params, settings), spec)
    return Course(model, steps, warmup, cooldown, params.sample_shift, 0, torch.float32)


def model_of(name: str, pipeline: Pipeline) -> Model:
    """What a strategy may know of a model that nothing was measured on."""
    dit = next(iter(pipeline.experts.values()))
    return Model(name, dit.config.num_layers, tuple(pipeline.experts), NOTHING)


@torch.inference_mode()
def observe(
    runs: Sequence[ResolvedParams], pipeline: Pipeline, settings: SamplerConfig, device: torch.device
) -> dict[str, Observed]:
    """Make every run without a cache, all of the same steps, and say what was seen, by expert."""
    first = runs[0]
    course = course_of(first, settings, pipeline.spec, model_of("", pipeline))
    signals = changes_of(course, partial(_time_signal, pipeline, device)).tolist()
    traces = [trace(params, course, pipeline, sampler_of(params, settings))[0] for params in runs]
    found = {}
    for expert in dict.fromkeys(step.expert for step in course.steps):
        own = [step for step in course.steps if step.expert == expert]
        seen = [each[expert] for each in traces]
        cond = _means([_floats(one.ratios["cond"]) for one in seen])
        has_uncond = bool(seen[0].ratios["uncond"])
        changes = [_floats(values) for one in seen for values in one.changes.values()]
        found[expert] = Observed(
            sigmas=tuple(step.sigma for step in own),
            signal_changes=tuple(signals[step.index] for step in own[1:]),
            residual_changes=_means(changes),
            cond=cond,
            uncond=_means([_floats(one.ratios["uncond"]) for one in seen]) if has_uncond else cond,
        )
    return found


def trace(
    params: ResolvedParams, course: Course, pipeline: Pipeline, sampler: FlowSampler
) -> tuple[dict[str, Trace], Tensor]:
    """One run as the generator makes it: a trace of each expert, and the last latent [C, T, h, w]."""
    encoder, spec, device = pipeline.prompt_encoder, pipeline.spec, pipeline.residency.device
    texts = {"cond": params.prompt, "uncond": params.negative_prompt}
    embeddings = encoder.embed_all({branch: encoder.tokenize(text) for branch, text in texts.items()})
    shape = spec.latent_shape(params.num_frames, params.height, params.width)
    generator = torch.Generator(device).manual_seed(params.seed)
    latents = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    traces: dict[str, Trace] = {}
    for step in course.steps:
        expert = spec.select_expert(step.timestep)
        dit, scale = pipeline.experts[expert.name], params.guidance_scale[expert.guidance_index]
        pipeline.residency.enter(expert.name)
        if expert.name not in traces:
            traces[expert.name] = Trace()
            projected = {name: dit.encode_text(embeddings[name][None]) for name in branches_of(scale)}
        t = torch.tensor(step.timestep, device=device)
        predict = partial(_predict, partial(dit, latents[None], t), projected, traces[expert.name])
        pipeline.attention.enter_step(dit, step.index, len(course.steps))
        latents = sampler.step(guided_velocity(predict, scale), latents)
    for one in traces.values():
        one.forget()
    return traces, latents


def _predict(
    forward: Callable[..., Tensor], texts: Mapping[Branch, TextCache], around: Trace, branch: Branch
) -> Tensor:
    around.branch = branch
    return forward(texts[branch], around=around)[0]


def _time_signal(pipeline: Pipeline, device: torch.device, expert: str, timesteps: Sequence[int]) -> Tensor:
    return pipeline.experts[expert].time_signal(torch.tensor(timesteps, device=device))


def _floats(values: Sequence[Tensor]) -> list[float]:
    found: list[float] = torch.stack(tuple(values)).tolist() if values else []
    return found


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """By place, over rows of one length."""
    return tuple(fmean(column) for column in zip(*rows, strict=True))
