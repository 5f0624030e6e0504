"""`infer`: the engine, fixed at launch."""

import math
import re
from dataclasses import dataclass, replace

from chitu_core.config._fields import decimal, doc, require, switch, whole_number

DTYPES = ("auto", "bfloat16", "float16", "float32")
VAE_DTYPES = ("float32", "bfloat16")
STREAM_DTYPES = ("model", "float8_e4m3fn")
SCHEDULE_POLICIES = ("fifo", "priority", "round_robin")


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
        require(found is not None, key, text, "write WIDTHxHEIGHTxFRAMES, such as 832x480x81")
        assert found is not None
        width, height, frames = map(int, found.groups())
        legal = width > 0 and height > 0 and width % 16 == 0 and height % 16 == 0
        require(legal, key, text, "width and height must be positive multiples of 16")
        require(frames % 4 == 1, key, text, "frames must be 4n + 1")
        return cls(width, height, frames)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


@dataclass(frozen=True)
class DiffusionConfig:
    cfg_size: int | str = doc(
        "ranks that share the branches of guidance: 1, 2 or auto (2 where the model's guidance has both)"
    )
    cp_size: int | str = doc("ranks that share one sequence: auto (all that are left) or a number")
    up_limit: int = doc("largest Ulysses degree inside context parallelism; what is left is a ring")
    low_mem_level: int | str = doc(
        "what is not on the device all the time, each level with those below it: 1 tiles in the VAE, 2 the "
        "text encoder, 3 the transformer, 4 most of its blocks and the encoder's, which are streamed; from 3 "
        "on one task runs at a time. auto: the lowest level that fits the memory that is free"
    )
    stream_dtype: str = doc(
        "how level 4 stores linear weights: model (as they are used), or float8_e4m3fn, which halves what is "
        "copied and is lossy"
    )
    resident_gb: float | int | str = doc(
        "GB (10^9 bytes) of transformer blocks that level 4 keeps on the device, shared by all experts: auto "
        "(0, or what fits where low_mem_level is auto) or a number"
    )
    enable_flexcache: bool = doc("let requests reuse features across steps (docs/flexcache.md)")
    flexcache_max_gb: float = doc(
        "GB, 10^9 bytes, that caches of all live requests may take on one rank; requests wait for room"
    )
    flexcache_calibration: str | None = doc(
        "YAML of chitu bench flexcache --calibrate for teacache and magcache; null takes the model's own"
    )

    def __post_init__(self) -> None:
        for name in ("cfg_size", "cp_size"):
            object.__setattr__(self, name, whole_number(getattr(self, name)))
        cfg, cp = self.cfg_size, self.cp_size
        require(cfg in ("auto", 1, 2), "infer.diffusion.cfg_size", cfg, "must be auto, 1 or 2")
        holds = cp == "auto" or (isinstance(cp, int) and cp >= 1)
        require(holds, "infer.diffusion.cp_size", cp, "must be auto or a whole number, at least 1")
        require(self.up_limit >= 1, "infer.diffusion.up_limit", self.up_limit, "must be at least 1")
        most = self.flexcache_max_gb
        require(math.isfinite(most) and most > 0, "infer.diffusion.flexcache_max_gb", most, "must be above 0")
        self._check_memory()

    def _check_memory(self) -> None:
        key = "infer.diffusion"
        object.__setattr__(self, "low_mem_level", whole_number(self.low_mem_level))
        level, stored, resident = self.low_mem_level, self.stream_dtype, self.resident_gb
        is_auto = level == "auto"
        holds = is_auto or (type(level) is int and 0 <= level <= 4)
        require(holds, f"{key}.low_mem_level", level, "must be auto or a whole number from 0 to 4")
        dtypes = ", ".join(STREAM_DTYPES)
        require(stored in STREAM_DTYPES, f"{key}.stream_dtype", stored, f"choose one of {dtypes}")
        remedy = f"only {key}.low_mem_level=4 streams; set that, or model"
        require(stored == "model" or level in (4, "auto"), f"{key}.stream_dtype", stored, remedy)
        number = decimal(resident)
        object.__setattr__(self, "resident_gb", resident if number is None else number)
        holds = resident == "auto" or (number is not None and math.isfinite(number) and number >= 0)
        require(holds, f"{key}.resident_gb", resident, "must be auto or a number of GB, at least 0")
        remedy = f"at {key}.low_mem_level={level} no block is streamed; set that to 4, or this to auto"
        require(resident == "auto" or level in (4, "auto"), f"{key}.resident_gb", resident, remedy)

    @property
    def level(self) -> int:
        """`low_mem_level` as the number that it is once a configuration is built from."""
        assert isinstance(self.low_mem_level, int), "auto is settled before it is asked"
        return self.low_mem_level

    @property
    def flexcache_bytes(self) -> int:
        """`flexcache_max_gb` in bytes."""
        return round(self.flexcache_max_gb * 1e9)

    @property
    def resident_bytes(self) -> int:
        """`resident_gb` in bytes; 0 for auto."""
        return 0 if isinstance(self.resident_gb, str) else int(self.resident_gb * 1e9)


@dataclass(frozen=True)
class AttentionConfig:
    sparsity_ratio: float = doc("share of key blocks that sparge leaves out, 0 to below 1")

    def __post_init__(self) -> None:
        ratio = self.sparsity_ratio
        require(0 <= ratio < 1, "infer.attn_config.sparsity_ratio", ratio, "must lie in [0, 1)")


@dataclass(frozen=True)
class AttentionScheduleConfig:
    exact_first_steps: int = doc("first steps of a request that run exact while attn_type is a lossy one")
    exact_last_steps: int = doc("last steps of a request that do so")
    exact_layers: tuple[int, ...] = doc("blocks that do so in every step, counted from 0")

    def __post_init__(self) -> None:
        object.__setattr__(self, "exact_layers", tuple(self.exact_layers))
        key = "infer.attn_schedule"
        for name, steps in (("first", self.exact_first_steps), ("last", self.exact_last_steps)):
            require(steps >= 0, f"{key}.exact_{name}_steps", steps, "must be 0 or more")
        legal = all(layer >= 0 for layer in self.exact_layers)
        require(legal, f"{key}.exact_layers", list(self.exact_layers), "must be block numbers from 0 on")

    @property
    def is_set(self) -> bool:
        """Whether anything is to run exact."""
        return bool(self.exact_first_steps or self.exact_last_steps or self.exact_layers)


@dataclass(frozen=True)
class InferConfig:
    attn_type: str = doc(
        "self-attention backend: auto (fastest exact one) or a name that `chitu doctor` lists"
    )
    cross_attn_type: str = doc("cross-attention backend: auto or an exact one's name")
    attn_config: AttentionConfig = doc("settings of single backends")
    attn_schedule: AttentionScheduleConfig = doc("where a lossy attn_type gives way to the exact one")
    dtype: str = doc(
        "of matrix products: auto (float32 on CPU, bfloat16 on CUDA), bfloat16, float16, float32"
    )
    compile: str = doc(
        "the transformer's blocks through torch.compile: off, auto (where it was measured to be faster: "
        "nowhere yet) or on"
    )
    use_cuda_graph: str = doc(
        "the transformer from a recorded CUDA graph: off, auto (on one GPU, where launches take longer than "
        "kernels) or on"
    )
    warmup: tuple[str, ...] = doc(
        "sizes, as WIDTHxHEIGHTxFRAMES, that every network runs once at during start-up"
    )
    op_impl: str = doc("torch: the first CUDA device where there is one; cpu: never a GPU")
    vae_dtype: str = doc("of the VAE: float32, as the reference computes, or bfloat16, which is faster")
    vae_chunk: int | str = doc(
        "latent frames that the VAE takes at once: auto (2 in bfloat16 on CUDA, else 1) or a number"
    )
    vae_tile_px: int = doc(
        "from low_mem_level 1 on: longest side of a tile of the VAE with its halo, in pixels; a multiple of 8"
    )
    vae_tile_stride_px: int = doc(
        "pixels from a tile to the next where tiles cannot be exact and are blended; below vae_tile_px"
    )
    prompt_cache_mb: int = doc(
        "megabytes of the host that keep text embeddings of earlier prompts; 0 encodes every prompt anew"
    )
    seed: int = doc("of the random weights under debug.skip_model_load; a request has its own seed")
    max_reqs: int = doc("tasks that may hold denoising state at once")
    schedule_policy: str = doc("which task runs next: fifo, priority, round_robin (by role)")
    dp_size: int = doc("data parallelism: copies of the mesh, each with tasks of its own")
    enable_flexcache: bool | None = doc("other name of infer.diffusion.enable_flexcache, which null follows")
    diffusion: DiffusionConfig = doc("parallelism, memory and caching")

    def __post_init__(self) -> None:
        for name in ("compile", "use_cuda_graph"):
            object.__setattr__(self, name, switch(f"infer.{name}", getattr(self, name)))
        object.__setattr__(self, "warmup", tuple(self.warmup))
        for text in self.warmup:
            VideoSize.parse(text, "infer.warmup")
        require(self.dtype in DTYPES, "infer.dtype", self.dtype, f"choose one of {', '.join(DTYPES)}")
        require(self.op_impl in ("torch", "cpu"), "infer.op_impl", self.op_impl, "choose torch or cpu")
        vae_dtypes = ", ".join(VAE_DTYPES)
        known = self.vae_dtype in VAE_DTYPES
        require(known, "infer.vae_dtype", self.vae_dtype, f"choose one of {vae_dtypes}")
        object.__setattr__(self, "vae_chunk", whole_number(self.vae_chunk))
        chunk = self.vae_chunk
        holds = chunk == "auto" or (isinstance(chunk, int) and chunk >= 1)
        require(holds, "infer.vae_chunk", chunk, "must be auto or a whole number, at least 1")
        tile, stride = self.vae_tile_px, self.vae_tile_stride_px
        legal = tile >= 64 and tile % 8 == 0
        require(legal, "infer.vae_tile_px", tile, "must be a multiple of 8, at least 64")
        legal = 0 < stride < tile and stride % 8 == 0
        remedy = f"must be a multiple of 8, above 0 and below infer.vae_tile_px={tile}"
        require(legal, "infer.vae_tile_stride_px", stride, remedy)
        cache = self.prompt_cache_mb
        require(cache >= 0, "infer.prompt_cache_mb", cache, "must be 0 or more")
        legal = -(2**63) <= self.seed < 2**63
        require(legal, "infer.seed", self.seed, "must lie between -2^63 and 2^63 - 1")
        require(self.max_reqs >= 1, "infer.max_reqs", self.max_reqs, "must be at least 1")
        policies = ", ".join(SCHEDULE_POLICIES)
        known = self.schedule_policy in SCHEDULE_POLICIES
        require(known, "infer.schedule_policy", self.schedule_policy, f"choose one of {policies}")
        require(self.dp_size >= 1, "infer.dp_size", self.dp_size, "must be at least 1")
        self._join_flexcache()

    def _join_flexcache(self) -> None:
        """True under either name counts, as false is the default of one."""
        alias, diffusion = self.enable_flexcache, self.diffusion
        agrees = alias is not False or not diffusion.enable_flexcache
        remedy = "contradicts infer.diffusion.enable_flexcache=true; give one of them"
        require(agrees, "infer.enable_flexcache", "false", remedy)
        if alias:
            object.__setattr__(self, "diffusion", replace(diffusion, enable_flexcache=True))

    @property
    def warmup_sizes(self) -> tuple[VideoSize, ...]:
        """The sizes of `warmup`."""
        return tuple(VideoSize.parse(text, "infer.warmup") for text in self.warmup)
