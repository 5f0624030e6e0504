"""The packages' loggers: level, format, the file of a run. Modules use `logging.getLogger(__name__)`."""

import logging
import re
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from chitu_core.environment import Environment

PACKAGES = ("chitu_core", "chitu_diffusion")
_KEPT_RECORDS = 1000  # of the time before the run directory is made
_FORMAT = "%(asctime)s [%(levelname)s] %(name)s: %(message)s"
_COLORS = {
    "TextEncode": 36,
    "VAEEncode": 33,
    "Denoise": 34,
    "VAEDecode": 32,
}  # ANSI cyan, yellow, blue, green
_STAGE = re.compile(rf"\bstage=({'|'.join(_COLORS)})\b")


class _ColorFormatter(logging.Formatter):
    """Colours the names of stages, for a terminal; the record stays plain for others."""

    def format(self, record: logging.LogRecord) -> str:
        return _STAGE.sub(self._paint, super().format(record))

    @staticmethod
    def _paint(found: re.Match[str]) -> str:
        return f"stage=\033[{_COLORS[found[1]]}m{found[1]}\033[0m"


def setup(environment: Environment, level: int | None = None) -> None:
    """Log both packages to standard error; ranks above 0 log warnings only unless CHITU_LOG_RANK0_ONLY is
    off. The names of stages are coloured on a terminal unless CHITU_ENABLE_STAGE_COLOR is off.

    `level` wins; otherwise DEBUG where CHITU_DEBUG is on, else CHITU_LOGGING_LEVEL. It is that of standard
    error alone: a run's file gets all from INFO on.
    """
    named = logging.DEBUG if environment.debug else logging.getLevelNamesMapping()[environment.logging_level]
    lowest = named if level is None else level
    if environment.rank > 0 and environment.log_rank0_only:
        lowest = max(lowest, logging.WARNING)
    is_coloured = environment.enable_stage_color and sys.stderr.isatty()
    formatter = _ColorFormatter(_FORMAT) if is_coloured else logging.Formatter(_FORMAT)
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(min(lowest, logging.INFO))
        if not _consoles(logger):
            console = logging.StreamHandler()
            console.setFormatter(formatter)
            logger.addHandler(console)
            logger.propagate = False
        for handler in _consoles(logger):
            handler.setLevel(lowest)


def set_console_level(level: int) -> None:
    """Show nothing below `level` on standard error; files keep their own level."""
    for package in PACKAGES:
        for handler in _consoles(logging.getLogger(package)):
            handler.setLevel(max(level, handler.level))


def _consoles(logger: logging.Logger) -> list[logging.Handler]:
    return [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]


class RunLog:
    """The log of one run: records from INFO on, kept until the run has a directory, then in a file."""

    def __init__(self) -> None:
        self._file: logging.FileHandler | None = None
        self._early = MemoryHandler(_KEPT_RECORDS, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._attach(self._early)

    def open(self, path: Path) -> None:
        """Write what was kept, and from now on everything, to `path`. Raises OSError where it cannot."""
        self._file = logging.FileHandler(path, encoding="utf-8")
        self._file.setFormatter(logging.Formatter(_FORMAT))
        self._early.setTarget(self._file)
        self._early.flush()
        self._detach(self._early)
        self._attach(self._file)

    def close(self) -> None:
        """Stop listening; the file, if there is one, is complete."""
        self._detach(self._early)
        if self._file is not None:
            self._detach(self._file)

    def _attach(self, handler: logging.Handler) -> None:
        handler.setLevel(logging.INFO)
        for package in PACKAGES:
            logging.getLogger(package).addHandler(handler)

    def _detach(self, handler: logging.Handler) -> None:
        for package in PACKAGES:
            logging.getLogger(package).removeHandler(handler)
        handler.close()
