"""Standard error follows the level that was asked for; a run's file is plain and holds all from INFO on."""

import logging
import sys

import pytest

from chitu_core import logging as chitu_logging
from chitu_core.environment import Environment
from chitu_diffusion.stage_log import StageLog

pytestmark = pytest.mark.usefixtures("own_loggers")

LOGGER = logging.getLogger("chitu_diffusion.somewhere")


@pytest.fixture
def run_log(own_loggers, tmp_path):
    """Opens the log of a run and gives what reads it."""
    log = chitu_logging.RunLog()

    def read():
        log.open(tmp_path / "run.log")
        return (tmp_path / "run.log").read_text("utf-8")

    yield read
    log.close()


@pytest.mark.parametrize(
    ("environment", "level", "shown"),
    [
        (Environment(), None, ["info", "warning"]),
        (Environment(logging_level="WARNING"), None, ["warning"]),
        (Environment(), logging.WARNING, ["warning"]),
        (Environment(logging_level="DEBUG"), None, ["debug", "info", "warning"]),
        (Environment(debug=True), None, ["debug", "info", "warning"]),
        (Environment(rank=1, world_size=2), None, ["warning"]),
    ],
)
def test_a_level_is_that_of_standard_error_and_the_file_has_all_from_info_on(
    capsys, run_log, environment, level, shown
):
    chitu_logging.setup(environment, level)
    for name in ("debug", "info", "warning"):
        LOGGER.log(logging.getLevelNamesMapping()[name.upper()], name)
    assert [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()] == shown
    assert [line.rpartition(" ")[2] for line in run_log().splitlines()] == ["info", "warning"]


def test_a_progress_bar_never_lets_more_reach_standard_error(capsys, run_log):
    chitu_logging.setup(Environment(logging_level="ERROR"))
    chitu_logging.set_console_level(logging.WARNING)
    LOGGER.warning("unseen")
    assert capsys.readouterr().err == ""
    assert "unseen" in run_log()


def test_a_second_setup_changes_the_level(capsys):
    chitu_logging.setup(Environment(), logging.WARNING)
    chitu_logging.setup(Environment(), logging.DEBUG)
    LOGGER.debug("seen")
    assert capsys.readouterr().err.count("seen") == 1


@pytest.mark.parametrize("is_coloured", [True, False])
def test_stages_are_coloured_on_a_terminal_and_never_in_the_file(capsys, monkeypatch, run_log, is_coloured):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    environment = Environment(enable_stage_color=is_coloured)
    chitu_logging.setup(environment)
    StageLog(environment, perf=False).start("t", "Denoise", " step=0/2")
    stage = "\033[34mDenoise\033[0m" if is_coloured else "Denoise"
    assert f"event=START stage={stage} step=0/2" in capsys.readouterr().err
    assert "event=START stage=Denoise step=0/2" in run_log()
