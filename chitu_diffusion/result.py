"""The record of a finished video: what was run, with what, how long it took; the JSON beside the video."""

from dataclasses import dataclass

from chitu_core.memory import MemoryPeak


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
    flexcache: str | None
    approximations: tuple[str, ...]  # empty: every computation was exact
    warnings: tuple[str, ...]
    seconds: dict[str, float]  # by stage
    peak_memory: MemoryPeak
    versions: dict[str, str]
