"""From a prompt to pictures against diffusers' WanPipeline: the same random weights, seed and noise levels.

Only the grid of noise levels is carried over, for the two projects choose it differently; text, noise,
guidance, the switch of experts, solver and decoding are each side's own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    DIT_KEYS,
    UMT5_KEYS,
    VAE_KEYS,
    TinyWeights,
    random_weights,
    to_diffusers,
    write_diffusers,
    write_official,
)
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from engines import new_engine, submit
from oracles import relative_error
from torch import Tensor

from chitu_diffusion.engine import Engine
from chitu_diffusion.samplers._flow import FlowSampler
from chitu_diffusion.task import DiffusionTask, DiffusionTaskType

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

PROMPT, NEGATIVE = "a  small red circle &amp; a ring move slowly to the right on a blue background", "blurred"
HEIGHT, WIDTH, FRAMES, STEPS, SEED = 48, 80, 9, 8, 7
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "unipc": (UniPCMultistepScheduler, FLOW),
    "dpm++": (DPMSolverMultistepScheduler, FLOW),
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
}
ONE, TWO = "Wan2.1-T2V-1.3B", "Wan2.2-T2V-A14B"
EXPERTS = {ONE: 1, TWO: 2}
# relative L2; fp32 on both sides, sums in other orders: measured 1e-6 to 2e-6, promised 2e-4
LIMIT = 2e-5
GUIDANCE = {ONE: (4.0,), TWO: (3.0, 4.0)}  # (low noise, high noise)


@dataclass(frozen=True)
class Outcome:
    """Latents [C, T, h, w] at the end of denoising and the video [3, F, H, W] in [-1, 1]."""

    latents: Tensor
    video: Tensor


def build_engine(model: str, checkpoint: Path, outputs: Path) -> Engine:
    return new_engine(f"models={model}", f"models.ckpt_dir={checkpoint}", f"output.root_dir={outputs}")


def denoise(engine: Engine, model: str, solver: str) -> DiffusionTask:
    """A task of the engine that has nothing left to do but to decode."""
    task = submit(
        engine,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        size=(WIDTH, HEIGHT),
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE[model],
        sample_solver=solver,
        seed=SEED,
    )
    while task.task_type != DiffusionTaskType.VAEDecode:
        engine.step()
        assert task.is_running(), task.error_message
    return task


def ours(engine: Engine, task: DiffusionTask) -> Outcome:
    latents = task.buffer.latents
    return Outcome(latents, torch.cat(list(engine.pipeline.vae.decode(latents)), dim=1))


def build_scheduler(solver: str, sampler: FlowSampler) -> Any:
    """The scheduler of diffusers that always takes the noise levels of `sampler`."""
    base, config = SCHEDULERS[solver]

    class SameNoiseLevels(base):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.sigmas = torch.tensor(sampler.sigmas)
            self.timesteps = torch.tensor(sampler.timesteps, dtype=torch.float32)

    return SameNoiseLevels(**config)


def build_pipeline(tiny: TinyWeights, folder: Path, scheduler: Any) -> WanPipeline:
    """diffusers with the weights `tiny`; `folder` has sizes and tokenizer in its own layout."""
    vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder / "vae"))
    vae.load_state_dict(to_diffusers(tiny.vae, VAE_KEYS))
    high_noise, *low_noise = build_transformers(tiny, folder)
    return WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=build_text_encoder(tiny, folder),
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=high_noise,
        transformer_2=low_noise[0] if low_noise else None,
        boundary_ratio=0.875 if low_noise else None,
    )


def build_transformers(tiny: TinyWeights, folder: Path) -> list[WanTransformer3DModel]:
    """High noise first. NOTE not by from_pretrained, which needs one more package for this class."""
    models = []
    for name, state in zip(("transformer", "transformer_2"), tiny.dits, strict=False):
        model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder / name))
        model.load_state_dict(to_diffusers(state, DIT_KEYS))
        models.append(model.eval())
    return models


def build_text_encoder(tiny: TinyWeights, folder: Path) -> transformers.UMT5EncoderModel:
    config = transformers.UMT5Config.from_pretrained(folder / "text_encoder")
    encoder = transformers.UMT5EncoderModel(config).eval()
    state = to_diffusers(tiny.text_encoder, UMT5_KEYS)
    # NOTE some releases of transformers do not tie the two names of the embedding
    encoder.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    return encoder


def theirs(pipeline: WanPipeline, model: str) -> Outcome:
    kept: dict[str, Tensor] = {}

    def keep(
        _pipeline: WanPipeline, _index: int, _timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        kept.update(tensors)
        return {}

    low, high = GUIDANCE[model][0], GUIDANCE[model][-1]
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=high,
        guidance_scale_2=low if EXPERTS[model] == 2 else None,
        generator=torch.Generator().manual_seed(SEED),
        output_type="pt",
        callback_on_step_end=keep,
    ).frames[0]  # [F, 3, H, W] in [0, 1]
    return Outcome(kept["latents"][0], video.transpose(0, 1) * 2 - 1)


@pytest.mark.parametrize("layout", [write_official, write_diffusers])
@pytest.mark.parametrize(
    ("model", "solver"), [(ONE, "unipc"), (TWO, "unipc"), (ONE, "dpm++"), (TWO, "dpm++"), (ONE, "euler")]
)
def test_latents_and_video_equal_those_of_diffusers(tmp_path, model, solver, layout):
    tiny = random_weights(seed=3, experts=EXPERTS[model])
    engine = build_engine(model, layout(tmp_path / "checkpoint", tiny), tmp_path)
    task = denoise(engine, model, solver)
    used = {engine.pipeline.spec.select_expert(t).name for t in task.buffer.sampler.timesteps}
    assert len(used) == EXPERTS[model], "every expert must have run"
    actual = ours(engine, task)

    folder = write_diffusers(tmp_path / "reference", tiny)
    expected = theirs(build_pipeline(tiny, folder, build_scheduler(solver, task.buffer.sampler)), model)

    assert (expected.video.abs() < 1).float().mean() > 0.5, "clamped pixels would hide errors"
    assert relative_error(actual.latents, expected.latents) <= LIMIT
    assert relative_error(actual.video, expected.video) <= LIMIT
