"""Attention backends: one file each, chosen by `infer.attn_type`.

`auto` alone may choose, and never a kernel that approximates; a named backend that cannot run is an error.
"""

from chitu_core.attention._base import Attention, LseAttention, Place
from chitu_core.attention._parallel import Ring, Timed, Ulysses, check_ring, merge, spread
from chitu_core.attention._select import (
    ALIASES,
    CROSS_RANKING,
    GIVES_LSE,
    LOSSY,
    RANKING,
    Rank,
    canonical,
    choose,
    create,
    names,
    ranking,
    unavailable,
)

__all__ = [
    "ALIASES",
    "CROSS_RANKING",
    "GIVES_LSE",
    "LOSSY",
    "RANKING",
    "Attention",
    "LseAttention",
    "Place",
    "Rank",
    "Ring",
    "Timed",
    "Ulysses",
    "canonical",
    "check_ring",
    "choose",
    "create",
    "merge",
    "names",
    "ranking",
    "spread",
    "unavailable",
]
