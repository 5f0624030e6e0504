"""The algorithm: a task's stages, one method each. A step of the engine is one call of one of them.

A prompt becomes embeddings; noise becomes a latent, a step a call; the latent becomes a video file.
All ranks of a replica take the same steps; its leader alone writes.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from chitu_core import memory
from chitu_core.config import Config
from chitu_core.distributed import ParallelMesh
from chitu_core.timing import Timer
from chitu_diffusion.cache_plan import CachePlan
from chitu_diffusion.encoders.tokenizer import TokenizedPrompt
from chitu_diffusion.flex_cache._base import Services
from chitu_diffusion.flex_cache._picture import write
from chitu_diffusion.guidance import branches_of, guided_prediction, guided_velocity, needs_cfg
from chitu_diffusion.media import RECORD_SUFFIX, WRITE_ERRORS, VideoWriter, write_json
from chitu_diffusion.memory_gate import MemoryGate
from chitu_diffusion.prepare import Pipeline
from chitu_diffusion.record import cache_record, result_of
from chitu_diffusion.resolve import ResolvedParams, sampler_of
from chitu_diffusion.result import CacheRecord
from chitu_diffusion.run_folder import RunFolder
from chitu_diffusion.seam import Branch
from chitu_diffusion.sequence import NO_SHARD
from chitu_diffusion.stage_log import StageLog
from chitu_diffusion.task import DiffusionTask, DiffusionTaskType

logger = logging.getLogger(__name__)

Stage = DiffusionTaskType
_TIMER_NAMES = {Stage.TextEncode: "TextEncode", Stage.Denoise: "denoise", Stage.VAEDecode: "VaeDecode"}


class Generator:
    """Advances tasks on one device. It keeps nothing of a task; all state is in the task's buffer."""

    def __init__(
        self,
        pipeline: Pipeline,
        config: Config,
        mesh: ParallelMesh,
        folder: RunFolder,
        device: torch.device,
        *,
        timer: Timer,
        cache_plan: CachePlan,
        gate: MemoryGate,
    ) -> None:
        self.pipeline = pipeline
        self.config = config
        self.mesh = mesh
        self.folder = folder
        self.device = device
        self._cache_plan = cache_plan
        self._gate = gate
        self._agree = mesh.agreement()
        self._pair = mesh.branches()
        self.timer = timer
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
        """Encode the texts that this rank needs, once files can be written, and prepare the first step."""
        params, buffer, scales = _params(task), task.buffer, _params(task).guidance_scale
        memory.reset_peak(self.device)
        if self.mesh.is_leader:
            self.folder.check(params)
        own = {branch for scale in scales for branch in branches_of(scale, self._pair)}
        texts = {"cond": self._tokens("prompt", params.prompt, task, log)}
        if any(needs_cfg(scale) for scale in scales):
            texts["uncond"] = self._tokens("negative_prompt", params.negative_prompt, task, log)
        found = self.pipeline.prompt_encoder.embed_all(
            {branch: text for branch, text in texts.items() if branch in own}
        )
        buffer.text_embeddings, buffer.negative_embeddings = found.get("cond"), found.get("uncond")
        self._start_denoise(task, log)
        return Stage.Denoise

    def denoise_step(self, task: DiffusionTask, log: StageLog) -> Stage:
        """Predict the guided velocity at the present noise level and take the sampler's step with it.

        NOTE what may fail on one rank alone stands before or after the exchanges of the prediction, never
        between a report and them: so the next step is prepared here, and the first one with the texts.
        """
        params, buffer = _params(task), task.buffer
        with self.mesh.guard("denoising"):
            if buffer.sampler is None:  # of a task that was serialized: its history is lost
                self._start_denoise(task, log)
            assert buffer.sampler is not None
            assert buffer.latents is not None
            timestep = buffer.sampler.timesteps[buffer.current_step]
            expert = self.pipeline.spec.select_expert(timestep)
            dit, scale = self.pipeline.experts[expert.name], params.guidance_scale[expert.guidance_index]
            self.pipeline.residency.enter(expert.name)  # again, if a scheduler let another task come between
            self.pipeline.attention.enter_step(dit, buffer.current_step, params.num_inference_steps)
            velocity = self._velocity(task, scale)
        before = buffer.latents
        buffer.latents = buffer.sampler.step(velocity, before)
        if buffer.flexcache is not None:
            buffer.flexcache.leave_step(before, buffer.latents, velocity)
        buffer.current_step += 1
        log.progress(task.task_id, buffer.current_step, params.num_inference_steps, timestep)
        if buffer.current_step < params.num_inference_steps:
            self._enter_expert(task)
            return Stage.Denoise
        self._check_finite(buffer.latents)
        if buffer.flexcache is not None:
            buffer.flexcache.forget()  # its memory is the decoder's now
        return Stage.VAEDecode

    def vae_decode_step(self, task: DiffusionTask, log: StageLog) -> None:
        """Decode the latent chunk by chunk into the video file, which appears when it is whole."""
        params, latents = _params(task), task.buffer.latents
        assert latents is not None
        self.pipeline.residency.leave()
        failure: Exception | None = None
        with ExitStack() as stack:
            writer = None
            try:
                writer = stack.enter_context(self.folder.open_video(params)) if self.mesh.is_leader else None
            except WRITE_ERRORS as error:
                failure = self._postpone(error)
            with self.mesh.guard("decoding"):
                failure = self._decode(latents, writer) or failure
            if failure is not None:
                raise failure
            if writer is not None:
                task.buffer.save_path = str(writer.close())
                log.saved(task.task_id, task.buffer.save_path)

    def _check_finite(self, latents: Tensor) -> None:
        """The one host read of a task: a black video would say nothing. Raises FloatingPointError."""
        if torch.isfinite(latents).all():
            return
        dtype = self.pipeline.dtype
        remedy = "check the checkpoint" if dtype == torch.float32 else "try infer.dtype=float32"
        raise FloatingPointError(f"denoising in {dtype} gave values that are not finite; {remedy}")

    def _decode(self, latents: Tensor, writer: VideoWriter | None) -> Exception | None:
        """Decode with all ranks of the replica; its leader writes. What the disk refused comes back."""
        failure: Exception | None = None
        for pixels in self.pipeline.pixels(latents):
            if pixels is None or writer is None or failure is not None:
                continue
            try:
                writer.put(pixels)
            except WRITE_ERRORS as error:
                failure = self._postpone(error)
        return failure

    def _postpone(self, error: Exception) -> Exception:
        """A disk that refuses must not keep the leader from the exchanges that other ranks wait for."""
        if self.pipeline.line is None:
            raise error
        return error

    def _tokens(self, key: str, text: str, task: DiffusionTask, log: StageLog) -> TokenizedPrompt:
        """A text's tokens; that there are too many is remarked on every rank."""
        tokens = self.pipeline.prompt_encoder.tokenize(text)
        if tokens.num_dropped:
            limit = self.pipeline.spec.text_len
            remark = f"{key} is longer than {limit} tokens; {tokens.num_dropped} were dropped"
            log.warning(task.task_id, remark)
            task.warnings.append(remark)
        return tokens

    def _start_denoise(self, task: DiffusionTask, log: StageLog) -> None:
        """Draw the noise from the task's seed on the device and build the task's own sampler.

        Every rank draws the whole noise, so that it does not depend on how many there are.
        """
        params, buffer, spec = _params(task), task.buffer, self.pipeline.spec
        buffer.current_step, buffer.expert = 0, None
        buffer.sampler = sampler_of(params, self.config.models.sampler)
        shape = spec.latent_shape(params.num_frames, params.height, params.width)
        buffer.seq_len = spec.seq_len(shape)
        buffer.seed_g = torch.Generator(self.device).manual_seed(params.seed)
        buffer.latents = torch.randn(shape, generator=buffer.seed_g, device=self.device, dtype=torch.float32)
        buffer.timesteps = torch.tensor(buffer.sampler.timesteps, device=self.device)
        services = Services(self._agree, self._time_signal, self.pipeline.attention.chosen, self.timer.span)
        cache = self._cache_plan.build(params, buffer.sampler, services, self.mesh.cp_index)
        if cache is not None:
            log.reuse(task.task_id, f"flexcache={cache.name} {params.knobs}")
            for remark in cache.remarks():
                log.warning(task.task_id, remark)
                task.warnings.append(remark)
        buffer.flexcache = cache
        self._enter_expert(task)

    def _enter_expert(self, task: DiffusionTask) -> None:
        """See to the next step's expert, and project the text for it if it is another than before."""
        params, buffer = _params(task), task.buffer
        assert buffer.sampler is not None
        upcoming = buffer.sampler.timesteps[buffer.current_step : buffer.current_step + 2]
        expert, *after = map(self.pipeline.spec.select_expert, upcoming)
        following = after[0].name if after else None
        is_last = following not in (None, expert.name)
        spare = self._gate.spare_bytes(params, task.cache_bytes) if is_last else 0
        self.pipeline.residency.enter(expert.name, following, spare)
        if buffer.expert == expert.name:
            return
        buffer.expert = expert.name
        buffer.text_caches.clear()
        dit, scale = self.pipeline.experts[expert.name], params.guidance_scale[expert.guidance_index]
        texts = {"cond": buffer.text_embeddings, "uncond": buffer.negative_embeddings}
        for branch in branches_of(scale, self._pair):
            embeddings = texts[branch]
            assert embeddings is not None
            buffer.text_caches[branch] = dit.encode_text(embeddings[None])
        logger.debug("task_id=%s | expert %s, guidance %s", task.task_id, expert.name, scale)

    def _time_signal(self, expert: str, timesteps: Sequence[int]) -> Tensor:
        """What the time modulates an expert's blocks with, [N, 6, d] fp32."""
        return self.pipeline.experts[expert].time_signal(torch.tensor(timesteps, device=self.device))

    def _velocity(self, task: DiffusionTask, scale: float) -> Tensor:
        """The guided velocity of the present step, computed or reused."""
        buffer, predict = task.buffer, partial(self._predict, task)
        cache, latents = buffer.flexcache, buffer.latents
        if cache is None:
            return guided_velocity(predict, scale, self._pair)
        assert latents is not None
        cache.enter_step(buffer.current_step)
        return cache.velocity(partial(guided_prediction, predict, scale, self._pair), latents)

    def _predict(self, task: DiffusionTask, branch: Branch) -> Tensor:
        """Velocity [C, T, h, w] fp32 of one branch at the task's present step."""
        buffer = task.buffer
        assert buffer.latents is not None
        assert buffer.timesteps is not None
        assert buffer.expert is not None
        dit, t = self.pipeline.experts[buffer.expert], buffer.timesteps[buffer.current_step]
        shard = self.pipeline.tokens or NO_SHARD
        text, cache = buffer.text_caches[branch], buffer.flexcache
        if cache is not None and cache.sites:
            cache.enter_branch(branch)
            velocity: Tensor = dit(buffer.latents[None], t, text, shard=shard, around=cache)[0]
            return velocity
        return self.pipeline.forward(dit, buffer.latents[None], t, text, shard=shard)[0]

    def _complete(self, task: DiffusionTask, log: StageLog) -> None:
        """Gather the figures of a finished task and write them beside the video."""
        seconds: dict[str, float] = {}
        for stage, span in task.buffer.spans:
            seconds[stage] = seconds.get(stage, 0.0) + span.milliseconds() / 1000
        for stage, value in seconds.items():
            log.elapsed(task.task_id, stage, value * 1000)
        total = sum(seconds.values())
        self.timer.record("overall", total * 1000)
        if not self.mesh.is_leader:
            return
        seconds |= {"total": total}
        result = result_of(
            task,
            self.pipeline,
            seconds,
            model=self.config.models.name,
            device=self.device,
            mesh=self.mesh,
            flexcache=self._reuse_of(task),
            memory_plan=self._gate.record(_params(task), task.cache_bytes),
        )
        write_json(Path(result.video_path).with_suffix(RECORD_SUFFIX), result)
        task.result = result  # not before the record is on disk: a task with a result has all its files

    def _reuse_of(self, task: DiffusionTask) -> CacheRecord | None:
        """What the task's cache did, and its pictures beside the video."""
        cache, path = task.buffer.flexcache, task.buffer.save_path
        if cache is None:
            return None
        assert path is not None
        picture = cache.picture()
        return cache_record(
            _params(task), cache, () if picture is None else write(picture, Path(path).parent)
        )


def _params(task: DiffusionTask) -> ResolvedParams:
    assert task.params is not None, "a task is completed by the engine when it enters the pool"
    return task.params
