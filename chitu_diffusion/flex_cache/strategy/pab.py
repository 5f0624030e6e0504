"""PAB, pyramid attention broadcast (Zhao et al. 2024, arXiv:2408.12588): attention changes slowly in mid-run.

The outputs of self-attention are computed every `self_range` steps, those of cross-attention every
`cross_range`, and reused in between; a range of 1 never reuses. Gates and feed-forward layers are always new.
It keeps the outputs of every block: gigabytes where a residual of the stack is a tenth of one.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from chitu_diffusion.flex_cache._base import GREY, ORANGE, FlexCache, Model, Sizes
from chitu_diffusion.flex_cache._checks import check_whole
from chitu_diffusion.flex_cache._ratio import whole
from chitu_diffusion.seam import Site

_CODES = {"self_attn": 2, "cross_attn": 3}


@dataclass(frozen=True)
class Knobs:
    """Every how many steps self- and cross-attention are computed, 1 or more."""

    self_range: int | None = None
    cross_range: int | None = None

    def __post_init__(self) -> None:
        check_whole("self_range", self.self_range, 1)
        check_whole("cross_range", self.cross_range, 1)


class Strategy(FlexCache):
    """Reuses the outputs of attention, after their projection and before their gate."""

    knobs_type = Knobs
    palette = (GREY, ORANGE, (120, 200, 255), (20, 80, 200))

    @classmethod
    def complete(cls, asked: Knobs, ratio: float, model: Model) -> Knobs:  # noqa: ARG003
        return replace(
            asked,
            self_range=asked.self_range or whole(ratio, 1, 2, 3),
            cross_range=asked.cross_range or whole(ratio, 1, 3, 5),
        )

    @classmethod
    def footprint(cls, knobs: Knobs, sizes: Sizes) -> int:
        kinds = (knobs.self_range != 1) + (knobs.cross_range != 1)
        return sizes.branches * sizes.num_layers * kinds * sizes.feature

    def prepare(self) -> None:
        ranges = {"self_attn": self.knobs.self_range, "cross_attn": self.knobs.cross_range}
        self._ranges = {kind: count for kind, count in ranges.items() if count > 1}
        self.sites = frozenset(self._ranges)

    def wants_reuse(self, site: Site) -> bool:
        return not self._is_due(site.kind, self.step.index)

    def _is_due(self, kind: str, index: int) -> bool:
        return self.course.is_forced(index) or (index - self.course.warmup) % self._ranges[kind] == 0

    def restore(self, site: Site, x: Tensor) -> Tensor | None:  # noqa: ARG002
        return self.kept.get((self.branch, site))

    def keep(self, site: Site, x: Tensor, out: Tensor) -> None:  # noqa: ARG002
        following = self.step.index + 1
        if following < len(self.course.steps) and not self._is_due(site.kind, following):
            self.kept.put((self.branch, site), out)

    def note(self, kind: str, *, is_reused: bool, code: int = 2) -> None:  # noqa: ARG002
        super().note(kind, is_reused=is_reused, code=_CODES[kind])
