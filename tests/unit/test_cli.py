"""The shell: what it makes of a command line, and that an error is a line that names the remedy."""

import pytest

from chitu_diffusion import cli


@pytest.mark.parametrize(
    ("name", "value"),
    [("CHITU_DEBUG", "2"), ("CHITU_LOGGING_LEVEL", "foo"), ("MASTER_PORT", "99999999"), ("RANK", "one")],
)
def test_a_malformed_variable_is_an_error_line(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    assert cli.main(["generate", "a red circle"]) == 1
    assert capsys.readouterr().err.startswith(f"Error: {name} must be ")
