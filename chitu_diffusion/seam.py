"""What a model offers to a strategy that may skip parts of it, and what such a strategy sees.

A model writes every computation that may be skipped as `run(kind, compute, x)`. Without a strategy `run` is
`inline`, which just calls it; with one, `bind` routes the sites that the strategy wants to its `around`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

Compute = Callable[[Any], Tensor]  # of a tensor; of (q, k, v) at the site `attention`
Branch = Literal["cond", "uncond", "guided"]

BLOCK_SITES = frozenset({"self_attn", "attention", "cross_attn", "ffn"})  # inside a block


@dataclass(frozen=True)
class Site:
    """One computation of a model: `blocks`, `block` or one of `BLOCK_SITES`, and the index of its block."""

    kind: str
    layer: int | None = None


class Around(Protocol):
    """A strategy as a model sees it."""

    sites: frozenset[str]

    def around(self, site: Site, compute: Compute, x: Any, signal: Tensor) -> Tensor:
        """Return `compute(x)` or something that stands for it; `signal` [6, d] is the time modulation."""


class Run(Protocol):
    """How a model calls its own parts."""

    def __call__(self, kind: str, compute: Compute, x: Any) -> Tensor:
        """The result of the part of this kind."""

    def at(self, layer: int) -> "Run":
        """The same for one block."""

    def inside_block(self) -> "Run":
        """Itself if a strategy wants a site in a block, else `inline`: a compiled block sees no strategy."""


class _Inline:
    def __call__(self, kind: str, compute: Compute, x: Any) -> Tensor:  # noqa: ARG002  (the plain case ignores it)
        return compute(x)

    def at(self, layer: int) -> Run:  # noqa: ARG002
        return self

    def inside_block(self) -> Run:
        return self


inline: Run = _Inline()


@dataclass(frozen=True)
class _Bound:
    strategy: Around
    signal: Tensor
    layer: int | None = None

    def __call__(self, kind: str, compute: Compute, x: Any) -> Tensor:
        if kind not in self.strategy.sites:
            return compute(x)
        return self.strategy.around(Site(kind, self.layer), compute, x, self.signal)

    def at(self, layer: int) -> Run:
        return _Bound(self.strategy, self.signal, layer)

    def inside_block(self) -> Run:
        return self if self.strategy.sites & BLOCK_SITES else inline


def bind(around: Around | None, signal: Tensor) -> Run:
    """How a model calls its parts during one forward pass."""
    return inline if around is None else _Bound(around, signal)
