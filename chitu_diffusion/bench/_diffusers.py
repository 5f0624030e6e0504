"""The peer: diffusers' Wan networks at our sizes with random weights. The one file that imports diffusers.

Networks are in bfloat16 on a GPU and float32 on a CPU, attention by cuDNN on a GPU, as a user would set them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from chitu_diffusion.bench._setup import Video, installed
from chitu_diffusion.bench._work import SEED, TIMESTEP
from chitu_diffusion.encoders.umt5 import UMT5Config
from chitu_diffusion.models.wan import WanConfig
from chitu_diffusion.vaes.wan import WanVAEConfig

MODES = ("eager", "compile", "blocks")
ATTENTION = "_native_cudnn"  # on a GPU


@dataclass(frozen=True)
class Sizes:
    """What our networks are, for the peer to be the same."""

    encoder: UMT5Config
    vae: WanVAEConfig
    dit: WanConfig
    latent_shape: tuple[int, ...]
    sample_shift: float


def version() -> str:
    """The version of the peer. Raises RuntimeError with the remedy where it is not installed."""
    _package()
    return installed("diffusers") or "unknown"


def peer_dtype(device: torch.device) -> torch.dtype:
    """What the peer computes in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def forwards(sizes: Sizes, device: torch.device, modes: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """One forward of the transformer at timestep 500, by mode. The modes share weights.

    The peer projects time and text in every forward, as it does in its own pipeline.
    """
    dtype = peer_dtype(device)
    noise = torch.Generator(device).manual_seed(SEED)
    latents = torch.randn(1, *sizes.latent_shape, generator=noise, device=device, dtype=dtype)
    text_shape = (1, sizes.dit.text_len, sizes.dit.text_dim)
    text = torch.randn(text_shape, generator=noise, device=device, dtype=dtype)
    t = torch.tensor([TIMESTEP], device=device)

    def call_of(model: nn.Module) -> Callable[[], object]:
        return lambda: model(hidden_states=latents, timestep=t, encoder_hidden_states=text, return_dict=False)

    return {mode: call_of(model) for mode, model in _transformers(sizes.dit, device, modes).items()}


def decode(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Decoding a random latent in `dtype` to the whole video, as its pipeline does."""
    vae = _vae(sizes.vae, device, dtype)
    noise = torch.Generator(device).manual_seed(SEED)
    latents = torch.randn(1, *sizes.latent_shape, generator=noise, device=device, dtype=dtype)
    return lambda: vae.decode(latents).sample


def requests(
    sizes: Sizes, device: torch.device, modes: tuple[str, ...], video: Video, guidance: float
) -> dict[str, Callable[[int], object]]:
    """Whole requests of so many steps, by mode of the transformer: from token ids to frames in memory.

    The modes share weights. The VAE computes in fp32, as its users let it.
    """
    diffusers, transformers = _package(), _transformers_package()
    size = sizes.encoder
    config = transformers.UMT5Config(
        vocab_size=size.vocab_size,
        d_model=size.dim,
        d_kv=size.attention_dim // size.num_heads,
        d_ff=size.ffn_dim,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        feed_forward_proj="gated-gelu",
    )
    with _made_in(peer_dtype(device), device):
        encoder = _frozen(transformers.UMT5EncoderModel(config))
    vae = _vae(sizes.vae, device, torch.float32)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=sizes.sample_shift
    )
    found = {}
    for mode, transformer in _transformers(sizes.dit, device, modes).items():
        pipe = diffusers.WanPipeline(
            tokenizer=None, text_encoder=encoder, vae=vae, scheduler=scheduler, transformer=transformer
        )
        pipe.set_progress_bar_config(disable=True)
        found[mode] = _request(pipe, encoder, sizes, video, guidance)
    return found


def _request(
    pipe: Callable[..., object], encoder: nn.Module, sizes: Sizes, video: Video, guidance: float
) -> Callable[[int], object]:
    length, device = sizes.dit.text_len, next(encoder.parameters()).device

    def generate(steps: int) -> object:
        noise = torch.Generator(device).manual_seed(SEED)
        ids = torch.randint(3, sizes.encoder.vocab_size, (1, length), generator=noise, device=device)
        branches = 2 if guidance > 1 else 1
        texts = [encoder(ids).last_hidden_state for _ in range(branches)]
        return pipe(
            prompt_embeds=texts[0],
            negative_prompt_embeds=texts[1] if branches == 2 else None,
            width=video.width,
            height=video.height,
            num_frames=video.num_frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
            generator=noise,
        )

    return generate


def _transformers(size: WanConfig, device: torch.device, modes: tuple[str, ...]) -> dict[str, nn.Module]:
    """The transformer in each mode: copies of one that share its parameters."""
    with _made_in(peer_dtype(device), device):
        model = _package().WanTransformer3DModel(
            patch_size=size.patch_size,
            num_attention_heads=size.num_heads,
            attention_head_dim=size.dim // size.num_heads,
            in_channels=size.in_dim,
            out_channels=size.out_dim,
            text_dim=size.text_dim,
            freq_dim=size.freq_dim,
            ffn_dim=size.ffn_dim,
            num_layers=size.num_layers,
            eps=size.eps,
        )
    if device.type == "cuda":
        model.set_attention_backend(ATTENTION)
    model = _frozen(model)
    return {mode: _in_mode(model, mode) for mode in modes}


def _in_mode(model: nn.Module, mode: str) -> nn.Module:
    shared: dict[int, object] = {id(tensor): tensor for tensor in model.parameters()}
    own: nn.Module = copy.deepcopy(model, shared)
    if mode == "compile":
        own.compile(dynamic=False)  # what torch.compile(model, dynamic=False) does, in place
    elif mode == "blocks":
        own.compile_repeated_blocks(fullgraph=True, dynamic=False)  # type: ignore[operator]  # of the peer
    return own


def _vae(size: WanVAEConfig, device: torch.device, dtype: torch.dtype) -> Any:
    with _made_in(dtype, device):
        vae = _package().AutoencoderKLWan(
            base_dim=size.base_dim,
            z_dim=size.z_dim,
            dim_mult=list(size.dim_mult),
            num_res_blocks=size.num_res_blocks,
            temperal_downsample=list(size.temporal_downsample),
            latents_mean=list(size.latents_mean),
            latents_std=list(size.latents_std),
        )
    return _frozen(vae)


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


@contextmanager
def _made_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Modules made within come in this dtype, on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _package() -> ModuleType:
    try:
        import diffusers
    except ImportError as error:
        remedy = "pip install diffusers, or leave the peer out with --peer none"
        raise RuntimeError(f"--peer=diffusers cannot run: {error}; {remedy}") from error
    return diffusers


def _transformers_package() -> ModuleType:
    import transformers  # seconds to import, and for whole requests alone

    return transformers
