"""Which reference a video is compared with, and that unrelated videos are not."""

import json

import pytest

from chitu_diffusion.eval._pairing import find_videos, pair_up


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def note(path, **record):
    path.write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture
def paired(tmp_path):
    """The pairs found between tmp_path/ours and tmp_path/theirs, as names and rule."""

    def run(how="match"):
        pairs = pair_up(find_videos(tmp_path / "ours"), find_videos(tmp_path / "theirs"), how)
        return [(pair.generated.name, pair.reference.name, pair.matched_by) for pair in pairs]

    return run


def test_the_same_file_name_comes_first(tmp_path, paired):
    touch(tmp_path / "ours", "a_cat_seed1_step2.mp4", "z.mp4")
    touch(tmp_path / "theirs", "A_CAT_seed1_step2.mp4", "a_cat_seed1_step2.mp4", "other.mp4")
    assert paired() == [("a_cat_seed1_step2.mp4", "a_cat_seed1_step2.mp4", "file name")]


def test_a_name_is_preferred_for_all_before_other_rules_take_its_reference(tmp_path, paired):
    touch(tmp_path / "ours", "a_cat_seed1_step2.mp4", "a_cat_seed1_step2_2.mp4")
    touch(tmp_path / "theirs", "a_cat_seed1_step2_2.mp4")
    assert paired() == [("a_cat_seed1_step2_2.mp4", "a_cat_seed1_step2_2.mp4", "file name")]


def test_prompt_seed_and_steps_of_a_name_match_in_any_case_and_format(tmp_path, paired):
    touch(tmp_path / "ours", "a_cat_seed1_step2.mp4", "a_dog_seed1_step2.mp4")
    touch(tmp_path / "theirs", "A_Cat_seed1_step2.mkv", "a_dog_seed1_step3.mp4", "a_dog_seed2_step2.mp4")
    assert paired() == [("a_cat_seed1_step2.mp4", "A_Cat_seed1_step2.mkv", "prompt, seed and steps")]


def test_the_side_car_wins_over_the_name_and_is_slugged_alike(tmp_path, paired):
    touch(tmp_path / "ours", "mine.mp4")
    note(tmp_path / "ours" / "mine.json", prompt="A cat: on  grass?", seed=1, step=2)
    touch(tmp_path / "theirs", "a_dog_seed1_step2.mp4", "a_cat_on_grass_seed9_step9.mp4")
    note(tmp_path / "theirs" / "a_dog_seed1_step2.json", prompt="a CAT: on grass?", seed=1, step=2)
    assert paired() == [("mine.mp4", "a_dog_seed1_step2.mp4", "prompt, seed and steps")]


def test_a_side_car_may_name_its_file(tmp_path, paired):
    touch(tmp_path / "ours", "a_cat_seed1_step2.mp4")
    touch(tmp_path / "theirs", "0001.mp4", "0002.mp4")
    note(tmp_path / "theirs" / "facts.json", filename="0002.mp4", prompt="a cat", seed=1, step=2)
    (tmp_path / "theirs" / "0001.json").write_text("{no json")
    assert paired() == [("a_cat_seed1_step2.mp4", "0002.mp4", "prompt, seed and steps")]


def test_each_reference_is_used_once(tmp_path, paired):
    touch(tmp_path / "ours", "a_cat_seed1_step2.mp4", "a_cat_seed1_step2_2.mp4")
    touch(tmp_path / "theirs", "a_cat_seed1_step2.mp4")
    assert [pair[0] for pair in paired()] == ["a_cat_seed1_step2.mp4"]


def test_videos_without_a_seed_match_by_name_alone(tmp_path, paired):
    touch(tmp_path / "ours", "a_cat_seednone_step2.mp4", "same_seednone_step2.mp4")
    touch(tmp_path / "theirs", "A_cat_seednone_step2.mp4", "same_seednone_step2.mp4")
    assert paired() == [("same_seednone_step2.mp4", "same_seednone_step2.mp4", "file name")]


def test_runs_of_other_step_counts_compare_if_asked_for(tmp_path, paired):
    touch(tmp_path / "ours", "a_cat_seed1_step2.mp4")
    touch(tmp_path / "theirs", "a_cat_seed1_step50.mp4", "a_cat_seed2_step2.mp4")
    assert paired() == []
    expected = [("a_cat_seed1_step2.mp4", "a_cat_seed1_step50.mp4", "prompt and seed")]
    assert paired("ignore_steps") == expected


def test_order_pairs_only_if_asked_for(tmp_path, paired):
    touch(tmp_path / "ours", "b.mp4", "a.mp4", "c.mp4")
    touch(tmp_path / "theirs", "2.mp4", "1.mp4", ".hidden.mp4", "notes.txt")
    assert paired() == []
    assert paired("order") == [("a.mp4", "1.mp4", "order"), ("b.mp4", "2.mp4", "order")]
