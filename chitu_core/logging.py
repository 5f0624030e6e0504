"""The two packages' loggers: level, format and the file of a run. Modules use `logging.getLogger(__name__)`."""

import logging
from pathlib import Path

PACKAGES = ("chitu_core", "chitu_diffusion")
_FORMAT = "%(asctime)s [%(levelname)s] %(name)s: %(message)s"


def setup(level: int, is_main_rank: bool = True, all_ranks: bool = False) -> None:
    """Log both packages to standard error from `level` on; other ranks than the main one log warnings only."""
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(level if is_main_rank or all_ranks else max(level, logging.WARNING))
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter(_FORMAT))
            logger.addHandler(handler)
            logger.propagate = False


def set_console_level(level: int) -> None:
    """Change what reaches standard error; files keep their own level."""
    for handler in _handlers():
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


def _handlers() -> list[logging.Handler]:
    return [handler for package in PACKAGES for handler in logging.getLogger(package).handlers]
