"""The shell's options of a cache strategy: what they turn on, and what they refuse beforehand."""

import json

import pytest

from chitu_diffusion import cli
from chitu_diffusion.params import FlexCacheParams

pytestmark = pytest.mark.usefixtures("own_loggers")

FEW = ["--size", "32x32", "--frames", "5", "--steps", "6", "--seed", "1", "infer.op_impl=cpu"]


def parsed(*words):
    return cli._parser().parse_args(["generate", "a red circle", *words])


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ([], []),
        (["--flexcache", "none"], []),
        (["--flexcache", "PAB"], ["infer.diffusion.enable_flexcache=true"]),
        (
            ["--flexcache", "ditango"],
            ["infer.diffusion.enable_flexcache=true", "infer.diffusion.up_limit=2"],
        ),
    ],
)
def test_a_strategy_turns_on_what_it_needs(words, flags):
    assert cli._prompts(parsed(*words))[1] == flags


def test_an_override_wins_over_what_a_strategy_turns_on():
    options = parsed("--flexcache", "ditango")
    options.words.append("infer.diffusion.up_limit=1")
    assert cli._prompts(options)[1][-2:] == ["infer.diffusion.up_limit=2", "infer.diffusion.up_limit=1"]


def test_options_become_the_request():
    words = ["--flexcache", "TeaCache", "--cache-ratio", "0.3", "--warmup", "2", "--cooldown", "0"]
    params = cli._user_params(parsed(*words), "a")
    assert params.resolve_flexcache_params() == FlexCacheParams("teacache", 0.3, 2, 0)
    assert cli._user_params(parsed(), "a").resolve_flexcache_params() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flexcache", "magic"], "strategy='magic': choose one of blockdance, "),
        (["--flexcache", "pab", "--cache-ratio", "1.5"], "cache_ratio=1.5: must lie in [0, 1]"),
        (["--flexcache", "pab", "--cache-ratio", "nan"], "cache_ratio=nan: must lie in [0, 1]"),
        (["--flexcache", "pab", "--warmup", "-1"], "warmup=-1: must be a whole number, 0 or more"),
        (["--cache-ratio", "0.5"], "--cache-ratio=0.5 needs a strategy; name one with --flexcache"),
        (["--cooldown", "3"], "--cooldown=3 needs a strategy"),
        (
            ["--steps", "6", "--flexcache", "pab"],
            "warmup + cooldown = 10 must be below num_inference_steps=6",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_built(words, message, capsys, monkeypatch):
    monkeypatch.setattr(cli, "Engine", lambda *_, **__: pytest.fail("an engine is built"))
    assert cli.main(["generate", "a red circle", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_video_with_a_strategy_says_what_was_reused(capsys, tmp_path):
    words = [*FEW, "--flexcache", "pab", "--warmup", "1", "--cooldown", "1", "--json"]
    assert cli.main(["generate", "a red circle", *words, f"output.root_dir={tmp_path}"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["flexcache"]["strategy"] == "pab"
    assert sum(record["flexcache"]["reused"].values()) > 0
