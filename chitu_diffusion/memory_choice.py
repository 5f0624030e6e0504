"""Which level of `infer.diffusion.low_mem_level` fits the memory that is free, and what would make one fit.

Arithmetic alone, over `memory_plan`. Advice is tried before it is given.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from chitu_core.config import VideoSize
from chitu_core.memory import GIB
from chitu_core.ops.fp8 import ALIGNMENT
from chitu_diffusion.memory_decode import Decode, plan_decode
from chitu_diffusion.memory_plan import Plan, plan_memory
from chitu_diffusion.memory_setting import LEVELS, STREAMED, TILED, Setting

MARGIN_SHARE, MARGIN_BYTES = 0.05, GIB // 2  # the larger one stays free: contexts, and what allocators waste
_GB = 10**9
STEP_PX = 16  # of a video's sides
_LEVEL = "infer.diffusion.low_mem_level"
_SCALES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of a smaller video's sides


@dataclass(frozen=True)
class Limits:
    """Bytes that a run may have: on the device of a rank, and on the host for all ranks of the machine.

    Before anything is loaded they are what is free; later, that and what the run holds itself.
    """

    device_bytes: int
    host_bytes: int

    @property
    def device_usable(self) -> int:
        """Without the margin."""
        return _without_margin(self.device_bytes)

    @property
    def host_usable(self) -> int:
        """Without the margin."""
        return _without_margin(self.host_bytes)

    def hold(self, plan: Plan) -> bool:
        """Whether a plan fits."""
        return plan.device_peak <= self.device_usable and plan.host_bytes <= self.host_usable


@dataclass(frozen=True)
class Need:
    """What is to fit: a launch, a video, and the bytes of a step cache."""

    setting: Setting
    video: VideoSize
    cache_bytes: int = 0

    def plan(self, level: int, resident_blocks: int = 0) -> Plan:
        """Its plan at a level."""
        return plan_memory(
            self.setting,
            self.video,
            level,
            cache_bytes=self.cache_bytes,
            resident_blocks=resident_blocks,
            decode=self._in_tiles if level >= TILED else self._whole,
        )

    @cached_property
    def _whole(self) -> Decode:
        return plan_decode(self.setting, self.video, 0)

    @cached_property
    def _in_tiles(self) -> Decode:
        return plan_decode(self.setting, self.video, TILED)


def choose_level(need: Need, limits: Limits) -> Plan:
    """The plan of the lowest level that fits; at level 4 with as many resident blocks as fit.

    Raises ValueError when none fits, with settings that would make one fit.
    """
    plan = _lowest(need, limits, LEVELS)
    if plan is not None:
        return plan
    last = need.plan(STREAMED)
    found = f"{_LEVEL}={STREAMED} would take {_takes(last, limits)}"
    problem = f"{_LEVEL}=auto: no level fits a video of {need.video}; {found}"
    raise ValueError(f"{problem}; {_advice(need, limits, LEVELS)}")


def check_request(need: Need, limits: Limits, level: int, resident_blocks: int = 0) -> str | None:
    """Why a request cannot run at the level of this launch, with settings that would let it; None if it can.

    At level 4, `resident_blocks` of each transformer are on the device already.
    """
    plan = need.plan(level, resident_blocks)
    if limits.hold(plan):
        return None
    problem = f"a video of {need.video} would take {_takes(plan, limits)}"
    return f"{problem} at {_LEVEL}={level}; {_advice(need, limits, [level], resident_blocks)}"


def _without_margin(num_bytes: int) -> int:
    return num_bytes - max(int(MARGIN_SHARE * num_bytes), MARGIN_BYTES)


def _lowest(need: Need, limits: Limits, levels: Iterable[int]) -> Plan | None:
    for level in levels:
        most = need.setting.sizes.dit.num_layers if level >= STREAMED else 0
        for resident in range(most, -1, -1):
            plan = need.plan(level, resident)
            if limits.hold(plan):
                return plan
    return None


def _takes(plan: Plan, limits: Limits) -> str:
    """What a plan takes beside what there is, of the memory that is too small."""
    stages = {"encoding": plan.text_bytes, "denoising": plan.denoise_bytes, "decoding": plan.decode_bytes}
    stage = max(stages, key=lambda name: stages[name])
    pairs = [(f"on the device while {stage}", plan.device_peak, limits.device_usable)]
    pairs += [("on the host", plan.host_bytes, limits.host_usable)]
    short = [
        f"{wanted / GIB:.1f} GiB {where}, where {max(0, there) / GIB:.1f} are to be had"
        for where, wanted, there in pairs
        if wanted > there
    ]
    return " and ".join(short)


def _advice(need: Need, limits: Limits, levels: Sequence[int], resident: int = 0) -> str:
    """Changes each of which makes the need fit; where none does, all at once, with a smaller video."""

    def fits(other: Need) -> bool:
        return any(limits.hold(other.plan(level, resident)) for level in levels)

    higher = _lowest(need, limits, range(levels[-1] + 1, STREAMED + 1))
    words = [] if higher is None else [f"{_LEVEL}={higher.level}"]
    words += _fewer_resident(need, limits, resident)
    formats = ((text, replace(need, setting=setting)) for text, setting in _formats(need.setting))
    words += [text for text, other in formats if fits(other)]
    words += _smaller(need, fits)
    words = words or _all_at_once(need, limits)
    if not words:
        return "no smaller video and no other format fits either; free memory, or take a larger device"
    return f"what fits: {'; or '.join(words)}"


def _fewer_resident(need: Need, limits: Limits, resident: int) -> list[str]:
    """The most blocks of a transformer, fewer than now, that may stay on the device, as a setting."""
    for fewer in range(resident - 1, -1, -1):
        plan = need.plan(STREAMED, fewer)
        if limits.hold(plan):
            tenths = plan.resident_bytes * 10 // _GB
            return [f"infer.diffusion.resident_gb={tenths / 10:g}"]
    return []


def _all_at_once(need: Need, limits: Limits) -> list[str]:
    texts = [f"{_LEVEL}={STREAMED}"]
    while formats := _formats(need.setting):
        text, setting = formats[0]
        texts, need = [*texts, text], replace(need, setting=setting)
    if limits.hold(need.plan(STREAMED)):
        return [" ".join(texts)]
    return [
        " ".join([*texts, "and", smaller])
        for smaller in _smaller(need, lambda other: limits.hold(other.plan(STREAMED)))
    ]


def _formats(setting: Setting) -> list[tuple[str, Setting]]:
    """Launches with one format changed for a smaller one."""
    found = []
    if setting.vae_dtype.itemsize > torch.bfloat16.itemsize:
        small = replace(setting, vae_dtype=torch.bfloat16, vae_chunk=1)
        found.append(("infer.vae_dtype=bfloat16 infer.vae_chunk=1", small))
    elif setting.vae_chunk > 1:
        found.append(("infer.vae_chunk=1", replace(setting, vae_chunk=1)))
    is_plain = setting.quant is None and setting.stream_dtype is None
    dit = setting.sizes.dit
    if is_plain and setting.has_fp8 and not (dit.dim % ALIGNMENT or dit.ffn_dim % ALIGNMENT):
        found.append(("quant=fp8", replace(setting, quant="fp8")))
    if is_plain:
        stored = replace(setting, stream_dtype=torch.float8_e4m3fn)
        found.append(("infer.diffusion.stream_dtype=float8_e4m3fn", stored))
    return found


def _smaller(need: Need, fits: Callable[[Need], bool]) -> list[str]:
    """The largest picture of about the same shape that fits, and the most frames."""
    video, step = need.video, STEP_PX
    sizes = (
        replace(
            video,
            width=int(scale * video.width) // step * step,
            height=int(scale * video.height) // step * step,
        )
        for scale in _SCALES
    )
    lengths = (replace(video, num_frames=frames) for frames in range(video.num_frames - 4, 0, -4))
    words = []
    for videos, text in (
        (sizes, "width={0.width} height={0.height}"),
        (lengths, "num_frames={0.num_frames}"),
    ):
        legal = (other for other in videos if other.width and other.height)
        found = next((other for other in legal if fits(replace(need, video=other))), None)
        words += [] if found is None else [text.format(found)]
    return words
