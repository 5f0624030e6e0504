"""The structured log lines of a run: which stage of a task begins or ends, how far it is, what came out."""

import logging

from chitu_core.environment import Environment

logger = logging.getLogger(__name__)


class StageLog:
    """Writes `[TAG]    task_id=... | ...` lines at INFO."""

    def __init__(self, environment: Environment, perf: bool, *, is_quiet: bool = False) -> None:
        """`is_quiet` on a rank that does what another one logs."""
        self._interval = environment.progress_interval
        self._perf = perf
        self._is_quiet = is_quiet

    def start(self, task_id: str, stage: str, note: str = "") -> None:
        """A stage begins."""
        self._line("STAGE", task_id, f"event=START stage={stage}{note}")

    def end(self, task_id: str, stage: str) -> None:
        """A stage has ended."""
        self._line("STAGE", task_id, f"event=END stage={stage}")

    def progress(self, task_id: str, done: int, total: int, timestep: int) -> None:
        """A denoising step is done; the first, the last and every N-th is logged."""
        if done in (1, total) or done % self._interval == 0:
            share = f"step={done}/{total} pct={100 * done / total:.1f}%"
            self._line("PROGRESS", task_id, f"stage=Denoise {share} timestep={timestep}")

    def saved(self, task_id: str, path: str) -> None:
        """A video is on disk."""
        self._line("RESULT", task_id, f"video_saved={path}")

    def elapsed(self, task_id: str, stage: str, milliseconds: float) -> None:
        """How long a stage took; only where timers are asked for."""
        if self._perf:
            self._line("PERF", task_id, f"stage={stage} elapsed={milliseconds:.1f}ms")

    def reuse(self, task_id: str, text: str) -> None:
        """Which cache strategy a task has, with every setting."""
        self._line("CACHE", task_id, text)

    def warning(self, task_id: str, text: str) -> None:
        """Something that the user should know."""
        if not self._is_quiet:
            logger.warning("%-10s task_id=%s | %s", "[WARNING]", task_id, text)

    def _line(self, tag: str, task_id: str, text: str) -> None:
        if not self._is_quiet:
            logger.info("%-10s task_id=%s | %s", f"[{tag}]", task_id, text)
