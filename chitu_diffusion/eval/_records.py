"""The record of a metric, and the words and numbers that a person reads of it."""

from dataclasses import dataclass
from typing import Any

SUCCESS, SKIPPED, FAILED = "success", "skipped", "failed"


def number(value: float) -> str:
    """Four decimals, or three digits where these would be zeros."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.3g}"


@dataclass(frozen=True)
class EvalRecord:
    """What became of one metric: `status` is success, skipped or failed; without success `result` is None."""

    type: str
    status: str
    message: str = ""
    result: dict[str, Any] | None = None

    @property
    def score(self) -> float | None:
        """The one number of the result; None without one, and where all videos are identical in PSNR."""
        result = self.result or {}
        return result.get("mean_score", result.get("score"))

    @property
    def headline(self) -> str:
        """The score with its unit, or what stands in its place."""
        if self.result is None:
            return "-"
        if self.score is not None:
            return f"{number(self.score)} {self.result.get('unit', '')}".strip()
        if self.result.get("is_identical"):
            return "identical"
        parts = self.result.get("dimensions", {})
        return ", ".join(f"{name} {number(value)}" for name, value in parts.items()) or "-"

    @property
    def line(self) -> str:
        """The record as one line of text."""
        if self.result is None:
            return f"{self.type}: {self.status}: {self.message}"
        message = f" ({self.message})" if self.message else ""
        return f"{self.type}: {self.headline}{message}"
