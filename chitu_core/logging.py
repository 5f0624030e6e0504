"""The packages' loggers: level, format, the file of a run. Modules use `logging.getLogger(__name__)`."""

import logging
from pathlib import Path

from chitu_core.environment import Environment

PACKAGES = ("chitu_core", "chitu_diffusion")
_FORMAT = "%(asctime)s [%(levelname)s] %(name)s: %(message)s"


def setup(environment: Environment, level: int | None = None) -> None:
    """Log both packages to standard error; ranks above 0 log warnings only unless CHITU_LOG_RANK0_ONLY is
    off.

    `level` wins; otherwise DEBUG where CHITU_DEBUG is on, else CHITU_LOGGING_LEVEL.
    """
    named = logging.DEBUG if environment.debug else logging.getLevelNamesMapping()[environment.logging_level]
    lowest = named if level is None else level
    if environment.rank > 0 and environment.log_rank0_only:
        lowest = max(lowest, logging.WARNING)
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(lowest)
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter(_FORMAT))
            logger.addHandler(handler)
            logger.propagate = False


def set_console_level(level: int) -> None:
    """Change what reaches standard error; files keep their own level."""
    for package in PACKAGES:
        for handler in logging.getLogger(package).handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(level)


def attach_file(path: Path) -> logging.FileHandler:
    """Write both packages' records from INFO on to `path` as well, until `detach_file`."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter(_FORMAT))
    for package in PACKAGES:
        logging.getLogger(package).addHandler(handler)
    return handler


def detach_file(handler: logging.FileHandler) -> None:
    """Stop writing to a file that `attach_file` opened, and close it."""
    for package in PACKAGES:
        logging.getLogger(package).removeHandler(handler)
    handler.close()
