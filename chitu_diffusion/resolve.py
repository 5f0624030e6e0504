"""From what a user said to what will be done: every default filled in from the model, nothing left open.

After this no rank can disagree about a request, and the result can say exactly what was run.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from chitu_core import plugins
from chitu_core.config import ModelConfig, SamplerConfig
from chitu_diffusion.guidance import needs_cfg
from chitu_diffusion.params import MAX_SEED, SOLVERS, DiffusionUserParams, FlexCacheParams
from chitu_diffusion.samplers._flow import FlowSampler


@dataclass(frozen=True)
class ResolvedParams:
    """A complete request: fields of `DiffusionUserParams`; guidance is (value,) or (low, high noise)."""

    role: str
    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: tuple[float, ...]
    sample_shift: float
    sample_solver: str
    seed: int
    save_dir: str | None  # None: the run directory
    save_path: str | None  # None: named after prompt, seed and steps
    flexcache: FlexCacheParams | None
    priority: int
    knobs: Any = None  # every setting of the cache strategy, filled in by CachePlan; None: none is built


def resolve(params: DiffusionUserParams, model: ModelConfig) -> ResolvedParams:
    """Fill every default of `model` into a request and draw a seed where none was given.

    Raises ValueError where guidance does not fit the model's experts, where there are more steps than
    timesteps, or where forced steps of a cache fill the whole run.
    """
    steps, most = params.num_inference_steps or model.sampler.sample_steps, model.sampler.num_train_timesteps
    if steps > most:
        raise ValueError(f"num_inference_steps={steps}: must be at most {most}, the timesteps of training")
    flexcache = params.resolve_flexcache_params()
    if flexcache is not None:
        flexcache.check_steps(steps)
    negative = params.negative_prompt
    return ResolvedParams(
        role=params.role,
        prompt=params.prompt or "",
        negative_prompt=model.encoder.default_negative_prompt if negative is None else negative,
        height=params.height or model.video.height,
        width=params.width or model.video.width,
        num_frames=params.num_frames or model.video.num_frames,
        fps=params.fps or model.video.fps,
        num_inference_steps=steps,
        guidance_scale=_guidance(params, model),
        sample_shift=model.sampler.sample_shift,
        sample_solver=params.sample_solver,
        seed=secrets.randbelow(MAX_SEED + 1) if params.seed is None else params.seed,
        save_dir=params.save_dir,
        save_path=params.save_path,
        flexcache=flexcache,
        priority=params.priority,
    )


def sampler_of(params: ResolvedParams, settings: SamplerConfig) -> FlowSampler:
    """The sampler of a request, at its first step. Raises ValueError where steps and shift make no grid."""
    name = SOLVERS[params.sample_solver]
    sampler_class = plugins.load("chitu_diffusion.samplers", name, "Sampler", "sample_solver")
    made: FlowSampler = sampler_class(
        params.num_inference_steps, params.sample_shift, settings.num_train_timesteps
    )
    return made


def remarks(
    params: ResolvedParams, model: ModelConfig, flexcache_is_enabled: bool, cfg_size: int = 1
) -> list[str]:
    """What a user should know about a legal request; it goes into the log and into the result."""
    found = []
    usual = model.sampler.sample_steps
    if params.num_inference_steps != usual:
        found.append(
            f"num_inference_steps={params.num_inference_steps} differs from the {usual} of {model.name}"
        )
    if params.num_frames > model.video.num_frames:
        trained = model.video.num_frames
        found.append(
            f"num_frames={params.num_frames} is more than the {trained} of {model.name}; motion may repeat"
        )
    if params.flexcache is not None and not flexcache_is_enabled:
        name = params.flexcache.strategy
        found.append(
            f"flexcache={name} is ignored and every step computed: infer.diffusion.enable_flexcache is false"
        )
    if cfg_size > 1 and not all(map(needs_cfg, params.guidance_scale)):
        found.append(
            f"guidance_scale={params.guidance_scale} has steps without an unconditional branch, in which "
            f"infer.diffusion.cfg_size={cfg_size} makes both halves of the ranks do the same; use cfg_size=1"
        )
    return found


def _guidance(params: DiffusionUserParams, model: ModelConfig) -> tuple[float, ...]:
    asked, experts = params.guidance_scale, len(model.sampler.guidance_scale)
    if asked is None:
        return model.sampler.guidance_scale
    if not isinstance(asked, tuple):
        return (float(asked),) * experts
    if len(asked) != experts:
        legal = "one value" if experts == 1 else "one value or (low noise, high noise)"
        raise ValueError(f"guidance_scale={asked}: {model.name} takes {legal}")
    return tuple(float(scale) for scale in asked)
