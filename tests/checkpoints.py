"""Writes small random Wan checkpoints in both layouts, for tests that load or run one.

Names and ranks of the tensors come from data/keys/*.tsv, made from the reference code; only sizes are
replaced. Nothing here uses the name maps of the package, so tests of those maps have an independent side.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

DATA = Path(__file__).parent / "data" / "keys"
DIT_KEYS = DATA / "dit_wan2.1_t2v_14b_and_wan2.2_t2v_a14b_each_expert.tsv"
UMT5_KEYS = DATA / "t5_umt5_xxl_encoder.tsv"
VAE_KEYS = DATA / "vae_wan2.1.tsv"
TOKENIZER = Path(__file__).parent.parent / "chitu_diffusion" / "demo" / "tokenizer"

WIDTH, HEADS, FFN, FREQ, LAYERS = 64, 4, 160, 32, 3
TEXT_DIM, TEXT_HEADS, TEXT_FFN, VOCABULARY = 64, 4, 160, 384
VAE_BASE, LATENT_CHANNELS = 16, 16
T5_FILE, VAE_FILE, T5_TOKENIZER = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl"

_DIT_SIZES = {5120: WIDTH, 30720: 6 * WIDTH, 13824: FFN, 256: FREQ, 4096: TEXT_DIM}
_UMT5_SIZES = {256384: VOCABULARY, 4096: TEXT_DIM, 10240: TEXT_FFN, 64: TEXT_HEADS}
_VAE_SIZES = {96 * n: VAE_BASE * n for n in (1, 2, 4, 8, 12)}


@dataclass(frozen=True)
class Key:
    """One row of a key table: a tensor's two names and its full-size shape."""

    official: str
    shape: tuple[int, ...]
    diffusers: str


@dataclass(frozen=True)
class TinyWeights:
    """State dicts under official names; one transformer, or (high noise, low noise)."""

    dits: tuple[State, ...]
    text_encoder: State
    vae: State


def read_keys(file: Path) -> tuple[Key, ...]:
    """The rows of a key table."""
    rows = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    return tuple(Key(name, tuple(map(int, shape.split("x"))), theirs) for name, shape, theirs in rows)


def random_weights(seed: int = 0, experts: int = 1, dtype: torch.dtype = torch.float32) -> TinyWeights:
    """Weights of a tiny model, everything random, norms and modulation too; another seed for each network."""
    dits = tuple(_random_state(DIT_KEYS, _DIT_SIZES, seed + i, dtype) for i in range(experts))
    text_encoder = _random_state(UMT5_KEYS, _UMT5_SIZES, seed + 10, dtype)
    return TinyWeights(dits, text_encoder, _random_state(VAE_KEYS, _VAE_SIZES, seed + 20, dtype))


def write_official(folder: Path, tiny: TinyWeights, *, shards: int = 1, with_index: bool = True) -> Path:
    """An official checkpoint: one expert in the root, two in high_noise_model/ and low_noise_model/."""
    names = ("",) if len(tiny.dits) == 1 else ("high_noise_model", "low_noise_model")
    for name, state in zip(names, tiny.dits, strict=True):
        config = {"_class_name": "WanModel", "model_type": "t2v", "text_len": 512, "eps": 1e-6}
        sizes = {"dim": WIDTH, "ffn_dim": FFN, "freq_dim": FREQ, "num_heads": HEADS, "num_layers": LAYERS}
        channels = {"in_dim": LATENT_CHANNELS, "out_dim": LATENT_CHANNELS}
        write_json(folder / name / "config.json", config | sizes | channels)
        write_shards(folder / name, "diffusion_pytorch_model", state, shards=shards, with_index=with_index)
    torch.save(tiny.text_encoder, folder / T5_FILE)
    torch.save(tiny.vae, folder / VAE_FILE)
    shutil.copytree(TOKENIZER, folder / T5_TOKENIZER)
    return folder


def write_diffusers(folder: Path, tiny: TinyWeights, *, shards: int = 1, with_index: bool = True) -> Path:
    """A Diffusers checkpoint: transformer/ is the only or the high-noise expert, transformer_2/ the other."""
    second = ["diffusers", "WanTransformer3DModel"] if len(tiny.dits) == 2 else [None, None]
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline", "transformer_2": second})
    for name, state in zip(("transformer", "transformer_2"), tiny.dits, strict=False):
        heads = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "num_layers": LAYERS}
        sizes = {"ffn_dim": FFN, "freq_dim": FREQ, "text_dim": TEXT_DIM, "patch_size": [1, 2, 2], "eps": 1e-6}
        channels = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "image_dim": None}
        norms = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024}
        write_json(folder / name / "config.json", heads | sizes | channels | norms)
        theirs = to_diffusers(state, DIT_KEYS)
        write_shards(folder / name, "diffusion_pytorch_model", theirs, shards=shards, with_index=with_index)
    text = {"vocab_size": VOCABULARY, "d_model": TEXT_DIM, "d_kv": TEXT_DIM // TEXT_HEADS, "d_ff": TEXT_FFN}
    text |= {"num_layers": LAYERS, "num_heads": TEXT_HEADS, "feed_forward_proj": "gated-gelu"}
    buckets = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
    write_json(folder / "text_encoder" / "config.json", text | buckets | {"layer_norm_epsilon": 1e-6})
    write_shards(folder / "text_encoder", "model", to_diffusers(tiny.text_encoder, UMT5_KEYS))
    vae = {"base_dim": VAE_BASE, "z_dim": LATENT_CHANNELS, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    steps = {"attn_scales": [], "temperal_downsample": [False, True, True]}
    write_json(folder / "vae" / "config.json", vae | steps)
    write_shards(folder / "vae", "diffusion_pytorch_model", to_diffusers(tiny.vae, VAE_KEYS))
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    return folder


def write_shards(folder: Path, stem: str, state: State, *, shards: int = 1, with_index: bool = True) -> None:
    """Safetensors under the names of the released checkpoints; several shards get an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(state, folder / f"{stem}.safetensors")
        return
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: state[key] for key in sorted(state)[number::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if with_index:
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def to_diffusers(state: State, keys: Path) -> State:
    """The same tensors under the names of the other library, by table."""
    theirs = {key.official: key.diffusers for key in read_keys(keys)}
    return {theirs[name]: tensor for name, tensor in state.items()}


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2))


def edit_json(file: Path, **values: object) -> None:
    """Replace some values of a JSON file."""
    write_json(file, json.loads(file.read_text()) | values)


def _random_state(keys: Path, sizes: Mapping[int, int], seed: int, dtype: torch.dtype) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key in read_keys(keys):
        parts = key.official.split(".")
        if parts[0] == "blocks" and int(parts[1]) >= LAYERS:
            continue
        shape = tuple(sizes.get(size, size) for size in key.shape)
        noise = torch.randn(shape, generator=generator)
        state[key.official] = _weight(key.official, noise).to(dtype)
    return state


def _weight(name: str, noise: Tensor) -> Tensor:
    """A weight of sensible scale; nothing keeps the value of a fresh module."""
    if name.endswith("modulation"):
        return 0.3 * noise
    if name.endswith("bias"):
        return 0.05 * noise
    if name.endswith("gamma") or "norm" in name:
        return 1 + 0.1 * noise
    if "pos_embedding" in name:
        return 0.5 * noise
    if name.startswith("token_embedding"):
        return noise
    return noise / noise[0].numel() ** 0.5
