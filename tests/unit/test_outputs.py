"""Run folders and file names: the documented rules, and no name that a prompt could misuse."""

import dataclasses
import json
import os
from datetime import datetime

import pytest

from chitu_diffusion.outputs import (
    RequestRecord,
    check_writable,
    drop_hydra,
    relocate_hydra,
    run_directory,
    video_stem,
    write_run_files,
)

NOW = datetime(2026, 1, 2, 3, 4, 5)
CAT = "A cat walking on grass."


def test_a_run_directory_is_named_after_tag_prompt_time_and_model(tmp_path):
    directory = run_directory(tmp_path / "new" / "outputs", "My Tag", CAT, "Wan2.1-T2V-1.3B", NOW)
    assert directory == tmp_path / "new/outputs/my_tag_a_cat_walking_on_grass_20260102_030405_wan2_1_t2v_1_3b"
    assert directory.is_dir()


def test_a_run_directory_without_tag_starts_with_the_prompt_cut_to_32_characters(tmp_path):
    prompt = "word " * 20
    directory = run_directory(tmp_path, "", prompt, "demo", NOW)
    assert directory.name == "word_word_word_word_word_word_wo_20260102_030405_demo"


@pytest.mark.parametrize("prompt", ["", "一只猫", "../..", "\x00\n"])
def test_a_prompt_without_ascii_letters_gives_the_word_prompt(tmp_path, prompt):
    assert run_directory(tmp_path, "", prompt, "demo", NOW).name == "prompt_20260102_030405_demo"


def test_a_second_run_in_the_same_second_gets_its_own_directory(tmp_path):
    names = [run_directory(tmp_path, "", "a", "demo", NOW).name for _ in range(3)]
    assert names == [f"a_20260102_030405_demo{suffix}" for suffix in ("", "_2", "_3")]


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        (CAT, "a_cat_walking_on_grass._seed42_step50"),
        ("  Two\tcats:\none?  ", "two_cats_one_seed42_step50"),
        ("一只猫 在草地上", "一只猫_在草地上_seed42_step50"),
        ("Ünïcode/É\\x", "ünïcode_é_x_seed42_step50"),
        ("a" * 100, "a" * 64 + "_seed42_step50"),
        ("", "prompt_seed42_step50"),
        ("...", "prompt_seed42_step50"),
        (".hidden", "hidden_seed42_step50"),
        ("a\u202eb\x1b[31m\udcffc", "a_b_[31m_c_seed42_step50"),
    ],
)
def test_a_video_is_named_after_prompt_seed_and_steps(prompt, stem):
    assert video_stem(prompt, 42, 50) == stem


def test_an_unknown_seed_or_step_count_is_called_none():
    assert video_stem("a", None, None) == "a_seednone_stepnone"


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "\x00\x7f\x85\u2028", "🐈" * 200, "한" * 200, ". /. /", "é" * 99]
)
def test_no_prompt_gives_an_unsafe_name(tmp_path, prompt):
    name = f"{video_stem(prompt, 2**63 - 1, 1000)}_2.json"
    assert len(os.fsencode(name)) <= 255
    assert not set("/\\") & set(name)
    assert name.isprintable()
    assert not name.startswith(".")
    (tmp_path / name).touch()


def test_the_run_files_hold_what_was_asked_and_with_what(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Params:
        prompt: str
        seed: int

    requests = [RequestRecord("00000001", Params("猫", 1)), RequestRecord("00000002", Params("b", 2))]
    write_run_files(tmp_path, requests, model_name="demo", created_at=NOW, config_yaml="infer:\n  seed: 0\n")
    asked = json.loads((tmp_path / "request_params.json").read_text(encoding="utf-8"))
    assert asked["requests"][0] == {"request_id": "00000001", "params": {"prompt": "猫", "seed": 1}}
    assert json.loads((tmp_path / "run_meta.json").read_text()) == {
        "model_name": "demo",
        "created_at": "2026-01-02T03:04:05",
        "num_requests": 2,
        "output_dir": str(tmp_path),
    }
    assert (tmp_path / "run_config.yaml").read_text() == "infer:\n  seed: 0\n"


@pytest.fixture
def hydra_dir(tmp_path):
    (tmp_path / "hydra" / ".hydra").mkdir(parents=True)
    (tmp_path / "hydra" / ".hydra" / "config.yaml").write_text("a: 1")
    (tmp_path / "run").mkdir()
    return tmp_path / "hydra"


@pytest.mark.parametrize("mode", ["video_dir", "same_as_video", "Relocate"])
def test_hydra_files_move_into_the_run_directory_and_leave_no_empty_folder(hydra_dir, mode):
    relocate_hydra(mode, hydra_dir, hydra_dir.parent / "run")
    assert (hydra_dir.parent / "run" / ".hydra" / "config.yaml").read_text() == "a: 1"
    assert not hydra_dir.exists()


def test_a_hydra_folder_with_other_files_stays(hydra_dir):
    (hydra_dir / "main.log").touch()
    relocate_hydra("video_dir", hydra_dir, hydra_dir.parent / "run")
    assert [path.name for path in hydra_dir.iterdir()] == ["main.log"]


def test_hydra_files_already_in_the_run_directory_stay(hydra_dir):
    relocate_hydra("video_dir", hydra_dir, hydra_dir)
    assert (hydra_dir / ".hydra" / "config.yaml").exists()


@pytest.mark.parametrize("mode", ["off", "disable", "none"])
def test_hydra_files_can_be_deleted(hydra_dir, mode):
    relocate_hydra(mode, hydra_dir, hydra_dir.parent / "run")
    assert list(hydra_dir.iterdir()) == []
    assert list((hydra_dir.parent / "run").iterdir()) == []


def test_hydra_files_can_be_left_alone(hydra_dir):
    relocate_hydra("default", hydra_dir, hydra_dir.parent / "run")
    assert (hydra_dir / ".hydra" / "config.yaml").exists()


@pytest.mark.parametrize("mode", ["video_dir", "off"])
def test_a_rank_above_0_removes_the_hydra_files_of_its_own_even_if_another_was_faster(hydra_dir, mode):
    drop_hydra(mode, hydra_dir)
    assert not hydra_dir.exists()
    drop_hydra(mode, hydra_dir)


def test_a_rank_above_0_leaves_hydra_files_alone_by_default_and_other_files_always(hydra_dir):
    drop_hydra("default", hydra_dir)
    assert (hydra_dir / ".hydra").is_dir()
    (hydra_dir / "mine.txt").touch()
    drop_hydra("off", hydra_dir)
    assert [path.name for path in hydra_dir.iterdir()] == ["mine.txt"]


def test_without_hydra_there_is_nothing_to_move(tmp_path):
    relocate_hydra("video_dir", None, tmp_path)
    relocate_hydra("video_dir", tmp_path / "absent", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_hydra_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"output\.hydra_dump_mode must be one of video_dir.*'elsewhere'"):
        relocate_hydra("elsewhere", None, tmp_path)


def test_a_writable_directory_is_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "a" / "b", "save_dir")
    check_writable(tmp_path / "c" / "video.mp4", "save_path")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("key", ["save_dir", "save_path", "output.root_dir"])
def test_a_directory_below_a_file_is_refused_with_its_key(tmp_path, key):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"{key}: cannot write into .*file"):
        check_writable(tmp_path / "file" / "a" / "b", key)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match=r"save_dir: .*Permission denied"):
        check_writable(tmp_path / "locked", "save_dir")


def test_a_save_path_that_is_a_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"save_path: .* is a directory"):
        check_writable(tmp_path, "save_path")


def test_a_save_path_whose_record_would_be_a_directory_is_refused(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(ValueError, match=r"save_path: .*x\.json is a directory"):
        check_writable(tmp_path / "x.mp4", "save_path")


@pytest.mark.parametrize("length", [251, 300])  # of 251 letters, .mp4 makes 255 bytes and .json 256
def test_a_save_path_with_too_long_a_name_for_video_or_record_is_refused(tmp_path, length):
    check_writable(tmp_path / f"{'x' * 250}.mp4", "save_path")
    with pytest.raises(ValueError, match=r"save_path: cannot write .*File name too long"):
        check_writable(tmp_path / f"{'x' * length}.mp4", "save_path")


@pytest.mark.parametrize("is_first", [True, False], ids=["rank 0", "rank 1"])
def test_the_folder_around_hydras_and_the_current_one_stay(hydra_dir, monkeypatch, is_first):
    def remove(folder):
        if is_first:
            relocate_hydra("video_dir", folder, hydra_dir.parent / "run")
        else:
            drop_hydra("video_dir", folder)

    users = hydra_dir.parent / "users"
    users.mkdir()
    nested = hydra_dir.rename(users / "sub")
    remove(nested)
    assert list(users.iterdir()) == []
    (users / ".hydra").mkdir()
    monkeypatch.chdir(users)
    remove(users)
    assert users.is_dir()
    assert list(users.iterdir()) == []
