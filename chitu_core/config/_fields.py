"""How a field of the schema is declared and checked."""

from dataclasses import field
from typing import Any


def doc(text: str) -> Any:
    """A required field whose meaning goes into docs/configuration.md."""
    return field(metadata={"doc": text})


def require(holds: bool, key: str, value: object, remedy: str) -> None:
    """Raise ValueError naming key, value and remedy unless something `holds`."""
    if not holds:
        raise ValueError(f"{key}={value}: {remedy}")


def switch(key: str, value: str) -> str:
    """off, auto or on; YAML reads a bare off and on as false and true."""
    word = {"false": "off", "true": "on"}.get(value.lower(), value.lower())
    require(word in ("off", "auto", "on"), key, value, "choose off, auto or on")
    return word


def whole_number(value: int | str) -> int | str:
    """A whole number that came as text, such as from a shell."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def decimal(value: float | str) -> float | None:
    """A number, also one that came as text; None for other text."""
    try:
        return float(value)
    except ValueError:
        return None
