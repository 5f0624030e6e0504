"""The run directory: made when first needed, with the run's log, configuration and requests."""

import csv
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from engines import configured
from omegaconf import OmegaConf

from chitu_core.config import load
from chitu_core.environment import Environment
from chitu_core.timing import Timer
from chitu_diffusion import run_folder
from chitu_diffusion.outputs import RequestRecord
from chitu_diffusion.params import DiffusionUserParams
from chitu_diffusion.resolve import resolve
from chitu_diffusion.run_folder import RunFolder

LOGGER = logging.getLogger("chitu_diffusion.somewhere")


def config_for(root, *overrides):
    return configured(f"output.root_dir={root}", *overrides)


@pytest.fixture
def folder(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="chitu_diffusion")
    made = RunFolder(config_for(tmp_path / "out"), Environment(run_tag="Tag"))
    yield made
    made.close(timer())


def timer(enabled=False):
    return Timer(torch.device("cpu"), enabled)


def test_nothing_is_made_before_it_is_needed(folder, tmp_path):
    assert folder.path is None
    assert list(tmp_path.iterdir()) == []


def test_the_first_prompt_names_the_directory_of_all(folder):
    first = folder.open("A red circle!")
    assert first.parent.name == "out"
    assert first.name.startswith("tag_a_red_circle_")
    assert first.name.endswith("_demo")
    assert folder.open("another") == folder.path == first


def test_a_given_directory_is_used_and_no_other_is_made(tmp_path):
    made = RunFolder(config_for(tmp_path / "out"), Environment(current_output_dir=tmp_path / "given" / "dir"))
    assert made.open("x") == tmp_path / "given" / "dir"
    made.close(timer())
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_a_root_that_cannot_be_written_is_named_by_its_key(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output\.root_dir: cannot write into .*file"):
        RunFolder(config_for(tmp_path / "file"), Environment()).open("x")
    with pytest.raises(ValueError, match=r"CHITU_CURRENT_OUTPUT_DIR: cannot write into .*file"):
        RunFolder(config_for(tmp_path), Environment(current_output_dir=tmp_path / "file" / "sub")).open("x")


def test_requests_and_configuration_are_written_beside_the_videos(folder, tmp_path):
    folder.open("a")
    config = config_for(tmp_path / "out")
    for number in range(2):
        params = resolve(DiffusionUserParams(prompt="a", seed=number), config.models)
        folder.add_request(RequestRecord(f"task-{number}", params))
    requests = json.loads((folder.path / "request_params.json").read_text("utf-8"))["requests"]
    assert [(one["request_id"], one["params"]["seed"]) for one in requests] == [("task-0", 0), ("task-1", 1)]
    meta = json.loads((folder.path / "run_meta.json").read_text("utf-8"))
    assert (meta["model_name"], meta["num_requests"], meta["output_dir"]) == ("demo", 2, str(folder.path))
    assert "schedule_policy: fifo" in (folder.path / "run_config.yaml").read_text()


def test_the_written_configuration_can_be_loaded_again(folder, tmp_path):
    folder.open("a")
    config = config_for(tmp_path / "out")
    folder.add_request(RequestRecord("t", resolve(DiffusionUserParams(), config.models)))
    assert load(OmegaConf.load(folder.path / "run_config.yaml")) == config


def test_the_log_of_a_run_holds_its_lines_and_ends_with_it(folder):
    folder.open("a")
    LOGGER.info("inside the run")
    LOGGER.debug("too fine")
    folder.close(timer())
    LOGGER.info("after the run")
    text = (folder.path / "run.log").read_text("utf-8")
    assert "[INFO] chitu_diffusion.somewhere: inside the run" in text
    assert "too fine" not in text
    assert "after" not in text


def test_no_log_is_written_where_it_is_switched_off(tmp_path):
    made = RunFolder(config_for(tmp_path, "output.enable_run_log=false"), Environment())
    made.open("a")
    made.close(timer())
    assert list(made.path.iterdir()) == []


def test_timers_are_written_when_asked_for_even_if_no_video_needed_the_directory(folder):
    enabled = timer(enabled=True)
    enabled.record("denoise", 2.0)
    folder.close(enabled)
    with (folder.path / "time_stats.csv").open(newline="") as file:
        assert [row[1] for row in csv.reader(file)] == ["Timer Name", "denoise"]


def test_a_run_without_timers_or_videos_leaves_nothing(folder, tmp_path):
    folder.close(timer())
    assert list(tmp_path.iterdir()) == []


def test_the_log_ends_also_when_the_last_files_cannot_be_written(folder, monkeypatch):
    enabled = timer(enabled=True)
    enabled.record("denoise", 2.0)
    folder.open("a")

    def refuse(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(enabled, "save_statistics", refuse)
    with pytest.raises(OSError, match="No space left"):
        folder.close(enabled)
    LOGGER.info("after the run")
    assert "after" not in (folder.path / "run.log").read_text("utf-8")


def test_the_folder_of_hydra_moves_into_the_run_directory(folder, tmp_path, monkeypatch):
    hydra_dir = tmp_path / "hydra"
    (hydra_dir / ".hydra").mkdir(parents=True)
    (hydra_dir / ".hydra" / "overrides.yaml").touch()
    running = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(hydra_dir)))
    fake = SimpleNamespace(initialized=lambda: True, get=lambda: running)
    monkeypatch.setattr(run_folder, "HydraConfig", fake)
    folder.open("a")
    folder.close(timer())
    assert (folder.path / ".hydra" / "overrides.yaml").is_file()
    assert not hydra_dir.exists()
