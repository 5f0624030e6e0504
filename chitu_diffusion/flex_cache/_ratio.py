"""From `cache_ratio` to a strategy's settings: 0 never reuses, 0.5 is the authors' quality, 1 aggressive."""

import math


def linear(ratio: float, zero: float, half: float, one: float) -> float:
    """The value at `ratio` in [0, 1] on straight lines between those at 0, 0.5 and 1."""
    if ratio <= 0.5:
        return zero + 2 * ratio * (half - zero)
    return half + (2 * ratio - 1) * (one - half)


def whole(ratio: float, zero: int, half: int, one: int) -> int:
    """The same, rounded to the nearest whole number; a half goes up."""
    return math.floor(linear(ratio, zero, half, one) + 0.5)
