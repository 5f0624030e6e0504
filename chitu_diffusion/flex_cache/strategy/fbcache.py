"""FBCache, first-block cache: DBCache with one block in front, none behind, and a stricter threshold."""

from dataclasses import dataclass

from chitu_diffusion.flex_cache._base import Model
from chitu_diffusion.flex_cache._checks import check_number, check_whole
from chitu_diffusion.flex_cache._ratio import linear
from chitu_diffusion.flex_cache.strategy import dbcache


@dataclass(frozen=True)
class Knobs:
    """`threshold` of the first block's relative change; at most `max_reuses` reused steps in a row."""

    threshold: float | None = None
    max_reuses: int = 4

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0)
        check_whole("max_reuses", self.max_reuses, 0)


class Strategy(dbcache.Strategy):
    """Reuses the residual of all blocks but the first."""

    knobs_type = Knobs

    @classmethod
    def complete(cls, asked: Knobs, ratio: float, model: Model) -> dbcache.Knobs:  # type: ignore[override]
        threshold = linear(ratio, 0, 0.05, 0.12) if asked.threshold is None else asked.threshold
        return super().complete(dbcache.Knobs(threshold, max_reuses=asked.max_reuses), ratio, model)
