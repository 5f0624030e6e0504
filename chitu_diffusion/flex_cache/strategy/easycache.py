"""EasyCache (Zhou et al. 2025, arXiv:2507.02860): the network's output changes in proportion to its input.

The factor, measured at computed steps, predicts from the change of the latent, which costs nothing, how much
the conditional velocity would change. Predictions add up; while the sum is below a threshold both branches
are skipped, and the velocity is the last one moved by the change of the latent. One host read a step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from chitu_diffusion.flex_cache._base import FlexCache, Model, Sizes
from chitu_diffusion.flex_cache._checks import check_number, check_whole
from chitu_diffusion.flex_cache._ratio import linear
from chitu_diffusion.guidance import Prediction


@dataclass(frozen=True)
class Knobs:
    """`threshold` of the summed predictions; the first `retention` of the steps are computed; at most
    `max_reuses` reused ones in a row."""

    threshold: float | None = None
    retention: float = 0.2
    max_reuses: int = 4

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0)
        check_number("retention", self.retention, 0, 1)
        check_whole("max_reuses", self.max_reuses, 0)


class Strategy(FlexCache):
    """Reuses the guided velocity: what moves both branches moves what guidance makes of them."""

    knobs_type = Knobs

    @classmethod
    def complete(cls, asked: Knobs, ratio: float, model: Model) -> Knobs:  # noqa: ARG003
        threshold = linear(ratio, 0, 0.05, 0.20) if asked.threshold is None else asked.threshold
        return replace(asked, threshold=threshold)

    @classmethod
    def footprint(cls, knobs: Knobs, sizes: Sizes) -> int:  # noqa: ARG003
        return 4 * sizes.latent

    def prepare(self) -> None:
        self._retained = round(self.knobs.retention * len(self.course.steps))
        self.forget()

    def forget(self) -> None:
        super().forget()
        self._factor: Tensor | None = None  # of the output's change by the input's
        self._size: Tensor | None = None  # mean absolute value of the last computed output
        self._sum: Tensor | None = None
        self._reuses = 0

    def velocity(self, compute: Callable[[], Prediction], latent: Tensor) -> Tensor:
        is_reused = self._is_reused(latent)
        self.note("velocity", is_reused=is_reused)
        self.kept.put("seen", latent)
        if is_reused:
            self._reuses += 1
            change = self.kept.get("change")
            assert change is not None
            return latent + change
        self._sum, self._reuses = None, 0
        found = compute()
        self._learn(found, latent)
        return found.guided

    def _is_reused(self, latent: Tensor) -> bool:
        seen = self.kept.get("seen")
        if seen is None or self._factor is None or self._size is None:
            return False
        if self.is_forced or self.step.index < self._retained or self._reuses >= self.knobs.max_reuses:
            return False
        predicted = self._factor * (latent - seen).abs().mean() / self._size
        self._sum = predicted if self._sum is None else self._sum + predicted
        return float(self.services.agree(self._sum)) < self.knobs.threshold

    def _learn(self, found: Prediction, latent: Tensor) -> None:
        """Take the factor from this computed step and the one before it."""
        before, output_before = self.kept.get("latent"), self.kept.get("output")
        if before is not None and output_before is not None:
            self._factor = (found.cond - output_before).abs().mean() / (latent - before).abs().mean()
        self._size = found.cond.abs().mean()
        self.kept.put("latent", latent)
        self.kept.put("output", found.cond)
        self.kept.put("change", found.guided - latent)
