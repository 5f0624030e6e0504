"""Which backend a name means, which of them `auto` takes, and why not the others."""

import logging
from dataclasses import dataclass
from typing import Any

from chitu_core import plugins
from chitu_core.attention._base import Attention, Place

logger = logging.getLogger(__name__)

_VARIANTS = {  # name: (file, variant); every other file of this folder is a name by itself
    "sdpa": ("torch_sdpa", ""),
    "sdpa_cudnn": ("torch_sdpa", "cudnn"),
    "sdpa_flash": ("torch_sdpa", "flash"),
    "sdpa_efficient": ("torch_sdpa", "efficient"),
    "sdpa_math": ("torch_sdpa", "math"),
    "flash_attn": ("flash_attn", ""),
    "fa2": ("flash_attn", "2"),
    "fa3": ("flash_attn", "3"),
    "fa4": ("flash_attn", "4"),
    "sage": ("sage", ""),
    "sage1": ("sage", "1"),
    "sage2": ("sage", "2"),
}
ALIASES = {
    "torch": "sdpa",
    "torch_sdpa": "sdpa",
    "cudnn": "sdpa_cudnn",
    "ref": "sdpa_math",
    "flash": "flash_attn",
    "flash_2": "fa2",
    "flash_attn2": "fa2",
    "flash_3": "fa3",
    "flash_attn3": "fa3",
    "flash_4": "fa4",
    "flash_attn4": "fa4",
    "sageattention": "sage",
    "sparse": "sparge",
    "spargeattn": "sparge",
}
LOSSY = frozenset({"sage", "sage1", "sage2", "sparge"})
GIVES_LSE = frozenset(_VARIANTS)  # what can serve a ring; sparge cannot


@dataclass(frozen=True)
class Rank:
    """One place in a ranking: a backend, and where its rank comes from."""

    name: str
    source: str

    @property
    def is_measured(self) -> bool:
        """Whether this project measured it on that capability."""
        return self.source.startswith("measured")


_H200 = "measured on H200, L 32,760, 12 heads of 128"
_DOCS = "cited: figures of the package's authors"
RANKING: dict[tuple[int, int], tuple[Rank, ...]] = {  # fastest first, exact ones only
    (8, 0): (Rank("fa2", _DOCS), Rank("sdpa_flash", "cited: the same kernels inside torch")),
    (8, 9): (Rank("fa2", _DOCS), Rank("sdpa_flash", "cited: the same kernels inside torch")),
    (9, 0): (
        Rank("fa4", f"{_H200}: 9.2 ms"),
        Rank("fa3", "cited: 740 TFLOP/s at most, FlashAttention 3 (arXiv:2407.08608)"),
        Rank("sdpa_cudnn", f"{_H200}: 11.3 ms"),
        Rank("sdpa_flash", f"{_H200}: 18.4 ms"),
    ),
    (10, 0): (Rank("fa4", _DOCS), Rank("sdpa_cudnn", "cited: cuDNN's release notes")),
    (12, 0): (Rank("fa2", _DOCS), Rank("sdpa_cudnn", "cited: cuDNN's release notes")),
}
CROSS_RANKING: dict[tuple[int, int], tuple[Rank, ...]] = {  # where 512 keys rank otherwise
    (9, 0): (Rank("sdpa", f"{_H200}, 512 keys: 0.18 ms, fa4 0.21 ms"),),
}
_ANYWHERE = (Rank("sdpa", "torch picks the kernel"),)


def names() -> list[str]:
    """Every name of a backend, without aliases."""
    files = {file for file, _ in _VARIANTS.values()}
    return [*_VARIANTS, *(name for name in plugins.names("chitu_core.attention") if name not in files)]


def canonical(name: str, key: str) -> str:
    """The backend that a name or an alias means. Raises ValueError naming `key` and all names."""
    known = ALIASES.get(name, name)
    if known not in names():
        raise ValueError(f"{key}={name!r} is unknown; choose one of auto, {', '.join(names())}")
    return known


def unavailable(name: str, place: Place) -> str | None:
    """Why a backend cannot run at `place`; None when it can."""
    file, variant = _VARIANTS.get(name, (name, ""))
    backend: type[Attention] = plugins.load("chitu_core.attention", file, "Backend", "attention")
    return backend.unavailable(variant, place)


def ranking(place: Place, cross: bool = False) -> tuple[Rank, ...]:
    """What `auto` tries at `place`, fastest first; a capability that has no table of its own takes `sdpa`."""
    if place.capability is None:
        return _ANYWHERE
    table = RANKING.get(place.capability, ())
    return (CROSS_RANKING.get(place.capability, table) if cross else table) + _ANYWHERE


def choose(name: str, place: Place, *, key: str, cross: bool = False) -> str:
    """The backend for a setting, `auto` or a name, at `place`.

    Raises ValueError for an unknown name, or a lossy one for cross-attention; RuntimeError, with package,
    reason and remedy, for one that cannot run.
    """
    if name == "auto":
        return _fastest(place, key, cross)
    chosen = canonical(name, key)
    if cross and chosen in LOSSY:
        raise ValueError(f"{key}={name!r} approximates; cross-attention takes an exact backend or auto")
    reason = unavailable(chosen, place)
    if reason is not None:
        present = [other for other in names() if unavailable(other, place) is None]
        raise RuntimeError(f"{key}={name!r} cannot run: {reason}; available here: {', '.join(present)}")
    return chosen


def create(name: str, place: Place, **options: Any) -> Attention:
    """The backend of a canonical name, made for `place`."""
    file, variant = _VARIANTS.get(name, (name, ""))
    backend = plugins.load("chitu_core.attention", file, "Backend", "attention")
    made: Attention = backend(variant, place, **options)
    return made


def _fastest(place: Place, key: str, cross: bool) -> str:
    passed: list[str] = []
    for rank in ranking(place, cross):
        reason = unavailable(rank.name, place)
        if reason is None:
            why = f"; passed over: {' | '.join(passed)}" if passed else ""
            logger.info("%s=auto takes %s on %s (%s)%s", key, rank.name, place, rank.source, why)
            return rank.name
        passed.append(f"{rank.name}: {reason}")
    raise AssertionError("sdpa runs everywhere")
