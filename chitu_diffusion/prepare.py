"""From what a survey found to networks on a device, in one order: load, place, quantise, attention, calls."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from chitu_core import weights
from chitu_core.arena import Lane
from chitu_core.config import Config, DiffusionConfig, InferConfig
from chitu_core.distributed import ParallelMesh
from chitu_core.distributed.collectives import TokenShard
from chitu_core.ops.rows import HAS_TRITON
from chitu_core.timing import Timer
from chitu_diffusion.attention_plan import AttentionPlan
from chitu_diffusion.compilation import choose_block_call
from chitu_diffusion.cuda_graph import Forward, choose_forward
from chitu_diffusion.encoders.tokenizer import PromptTokenizer
from chitu_diffusion.encoders.umt5 import UMT5Encoder
from chitu_diffusion.media import to_pixels
from chitu_diffusion.memory_setting import STREAMED, TILED
from chitu_diffusion.models.wan import WanDiT
from chitu_diffusion.placing import Placing
from chitu_diffusion.prompt_cache import PromptCache
from chitu_diffusion.prompt_encoder import PromptEncoder
from chitu_diffusion.quantisation import quantise_layers
from chitu_diffusion.residency import Residency
from chitu_diffusion.resolve import ResolvedParams
from chitu_diffusion.spec import ModelSpec
from chitu_diffusion.survey import DTYPES, Survey, dtype_name, pick_text_dtype, pick_vae_chunk, spec_of
from chitu_diffusion.vaes._strips import Line, Strips
from chitu_diffusion.vaes._tile_plan import TilePlan, plan_tiles
from chitu_diffusion.vaes._tiles import decode_tiled
from chitu_diffusion.vaes.wan import WanVAE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pipeline:
    """The networks of one model, ready to run."""

    spec: ModelSpec
    prompt_encoder: PromptEncoder
    experts: dict[str, WanDiT]
    vae_chunk: int  # latent frames that it decodes at once
    vae: WanVAE
    tiling: (
        tuple[int, int] | None
    )  # pixels of a tile and from one to the next; None: the VAE sees all at once
    forward: Forward  # how a transformer is called: by itself, or from a recorded graph
    attention: AttentionPlan
    residency: Residency  # brings what lives on the host
    stream_dtype: str | None  # how streamed linear weights are stored, where not as they are used
    quant: str | None
    dtype: torch.dtype  # of matrix products
    tokens: TokenShard | None  # how this rank's part of a sequence is cut; None where it has all
    line: Line | None  # the ranks that decode a video together; None where one does

    def pixels(self, latents: Tensor) -> Iterator[Tensor | None]:
        """Pictures [n, H, W, 3] uint8 of a latent [C, T, h, w], chunk by chunk; None on ranks that only help.

        Ranks that share a video decode a strip of it each, and the first of them has the whole.
        """
        plan = self.tile_plan(*latents.shape[-2:])
        if plan is not None:
            yield from decode_tiled(self.vae, latents, plan, self.vae_chunk, to_pixels)
            return
        if self.line is None:
            yield from map(to_pixels, self.vae.decode(latents, self.vae_chunk))
            return
        strips = Strips(self.line, *latents.shape[-2:])
        for frames in self.vae.decode(latents, self.vae_chunk, strips):
            yield strips.collect(to_pixels(frames), self.spec.vae_stride[1])

    def tile_plan(self, rows: int, columns: int) -> TilePlan | None:
        """How a latent of so many positions is decoded in tiles; None where it is not."""
        return None if self.tiling is None else plan_tiles(self.vae.decoder, rows, columns, *self.tiling)

    def approximations(self, params: ResolvedParams) -> tuple[str, ...]:
        """What the run of a request approximates, in words for its record."""
        quantised = () if self.quant is None else (f"linear layers: {self.quant}",)
        stored = () if self.stream_dtype is None else (f"streamed linear weights: {self.stream_dtype}",)
        vae = () if self.vae.dtype == torch.float32 else (f"VAE in {dtype_name(self.vae.dtype)}",)
        *_, rows, columns = self.spec.latent_shape(params.num_frames, params.height, params.width)
        plan = self.tile_plan(rows, columns)
        is_blended = plan is not None and plan.mode == "blended"
        blended = ("VAE in blended tiles",) if is_blended else ()
        exact = self.attention.approximations(params.num_inference_steps)
        return (*exact, *quantised, *stored, *vae, *blended)


def _vae_dtype(name: str) -> torch.dtype:
    if name != "float32":
        logger.info("infer.vae_dtype=%s: VAE in %s; the reference computes it in float32", name, name)
    return DTYPES[name]


def build_pipeline(
    config: Config,
    found: Survey,
    attention: AttentionPlan,
    mesh: ParallelMesh,
    device: torch.device,
    timer: Timer,
) -> Pipeline:
    """Make every network of a survey on `device`, ready to run on this rank of `mesh`.

    An enabled `timer` counts attention that ranks share. Raises ValueError for a file or a tensor that is not
    what its header said.
    """
    sizes, fill, dtype = found.sizes, found.fill, found.place.dtype
    tokenizer = PromptTokenizer(found.tokenizer_dir, sizes.text_len, sizes.encoder.vocab_size)
    tokens = mesh.tokens()
    attention = attention.spread(mesh, tokens, _attention_timer(config.infer, timer))
    vae_dtype = _vae_dtype(config.infer.vae_dtype)
    with torch.device("meta"):
        encoder, vae = UMT5Encoder(sizes.encoder), WanVAE(sizes.vae)
        experts = {name: WanDiT(size) for name, size in sizes.experts.items()}
    placing = _placing(config.infer.diffusion, found, device)
    text_guest = placing.encoder(encoder, pick_text_dtype(dtype))
    fill(vae, "vae", lambda _: vae_dtype, weights.whole, weights.ON_DEVICE)
    if device.type == "cuda" and not HAS_TRITON:
        remedy = "pip install triton, which comes with torch on Linux"
        logger.warning(
            "triton is missing: what lies between matrix products is not fused, and slower; %s", remedy
        )
    call_block = choose_block_call(config.infer.compile, mesh)
    guests = {}
    for name, expert in experts.items():
        if config.quant is not None:
            quantise_layers(expert, config.fp8_fast_accumulation)
        expert.call_block = call_block
        guest = placing.expert(expert, name, dtype)
        if guest is not None:
            guests[name] = guest
        attention.install(expert)
    for module in (encoder, vae, *experts.values()):
        module.eval().requires_grad_(False)
    residency = Residency(text_guest, guests, device)
    prompts = PromptCache(config.infer.prompt_cache_mb * 10**6)
    return Pipeline(
        spec=spec_of(config, sizes),
        prompt_encoder=PromptEncoder(tokenizer, encoder, residency, prompts),
        experts=experts,
        vae_chunk=pick_vae_chunk(config.infer.vae_chunk, device.type, vae_dtype),
        vae=vae,
        tiling=_tiling(config.infer, mesh),
        forward=choose_forward(config.infer, mesh, device),
        attention=attention,
        residency=residency,
        stream_dtype=config.infer.diffusion.stream_dtype if placing.packs else None,
        quant=config.quant,
        dtype=dtype,
        tokens=tokens,
        line=mesh.line(),
    )


def _attention_timer(config: InferConfig, timer: Timer) -> Timer | None:
    """A graph has no place for marks."""
    if not timer.is_enabled():
        return None
    if config.compile == "on":
        logger.warning("output.enable_timer_dump: under infer.compile=on attention is not timed by itself")
        return None
    return timer


def _tiling(config: InferConfig, mesh: ParallelMesh) -> tuple[int, int] | None:
    """From level 1 on; ranks that share a video decode strips of it instead."""
    level = config.diffusion.level
    if level < TILED:
        return None
    if mesh.replica is not None:
        logger.info("infer.diffusion.low_mem_level=%d: ranks decode strips of the image, not tiles", level)
        return None
    return config.vae_tile_px, config.vae_tile_stride_px


def _placing(config: DiffusionConfig, found: Survey, device: torch.device) -> Placing:
    each = config.resident_bytes // len(found.sizes.experts)
    packs = config.level == STREAMED and config.stream_dtype != "model"
    return Placing(config.level, packs, each, found.fill, Lane(device))
