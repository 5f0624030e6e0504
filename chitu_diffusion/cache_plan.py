"""Which reuse a request gets: its settings completed for the model, its memory, the strategy of its task."""

from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from chitu_core.config import Config
from chitu_core.distributed import Degrees
from chitu_diffusion.flex_cache._base import Course, FlexCache, Model, Services, Sizes, Step
from chitu_diffusion.flex_cache._calibration import packaged, read
from chitu_diffusion.guidance import needs_cfg
from chitu_diffusion.models.wan import WanConfig
from chitu_diffusion.params import FlexCacheParams, strategy_class
from chitu_diffusion.resolve import ResolvedParams
from chitu_diffusion.samplers._flow import FlowSampler
from chitu_diffusion.spec import ModelSpec

GB = 10**9
_FP32 = 4  # bytes


class CachePlan:
    """What one engine knows and allows of reuse. It keeps nothing of a task."""

    def __init__(
        self, config: Config, spec: ModelSpec, dit: WanConfig, degrees: Degrees, dtype: torch.dtype
    ) -> None:
        """Raises ValueError for a calibration that cannot be read."""
        settings, path = config.infer.diffusion, config.infer.diffusion.flexcache_calibration
        self.is_enabled = settings.enable_flexcache
        self.limit_bytes = settings.flexcache_bytes
        self._wants_graph = config.infer.use_cuda_graph == "on"
        self._spec, self._dit, self._degrees, self._dtype = spec, dit, degrees, dtype
        name, experts = config.models.name, tuple(expert.name for expert in spec.experts)
        try:
            calibration = packaged(name) if path is None else read(Path(path))
        except ValueError as error:
            raise ValueError(f"infer.diffusion.flexcache_calibration={path}: {error}") from error
        self._model = Model(
            name,
            dit.num_layers,
            experts,
            calibration,
            degrees.ring,
            degrees.ulysses,
            config.infer.attn_schedule.is_set,
        )

    def complete(self, params: ResolvedParams) -> ResolvedParams:
        """The same request with every expert setting of its strategy filled in, where reuse is enabled.

        Raises ValueError where the strategy cannot serve the model or its ranks.
        """
        asked = params.flexcache
        if asked is None or not self.is_enabled or asked.cache_ratio == 0:
            return params
        strategy = _strategy(asked)
        if strategy.idle(self._model) is not None:
            return params
        knobs = strategy.knobs_type() if asked.extra is None else asked.extra
        knobs = strategy.complete(knobs, asked.cache_ratio, self._model)
        return replace(params, knobs=knobs)

    def footprint(self, params: ResolvedParams) -> int:
        """Bytes that the cache of a completed request may take on this rank; 0 without one."""
        asked = params.flexcache
        if asked is None or params.knobs is None:
            return 0
        shape = self._latent_shape(params)
        _, length = self._tokens(shape)
        both = self._degrees.cfg == 1 and any(map(needs_cfg, params.guidance_scale))
        values = length * self._dit.dim
        sizes = Sizes(
            feature=values * self._dtype.itemsize,
            stream=values * _FP32,
            latent=prod(shape) * _FP32,
            num_layers=self._dit.num_layers,
            branches=2 if both else 1,
            heads=self._dit.num_heads,
            tokens=length,
        )
        return _strategy(asked).footprint(params.knobs, sizes)

    def refusal(self, params: ResolvedParams) -> str | None:
        """Why a completed request can never run under the limit, with the remedy; None where it can."""
        needed = self.footprint(params)
        if needed <= self.limit_bytes:
            return None
        assert params.flexcache is not None
        remedy = "raise it, ask for a smaller video, or take meancache, which keeps less"
        return (
            f"flexcache={params.flexcache.strategy} would keep {needed / GB:.3g} GB on a rank, above "
            f"infer.diffusion.flexcache_max_gb={self.limit_bytes / GB:g}; {remedy}"
        )

    def remarks(self, params: ResolvedParams) -> list[str]:
        """What a user should know about how a completed request is served."""
        asked = params.flexcache
        if asked is None or not self.is_enabled or asked.cache_ratio == 0:
            return []
        reason = _strategy(asked).idle(self._model)
        if reason is not None:
            return [f"flexcache={asked.strategy}: {reason}; every step is computed"]
        if not self._wants_graph:
            return []
        return [
            f"infer.use_cuda_graph=on: flexcache={asked.strategy} runs steps that it looks into without one; "
            "set infer.use_cuda_graph=off or leave flexcache out"
        ]

    def build(
        self, params: ResolvedParams, sampler: FlowSampler, services: Services, cp_index: int
    ) -> FlexCache | None:
        """The strategy of a task that is about to be denoised; None where nothing is to be reused."""
        asked = params.flexcache
        if asked is None or params.knobs is None:
            return None
        steps = steps_of(sampler, self._spec)
        total, length = self._tokens(self._latent_shape(params))
        own = min(max(total - cp_index * length, 0), length)
        ends = asked.warmup, asked.cooldown
        course = Course(self._model, steps, *ends, params.sample_shift, own, self._dtype)
        return _strategy(asked)(course, params.knobs, services)

    def _latent_shape(self, params: ResolvedParams) -> tuple[int, int, int, int]:
        return self._spec.latent_shape(params.num_frames, params.height, params.width)

    def _tokens(self, shape: tuple[int, int, int, int]) -> tuple[int, int]:
        """Tokens of a latent, and those that each rank has a place for."""
        total = self._spec.seq_len(shape)
        return total, -(-total // self._degrees.cp)


def steps_of(sampler: FlowSampler, spec: ModelSpec) -> tuple[Step, ...]:
    """The steps that a sampler will take, and whose they are."""
    levels = zip(sampler.timesteps, sampler.sigmas, sampler.sigmas[1:], strict=False)
    return tuple(
        Step(index, timestep, sigma, following, spec.select_expert(timestep).name)
        for index, (timestep, sigma, following) in enumerate(levels)
    )


def _strategy(asked: FlexCacheParams) -> type[FlexCache]:
    assert asked.strategy is not None
    return strategy_class(asked.strategy)
