"""The shell: what it makes of a command line, and that an error is a line that names the remedy."""

import pytest
from engines import composed
from omegaconf import OmegaConf

from chitu_diffusion import cli


def parsed(*words):
    return cli._parser().parse_args(["generate", *words])


@pytest.mark.parametrize(
    ("name", "value"),
    [("CHITU_DEBUG", "2"), ("CHITU_LOGGING_LEVEL", "foo"), ("MASTER_PORT", "99999999"), ("RANK", "one")],
)
def test_a_malformed_variable_is_an_error_line(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    assert cli.main(["generate", "a red circle"]) == 1
    assert capsys.readouterr().err.startswith(f"Error: {name} must be ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "2000"], "num_inference_steps=2000: must be at most 1000"),
        (["--guidance", "3,4"], "guidance_scale=(3.0, 4.0): demo takes one value"),
    ],
    ids=str,
)
def test_a_request_that_does_not_fit_is_refused_before_anything_is_built(monkeypatch, capsys, words, message):
    monkeypatch.setattr(cli.chitu_logging, "setup", lambda _: None)  # handlers would outlive the test
    monkeypatch.setattr(cli, "Engine", lambda *_, **__: pytest.fail("an engine is built"))
    assert cli.main(["generate", "a red circle", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["a\\b", "p${q}", "it's", "a b, c", "null", "\\\\host\\share\\"])
def test_hydra_reads_a_checkpoint_folder_as_it_was_written(folder):
    overrides = cli._prompts(parsed("a red circle", "--ckpt-dir", folder))[1]
    assert OmegaConf.to_container(composed(*overrides), resolve=True)["models"]["ckpt_dir"] == folder


def test_only_line_ends_part_the_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa\u2028b\r\n\r\n  c\x85d\x0ce\n \nf".encode())
    assert cli._prompts(parsed("--prompts", str(file)))[0] == ["a\u2028b", "c\x85d\x0ce", "f"]


def test_a_file_of_prompts_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("ein Käse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"--prompts=.*prompts\.txt: the file is not UTF-8"):
        cli._prompts(parsed("--prompts", str(file)))
