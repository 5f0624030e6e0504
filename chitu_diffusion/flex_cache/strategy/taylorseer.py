"""TaylorSeer (Liu et al. 2025, arXiv:2503.06923): features are forecast from those of computed steps.

Every `interval`-th step is computed; between them a polynomial through the last `order` + 1 computed features
is continued. By default the feature is the residual of the whole stack and the variable is sigma, for steps
of a shifted schedule are not equally long; `per_module` is the authors' form, for the three sub-layers of
every block, and takes 3 (order + 1) features a block: 36 GB for 832x480x81 on Wan2.1-T2V-1.3B.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from chitu_diffusion.flex_cache._base import FlexCache, Model, Sizes
from chitu_diffusion.flex_cache._checks import check_whole
from chitu_diffusion.flex_cache._ratio import whole
from chitu_diffusion.seam import Site

MODULES = frozenset({"self_attn", "cross_attn", "ffn"})
VARIABLES = ("sigma", "step")


@dataclass(frozen=True)
class Knobs:
    """Every `interval`-th step is computed; `order` 0 to 3 of the polynomial in `variable`, sigma or step."""

    interval: int | None = None
    order: int = 1
    variable: str = "sigma"
    per_module: bool = False

    def __post_init__(self) -> None:
        check_whole("interval", self.interval, 1)
        check_whole("order", self.order, 0, 3)
        if self.variable not in VARIABLES:
            raise ValueError(f"variable={self.variable!r}: choose one of {', '.join(VARIABLES)}")


class Strategy(FlexCache):
    """Forecasts a feature of each branch."""

    knobs_type = Knobs

    @classmethod
    def complete(cls, asked: Knobs, ratio: float, model: Model) -> Knobs:  # noqa: ARG003
        return replace(asked, interval=asked.interval or whole(ratio, 1, 3, 5))

    @classmethod
    def footprint(cls, knobs: Knobs, sizes: Sizes) -> int:
        features = len(MODULES) * sizes.num_layers if knobs.per_module else 1
        return sizes.branches * features * (knobs.order + 1) * sizes.feature

    def prepare(self) -> None:
        self.sites = MODULES if self.knobs.per_module else frozenset({"blocks"})
        warmup, interval = self.course.warmup, self.knobs.interval
        self.fresh = tuple(
            self.course.is_forced(step.index) or (step.index - warmup) % interval == 0
            for step in self.course.steps
        )
        self._nodes: dict[object, list[int]] = {}  # steps whose features are kept, by branch and site

    def forget(self) -> None:
        super().forget()
        self._nodes.clear()

    def restore(self, site: Site, x: Tensor) -> Tensor | None:
        nodes = self._nodes.get((self.branch, site))
        if not nodes:
            return None
        places = [self._place(node) for node in nodes]
        weights = lagrange(places, self._place(self.step.index))
        forecast: Tensor | None = None if self.knobs.per_module else x
        for node, weight in zip(nodes, weights, strict=True):
            feature = self.kept.get((self.branch, site, node))
            assert feature is not None
            forecast = feature * weight if forecast is None else forecast.add(feature, alpha=weight)
        return forecast

    def keep(self, site: Site, x: Tensor, out: Tensor) -> None:
        nodes = self._nodes.setdefault((self.branch, site), [])
        feature = out if self.knobs.per_module else (out - x).to(self.course.dtype)
        if len(nodes) > self.knobs.order:
            self.kept.drop((self.branch, site, nodes.pop(0)))
        self.kept.put((self.branch, site, self.step.index), feature)
        nodes.append(self.step.index)

    def _place(self, index: int) -> float:
        return self.course.steps[index].sigma if self.knobs.variable == "sigma" else float(index)


def lagrange(nodes: Sequence[float], place: float) -> list[float]:
    """Weights of values at distinct `nodes` in the value at `place` of the polynomial through them."""
    weights = []
    for node in nodes:
        weight = 1.0
        for other in nodes:
            if other != node:
                weight *= (place - other) / (node - other)
        weights.append(weight)
    return weights
