"""How long a video takes, roughly, and what a level of `infer.diffusion.low_mem_level` adds to it.

Time of work that tiles repeat, and of copies that computation does not hide. An estimate for one GPU's rates,
good for comparing levels.
"""

from dataclasses import dataclass

from chitu_core.config import VideoSize
from chitu_diffusion.flops import decode_flops, umt5_flops
from chitu_diffusion.memory_setting import DIT_ON_HOST, STREAMED, TEXT_ON_HOST, Setting


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: operations, and bytes from pinned host memory.

    Operations are those of a whole bf16 forward on an H100 (docs/benchmarks/h100_dit_14b_480p.json), the
    VAE's share of them is from vae_h100.json; bytes are those of PCIe 5 with 16 lanes.
    """

    flops: float = 650e12
    host_bytes: float = 50e9
    vae_share: float = 0.65
    vae_fp32_share: float = 0.23


def _forward_s(setting: Setting, video: VideoSize, rates: Rates) -> float:
    """One forward on one rank."""
    flops = sum(setting.sizes.dit.block_flops(setting.tokens(video)))
    return setting.sizes.dit.num_layers * flops / setting.degrees.cp / rates.flops


def _decode_s(setting: Setting, video: VideoSize, rates: Rates) -> float:
    share = rates.vae_share if setting.vae_dtype.itemsize == 2 else rates.vae_fp32_share
    flops = decode_flops(setting.sizes.vae, *setting.latent(video))
    return flops / setting.degrees.replica / (share * rates.flops)


def base_s(setting: Setting, video: VideoSize, rates: Rates) -> float:
    """A video at level 0."""
    text = setting.own_branches * umt5_flops(setting.sizes.encoder, setting.sizes.dit.text_len) / rates.flops
    forwards = setting.steps * setting.own_branches * _forward_s(setting, video, rates)
    return text + forwards + _decode_s(setting, video, rates)


def added_s(
    setting: Setting, video: VideoSize, level: int, resident: int, rates: Rates, *, tile_work: float
) -> float:
    """What a level adds to it: copies that computation does not hide, and work on what tiles share.

    `tile_work` is all work of the decode, relative to the whole image's.
    """
    seconds = (tile_work - 1) * _decode_s(setting, video, rates)
    encoder, dit = setting.text_encoder, setting.transformer
    if TEXT_ON_HOST <= level < STREAMED:
        seconds += (encoder.total - encoder.table) / rates.host_bytes
    if level == DIT_ON_HOST:
        seconds += len(setting.sizes.experts) * dit.in_blocks / rates.host_bytes
    if level >= STREAMED:
        seconds += setting.own_branches * encoder.in_blocks / rates.host_bytes
        copied = sum(setting.travels(block) for block in dit.blocks[resident:]) / rates.host_bytes
        forwards = setting.steps * setting.own_branches
        seconds += forwards * max(0.0, copied - _forward_s(setting, video, rates))
    return seconds
