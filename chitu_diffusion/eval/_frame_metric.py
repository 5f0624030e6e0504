"""Metrics that compare frame with frame: a mean over the frames of a video, then over videos."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean
from typing import Any, ClassVar

import numpy as np

from chitu_diffusion.eval._base import Measured, Outcome, Pair, UnfitPair, UnreadableVideo
from chitu_diffusion.eval._frames import Frames, read_pair


class FrameMetric(ABC):
    """A metric with a score for each pair of frames; a subclass says how one pair of clips is scored."""

    name: ClassVar[str]
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    needs_reference = True

    @abstractmethod
    def score(self, generated: Frames, reference: Frames) -> list[float | None]:
        """A score for each of n frames, uint8 [n, H, W, 3] RGB; None where it is infinite, for equal frames.
        Raises UnfitPair."""

    def measure(self, pairs: Sequence[Pair]) -> list[Measured]:
        """The mean of each pair."""
        return [self._measure_one(pair) for pair in pairs]

    def combine(self, measured: Sequence[Measured]) -> Outcome:
        """The mean over videos, those of infinite score left out; null if there is no other."""
        per_video = [{"video_name": one.name, **(one.value or {})} for one in measured]
        finite = [video["score"] for video in per_video if video["score"] is not None]
        result: dict[str, Any] = {
            "metric": self.name,
            "status": "success",
            "mean_score": fmean(finite) if finite else None,
            "is_identical": all(video["is_identical"] for video in per_video),
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "num_videos": len(per_video),
            "per_video": per_video,
        }
        infinite = len(per_video) - len(finite)
        note = f"{infinite} of {len(per_video)} videos are identical to their reference" if infinite else ""
        return Outcome(result, note)

    def _measure_one(self, pair: Pair) -> Measured:
        try:
            frames = read_pair(pair, same_size=True)
            scores = self.score(frames.generated, frames.reference)
        except UnfitPair as error:
            return Measured(pair.generated.name, reason=str(error))
        except UnreadableVideo as error:
            return Measured(pair.generated.name, reason=str(error), is_broken=True)
        equal = [np.array_equal(a, b) for a, b in zip(frames.generated, frames.reference, strict=True)]
        finite = [score for score in scores if score is not None]
        value = {
            "score": fmean(finite) if finite else None,
            "num_frames": len(scores),
            "is_identical": all(equal),
            "num_identical_frames": sum(equal),
            "note": frames.note,
        }
        return Measured(pair.generated.name, value)
