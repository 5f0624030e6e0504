"""The record of a finished video: what was run, with what, how long it took; the JSON beside the video."""

from dataclasses import dataclass, fields
from typing import Any

from chitu_core.memory import MemoryPeak


@dataclass(frozen=True)
class CacheRecord:
    """What a cache strategy did in one task, counted on the rank that wrote the video."""

    strategy: str
    cache_ratio: float
    warmup: int
    cooldown: int
    knobs: dict[str, Any]  # every expert setting, as it was used
    computed: dict[str, int]  # by kind of site, over steps, blocks and branches
    reused: dict[str, int]
    reused_steps: int  # steps in which anything was
    peak_gb: float  # kept at most, in 10^9 bytes
    pictures: tuple[str, ...]  # files of decisions by step


@dataclass(frozen=True)
class MemoryRecord:
    """The memory plan of one task on one rank: where each part lived, and peaks as they were foretold."""

    level: int  # infer.diffusion.low_mem_level
    resident_blocks: int | None  # of each transformer, at level 4
    places: dict[str, str]  # by part
    device_gib: dict[str, float]  # by stage
    host_gib: float  # pinned, of all ranks of the machine


@dataclass(frozen=True)
class TaskResult:
    """Every resolved parameter and every figure of one video; `chitu generate --json` prints it."""

    filename: str
    prompt: str
    seed: int
    step: int  # denoising steps; the documented name in side files
    task_id: str
    video_path: str
    model: str
    negative_prompt: str
    role: str
    width: int
    height: int
    num_frames: int
    fps: float
    sample_solver: str
    sample_shift: float
    guidance_scale: tuple[float, ...]
    latent_shape: tuple[int, ...]
    seq_len: int
    experts: tuple[str, ...]  # in the order in which they ran
    attention: str
    cross_attention: str
    dtype: str
    device: str
    flexcache: CacheRecord | None  # None: every step was computed
    quant: str | None  # of the transformer's linear layers
    parallel: dict[str, int]  # ranks by axis: dp, cfg, ring, ulysses
    approximations: tuple[str, ...]  # empty: every computation was exact
    warnings: tuple[str, ...]
    seconds: dict[str, float]  # by stage
    peak_memory: MemoryPeak
    memory_plan: MemoryRecord | None  # None on a CPU
    versions: dict[str, str]

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "TaskResult":
        """The result whose fields another rank sent as JSON."""
        lists = {part.name for part in fields(cls) if str(part.type).startswith("tuple")}
        values: dict[str, Any] = {
            key: tuple(value) if key in lists else value for key, value in record.items()
        }
        values["peak_memory"] = MemoryPeak(**record["peak_memory"])
        plan, cache = record["memory_plan"], record["flexcache"]
        values["memory_plan"] = None if plan is None else MemoryRecord(**plan)
        if cache is not None:
            values["flexcache"] = CacheRecord(**(cache | {"pictures": tuple(cache["pictures"])}))
        return cls(**values)
