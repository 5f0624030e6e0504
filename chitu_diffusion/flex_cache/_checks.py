"""Checks of expert settings; None passes, for it means that `cache_ratio` decides."""

import math


def check_number(key: str, value: object, lowest: float, highest: float = math.inf) -> None:
    """Raise ValueError unless `value` is a finite number from `lowest` to `highest`, or None."""
    if value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and lowest <= value <= highest):  # type: ignore[arg-type,operator]
        upper = "" if highest == math.inf else f" and at most {highest:g}"
        raise ValueError(f"{key}={value!r}: must be a finite number, at least {lowest:g}{upper}")


def check_whole(key: str, value: object, lowest: int, highest: float = math.inf) -> None:
    """Raise ValueError unless `value` is a whole number from `lowest` to `highest`, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        upper = "" if highest == math.inf else f" and at most {highest:g}"
        raise ValueError(f"{key}={value!r}: must be a whole number, at least {lowest}{upper}")
