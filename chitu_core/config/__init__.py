"""The whole configuration as frozen dataclasses, and `load`, the one door through which a configuration comes
in.

Hydra composes plain YAML; `load` merges it into this schema, checks every value and returns plain objects, so
that no `DictConfig` is seen behind this line. Defaults live in the YAML files alone: a field here has a
meaning, not a value.
"""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chitu_core.config._fields import doc, require
from chitu_core.config.infer import (
    DTYPES,
    AttentionScheduleConfig,
    DiffusionConfig,
    InferConfig,
    VideoSize,
)
from chitu_core.config.model import ModelConfig, SamplerConfig

__all__ = [
    "AttentionScheduleConfig",
    "Config",
    "DiffusionConfig",
    "EvalConfig",
    "InferConfig",
    "ModelConfig",
    "SamplerConfig",
    "VideoSize",
    "load",
]

QUANTISATIONS = ("fp8",)
PAIRINGS = ("match", "ignore_steps", "order")
HYDRA_DUMP_MODES = ("video_dir", "same_as_video", "relocate", "off", "disable", "none", "default")


def _metrics(value: object) -> tuple[str, ...]:
    """Names of metrics in lower case, each once, from any of the documented spellings."""
    given = value.split(",") if isinstance(value, str) else value or []
    is_legal = isinstance(given, list | tuple) and all(isinstance(name, str) for name in given)
    require(is_legal, "eval.eval_type", value, "write a list of metrics, such as [psnr,ssim]")
    assert isinstance(given, list | tuple)
    names = (name.strip().lower() for name in given)
    return tuple(dict.fromkeys(name for name in names if name not in ("", "none", "null")))


@dataclass(frozen=True)
class EvalConfig:
    eval_type: Any = doc(
        "metrics to compute after a run: a list, or one text with commas; null, none and empty mean none"
    )
    reference_path: str | None = doc("directory of the videos that generated ones are compared with")
    pairing: str = doc(
        "which reference belongs to a video: match (same file name, else same prompt, seed and steps), "
        "ignore_steps (else same prompt and seed), order (of file names, whatever they show)"
    )
    weights_dir: str | None = doc("directory of the networks that fid, frame_fid and fvd need")
    vbench_python: str | None = doc("Python of an environment that has vbench; the metric vbench needs it")

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_type", _metrics(self.eval_type))
        for name in ("reference_path", "weights_dir", "vbench_python"):
            object.__setattr__(self, name, getattr(self, name) or None)
        known = self.pairing in PAIRINGS
        require(known, "eval.pairing", self.pairing, f"choose one of {', '.join(PAIRINGS)}")


@dataclass(frozen=True)
class OutputConfig:
    root_dir: str = doc("where run directories are made")
    enable_run_log: bool = doc("write run.log into the run directory")
    enable_timer_dump: bool = doc("write time_stats.csv into the run directory and log [PERF] lines")
    hydra_dump_mode: str = doc(
        "video_dir moves Hydra's .hydra into the run directory, off removes it, default leaves it"
    )

    def __post_init__(self) -> None:
        require(bool(self.root_dir.strip()), "output.root_dir", repr(self.root_dir), "name a directory")
        mode = self.hydra_dump_mode.lower()
        object.__setattr__(
            self, "hydra_dump_mode", "off" if mode == "false" else mode
        )  # YAML reads off as false
        known = self.hydra_dump_mode in HYDRA_DUMP_MODES
        modes = ", ".join(HYDRA_DUMP_MODES)
        require(known, "output.hydra_dump_mode", self.hydra_dump_mode, f"choose one of {modes}")


@dataclass(frozen=True)
class DebugConfig:
    skip_model_load: bool = doc("random weights at the sizes of the model YAML in place of a checkpoint")


@dataclass(frozen=True)
class Config:
    models: ModelConfig = doc("the model: fixed by its weights")
    infer: InferConfig = doc("the engine: fixed at launch")
    eval: EvalConfig = doc("evaluation")
    output: OutputConfig = doc("files")
    debug: DebugConfig = doc("debugging")
    float_16bit_variant: str | None = doc("older name of infer.dtype; null follows infer.dtype")
    quant: str | None = doc(
        "quantisation of the transformer's linear layers: null (none), or fp8 (float8_e4m3fn, a scale a row)"
    )
    fp8_fast_accumulation: bool = doc("under quant=fp8, sum products without promotion to full fp32; faster")

    def __post_init__(self) -> None:
        choices = ", ".join(["null", *QUANTISATIONS])
        require(self.quant in (None, *QUANTISATIONS), "quant", self.quant, f"choose one of {choices}")
        models = self.models
        has_weights = models.ckpt_dir or models.packaged_dir or self.debug.skip_model_load
        remedy = f"{models.name} needs a checkpoint; add models.ckpt_dir=DIRECTORY (source: {models.source})"
        require(bool(has_weights), "models.ckpt_dir", models.ckpt_dir, remedy)
        alias, dtype = self.float_16bit_variant, self.infer.dtype
        require(alias in (None, *DTYPES), "float_16bit_variant", alias, f"choose one of {', '.join(DTYPES)}")
        agrees = alias is None or dtype in ("auto", alias)
        require(
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
