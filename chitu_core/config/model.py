"""`models`: what a model is, fixed by its weights, and what a request takes from it."""

import math
from dataclasses import dataclass
from itertools import product

from chitu_core.config._fields import doc, require

LATENT_CHANNELS = 16  # of the Wan2.1 VAE, whose mean and deviation are known for each
MAX_FPS = 1000  # what the video writer takes


def _require_size(key: str, size: int) -> None:
    require(size >= 1, key, size, "must be at least 1")


@dataclass(frozen=True)
class EncoderConfig:
    t5_checkpoint: str = doc("T5 weights inside an official checkpoint directory")
    t5_tokenizer: str = doc("tokenizer folder inside an official checkpoint directory")
    text_len: int = doc("rows of text that the transformer sees, for debug.skip_model_load alone")
    default_negative_prompt: str = doc(
        "used when a request gives no negative prompt; an empty string stays empty"
    )
    vocab_size: int = doc("size, for debug.skip_model_load alone")
    dim: int = doc("size, for debug.skip_model_load alone")
    attention_dim: int = doc("size, for debug.skip_model_load alone")
    num_heads: int = doc("size, for debug.skip_model_load alone")
    ffn_dim: int = doc("size, for debug.skip_model_load alone")
    num_layers: int = doc("size, for debug.skip_model_load alone")

    def __post_init__(self) -> None:
        key = "models.encoder"
        for name in ("text_len", "vocab_size", "dim", "attention_dim", "num_heads", "ffn_dim", "num_layers"):
            _require_size(f"{key}.{name}", getattr(self, name))
        width, heads = self.attention_dim, self.num_heads
        remedy = f"must be a multiple of {key}.num_heads={heads}"
        require(width % heads == 0, f"{key}.attention_dim", width, remedy)


@dataclass(frozen=True)
class VaeConfig:
    checkpoint: str = doc("VAE weights inside an official checkpoint directory")
    base_dim: int = doc("size, for debug.skip_model_load alone")
    z_dim: int = doc("size, for debug.skip_model_load alone")

    def __post_init__(self) -> None:
        _require_size("models.vae.base_dim", self.base_dim)
        legal = self.z_dim == LATENT_CHANNELS
        require(legal, "models.vae.z_dim", self.z_dim, f"must be {LATENT_CHANNELS}, as in the Wan2.1 VAE")


@dataclass(frozen=True)
class TransformerConfig:
    dim: int = doc("size, for debug.skip_model_load alone")
    ffn_dim: int = doc("size, for debug.skip_model_load alone")
    num_heads: int = doc("size, for debug.skip_model_load alone")
    num_layers: int = doc("size, for debug.skip_model_load alone")
    freq_dim: int = doc("size, for debug.skip_model_load alone")
    text_dim: int = doc("size, for debug.skip_model_load alone")
    in_dim: int = doc("size, for debug.skip_model_load alone")
    out_dim: int = doc("size, for debug.skip_model_load alone")
    patch_size: tuple[int, int, int] = doc(
        "(frames, rows, columns) of a token, for debug.skip_model_load alone"
    )
    eps: float = doc("epsilon of the layer norms, for debug.skip_model_load alone")

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        key = "models.transformer"
        for name in (
            "dim",
            "ffn_dim",
            "num_heads",
            "num_layers",
            "freq_dim",
            "text_dim",
            "in_dim",
            "out_dim",
        ):
            _require_size(f"{key}.{name}", getattr(self, name))
        dim, heads = self.dim, self.num_heads
        remedy = f"must be an even multiple of {key}.num_heads={heads}: rotary positions turn pairs"
        require(dim % (2 * heads) == 0, f"{key}.dim", dim, remedy)
        remedy = "must be even: half are cosines, half sines"
        require(self.freq_dim % 2 == 0, f"{key}.freq_dim", self.freq_dim, remedy)
        remedy = f"must be {key}.in_dim={self.in_dim}: the noise is predicted for each latent channel"
        require(self.out_dim == self.in_dim, f"{key}.out_dim", self.out_dim, remedy)
        legal = self.patch_size in product((1,), (1, 2), (1, 2))
        remedy = "must be 1 frame, 1 or 2 rows and 1 or 2 columns, which divide every legal video"
        require(legal, f"{key}.patch_size", list(self.patch_size), remedy)
        legal = math.isfinite(self.eps) and self.eps > 0
        require(legal, f"{key}.eps", self.eps, "must be a number above 0")


@dataclass(frozen=True)
class SamplerConfig:
    sample_steps: int = doc("denoising steps when a request names none")
    sample_shift: float = doc("flow shift of the sigma grid; larger spends more steps at high noise")
    guidance_scale: tuple[float, ...] = doc(
        "guidance when a request names none: one value, or (low noise, high noise)"
    )
    boundary: tuple[float, ...] = doc(
        "noise level, in (0, 1), from which the high-noise expert runs; empty for one expert"
    )
    num_train_timesteps: int = doc("timesteps of training")

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_scale", tuple(self.guidance_scale))
        object.__setattr__(self, "boundary", tuple(self.boundary))
        key = "models.sampler"
        require(self.sample_steps >= 1, f"{key}.sample_steps", self.sample_steps, "must be at least 1")
        shift_is_legal = math.isfinite(self.sample_shift) and self.sample_shift > 0
        require(shift_is_legal, f"{key}.sample_shift", self.sample_shift, "must be a number above 0")
        train = self.num_train_timesteps
        require(train >= 1, f"{key}.num_train_timesteps", train, "must be at least 1")
        remedy = f"must be at most {key}.num_train_timesteps={train}"
        require(self.sample_steps <= train, f"{key}.sample_steps", self.sample_steps, remedy)
        finite = all(math.isfinite(scale) for scale in self.guidance_scale)
        require(finite, f"{key}.guidance_scale", self.guidance_scale, "must be finite numbers")
        require(len(self.boundary) <= 1, f"{key}.boundary", self.boundary, "one or two experts are supported")
        require(
            all(0 < b < 1 for b in self.boundary),
            f"{key}.boundary",
            self.boundary,
            "must lie between 0 and 1",
        )
        require(
            len(self.guidance_scale) == len(self.boundary) + 1,
            f"{key}.guidance_scale",
            self.guidance_scale,
            f"needs {len(self.boundary) + 1} value(s), one more than models.sampler.boundary has",
        )


@dataclass(frozen=True)
class VideoConfig:
    height: int = doc("pixels, when a request names none")
    width: int = doc("pixels, when a request names none")
    num_frames: int = doc("frames, 4n + 1, when a request names none")
    fps: int = doc("frames per second that the model was trained at")

    def __post_init__(self) -> None:
        key = "models.video"
        for name, pixels in (("height", self.height), ("width", self.width)):
            legal = pixels > 0 and pixels % 16 == 0
            require(legal, f"{key}.{name}", pixels, "must be a positive multiple of 16")
        legal = self.num_frames > 0 and self.num_frames % 4 == 1
        require(legal, f"{key}.num_frames", self.num_frames, "must be 4n + 1, at least 1")
        require(1 <= self.fps <= MAX_FPS, f"{key}.fps", self.fps, f"must be from 1 to {MAX_FPS}")


@dataclass(frozen=True)
class ModelConfig:
    name: str = doc("the model's name in logs and results")
    type: str = doc("the family of the code that runs it")
    source: str = doc("where the checkpoint can be had; shown in messages")
    ckpt_dir: str | None = doc(
        "checkpoint directory (official or Diffusers layout) or a Hugging Face repo id"
    )
    packaged_dir: str | None = doc("folder of this package that a null ckpt_dir means; null where none ships")
    task: str = doc("t2v: text to video")
    low_noise_checkpoint: str | None = doc(
        "folder of the low-noise expert in an official directory; null for one expert"
    )
    high_noise_checkpoint: str | None = doc(
        "folder of the high-noise expert in an official directory; null for one expert"
    )
    encoder: EncoderConfig = doc("text encoder")
    vae: VaeConfig = doc("video autoencoder")
    transformer: TransformerConfig = doc("diffusion transformer")
    sampler: SamplerConfig = doc("sampler defaults")
    video: VideoConfig = doc("request defaults")

    def __post_init__(self) -> None:
        require(self.type == "diffusion-wan", "models.type", self.type, "known: diffusion-wan")
        require(self.task == "t2v", "models.task", self.task, "only text to video (t2v) is supported")
        require(
            self.ckpt_dir != "",
            "models.ckpt_dir",
            "''",
            f"name a directory or a repo id; source: {self.source}",
        )
        size = self.transformer
        remedy = f"must be models.vae.z_dim={self.vae.z_dim}, the channels of a latent"
        require(size.in_dim == self.vae.z_dim, "models.transformer.in_dim", size.in_dim, remedy)
        remedy = f"must be models.encoder.dim={self.encoder.dim}, the width of the text"
        require(size.text_dim == self.encoder.dim, "models.transformer.text_dim", size.text_dim, remedy)
