"""A folder is a registry: each module of a package is one choice, imported only when it is chosen."""

import importlib
import pkgutil
from typing import Any


def names(package: str) -> list[str]:
    """The choices in a package: its public modules, sorted."""
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


def load(package: str, name: str, symbol: str, key: str) -> Any:
    """The attribute `symbol` of module `name` in `package`.

    Raises ValueError naming `key`, the value and all choices when there is no such module.
    """
    if name not in names(package):
        raise ValueError(f"{key}={name!r} is unknown; choose one of {', '.join(names(package))}")
    return getattr(importlib.import_module(f"{package}.{name}"), symbol)
