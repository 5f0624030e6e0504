"""BlockDance (Zhang et al. 2025, arXiv:2503.15927): in the later part of a run shallow blocks change little.

In groups of steps the first one computes everything and keeps the stream behind the first blocks; the others
begin from there and compute only the deeper ones. A small gain at a high fidelity.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from chitu_diffusion.flex_cache._base import FlexCache, Model, Sizes
from chitu_diffusion.flex_cache._checks import check_number, check_whole
from chitu_diffusion.flex_cache._ratio import linear, whole
from chitu_diffusion.seam import Site


@dataclass(frozen=True)
class Knobs:
    """The first `boundary` of the blocks, a share of them, are reused in groups of `group` steps, between the
    shares `start` and `end` of the run."""

    boundary: float | None = None
    group: int | None = None
    start: float = 0.40
    end: float = 0.95

    def __post_init__(self) -> None:
        check_number("boundary", self.boundary, 0, 1)
        check_whole("group", self.group, 1)
        check_number("start", self.start, 0, 1)
        check_number("end", self.end, 0, 1)


class Strategy(FlexCache):
    """Reuses the stream, in fp32, behind the first blocks."""

    knobs_type = Knobs
    sites = frozenset({"block"})

    @classmethod
    def complete(cls, asked: Knobs, ratio: float, model: Model) -> Knobs:
        if model.num_layers < 2:
            raise ValueError(f"flexcache=blockdance: {model.name} has one block, which is shallow and deep")
        return replace(
            asked,
            boundary=linear(ratio, 0, 0.6, 0.8) if asked.boundary is None else asked.boundary,
            group=asked.group or whole(ratio, 1, 2, 3),
        )

    @classmethod
    def footprint(cls, knobs: Knobs, sizes: Sizes) -> int:  # noqa: ARG003
        return sizes.branches * sizes.stream

    def prepare(self) -> None:
        layers, total = self.course.model.num_layers, len(self.course.steps)
        self._boundary = (
            min(max(round(self.knobs.boundary * layers), 1), layers - 1) - 1
        )  # the last one reused
        first = max(self.course.warmup, round(self.knobs.start * total))
        last = min(total - self.course.cooldown, round(self.knobs.end * total))
        self.fresh = tuple(
            self.course.is_forced(index)
            or not first <= index < last
            or (index - first) % self.knobs.group == 0
            for index in range(total)
        )

    def wants_reuse(self, site: Site) -> bool:
        assert site.layer is not None
        has_kept = self.kept.get(self.branch) is not None
        return site.layer <= self._boundary and has_kept and not self.fresh[self.step.index]

    def restore(self, site: Site, x: Tensor) -> Tensor | None:
        return (
            self.kept.get(self.branch) if site.layer == self._boundary else x
        )  # blocks before it do nothing

    def keep(self, site: Site, x: Tensor, out: Tensor) -> None:  # noqa: ARG002
        following = self.step.index + 1
        if site.layer == self._boundary and following < len(self.fresh) and not self.fresh[following]:
            self.kept.put(self.branch, out)
