"""The requests of `chitu bench flexcache`: every prompt without a cache, then with each strategy."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chitu_core.config import ModelConfig
from chitu_diffusion.bench._cache_report import EXACT, Clip, Row
from chitu_diffusion.bench._cache_scores import Judge, Similarity
from chitu_diffusion.bench._cache_trace import course_of, model_of
from chitu_diffusion.bench._setup import say
from chitu_diffusion.engine import Engine
from chitu_diffusion.eval._frames import Frames
from chitu_diffusion.guidance import branches_of
from chitu_diffusion.media import to_pixels
from chitu_diffusion.prepare import Pipeline
from chitu_diffusion.resolve import resolve
from chitu_diffusion.result import TaskResult
from chitu_diffusion.task import (
    DiffusionTask,
    DiffusionTaskType,
    DiffusionUserParams,
    FlexCacheParams,
)


@dataclass(frozen=True)
class Variant:
    """One row: what its requests ask for; None of the exact ones."""

    name: str
    ratio: float | None
    cache: FlexCacheParams | None


@dataclass(frozen=True)
class Made:
    """A finished request; the frames are those before the mp4, uint8 [F, H, W, 3]."""

    result: TaskResult
    frames: Frames | None


class Runs:
    """Makes clips on one engine and keeps what is known of them, a row a variant."""

    def __init__(
        self,
        engine: Engine,
        request: DiffusionUserParams,
        variants: tuple[Variant, ...],
        folder: Path,
        *,
        similarity: Similarity | None,
        judge: Judge | None,
    ) -> None:
        """`request` says all but prompt and seed; videos go into `folder`; without `similarity` nothing is
        compared."""
        self.engine, self.request, self.folder = engine, request, folder
        self.similarity, self.judge = similarity, judge
        exact = Variant(EXACT, None, None)
        self._rows = {one: Row(one.name, one.ratio, (), (), None) for one in (exact, *variants)}

    @property
    def rows(self) -> tuple[Row, ...]:
        """The exact row first."""
        return tuple(self._rows.values())

    def add(self, place: int, prompt: str, seed: int) -> None:
        """Make the prompt at `place` of the list with every variant that has not been refused.

        Raises RuntimeError where the exact request fails.
        """
        reference: Frames | None = None
        for variant, row in self._rows.items():
            if row.reason is not None:
                continue
            stem = f"{row.name.replace(' ', '_')}_{place}_{seed}"
            request = replace(self.request, prompt=prompt, seed=seed, flexcache_params=variant.cache)
            request = replace(request, save_path=str(self.folder / f"{stem}.mp4"))
            try:
                made = make(self.engine, request, wants_frames=self.similarity is not None)
            except (ValueError, RuntimeError) as error:
                if variant.cache is None:
                    raise
                self._rows[variant] = replace(row, reason=str(error))
                say(f"{row.name}: {error}")
                continue
            reference = made.frames if reference is None else reference
            self._keep(variant, made, reference, (place, prompt, seed))

    def _keep(
        self, variant: Variant, made: Made, reference: Frames | None, asked: tuple[int, str, int]
    ) -> None:
        place, prompt, seed = asked
        row, did, dit_s = self._rows[variant], made.result.flexcache, made.result.seconds["Denoise"]
        scores: dict[str, float | None] = {}
        if made.frames is not None and reference is not None:
            assert self.similarity is not None
            if variant.cache is not None:
                scores |= self.similarity.scores(made.frames, reference)
            scores |= {} if self.judge is None else self.judge.scores(made.frames, prompt)
        clip = Clip(
            prompt=place,
            seed=seed,
            computed={} if did is None else did.computed,
            reused={} if did is None else did.reused,
            peak_gb=0.0 if did is None else did.peak_gb,
            scores=scores,
        )
        self._rows[variant] = replace(row, dit_s=(*row.dit_s, dit_s), clips=(*row.clips, clip))
        psnr = scores.get("psnr")
        said = "" if psnr is None else f", PSNR {psnr:.1f} dB"
        say(f"prompt {place}, seed {seed}, {row.name}: {dit_s:.2f} s{said}")


@torch.inference_mode()
def make(engine: Engine, request: DiffusionUserParams, *, wants_frames: bool) -> Made:
    """Carry out a request through pool and engine; its latent is decoded once more for `wants_frames`.

    Raises ValueError where the pool refuses it, and RuntimeError with the reason if it fails.
    """
    task = DiffusionTask.from_user_request(request)
    engine.pool.add(task)
    latents: Tensor | None = None
    while not task.is_finished():
        engine.step()
        if task.task_type == DiffusionTaskType.VAEDecode and latents is None:
            latents = task.buffer.latents
    engine.pool.remove(task.task_id)
    if task.result is None:
        raise RuntimeError(task.error_message or "the request was not carried out")
    assert latents is not None
    return Made(task.result, _decode(engine.pipeline, latents) if wants_frames else None)


def _decode(pipeline: Pipeline, latents: Tensor) -> Frames:
    chunks = [to_pixels(frames).cpu().numpy() for frames in pipeline.vae.decode(latents, pipeline.vae_chunk)]
    return np.concatenate(chunks)


def exact_forwards(request: DiffusionUserParams, model: ModelConfig, pipeline: Pipeline) -> int:
    """Forwards of the transformer that a request takes without a cache."""
    params = resolve(request, model)
    course = course_of(params, model.sampler, pipeline.spec, model_of(model.name, pipeline))
    experts = (pipeline.spec.select_expert(step.timestep) for step in course.steps)
    return sum(len(branches_of(params.guidance_scale[expert.guidance_index])) for expert in experts)
