"""What a launch fixes of the memory that its requests take, and what `infer.diffusion.low_mem_level` means.

Levels are cumulative: 0 all on the device; 1 the VAE in tiles; 2 the text encoder on the device for encoding
alone; 3 the blocks of one transformer, for denoising alone; 4 blocks of both pass through two buffers each.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from chitu_core.attention import Place
from chitu_core.config import Config, VideoSize
from chitu_core.distributed.degrees import Degrees
from chitu_core.ops.fp8 import LOWEST_CAPABILITY
from chitu_diffusion.footprint import Block, Weights, dit_weights, umt5_weights
from chitu_diffusion.guidance import BOTH, needs_cfg
from chitu_diffusion.spec import count_tokens, latent_size
from chitu_diffusion.survey import DTYPES, Sizes, pick_text_dtype, pick_vae_chunk
from chitu_diffusion.vaes.wan import WanVAE

LEVELS = range(5)
TILED, TEXT_ON_HOST, DIT_ON_HOST, STREAMED = 1, 2, 3, 4  # the level from which on
_STREAM_DTYPES = {"model": None, "float8_e4m3fn": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Setting:
    """What a launch fixes: networks, formats, and how ranks share the work.

    `branches` are those of guidance; `tasks` may be begun and unfinished at once, their step caches taking
    `caches_bytes` of a rank at most; `local_ranks` processes share this machine's memory; `stream_dtype` is
    how streamed blocks are stored (None: as they are computed); `capability` is that of the GPU, None for a
    CPU.
    """

    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.float32
    vae_chunk: int = 1
    quant: str | None = None
    stream_dtype: torch.dtype | None = None
    branches: int = 2
    steps: int = 50
    tasks: int = 1
    caches_bytes: int = 0
    degrees: Degrees = field(default_factory=Degrees)
    local_ranks: int = 1
    tile_px: int = 256
    tile_stride_px: int = 192
    capability: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        sizes: Sizes,
        place: Place,
        degrees: Degrees | None = None,
        local_ranks: int = 1,
    ) -> "Setting":
        """That of a configuration, for networks of `sizes` that run at `place`."""
        infer = config.infer
        vae_dtype = DTYPES[infer.vae_dtype]
        scales = config.models.sampler.guidance_scale
        return cls(
            sizes=sizes,
            dtype=place.dtype,
            vae_dtype=vae_dtype,
            vae_chunk=pick_vae_chunk(infer.vae_chunk, place.device_type, vae_dtype),
            quant=config.quant,
            stream_dtype=_STREAM_DTYPES[infer.diffusion.stream_dtype],
            branches=len(BOTH) if any(map(needs_cfg, scales)) else 1,
            steps=config.models.sampler.sample_steps,
            tasks=1 if infer.schedule_policy == "fifo" else infer.max_reqs,
            caches_bytes=infer.diffusion.flexcache_bytes if infer.diffusion.enable_flexcache else 0,
            degrees=degrees or Degrees(),
            local_ranks=local_ranks,
            tile_px=infer.vae_tile_px,
            tile_stride_px=infer.vae_tile_stride_px,
            capability=place.capability,
        )

    @property
    def has_fp8(self) -> bool:
        """Whether layers can be fp8; on a CPU they have an eager form."""
        return self.capability is None or self.capability >= LOWEST_CAPABILITY

    @property
    def text_dtype(self) -> torch.dtype:
        """Of the text encoder."""
        return pick_text_dtype(self.dtype)

    @property
    def own_branches(self) -> int:
        """Branches that one rank predicts."""
        return -(-self.branches // self.degrees.cfg)

    @cached_property
    def text_encoder(self) -> Weights:
        """Weights of the text encoder."""
        return umt5_weights(self.sizes.encoder, self.text_dtype)

    @cached_property
    def transformer(self) -> Weights:
        """Weights of one transformer; experts are alike."""
        return dit_weights(self.sizes.dit, self.dtype, self.quant)

    @cached_property
    def vae(self) -> WanVAE:
        """The VAE, on the meta device, to count from."""
        with torch.device("meta"):
            return WanVAE(self.sizes.vae)

    @property
    def vae_bytes(self) -> int:
        """Weights of the VAE."""
        return self.vae_dtype.itemsize * sum(parameter.numel() for parameter in self.vae.parameters())

    def latent(self, video: VideoSize) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a video."""
        return latent_size(self.sizes.vae.stride, video.num_frames, video.height, video.width)

    def tokens(self, video: VideoSize) -> int:
        """Tokens of a video, those of all ranks together."""
        return count_tokens(self.sizes.dit.patch_size, self.latent(video))

    def stored(self, block: Block) -> int:
        """Host bytes of a streamed block of the transformer."""
        return block.num_bytes if self.stream_dtype is None else block.stored

    def travels(self, block: Block) -> int:
        """Bytes of it that every step brings: what a text needs once is not among them."""
        if self.stream_dtype is None:
            return block.num_bytes - block.once
        return block.stored - block.once_stored
