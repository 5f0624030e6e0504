"""From a checked configuration to networks on a device: locate, size, load, choose attention."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from chitu_core import weights
from chitu_core.arena import Lane
from chitu_core.attention import Place
from chitu_core.config import Config, DiffusionConfig, InferConfig, ModelConfig
from chitu_core.distributed import Degrees, ParallelMesh
from chitu_core.distributed.collectives import TokenShard
from chitu_core.ops.rows import HAS_TRITON
from chitu_diffusion.attention_plan import AttentionPlan
from chitu_diffusion.checkpoint.layout import Component, locate
from chitu_diffusion.checkpoint.sizes import dit_config, umt5_config, vae_config
from chitu_diffusion.compilation import choose_block_call
from chitu_diffusion.cuda_graph import Forward, choose_forward
from chitu_diffusion.encoders.tokenizer import PromptTokenizer
from chitu_diffusion.encoders.umt5 import UMT5Config, UMT5Encoder
from chitu_diffusion.memory_setting import STREAMED, TILED, Setting
from chitu_diffusion.models.wan import WanConfig, WanDiT
from chitu_diffusion.placing import Fill, Placing, both_experts_limit
from chitu_diffusion.prompt_cache import PromptCache
from chitu_diffusion.prompt_encoder import PromptEncoder
from chitu_diffusion.quantisation import check_quantisation, quantise_layers
from chitu_diffusion.residency import Residency
from chitu_diffusion.resolve import ResolvedParams
from chitu_diffusion.spec import ModelSpec, experts_of
from chitu_diffusion.vaes._tile_plan import TilePlan, plan_tiles
from chitu_diffusion.vaes.wan import WanVAE, WanVAEConfig, wan21

logger = logging.getLogger(__name__)

DEMO_TOKENIZER = Path(__file__).parent / "demo" / "tokenizer"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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


@dataclass(frozen=True)
class Sizes:
    """What the networks of a model are, before any of them exists."""

    encoder: UMT5Config
    vae: WanVAEConfig
    experts: dict[str, WanConfig]

    @property
    def dit(self) -> WanConfig:
        """One transformer; experts differ in their weights alone."""
        return next(iter(self.experts.values()))


@dataclass(frozen=True)
class Survey:
    """What headers and settings tell about a model: enough to plan, and to make it."""

    sizes: Sizes
    fill: Fill
    tokenizer_dir: Path
    place: Place  # where attention will run


def pick_device(op_impl: str, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """This process's GPU; the CPU where there is none or `infer.op_impl=cpu` says so.

    Raises ValueError for more ranks on this machine than it has GPUs.
    """
    if op_impl == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_world_size > count:
        remedy = "start at most one rank a GPU (launch.gpus_per_node), or set infer.op_impl=cpu"
        raise ValueError(f"LOCAL_WORLD_SIZE={local_world_size}: this machine has {count} GPU(s); {remedy}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: by name, or bfloat16 on a GPU and float32 on a CPU for `auto`."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[name]


def pick_vae_chunk(chunk: int | str, device: torch.device, dtype: torch.dtype) -> int:
    """Latent frames that the VAE decodes at once; `auto` is 2 in bfloat16 on a GPU, else 1.

    Each frame more costs memory. The second gains where the image is smallest, which one frame does not fill.
    """
    if isinstance(chunk, int):
        return chunk
    return 2 if device.type == "cuda" and dtype == torch.bfloat16 else 1


def _vae_dtype(name: str) -> torch.dtype:
    if name != "float32":
        logger.info("infer.vae_dtype=%s: VAE in %s; the reference computes it in float32", name, name)
    return _DTYPES[name]


def survey(config: Config, device: torch.device, dtype: torch.dtype) -> Survey:
    """Find the checkpoint and read its headers; no tensor is read and nothing is allocated.

    Raises ValueError naming key, file or tensor when the checkpoint is not what it must be.
    """
    sizes, fill, tokenizer_dir = (
        _random(config, device) if config.debug.skip_model_load else _stored(config, device)
    )
    _check_fit(sizes)
    if config.quant is not None:
        check_quantisation(device, dtype, sizes.dit)
    return Survey(sizes, fill, tokenizer_dir, _place(device, dtype, sizes.dit))


def build_pipeline(
    config: Config, found: Survey, attention: AttentionPlan, mesh: ParallelMesh, device: torch.device
) -> Pipeline:
    """Make every network of a survey on `device`, ready to run on this rank of `mesh`.

    Raises ValueError for a file or a tensor that is not what its header said.
    """
    sizes, fill, dtype = found.sizes, found.fill, found.place.dtype
    tokenizer = PromptTokenizer(found.tokenizer_dir, _text_len(sizes), sizes.encoder.vocab_size)
    tokens = mesh.tokens()
    attention = attention.spread(mesh, tokens)
    # NOTE T5 overflows in fp16, so bf16 stands in there
    text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    vae_dtype = _vae_dtype(config.infer.vae_dtype)
    with torch.device("meta"):
        encoder, vae = UMT5Encoder(sizes.encoder), WanVAE(sizes.vae)
        experts = {name: WanDiT(size) for name, size in sizes.experts.items()}
    placing = _placing(config.infer.diffusion, found, device)
    text_guest = placing.encoder(encoder, text_dtype)
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
    residency = Residency(text_guest, guests, device, both_experts_limit(device))
    prompts = PromptCache(config.infer.prompt_cache_mb * 10**6)
    return Pipeline(
        spec=spec_of(config, sizes),
        prompt_encoder=PromptEncoder(tokenizer, encoder, residency, prompts),
        experts=experts,
        vae_chunk=pick_vae_chunk(config.infer.vae_chunk, device, vae_dtype),
        vae=vae,
        tiling=_tiling(config.infer, mesh),
        forward=choose_forward(config.infer, mesh, device),
        attention=attention,
        residency=residency,
        stream_dtype=config.infer.diffusion.stream_dtype if placing.packs else None,
        quant=config.quant,
        dtype=dtype,
        tokens=tokens,
    )


def spec_of(config: Config, sizes: Sizes) -> ModelSpec:
    """The facts of a model that no tensor states."""
    vae, dit = sizes.vae, sizes.dit
    experts = experts_of(config.models.sampler)
    return ModelSpec(experts, vae.stride, dit.patch_size, vae.z_dim, _text_len(sizes))


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


def setting_of(config: Config, sizes: Sizes, place: Place, degrees: Degrees, local_ranks: int) -> Setting:
    """What the memory plan must know of a launch."""
    infer = config.infer
    chunk = pick_vae_chunk(infer.vae_chunk, torch.device(place.device_type), _DTYPES[infer.vae_dtype])
    return Setting.of(config, sizes, place, vae_chunk=chunk, degrees=degrees, local_ranks=local_ranks)


def _stored(config: Config, device: torch.device) -> tuple[Sizes, Fill, Path]:
    """Sizes, weights and tokenizer of the checkpoint that `models.ckpt_dir` names."""
    model = config.models
    checkpoint = locate(model)
    logger.info("checkpoint %s (%s layout)", checkpoint.root, checkpoint.layout)
    parts: dict[str, Component] = {"text_encoder": checkpoint.text_encoder, "vae": checkpoint.vae}
    parts |= dict(checkpoint.experts)
    experts = {name: dit_config(part) for name, part in checkpoint.experts}
    sizes = Sizes(umt5_config(checkpoint.text_encoder), vae_config(checkpoint.vae), experts)
    stated = yaml_sizes(model).experts
    for name, size in experts.items():
        differing = [key for key, value in asdict(size).items() if asdict(stated[name])[key] != value]
        if differing and model.packaged_dir is not None:
            known = "Wan2.1-T2V-1.3B, Wan2.1-T2V-14B or Wan2.2-T2V-A14B"
            problem = f"models.ckpt_dir={model.ckpt_dir} holds another network than models={model.name}"
            raise ValueError(f"{problem}, whose sampler defaults would not fit it; add models={known}")
        if differing:
            logger.warning(
                "%s of the checkpoint differs from models=%s in %s", name, model.name, ", ".join(differing)
            )

    def fill(
        module: nn.Module,
        name: str,
        dtype_of: weights.DtypeOf,
        parts_of: weights.PartsOf,
        home: weights.Home,
    ) -> None:
        part = parts[name]
        weights.load(
            module,
            part.source,
            part.rename,
            device=device,
            dtype_of=dtype_of,
            label=name,
            spell=part.spell,
            parts_of=parts_of,
            home=home,
        )

    return sizes, fill, checkpoint.tokenizer_dir


def _random(config: Config, device: torch.device) -> tuple[Sizes, Fill, Path]:
    """Sizes of the model YAML, random weights, and the demo model's tokenizer."""
    logger.warning("debug.skip_model_load=true: weights are random, the video will be noise")
    seed = config.infer.seed

    def fill(
        module: nn.Module, name: str, dtype_of: weights.DtypeOf, _: weights.PartsOf, home: weights.Home
    ) -> None:
        logger.info("%s: random weights", name)
        weights.randomise(module, device=device, dtype_of=dtype_of, seed=seed, home=home)

    return yaml_sizes(config.models), fill, DEMO_TOKENIZER


def yaml_sizes(model: ModelConfig) -> Sizes:
    """Sizes as the model YAML states them, for use without a checkpoint."""
    text, size = model.encoder, model.transformer
    encoder = UMT5Config(
        text.vocab_size, text.dim, text.attention_dim, text.num_heads, text.ffn_dim, text.num_layers
    )
    vae = wan21(model.vae.base_dim, model.vae.z_dim)
    dit = WanConfig(text_len=text.text_len, **asdict(size))
    return Sizes(encoder, vae, {expert.name: dit for expert in experts_of(model.sampler)})


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, and so on."""
    return str(dtype).removeprefix("torch.")


def _text_len(sizes: Sizes) -> int:
    return min(size.text_len for size in sizes.experts.values())


def _place(device: torch.device, dtype: torch.dtype, size: WanConfig) -> Place:
    """Where attention will run."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return Place(device.type, capability, dtype, size.dim // size.num_heads)


def _check_fit(sizes: Sizes) -> None:
    """The parts of a checkpoint must fit each other; raises ValueError where they do not."""
    for name, size in sizes.experts.items():
        if size.text_dim != sizes.encoder.dim:
            raise ValueError(
                f"{name} expects text of width {size.text_dim}, the text encoder gives {sizes.encoder.dim}"
            )
        if size.in_dim != sizes.vae.z_dim:
            raise ValueError(f"{name} expects {size.in_dim} latent channels, the VAE has {sizes.vae.z_dim}")
