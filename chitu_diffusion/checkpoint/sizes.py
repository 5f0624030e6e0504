"""Network sizes of a checkpoint, from tensor shapes and config.json, never from a model's name.

Tensors decide; config.json adds what shapes cannot say (heads, epsilon, latent statistics), and where both
speak they must agree. Leaves out everything but text to video with the Wan2.1 VAE.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from math import prod

from chitu_diffusion.checkpoint.layout import Component
from chitu_diffusion.encoders.umt5 import UMT5Config
from chitu_diffusion.models.wan import WanConfig
from chitu_diffusion.vaes.wan import WAN21_LATENTS_MEAN, WAN21_LATENTS_STD, WanVAEConfig

_WAN_TEXT_LEN = 512  # of every released model; the Diffusers config does not say


def _dim(component: Component, name: str, axis: int) -> int:
    """Size of one axis of a tensor; raises ValueError where the tensor is missing or has too few axes."""
    shape = component.shapes.get(name)
    if shape is None or axis >= len(shape):
        what = "lacks the tensor" if shape is None else f"has the shape {list(shape)} for"
        problem = f"{component.place} {what} {component.spell(name)}"
        raise ValueError(f"{problem}; this is not the component it should be")
    return shape[axis]


def _count(component: Component, prefix: str) -> int:
    """Number of the blocks `<prefix>0`, `<prefix>1`, ... that have tensors."""
    blocks = {name.removeprefix(prefix).split(".")[0] for name in component.shapes if name.startswith(prefix)}
    return len(blocks)


def _number(component: Component, key: str, default: float | None = None) -> float:
    """A positive number of config.json, or the default; raises ValueError where there is neither."""
    value = component.config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{component.place}: config.json says {key}={value}, expected a number above 0")
    return value


def _agree(component: Component, tensors_say: Mapping[str, object]) -> None:
    """Raise ValueError where config.json states another value for a key than the tensors do."""
    for key, value in tensors_say.items():
        stated = component.config.get(key)
        if stated is not None and stated != value:
            contradiction = f"config.json says {key}={stated}, but the tensors have {key}={value}"
            raise ValueError(f"{component.place}: {contradiction}; fetch the checkpoint again")


def dit_config(component: Component) -> WanConfig:
    """Sizes of a diffusion transformer.

    Raises ValueError for a network that is not text to video, and where config.json contradicts the tensors.
    """
    patch_size = (
        _dim(component, "patch_embedding.weight", 2),
        _dim(component, "patch_embedding.weight", 3),
        _dim(component, "patch_embedding.weight", 4),
    )
    is_official = "num_heads" in component.config
    config = WanConfig(
        dim=_dim(component, "patch_embedding.weight", 0),
        ffn_dim=_dim(component, "blocks.0.ffn.0.weight", 0),
        num_heads=int(_number(component, "num_heads" if is_official else "num_attention_heads")),
        num_layers=_count(component, "blocks."),
        freq_dim=_dim(component, "time_embedding.0.weight", 1),
        text_dim=_dim(component, "text_embedding.0.weight", 1),
        text_len=int(_number(component, "text_len", _WAN_TEXT_LEN)),
        in_dim=_dim(component, "patch_embedding.weight", 1),
        out_dim=_dim(component, "head.head.weight", 0) // prod(patch_size),
        patch_size=patch_size,
        eps=float(_number(component, "eps", 1e-6)),
    )
    _check_text_to_video(component, config)
    if config.dim % config.num_heads:
        problem = f"config.json says {config.num_heads} heads, but the tensors have dim={config.dim}"
        raise ValueError(f"{component.place}: {problem}, not divisible; fetch the checkpoint again")
    _agree(component, asdict(config) | {"patch_size": list(patch_size)})
    in_diffusers = {"attention_head_dim": config.dim // config.num_heads, "in_channels": config.in_dim}
    _agree(component, in_diffusers | {"out_channels": config.out_dim})
    return config


def _check_text_to_video(component: Component, config: WanConfig) -> None:
    kind = component.config.get("model_type", "t2v")
    image_parts = ("img_emb.", "condition_embedder.image_embedder.")
    has_image = any(name.startswith(image_parts) for name in component.shapes)
    if kind != "t2v" or has_image or config.in_dim != config.out_dim:
        found = f"model_type={kind}, in_dim={config.in_dim}, out_dim={config.out_dim}"
        found += ", image embedding" if has_image else ""
        problem = f"{component.place} ({found}): only text-to-video is supported"
        raise ValueError(f"{problem}; give a T2V checkpoint")


def umt5_config(component: Component) -> UMT5Config:
    """Sizes of the text encoder; heads are the columns of the relative position table.

    Raises ValueError for another network, and where config.json contradicts the tensors.
    """
    config = UMT5Config(
        vocab_size=_dim(component, "token_embedding.weight", 0),
        dim=_dim(component, "token_embedding.weight", 1),
        attention_dim=_dim(component, "blocks.0.attn.q.weight", 0),
        num_heads=_dim(component, "blocks.0.pos_embedding.embedding.weight", 1),
        ffn_dim=_dim(component, "blocks.0.ffn.fc1.weight", 0),
        num_layers=_count(component, "blocks."),
        num_buckets=_dim(component, "blocks.0.pos_embedding.embedding.weight", 0),
        max_distance=int(_number(component, "relative_attention_max_distance", 128)),
        eps=float(_number(component, "layer_norm_epsilon", 1e-6)),
    )
    tensors_say = {
        "vocab_size": config.vocab_size,
        "d_model": config.dim,
        "d_kv": config.attention_dim // config.num_heads,
        "d_ff": config.ffn_dim,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.num_buckets,
    }
    _agree(component, tensors_say)
    return config


def vae_config(component: Component) -> WanVAEConfig:
    """Sizes of the VAE, read off the encoder: residual blocks, and a resampling entry between two levels.

    Raises ValueError for another VAE than Wan2.1's kind, and where config.json contradicts the tensors.
    """
    nested = any(re.match(r"encoder\.downsamples\.\d+\.downsamples\.", name) for name in component.shapes)
    if nested or component.config.get("is_residual"):
        raise ValueError(f"{component.place} is a Wan2.2 VAE; only the Wan2.1 VAE is supported")
    base_dim, z_dim = _dim(component, "encoder.conv1.weight", 0), _dim(component, "conv2.weight", 0)
    num_entries = _count(component, "encoder.downsamples.")
    entry = "encoder.downsamples.{}.{}.weight"
    ends = [n for n in range(num_entries) if entry.format(n, "resample.1") in component.shapes]
    num_res_blocks = ends[0] if ends else num_entries
    last_blocks = [n - 1 for n in (*ends, num_entries)]
    config = WanVAEConfig(
        base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=tuple(_dim(component, entry.format(n, "residual.6"), 0) // base_dim for n in last_blocks),
        num_res_blocks=num_res_blocks,
        temporal_downsample=tuple(entry.format(n, "time_conv") in component.shapes for n in ends),
        latents_mean=_latents(component, "latents_mean", z_dim, WAN21_LATENTS_MEAN),
        latents_std=_latents(component, "latents_std", z_dim, WAN21_LATENTS_STD),
    )
    tensors_say = {
        "base_dim": base_dim,
        "z_dim": z_dim,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": num_res_blocks,
        "temperal_downsample": list(config.temporal_downsample),  # the spelling is theirs
    }
    _agree(component, tensors_say)
    return config


def _latents(component: Component, key: str, z_dim: int, released: tuple[float, ...]) -> tuple[float, ...]:
    """Latent statistics of config.json; the official layout has none and means the released ones."""
    stated = component.config.get(key, released)
    numbers = isinstance(stated, list | tuple) and all(isinstance(x, int | float) for x in stated)
    if not isinstance(stated, list | tuple) or not numbers or len(stated) != z_dim:
        problem = f"{key} must be {z_dim} numbers, one for each latent channel, got {stated}"
        raise ValueError(f"{component.place}: {problem}; fetch the checkpoint again")
    return tuple(float(x) for x in stated)
