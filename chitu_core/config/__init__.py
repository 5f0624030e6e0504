"""The whole configuration as frozen dataclasses, and `load`, the one door through which a configuration comes
in.

Hydra composes plain YAML; `load` merges it into this schema, checks every value and returns plain objects, so
that no `DictConfig` is seen behind this line. Defaults live in the YAML files alone: a field here has a
meaning, not a value.
"""

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTISATIONS = ("fp8",)
VAE_DTYPES = ("float32", "bfloat16")
STREAM_DTYPES = ("model", "float8_e4m3fn")
SCHEDULE_POLICIES = ("fifo", "priority", "round_robin")
PAIRINGS = ("match", "ignore_steps", "order")
HYDRA_DUMP_MODES = ("video_dir", "same_as_video", "relocate", "off", "disable", "none", "default")


def _doc(text: str) -> Any:
    """A required field whose meaning goes into docs/configuration.md."""
    return field(metadata={"doc": text})


def _require(holds: bool, key: str, value: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value}: {remedy}")


def _only(key: str, value: object, allowed: object) -> None:
    """Refuse a documented key whose feature this version does not have; nothing is ignored in silence."""
    _require(value == allowed, key, value, f"not available in this version; leave {key}={allowed}")


def _switch(key: str, value: str) -> str:
    """off, auto or on; YAML reads a bare off and on as false and true."""
    word = {"false": "off", "true": "on"}.get(value.lower(), value.lower())
    _require(word in ("off", "auto", "on"), key, value, "choose off, auto or on")
    return word


@dataclass(frozen=True)
class VideoSize:
    """Pixels and frames of a video."""

    width: int
    height: int
    num_frames: int

    @classmethod
    def parse(cls, text: str, key: str) -> "VideoSize":
        """Read WIDTHxHEIGHTxFRAMES. Raises ValueError naming `key` for other text and for an illegal size."""
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        _require(found is not None, key, text, "write WIDTHxHEIGHTxFRAMES, such as 832x480x81")
        assert found is not None
        width, height, frames = map(int, found.groups())
        legal = width > 0 and height > 0 and width % 16 == 0 and height % 16 == 0
        _require(legal, key, text, "width and height must be positive multiples of 16")
        _require(frames % 4 == 1, key, text, "frames must be 4n + 1")
        return cls(width, height, frames)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


def _number(value: int | str) -> int | str:
    """A whole number that came as text, such as from a shell."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _decimal(value: float | str) -> float | None:
    """A number, also one that came as text; None for other text."""
    try:
        return float(value)
    except ValueError:
        return None


@dataclass(frozen=True)
class EncoderConfig:
    t5_checkpoint: str = _doc("T5 weights inside an official checkpoint directory")
    t5_tokenizer: str = _doc("tokenizer folder inside an official checkpoint directory")
    text_len: int = _doc("rows of text that the transformer sees, for debug.skip_model_load alone")
    default_negative_prompt: str = _doc(
        "used when a request gives no negative prompt; an empty string stays empty"
    )
    vocab_size: int = _doc("size, for debug.skip_model_load alone")
    dim: int = _doc("size, for debug.skip_model_load alone")
    attention_dim: int = _doc("size, for debug.skip_model_load alone")
    num_heads: int = _doc("size, for debug.skip_model_load alone")
    ffn_dim: int = _doc("size, for debug.skip_model_load alone")
    num_layers: int = _doc("size, for debug.skip_model_load alone")


@dataclass(frozen=True)
class VaeConfig:
    checkpoint: str = _doc("VAE weights inside an official checkpoint directory")
    base_dim: int = _doc("size, for debug.skip_model_load alone")
    z_dim: int = _doc("size, for debug.skip_model_load alone")


@dataclass(frozen=True)
class TransformerConfig:
    dim: int = _doc("size, for debug.skip_model_load alone")
    ffn_dim: int = _doc("size, for debug.skip_model_load alone")
    num_heads: int = _doc("size, for debug.skip_model_load alone")
    num_layers: int = _doc("size, for debug.skip_model_load alone")
    freq_dim: int = _doc("size, for debug.skip_model_load alone")
    text_dim: int = _doc("size, for debug.skip_model_load alone")
    in_dim: int = _doc("size, for debug.skip_model_load alone")
    out_dim: int = _doc("size, for debug.skip_model_load alone")
    patch_size: tuple[int, int, int] = _doc(
        "(frames, rows, columns) of a token, for debug.skip_model_load alone"
    )
    eps: float = _doc("epsilon of the layer norms, for debug.skip_model_load alone")

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))


@dataclass(frozen=True)
class SamplerConfig:
    sample_steps: int = _doc("denoising steps when a request names none")
    sample_shift: float = _doc("flow shift of the sigma grid; larger spends more steps at high noise")
    guidance_scale: tuple[float, ...] = _doc(
        "guidance when a request names none: one value, or (low noise, high noise)"
    )
    boundary: tuple[float, ...] = _doc(
        "noise level, in (0, 1), from which the high-noise expert runs; empty for one expert"
    )
    num_train_timesteps: int = _doc("timesteps of training")

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_scale", tuple(self.guidance_scale))
        object.__setattr__(self, "boundary", tuple(self.boundary))
        key = "models.sampler"
        _require(self.sample_steps >= 1, f"{key}.sample_steps", self.sample_steps, "must be at least 1")
        shift_is_legal = math.isfinite(self.sample_shift) and self.sample_shift > 0
        _require(shift_is_legal, f"{key}.sample_shift", self.sample_shift, "must be a number above 0")
        train = self.num_train_timesteps
        _require(train >= 1, f"{key}.num_train_timesteps", train, "must be at least 1")
        finite = all(math.isfinite(scale) for scale in self.guidance_scale)
        _require(finite, f"{key}.guidance_scale", self.guidance_scale, "must be finite numbers")
        _require(
            len(self.boundary) <= 1, f"{key}.boundary", self.boundary, "one or two experts are supported"
        )
        _require(
            all(0 < b < 1 for b in self.boundary),
            f"{key}.boundary",
            self.boundary,
            "must lie between 0 and 1",
        )
        _require(
            len(self.guidance_scale) == len(self.boundary) + 1,
            f"{key}.guidance_scale",
            self.guidance_scale,
            f"needs {len(self.boundary) + 1} value(s), one more than models.sampler.boundary has",
        )


@dataclass(frozen=True)
class VideoConfig:
    height: int = _doc("pixels, when a request names none")
    width: int = _doc("pixels, when a request names none")
    num_frames: int = _doc("frames, 4n + 1, when a request names none")
    fps: int = _doc("frames per second that the model was trained at")

    def __post_init__(self) -> None:
        key = "models.video"
        for name, pixels in (("height", self.height), ("width", self.width)):
            legal = pixels > 0 and pixels % 16 == 0
            _require(legal, f"{key}.{name}", pixels, "must be a positive multiple of 16")
        legal = self.num_frames > 0 and self.num_frames % 4 == 1
        _require(legal, f"{key}.num_frames", self.num_frames, "must be 4n + 1, at least 1")
        _require(self.fps >= 1, f"{key}.fps", self.fps, "must be at least 1")


@dataclass(frozen=True)
class ModelConfig:
    name: str = _doc("the model's name in logs and results")
    type: str = _doc("the family of the code that runs it")
    source: str = _doc("where the checkpoint can be had; shown in messages")
    ckpt_dir: str | None = _doc(
        "checkpoint directory (official or Diffusers layout) or a Hugging Face repo id"
    )
    packaged_dir: str | None = _doc(
        "folder of this package that a null ckpt_dir means; null where none ships"
    )
    task: str = _doc("t2v: text to video")
    low_noise_checkpoint: str | None = _doc(
        "folder of the low-noise expert in an official directory; null for one expert"
    )
    high_noise_checkpoint: str | None = _doc(
        "folder of the high-noise expert in an official directory; null for one expert"
    )
    encoder: EncoderConfig = _doc("text encoder")
    vae: VaeConfig = _doc("video autoencoder")
    transformer: TransformerConfig = _doc("diffusion transformer")
    sampler: SamplerConfig = _doc("sampler defaults")
    video: VideoConfig = _doc("request defaults")

    def __post_init__(self) -> None:
        _require(self.type == "diffusion-wan", "models.type", self.type, "known: diffusion-wan")
        _require(self.task == "t2v", "models.task", self.task, "only text to video (t2v) is supported")
        _require(
            self.ckpt_dir != "",
            "models.ckpt_dir",
            "''",
            f"name a directory or a repo id; source: {self.source}",
        )


@dataclass(frozen=True)
class DiffusionConfig:
    cfg_size: int | str = _doc(
        "ranks that share the branches of guidance: 1, 2 or auto (2 where the model's guidance has both)"
    )
    cp_size: int | str = _doc("ranks that share one sequence: auto (all that are left) or a number")
    up_limit: int = _doc("largest Ulysses degree inside context parallelism; what is left is a ring")
    low_mem_level: int | str = _doc(
        "what is not on the device all the time, each level with those below it: 1 tiles in the VAE, 2 the "
        "text encoder, 3 the transformer, 4 most of its blocks and the encoder's, which are streamed; from 3 "
        "on one task runs at a time. auto: the lowest level that fits the memory that is free"
    )
    stream_dtype: str = _doc(
        "how level 4 stores linear weights: model (as they are used), or float8_e4m3fn, which halves what is "
        "copied and is lossy"
    )
    resident_gb: float | int | str = _doc(
        "GB (10^9 bytes) of transformer blocks that level 4 keeps on the device, shared by all experts: auto "
        "(0, or what fits where low_mem_level is auto) or a number"
    )
    enable_flexcache: bool = _doc("let requests reuse features across steps (docs/flexcache.md)")
    flexcache_max_gb: float = _doc(
        "GB, 10^9 bytes, that caches of all live requests may take on one rank; requests wait for room"
    )
    flexcache_calibration: str | None = _doc(
        "YAML of chitu bench flexcache --calibrate for teacache and magcache; null takes the model's own"
    )

    def __post_init__(self) -> None:
        for name in ("cfg_size", "cp_size"):
            object.__setattr__(self, name, _number(getattr(self, name)))
        cfg, cp = self.cfg_size, self.cp_size
        _require(cfg in ("auto", 1, 2), "infer.diffusion.cfg_size", cfg, "must be auto, 1 or 2")
        holds = cp == "auto" or (isinstance(cp, int) and cp >= 1)
        _require(holds, "infer.diffusion.cp_size", cp, "must be auto or a whole number, at least 1")
        _require(self.up_limit >= 1, "infer.diffusion.up_limit", self.up_limit, "must be at least 1")
        most = self.flexcache_max_gb
        _require(
            math.isfinite(most) and most > 0, "infer.diffusion.flexcache_max_gb", most, "must be above 0"
        )
        self._check_memory()

    def _check_memory(self) -> None:
        key = "infer.diffusion"
        object.__setattr__(self, "low_mem_level", _number(self.low_mem_level))
        level, stored, resident = self.low_mem_level, self.stream_dtype, self.resident_gb
        is_auto = level == "auto"
        holds = is_auto or (type(level) is int and 0 <= level <= 4)
        _require(holds, f"{key}.low_mem_level", level, "must be auto or a whole number from 0 to 4")
        dtypes = ", ".join(STREAM_DTYPES)
        _require(stored in STREAM_DTYPES, f"{key}.stream_dtype", stored, f"choose one of {dtypes}")
        remedy = f"only {key}.low_mem_level=4 streams; set that, or model"
        _require(stored == "model" or level in (4, "auto"), f"{key}.stream_dtype", stored, remedy)
        number = _decimal(resident)
        object.__setattr__(self, "resident_gb", resident if number is None else number)
        holds = resident == "auto" or (number is not None and math.isfinite(number) and number >= 0)
        _require(holds, f"{key}.resident_gb", resident, "must be auto or a number of GB, at least 0")
        remedy = f"at {key}.low_mem_level={level} no block is streamed; set that to 4, or this to auto"
        _require(resident == "auto" or level in (4, "auto"), f"{key}.resident_gb", resident, remedy)

    @property
    def level(self) -> int:
        """`low_mem_level` as the number that it is once a configuration is built from."""
        assert isinstance(self.low_mem_level, int), "auto is settled before it is asked"
        return self.low_mem_level

    @property
    def resident_bytes(self) -> int:
        """`resident_gb` in bytes; 0 for auto."""
        return 0 if isinstance(self.resident_gb, str) else int(self.resident_gb * 1e9)


@dataclass(frozen=True)
class AttentionConfig:
    sparsity_ratio: float = _doc("share of key blocks that sparge leaves out, 0 to below 1")

    def __post_init__(self) -> None:
        ratio = self.sparsity_ratio
        _require(0 <= ratio < 1, "infer.attn_config.sparsity_ratio", ratio, "must lie in [0, 1)")


@dataclass(frozen=True)
class AttentionScheduleConfig:
    exact_first_steps: int = _doc("first steps of a request that run exact while attn_type is a lossy one")
    exact_last_steps: int = _doc("last steps of a request that do so")
    exact_layers: tuple[int, ...] = _doc("blocks that do so in every step, counted from 0")

    def __post_init__(self) -> None:
        object.__setattr__(self, "exact_layers", tuple(self.exact_layers))
        key = "infer.attn_schedule"
        for name, steps in (("first", self.exact_first_steps), ("last", self.exact_last_steps)):
            _require(steps >= 0, f"{key}.exact_{name}_steps", steps, "must be 0 or more")
        legal = all(layer >= 0 for layer in self.exact_layers)
        _require(legal, f"{key}.exact_layers", list(self.exact_layers), "must be block numbers from 0 on")

    @property
    def is_set(self) -> bool:
        """Whether anything is to run exact."""
        return bool(self.exact_first_steps or self.exact_last_steps or self.exact_layers)


@dataclass(frozen=True)
class InferConfig:
    attn_type: str = _doc(
        "self-attention backend: auto (fastest exact one) or a name that `chitu doctor` lists"
    )
    cross_attn_type: str = _doc("cross-attention backend: auto or an exact one's name")
    attn_config: AttentionConfig = _doc("settings of single backends")
    attn_schedule: AttentionScheduleConfig = _doc("where a lossy attn_type gives way to the exact one")
    dtype: str = _doc(
        "of matrix products: auto (float32 on CPU, bfloat16 on CUDA), bfloat16, float16, float32"
    )
    compile: str = _doc(
        "the transformer's blocks through torch.compile: off, auto (where it was measured to be faster: "
        "nowhere yet) or on"
    )
    use_cuda_graph: str = _doc(
        "the transformer from a recorded CUDA graph: off, auto (on one GPU, where launches take longer than "
        "kernels) or on"
    )
    warmup: tuple[str, ...] = _doc(
        "sizes, as WIDTHxHEIGHTxFRAMES, that every network runs once at during start-up"
    )
    op_impl: str = _doc("torch: the first CUDA device where there is one; cpu: never a GPU")
    vae_dtype: str = _doc("of the VAE: float32, as the reference computes, or bfloat16, which is faster")
    vae_chunk: int | str = _doc(
        "latent frames that the VAE takes at once: auto (2 in bfloat16 on CUDA, else 1) or a number"
    )
    vae_tile_px: int = _doc(
        "from low_mem_level 1 on: longest side of a tile of the VAE with its halo, in pixels; a multiple of 8"
    )
    vae_tile_stride_px: int = _doc(
        "pixels from a tile to the next where tiles cannot be exact and are blended; below vae_tile_px"
    )
    prompt_cache_mb: int = _doc(
        "megabytes of the host that keep text embeddings of earlier prompts; 0 encodes every prompt anew"
    )
    seed: int = _doc("of the random weights under debug.skip_model_load; a request has its own seed")
    max_reqs: int = _doc("tasks that may hold denoising state at once")
    schedule_policy: str = _doc("which task runs next: fifo, priority, round_robin (by role)")
    dp_size: int = _doc("data parallelism: copies of the mesh, each with tasks of its own")
    diffusion: DiffusionConfig = _doc("parallelism, memory and caching")

    def __post_init__(self) -> None:
        for name in ("compile", "use_cuda_graph"):
            object.__setattr__(self, name, _switch(f"infer.{name}", getattr(self, name)))
        object.__setattr__(self, "warmup", tuple(self.warmup))
        for text in self.warmup:
            VideoSize.parse(text, "infer.warmup")
        _require(self.dtype in DTYPES, "infer.dtype", self.dtype, f"choose one of {', '.join(DTYPES)}")
        _require(self.op_impl in ("torch", "cpu"), "infer.op_impl", self.op_impl, "choose torch or cpu")
        vae_dtypes = ", ".join(VAE_DTYPES)
        known = self.vae_dtype in VAE_DTYPES
        _require(known, "infer.vae_dtype", self.vae_dtype, f"choose one of {vae_dtypes}")
        object.__setattr__(self, "vae_chunk", _number(self.vae_chunk))
        chunk = self.vae_chunk
        holds = chunk == "auto" or (isinstance(chunk, int) and chunk >= 1)
        _require(holds, "infer.vae_chunk", chunk, "must be auto or a whole number, at least 1")
        tile, stride = self.vae_tile_px, self.vae_tile_stride_px
        legal = tile >= 64 and tile % 8 == 0
        _require(legal, "infer.vae_tile_px", tile, "must be a multiple of 8, at least 64")
        legal = 0 < stride < tile and stride % 8 == 0
        remedy = f"must be a multiple of 8, above 0 and below infer.vae_tile_px={tile}"
        _require(legal, "infer.vae_tile_stride_px", stride, remedy)
        cache = self.prompt_cache_mb
        _require(cache >= 0, "infer.prompt_cache_mb", cache, "must be 0 or more")
        _require(self.max_reqs >= 1, "infer.max_reqs", self.max_reqs, "must be at least 1")
        policies = ", ".join(SCHEDULE_POLICIES)
        known = self.schedule_policy in SCHEDULE_POLICIES
        _require(known, "infer.schedule_policy", self.schedule_policy, f"choose one of {policies}")
        _require(self.dp_size >= 1, "infer.dp_size", self.dp_size, "must be at least 1")

    @property
    def warmup_sizes(self) -> tuple[VideoSize, ...]:
        """The sizes of `warmup`."""
        return tuple(VideoSize.parse(text, "infer.warmup") for text in self.warmup)


def _metrics(value: object) -> tuple[str, ...]:
    """Names of metrics in lower case, each once, from any of the documented spellings."""
    given = value.split(",") if isinstance(value, str) else value or []
    is_legal = isinstance(given, list | tuple) and all(isinstance(name, str) for name in given)
    _require(is_legal, "eval.eval_type", value, "write a list of metrics, such as [psnr,ssim]")
    assert isinstance(given, list | tuple)
    names = (name.strip().lower() for name in given)
    return tuple(dict.fromkeys(name for name in names if name not in ("", "none", "null")))


@dataclass(frozen=True)
class EvalConfig:
    eval_type: Any = _doc(
        "metrics to compute after a run: a list, or one text with commas; null, none and empty mean none"
    )
    reference_path: str | None = _doc("directory of the videos that generated ones are compared with")
    pairing: str = _doc(
        "which reference belongs to a video: match (same file name, else same prompt, seed and steps), "
        "ignore_steps (else same prompt and seed), order (of file names, whatever they show)"
    )
    weights_dir: str | None = _doc("directory of the networks that fid, frame_fid and fvd need")
    vbench_python: str | None = _doc("Python of an environment that has vbench; the metric vbench needs it")

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_type", _metrics(self.eval_type))
        for name in ("reference_path", "weights_dir", "vbench_python"):
            object.__setattr__(self, name, getattr(self, name) or None)
        known = self.pairing in PAIRINGS
        _require(known, "eval.pairing", self.pairing, f"choose one of {', '.join(PAIRINGS)}")


@dataclass(frozen=True)
class OutputConfig:
    root_dir: str = _doc("where run directories are made")
    enable_run_log: bool = _doc("write run.log into the run directory")
    enable_timer_dump: bool = _doc("write time_stats.csv into the run directory and log [PERF] lines")
    hydra_dump_mode: str = _doc(
        "video_dir moves Hydra's .hydra into the run directory, off removes it, default leaves it"
    )

    def __post_init__(self) -> None:
        _require(bool(self.root_dir.strip()), "output.root_dir", repr(self.root_dir), "name a directory")
        mode = self.hydra_dump_mode.lower()
        object.__setattr__(
            self, "hydra_dump_mode", "off" if mode == "false" else mode
        )  # YAML reads off as false
        known = self.hydra_dump_mode in HYDRA_DUMP_MODES
        modes = ", ".join(HYDRA_DUMP_MODES)
        _require(known, "output.hydra_dump_mode", self.hydra_dump_mode, f"choose one of {modes}")


@dataclass(frozen=True)
class DebugConfig:
    skip_model_load: bool = _doc("random weights at the sizes of the model YAML in place of a checkpoint")


@dataclass(frozen=True)
class Config:
    models: ModelConfig = _doc("the model: fixed by its weights")
    infer: InferConfig = _doc("the engine: fixed at launch")
    eval: EvalConfig = _doc("evaluation")
    output: OutputConfig = _doc("files")
    debug: DebugConfig = _doc("debugging")
    float_16bit_variant: str | None = _doc("older name of infer.dtype; null follows infer.dtype")
    quant: str | None = _doc(
        "quantisation of the transformer's linear layers: null (none), or fp8 (float8_e4m3fn, a scale a row)"
    )
    fp8_fast_accumulation: bool = _doc("under quant=fp8, sum products without promotion to full fp32; faster")

    def __post_init__(self) -> None:
        choices = ", ".join(["null", *QUANTISATIONS])
        _require(self.quant in (None, *QUANTISATIONS), "quant", self.quant, f"choose one of {choices}")
        models = self.models
        has_weights = models.ckpt_dir or models.packaged_dir or self.debug.skip_model_load
        remedy = f"{models.name} needs a checkpoint; add models.ckpt_dir=DIRECTORY (source: {models.source})"
        _require(bool(has_weights), "models.ckpt_dir", models.ckpt_dir, remedy)
        alias, dtype = self.float_16bit_variant, self.infer.dtype
        _require(alias in (None, *DTYPES), "float_16bit_variant", alias, f"choose one of {', '.join(DTYPES)}")
        agrees = alias is None or dtype in ("auto", alias)
        _require(
            agrees, "float_16bit_variant", alias, f"contradicts infer.dtype={dtype}; give infer.dtype alone"
        )

    @property
    def dtype(self) -> str:
        """`infer.dtype`, or its alias where only that was given."""
        return self.infer.dtype if self.infer.dtype != "auto" else self.float_16bit_variant or "auto"


def _schema(record: type) -> DictConfig:
    """The schema node of a dataclass; frozen ones come out read-only, and a merge must write into them."""
    node = OmegaConf.structured(record)
    OmegaConf.set_readonly(node, False)
    for part in fields(record):
        if isinstance(part.type, type) and is_dataclass(part.type):
            node[part.name] = _schema(part.type)
    assert isinstance(node, DictConfig)
    return node


def load(args: Any) -> Config:
    """Check a composed configuration (DictConfig or nested dict) and return it as frozen dataclasses.

    Raises ValueError naming key and value for an unknown key, a wrong type, a missing or an illegal value.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(_schema(Config), args))
    except OmegaConfBaseException as error:
        key = error.full_key or "configuration"
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    return config
