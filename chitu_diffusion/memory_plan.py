"""Where the parts of a model live at each `infer.diffusion.low_mem_level`, and what that takes.

Arithmetic alone: nothing is loaded and no device is asked. `memory_choice.py` picks a level by it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from chitu_core._staging import STAGING
from chitu_core.config import VideoSize
from chitu_core.memory import GIB
from chitu_diffusion.footprint import FP32_BYTES, dit_bytes, text_cache_bytes, umt5_bytes
from chitu_diffusion.memory_cost import Rates, added_s, base_s
from chitu_diffusion.memory_decode import Decode, plan_decode
from chitu_diffusion.memory_setting import DIT_ON_HOST, LEVELS, STREAMED, TEXT_ON_HOST, Setting

SLABS = 2  # device buffers that blocks pass through
_LATENTS = 5  # fp32 copies beside a forward: the sample, a branch's velocity, three of the sampler's history


@dataclass(frozen=True)
class Part:
    """A part of a run: where it lives, and its bytes on the device in each stage, and on the host."""

    name: str
    place: str
    text: int = 0
    denoise: int = 0
    decode: int = 0
    host: int = 0


@dataclass(frozen=True)
class Plan:
    """Where everything lives at a level, for one rank; host bytes are those of all ranks of the machine.

    `resident_blocks` of each transformer, of `resident_bytes`, stay on the device; None below level 4.
    `seconds` are an estimate of one video, of which `added_s` are the level's.
    """

    level: int
    resident_blocks: int | None
    resident_bytes: int
    parts: tuple[Part, ...]
    host_bytes: int
    seconds: float
    added_s: float

    @property
    def text_bytes(self) -> int:
        """Device peak while text is encoded."""
        return sum(part.text for part in self.parts)

    @property
    def denoise_bytes(self) -> int:
        """Device peak of denoising."""
        return sum(part.denoise for part in self.parts)

    @property
    def decode_bytes(self) -> int:
        """Device peak of decoding."""
        return sum(part.decode for part in self.parts)

    @property
    def device_peak(self) -> int:
        """The largest of the three."""
        return max(self.text_bytes, self.denoise_bytes, self.decode_bytes)

    def __str__(self) -> str:
        """One line for a log: where what lives that need not be on the device, and the peaks."""
        away = [f"{part.name}: {part.place}" for part in self.parts if part.host]
        stages = {"text": self.text_bytes, "denoise": self.denoise_bytes, "decode": self.decode_bytes}
        peaks = ", ".join(f"{stage} {peak / GIB:.1f}" for stage, peak in stages.items())
        blocks = "" if self.resident_blocks is None else f"{self.resident_blocks} resident blocks; "
        where = "; ".join(away) or "all on the device"
        host = f"{self.host_bytes / GIB:.1f} on the host"
        return f"low_mem_level {self.level}: {where}; {blocks}GiB on the device: {peaks}; {host}"

    @property
    def slowdown(self) -> float:
        """Time of a video over its time at level 0."""
        return self.seconds / (self.seconds - self.added_s)


def plan_memory(
    setting: Setting,
    video: VideoSize,
    level: int,
    *,
    cache_bytes: int = 0,
    resident_blocks: int = 0,
    decode: Decode | None = None,
    rates: Rates | None = None,
) -> Plan:
    """What a request for `video` takes at a level. `cache_bytes` are what a step cache keeps on this rank.

    At level 4 `resident_blocks` of each transformer stay on the device. `decode` is what `plan_decode` gives,
    where it is known. Raises ValueError for a level that is none, and for blocks that are not there to stay.
    """
    if level not in LEVELS:
        raise ValueError(f"infer.diffusion.low_mem_level={level}: must be 0 to {LEVELS[-1]}")
    most = setting.sizes.dit.num_layers if level >= STREAMED else 0
    if not 0 <= resident_blocks <= most:
        raise ValueError(f"resident_blocks={resident_blocks}: must be 0 to {most} at level {level}")
    decode = decode or plan_decode(setting, video, level)
    parts = (
        _text_encoder(setting, level),
        *_transformers(setting, level, resident_blocks),
        _everywhere("VAE", "device", setting.vae_bytes),
        *_passing(setting, video, level, cache_bytes),
        Part("activations of decoding", "device", decode=decode.device_bytes),
        Part("features and pictures of tiles", "device, for decoding", decode=decode.kept_bytes),
        Part("step cache", "device, for denoising", denoise=cache_bytes),
    )
    staging = STAGING.buffers * STAGING.buffer_bytes
    host = setting.local_ranks * (sum(part.host for part in parts) + staging)
    rates = rates or Rates()
    base = base_s(setting, video, rates)
    added = added_s(setting, video, level, resident_blocks, rates, tile_work=decode.work)
    return Plan(
        level=level,
        resident_blocks=resident_blocks if level >= STREAMED else None,
        resident_bytes=sum(block.num_bytes for block in setting.transformer.blocks[:resident_blocks]),
        parts=parts,
        host_bytes=host,
        seconds=base + added,
        added_s=added,
    )


def _everywhere(name: str, place: str, num_bytes: int) -> Part:
    return Part(name, place, num_bytes, num_bytes, num_bytes)


def _text_encoder(setting: Setting, level: int) -> Part:
    name, weights = "text encoder", setting.text_encoder
    if level < TEXT_ON_HOST:
        return _everywhere(name, "device", weights.total)
    if level < STREAMED:  # rows of the table are looked up where it lies
        there = weights.total - weights.table
        return Part(name, "host, on the device for encoding", text=there, host=weights.total)
    always = weights.rest - weights.table
    slabs = SLABS * max(block.num_bytes for block in weights.blocks)
    return Part(name, "host, streamed", always + slabs, always, always, weights.total - always)


def _transformers(setting: Setting, level: int, resident: int) -> Iterator[Part]:
    """A row for each expert. From level 3 on what is outside of its blocks stays, and one has its blocks."""
    weights = setting.transformer
    for index, name in enumerate(setting.sizes.experts):
        is_there = index == 0
        if level < DIT_ON_HOST:
            yield _everywhere(name, "device", weights.total)
        elif level < STREAMED:
            blocks, place = weights.in_blocks, "host, on the device for denoising"
            yield Part(name, place, weights.rest, weights.rest + blocks * is_there, weights.rest, blocks)
        else:
            kept = weights.rest + sum(block.num_bytes for block in weights.blocks[:resident])
            denoise = kept + _slab_bytes(setting, resident) * is_there
            host = sum(setting.stored(block) for block in weights.blocks[resident:])
            yield Part(name, "host, streamed", kept, denoise, kept, host)


def _slab_bytes(setting: Setting, resident: int) -> int:
    """Device buffers of streamed blocks, and one in which what is stored in another form arrives."""
    blocks = setting.transformer.blocks[resident:]
    used = max((block.num_bytes - block.once for block in blocks), default=0)
    arriving = max((setting.travels(block) for block in blocks), default=0)
    return min(SLABS, len(blocks)) * used + (0 if setting.stream_dtype is None else arriving)


def _passing(setting: Setting, video: VideoSize, level: int, cache_bytes: int) -> Iterator[Part]:
    """What is no weight, but for what a decode holds."""
    dit, dtype = setting.sizes.dit, setting.dtype
    latents = _LATENTS * setting.sizes.vae.z_dim * prod(setting.latent(video)) * FP32_BYTES
    yield Part("latents", "device", denoise=latents, decode=latents)
    texts = setting.own_branches * text_cache_bytes(dit, dtype)
    yield Part("keys and values of text", "device", denoise=texts, decode=texts)
    others = setting.tasks - 1 if level < DIT_ON_HOST else 0  # taken to be alike; from there on one by one
    caches = min(others * cache_bytes, max(0, setting.caches_bytes - cache_bytes))
    yield _everywhere("state of waiting tasks", "device", others * (latents + texts) + caches)
    text = umt5_bytes(setting.sizes.encoder, setting.text_dtype, dit.text_len)
    yield Part("activations of encoding", "device", text=text)
    tokens = setting.tokens(video)
    forward = dit_bytes(dit, dtype, tokens, quant=setting.quant, degrees=setting.degrees)
    yield Part("activations of denoising", "device", denoise=forward)
