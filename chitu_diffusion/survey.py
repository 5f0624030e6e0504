"""What a model is, from a checked configuration and a checkpoint's headers, before any network exists."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from chitu_core import weights
from chitu_core.attention import Place
from chitu_core.config import Config, ModelConfig
from chitu_diffusion.checkpoint.layout import Component, locate
from chitu_diffusion.checkpoint.sizes import dit_config, umt5_config, vae_config
from chitu_diffusion.encoders.umt5 import UMT5Config
from chitu_diffusion.models.wan import WanConfig
from chitu_diffusion.quantisation import check_quantisation
from chitu_diffusion.spec import ModelSpec, experts_of
from chitu_diffusion.vaes.wan import WanVAEConfig, wan21

logger = logging.getLogger(__name__)

DEMO_TOKENIZER = Path(__file__).parent / "demo" / "tokenizer"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# a meta module, its part's name, the dtype of each parameter, the checkpoint's tensors that make it, its home
Fill = Callable[[nn.Module, str, weights.DtypeOf, weights.PartsOf, weights.Home], None]


@dataclass(frozen=True)
class Sizes:
    """What the networks of a model are, before any of them exists."""

    encoder: UMT5Config
    vae: WanVAEConfig
    experts: dict[str, WanConfig]

    @property
    def text_len(self) -> int:
        """Rows of text that every expert takes."""
        return min(size.text_len for size in self.experts.values())

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
    return DTYPES[name]


def pick_text_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the text encoder by that of matrix products: T5 overflows in float16, not in bfloat16."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def pick_vae_chunk(chunk: int | str, device_type: str, dtype: torch.dtype) -> int:
    """Latent frames that the VAE decodes at once; `auto` is 2 in bfloat16 on a GPU, else 1.

    Each frame more costs memory. The second gains where the image is smallest, which one frame does not fill.
    """
    if isinstance(chunk, int):
        return chunk
    return 2 if device_type == "cuda" and dtype == torch.bfloat16 else 1


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


def spec_of(config: Config, sizes: Sizes) -> ModelSpec:
    """The facts of a model that no tensor states."""
    vae, dit = sizes.vae, sizes.dit
    experts = experts_of(config.models.sampler)
    return ModelSpec(experts, vae.stride, dit.patch_size, vae.z_dim, sizes.text_len)


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
