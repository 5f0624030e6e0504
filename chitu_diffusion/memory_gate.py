"""The memory plan of one engine: its level, settled before anything is loaded, and which requests fit it.

A plan foretells a GPU. On a CPU nothing is foretold and nothing refused, and `auto` is level 0.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch

from chitu_core.config import Config, VideoSize
from chitu_core.memory import GIB, free_device_bytes, free_host_bytes
from chitu_diffusion.memory_choice import Limits, Need, check_request, choose_level
from chitu_diffusion.memory_plan import Plan
from chitu_diffusion.memory_setting import STREAMED, Setting
from chitu_diffusion.resolve import ResolvedParams
from chitu_diffusion.result import MemoryRecord

logger = logging.getLogger(__name__)

_KEY = "infer.diffusion"


class MemoryGate:
    """What requests may take at the level of this launch."""

    def __init__(self, setting: Setting, limits: Limits | None, level: int, resident_bytes: int) -> None:
        """`limits` None foretells nothing; `resident_bytes` of each transformer's blocks stay at level 4."""
        self.level = level
        self._limits = limits
        self._need = lru_cache(maxsize=16)(partial(Need, setting))  # decodes of a size are worked out once
        self._resident = 0 if limits is None else _blocks_in(setting, level, resident_bytes)

    def announce(self, videos: Sequence[VideoSize]) -> None:
        """Log the plan of each video, and whether it fits."""
        if self._limits is None:
            return
        for video in videos:
            need = self._need(video, 0)
            logger.info("memory for %s: %s", video, need.plan(self.level, self._resident))
            problem = check_request(need, self._limits, self.level, self._resident)
            if problem is not None:
                logger.warning("%s", problem)

    def plan(self, params: ResolvedParams, cache_bytes: int) -> Plan | None:
        """Where everything lives for a request, and what that takes."""
        if self._limits is None:
            return None
        return self._need(_size(params), cache_bytes).plan(self.level, self._resident)

    def spare_bytes(self, params: ResolvedParams, cache_bytes: int) -> int:
        """What a request leaves of the device while denoising; 0 where nothing is foretold."""
        plan = self.plan(params, cache_bytes)
        if plan is None or self._limits is None:
            return 0
        return max(0, self._limits.device_usable - plan.denoise_bytes)

    def refusal(self, params: ResolvedParams, cache_bytes: int) -> str | None:
        """Why a request does not fit, with settings that would make it; None where it does."""
        if self._limits is None:
            return None
        return check_request(self._need(_size(params), cache_bytes), self._limits, self.level, self._resident)

    def record(self, params: ResolvedParams, cache_bytes: int) -> MemoryRecord | None:
        """The plan of a request for its result."""
        plan = self.plan(params, cache_bytes)
        if plan is None:
            return None
        stages = {"text": plan.text_bytes, "denoise": plan.denoise_bytes, "decode": plan.decode_bytes}
        return MemoryRecord(
            level=plan.level,
            resident_blocks=plan.resident_blocks,
            places={part.name: part.place for part in plan.parts},
            device_gib={stage: round(num_bytes / GIB, 3) for stage, num_bytes in stages.items()},
            host_gib=round(plan.host_bytes / GIB, 3),
        )


def own_limits(device: torch.device) -> Limits | None:
    """What is free for this rank; None on a CPU."""
    return None if device.type == "cpu" else Limits(free_device_bytes(device), free_host_bytes())


def least(limits: Sequence[Limits | None]) -> Limits | None:
    """What every one of the ranks has; None where one has no GPU."""
    known = [one for one in limits if one is not None]
    if len(known) < len(limits):
        return None
    return Limits(min(one.device_bytes for one in known), min(one.host_bytes for one in known))


def videos_of(config: Config, expected: Sequence[VideoSize]) -> tuple[VideoSize, ...]:
    """What a launch must have room for: expected requests, else the model's own video; and warm-ups."""
    video = config.models.video
    usual = VideoSize(video.width, video.height, video.num_frames)
    return (*(expected or (usual,)), *config.infer.warmup_sizes)


def settle(config: Config, setting: Setting, limits: Limits | None, videos: Sequence[VideoSize]) -> Config:
    """The configuration with a level in place of `auto`: the lowest one that all of `videos` fit.

    Raises ValueError when none fits, with settings that would make one fit.
    """
    diffusion = config.infer.diffusion
    if diffusion.low_mem_level != "auto":
        return config
    level, resident = 0, diffusion.resident_gb
    if limits is not None:
        plan = max((choose_level(Need(setting, video), limits) for video in videos), key=_strictness)
        level = plan.level
        if resident == "auto" and plan.resident_bytes:
            each = plan.resident_bytes + 1  # a byte more: rounding must not cost a block
            resident = len(setting.sizes.experts) * each / 1e9
    stored = diffusion.stream_dtype
    if level < STREAMED:
        if stored != "model" or resident != "auto":
            logger.warning("%s.stream_dtype, resident_gb: no effect at level %d, auto's choice", _KEY, level)
        stored, resident = "model", "auto"
    changed = replace(diffusion, low_mem_level=level, resident_gb=resident, stream_dtype=stored)
    return replace(config, infer=replace(config.infer, diffusion=changed))


def _strictness(plan: Plan) -> tuple[int, int]:
    """A higher level is stricter; at level 4 fewer resident blocks are."""
    return plan.level, -(plan.resident_blocks or 0)


def _size(params: ResolvedParams) -> VideoSize:
    return VideoSize(params.width, params.height, params.num_frames)


def _blocks_in(setting: Setting, level: int, num_bytes: int) -> int:
    """How many blocks of a transformer, which are alike, a budget holds."""
    if level < STREAMED:
        return 0
    blocks, total = setting.transformer.blocks, 0
    for count, block in enumerate(blocks):
        total += block.num_bytes
        if total > num_bytes:
            return count
    return len(blocks)
