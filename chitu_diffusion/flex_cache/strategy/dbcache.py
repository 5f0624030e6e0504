"""DBCache (cache-dit, 2025): the first blocks are computed and tell whether the middle ones may be reused.

The change that the `front` blocks make, compared with the one at the last computed step, stands for the
change of the whole. Below a threshold the middle blocks' own change is reused; the `back` blocks are computed
behind it. The branch that comes first in a step decides for both: on ranks that share the branches, the
conditional one. One host read a step, in the middle of the forward.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from chitu_diffusion.flex_cache._base import FlexCache, Model, Sizes
from chitu_diffusion.flex_cache._checks import check_number, check_whole
from chitu_diffusion.flex_cache._ratio import linear
from chitu_diffusion.seam import Compute, Site


@dataclass(frozen=True)
class Knobs:
    """`threshold` of the relative change; `front` and `back` blocks are always computed; at most `max_reuses`
    reused steps in a row."""

    threshold: float | None = None
    front: int = 1
    back: int = 0
    max_reuses: int = 4

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0)
        check_whole("front", self.front, 1)
        check_whole("back", self.back, 0)
        check_whole("max_reuses", self.max_reuses, 0)


class Strategy(FlexCache):
    """Reuses the residual of the middle blocks."""

    knobs_type: ClassVar[Any] = Knobs
    sites = frozenset({"block"})

    @classmethod
    def complete(cls, asked: Knobs, ratio: float, model: Model) -> Knobs:
        if asked.front + asked.back >= model.num_layers:
            most = f"must leave a block of the {model.num_layers} of {model.name}"
            raise ValueError(f"flexcache=dbcache: front={asked.front} and back={asked.back}: {most}")
        threshold = linear(ratio, 0, 0.08, 0.16) if asked.threshold is None else asked.threshold
        return replace(asked, threshold=threshold)

    @classmethod
    def footprint(cls, knobs: Knobs, sizes: Sizes) -> int:  # noqa: ARG003
        return sizes.branches * 2 * sizes.feature

    def prepare(self) -> None:
        self._last = self.course.model.num_layers - self.knobs.back - 1  # of the middle
        self._decided: tuple[int, bool] = (-1, False)  # at which step, and what
        self._reuses = 0
        self._input: Tensor | None = None  # of the first block, then of the middle

    def forget(self) -> None:
        super().forget()
        self._reuses = 0

    def around(self, site: Site, compute: Compute, x: Any, signal: Tensor) -> Tensor:  # noqa: ARG002
        assert site.layer is not None
        layer, front = site.layer, self.knobs.front
        if layer == 0:
            self._input = x
        if layer < front or layer > self._last:
            self.note("block", is_reused=False)
            out = compute(x)
            if layer == front - 1:
                self._decide(out)
            return out
        return self._reuse_middle(layer, x) if self._is_reused() else self._compute_middle(layer, compute, x)

    def _is_reused(self) -> bool:
        return self._decided[1] and self.kept.get((self.branch, "middle")) is not None

    def _decide(self, out: Tensor) -> None:
        """Compare the change by the front blocks with that of the last computed step, once a step."""
        assert self._input is not None
        change, self._input = (out - self._input).to(self.course.dtype), None
        step, known = self.step.index, self.kept.get((self.branch, "front"))
        if self._decided[0] != step:
            may_reuse = not self.is_forced and known is not None and self._reuses < self.knobs.max_reuses
            is_reused = may_reuse and self._distance(change, known) < self.knobs.threshold
            self._decided = step, is_reused
            self._reuses = self._reuses + 1 if is_reused else 0
        if not self._is_reused():
            self.kept.put((self.branch, "front"), change)

    def _distance(self, change: Tensor, known: Tensor | None) -> float:
        """Relative L1 distance over all ranks' tokens, without padding."""
        assert known is not None
        here, there = change[:, : self.course.tokens].float(), known[:, : self.course.tokens].float()
        sums = torch.stack(((here - there).abs().sum(), there.abs().sum()))
        apart, size = self.services.agree(sums).tolist()  # the one host read of a step
        return float(apart / size) if size > 0 else float("inf")

    def _reuse_middle(self, layer: int, x: Tensor) -> Tensor:
        self.note("block", is_reused=True)
        if layer < self._last:
            return x
        change = self.kept.get((self.branch, "middle"))
        assert change is not None
        return x + change

    def _compute_middle(self, layer: int, compute: Compute, x: Tensor) -> Tensor:
        self.note("block", is_reused=False)
        if layer == self.knobs.front:
            self._input = x
        out = compute(x)
        if layer == self._last:
            assert self._input is not None
            self.kept.put((self.branch, "middle"), (out - self._input).to(self.course.dtype))
            self._input = None
        return out
