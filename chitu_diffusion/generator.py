"""The algorithm: a task's stages, one method each. A step of the engine is one call of one of them.

A prompt becomes embeddings; noise becomes a latent, a step a call; the latent becomes a video file.
"""

import logging
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from chitu_core import __version__, memory, plugins
from chitu_core.config import Config
from chitu_core.timing import Timer
from chitu_diffusion.guidance import guided_velocity, needs_cfg
from chitu_diffusion.media import VideoWriter, unique_path, write_json
from chitu_diffusion.outputs import RequestRecord, check_writable, video_stem
from chitu_diffusion.params import SOLVERS
from chitu_diffusion.prepare import Pipeline
from chitu_diffusion.resolve import ResolvedParams
from chitu_diffusion.result import TaskResult
from chitu_diffusion.run_folder import RunFolder
from chitu_diffusion.seam import Branch
from chitu_diffusion.spec import Expert
from chitu_diffusion.stage_log import StageLog
from chitu_diffusion.task import DiffusionTask, DiffusionTaskType

logger = logging.getLogger(__name__)

Stage = DiffusionTaskType
_TIMER_NAMES = {Stage.TextEncode: "TextEncode", Stage.Denoise: "denoise", Stage.VAEDecode: "VaeDecode"}


class Generator:
    """Advances tasks on one device. It keeps nothing of a task; all state is in the task's buffer."""

    def __init__(
        self, pipeline: Pipeline, config: Config, device: torch.device, dtype: torch.dtype, folder: RunFolder
    ) -> None:
        self.pipeline = pipeline
        self.config = config
        self.device = device
        self.dtype = dtype
        self.folder = folder
        self.timer = Timer(device, config.output.enable_timer_dump)
        self._stages = {
            Stage.TextEncode: self.text_encode_step,
            Stage.Denoise: self.denoise_step,
            Stage.VAEDecode: self.vae_decode_step,
        }

    def step(self, task: DiffusionTask, log: StageLog) -> bool:
        """Run one step of the task's stage and move it to its next one; True when the task is complete."""
        stage = task.task_type
        if stage != Stage.Denoise or task.current_step == 0:
            note = f" step=0/{_params(task).num_inference_steps} pct=0.0%" if stage == Stage.Denoise else ""
            log.start(task.task_id, stage.name, note)
        span = self.timer.get_timer(_TIMER_NAMES[stage])
        task.buffer.spans.append((stage.name, span))
        with span:
            following = self._stages[stage](task, log)
        if following != stage:
            log.end(task.task_id, stage.name)
        if following is None:
            self._complete(task, log)
            return True
        task.task_type = following
        return False

    generate_step = step

    def get_progress(self, task: DiffusionTask) -> float:
        """How far a task is, from 0 to 1, counted in denoising steps."""
        if task.is_finished():
            return 1.0
        return task.current_step / task.params.num_inference_steps if task.params else 0.0

    def text_encode_step(self, task: DiffusionTask, log: StageLog) -> Stage:
        """Encode the prompt, and the negative prompt where guidance needs it, once files can be written."""
        params, buffer = _params(task), task.buffer
        memory.reset_peak(self.device)
        self._prepare_outputs(task)
        buffer.text_embeddings = self._encode("prompt", params.prompt, task, log)
        if any(needs_cfg(scale) for scale in params.guidance_scale):
            buffer.negative_embeddings = self._encode("negative_prompt", params.negative_prompt, task, log)
        return Stage.Denoise

    def denoise_step(self, task: DiffusionTask, log: StageLog) -> Stage:
        """Predict the guided velocity at the present noise level and take the sampler's step with it."""
        params, buffer = _params(task), task.buffer
        if buffer.sampler is None:
            self._start_denoise(task)
        assert buffer.sampler is not None
        assert buffer.latents is not None
        timestep = buffer.sampler.timesteps[buffer.current_step]
        expert = self.pipeline.spec.select_expert(timestep)
        scale = params.guidance_scale[expert.guidance_index]
        if buffer.expert != expert.name:
            self._enter_expert(task, expert, scale)
        dit = self.pipeline.experts[expert.name]
        self.pipeline.attention.enter_step(dit, buffer.current_step, params.num_inference_steps)
        velocity = guided_velocity(partial(self._predict, task), scale)
        buffer.latents = buffer.sampler.step(velocity, buffer.latents)
        buffer.current_step += 1
        log.progress(task.task_id, buffer.current_step, params.num_inference_steps, timestep)
        return Stage.VAEDecode if buffer.current_step == params.num_inference_steps else Stage.Denoise

    def vae_decode_step(self, task: DiffusionTask, log: StageLog) -> None:
        """Decode the latent chunk by chunk into the video file, which appears when it is whole."""
        params, latents = _params(task), task.buffer.latents
        assert latents is not None
        if not torch.isfinite(latents).all():  # the one host read of a task; a black video says nothing
            remedy = "check the checkpoint" if self.dtype == torch.float32 else "try infer.dtype=float32"
            raise FloatingPointError(f"denoising in {self.dtype} gave values that are not finite; {remedy}")
        path = self._video_path(task)
        with VideoWriter(path, params.fps, (params.width, params.height)) as writer:
            for frames in self.pipeline.vae.decode(latents):
                writer.put(frames)
        task.buffer.save_path = str(path)
        log.saved(task.task_id, str(path))

    def _encode(self, key: str, text: str, task: DiffusionTask, log: StageLog) -> Tensor:
        encoded = self.pipeline.prompt_encoder.encode(text)
        if encoded.num_dropped:
            limit = self.pipeline.spec.text_len
            remark = f"{key} is longer than {limit} tokens; {encoded.num_dropped} were dropped"
            log.warning(task.task_id, remark)
            task.warnings.append(remark)
        return encoded.embeddings

    def _start_denoise(self, task: DiffusionTask) -> None:
        """Draw the noise from the task's seed on the device and build the task's own sampler.

        NOTE a task that was serialized comes without its sampler and starts again here: its history is lost.
        """
        params, buffer, spec = _params(task), task.buffer, self.pipeline.spec
        buffer.current_step, buffer.expert = 0, None
        sampler_class = plugins.load(
            "chitu_diffusion.samplers", SOLVERS[params.sample_solver], "Sampler", "sample_solver"
        )
        train_steps = self.config.models.sampler.num_train_timesteps
        buffer.sampler = sampler_class(params.num_inference_steps, params.sample_shift, train_steps)
        shape = spec.latent_shape(params.num_frames, params.height, params.width)
        buffer.seq_len = spec.seq_len(shape)
        buffer.seed_g = torch.Generator(self.device).manual_seed(params.seed)
        buffer.latents = torch.randn(shape, generator=buffer.seed_g, device=self.device, dtype=torch.float32)
        buffer.timesteps = torch.tensor(buffer.sampler.timesteps, device=self.device)

    def _enter_expert(self, task: DiffusionTask, expert: Expert, scale: float) -> None:
        """Project the text for an expert, once; what was made for the former one is dropped."""
        buffer, dit = task.buffer, self.pipeline.experts[expert.name]
        buffer.expert = expert.name
        buffer.text_caches.clear()
        assert buffer.text_embeddings is not None
        buffer.text_caches["cond"] = dit.encode_text(buffer.text_embeddings[None])
        if needs_cfg(scale):
            assert buffer.negative_embeddings is not None
            buffer.text_caches["uncond"] = dit.encode_text(buffer.negative_embeddings[None])
        logger.debug("task_id=%s | expert %s, guidance %s", task.task_id, expert.name, scale)

    def _predict(self, task: DiffusionTask, branch: Branch) -> Tensor:
        """Velocity [C, T, h, w] fp32 of one branch at the task's present step."""
        buffer = task.buffer
        assert buffer.latents is not None
        assert buffer.timesteps is not None
        assert buffer.expert is not None
        dit, t = self.pipeline.experts[buffer.expert], buffer.timesteps[buffer.current_step]
        velocity: Tensor = dit(buffer.latents[None], t, buffer.text_caches[branch])
        return velocity[0]

    def _prepare_outputs(self, task: DiffusionTask) -> None:
        """See that the video can be written, and open the run directory, where the run's log begins."""
        params = _params(task)
        if params.save_path is not None:
            check_writable(Path(params.save_path), "save_path")
        elif params.save_dir is not None:
            check_writable(Path(params.save_dir), "save_dir")
        else:
            self.folder.open(params.prompt)
            self.folder.add_request(RequestRecord(task.task_id, params))

    def _video_path(self, task: DiffusionTask) -> Path:
        """Where the video goes: exactly `save_path`, or a free name in `save_dir` or the run directory."""
        params = _params(task)
        if params.save_path is not None:
            return Path(params.save_path)
        directory = self.folder.open(params.prompt) if params.save_dir is None else Path(params.save_dir)
        return unique_path(
            directory / f"{video_stem(params.prompt, params.seed, params.num_inference_steps)}.mp4"
        )

    def _complete(self, task: DiffusionTask, log: StageLog) -> None:
        """Gather the figures of a finished task and write them beside the video."""
        seconds: dict[str, float] = {}
        for stage, span in task.buffer.spans:
            seconds[stage] = seconds.get(stage, 0.0) + span.milliseconds() / 1000
        for stage, value in seconds.items():
            log.elapsed(task.task_id, stage, value * 1000)
        total = sum(seconds.values())
        self.timer.record("overall", total * 1000)
        result = self._result(task, {**seconds, "total": total})
        write_json(Path(result.video_path).with_suffix(".json"), result)
        task.result = result  # not before the record is on disk: a task with a result has all its files

    def _result(self, task: DiffusionTask, seconds: dict[str, float]) -> TaskResult:
        params, pipeline, buffer = _params(task), self.pipeline, task.buffer
        assert buffer.timesteps is not None
        path = Path(buffer.save_path or "")
        used = [pipeline.spec.select_expert(t).name for t in buffer.timesteps.tolist()]
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return TaskResult(
            filename=path.name,
            prompt=params.prompt,
            seed=params.seed,
            step=params.num_inference_steps,
            task_id=task.task_id,
            video_path=str(path.absolute()),
            model=self.config.models.name,
            negative_prompt=params.negative_prompt,
            role=params.role,
            width=params.width,
            height=params.height,
            num_frames=params.num_frames,
            fps=params.fps,
            sample_solver=params.sample_solver,
            sample_shift=params.sample_shift,
            guidance_scale=params.guidance_scale,
            latent_shape=pipeline.spec.latent_shape(params.num_frames, params.height, params.width),
            seq_len=buffer.seq_len or 0,
            experts=tuple(dict.fromkeys(used)),
            attention=pipeline.attention.name,
            cross_attention=pipeline.attention.cross_name,
            dtype=str(self.dtype).removeprefix("torch."),
            device=name,
            flexcache=None,
            approximations=pipeline.attention.approximations(params.num_inference_steps),
            warnings=tuple(task.warnings),
            seconds={stage: round(value, 4) for stage, value in seconds.items()},
            peak_memory=memory.peak(self.device),
            versions={"chitu-diffusion": __version__, "torch": torch.__version__},
        )


def _params(task: DiffusionTask) -> ResolvedParams:
    assert task.params is not None, "a task is completed by the engine when it enters the pool"
    return task.params
