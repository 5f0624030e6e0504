"""What a user may say: legal values pass and are joined, others are refused with key, value and remedy."""

import dataclasses
import math

import pytest

from chitu_diffusion.params import MAX_SEED, DiffusionUserParams, FlexCacheParams


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": -1}, r"height=-1: must be a positive multiple of 16; nearest: 16$"),
        ({"height": 0}, r"height=0: .*nearest: 16$"),
        ({"width": 424}, r"width=424: must be a positive multiple of 16; nearest: 416 or 432"),
        ({"width": 480.0}, r"width=480\.0: must be a positive multiple of 16"),
        ({"width": "480"}, r"width='480': must be a positive multiple of 16$"),
        ({"width": True}, r"width=True: must be a positive multiple of 16$"),
        ({"height": math.nan}, r"height=nan: must be a positive multiple of 16$"),
        ({"num_frames": 0}, r"num_frames=0: must be 4n \+ 1, at least 1; nearest: 1$"),
        ({"num_frames": 16}, r"num_frames=16: .*nearest: 13 or 17$"),
        ({"num_frames": -7}, r"num_frames=-7: .*nearest: 1$"),
        ({"fps": 0}, r"fps=0: must be a number from 0\.001 to 1000"),
        ({"fps": math.nan}, r"fps=nan: must be a number"),
        ({"fps": 1001}, r"fps=1001: must be a number from 0\.001 to 1000"),
        ({"num_inference_steps": 0}, r"num_inference_steps=0: must be a whole number, at least 1"),
        ({"num_inference_steps": 2.5}, r"num_inference_steps=2\.5: must be a whole number"),
        ({"guidance_scale": math.nan}, r"guidance_scale=nan: must be a finite number, or one per expert"),
        ({"guidance_scale": (3.0, math.inf)}, r"guidance_scale=\(3\.0, inf\): must be a finite number"),
        ({"guidance_scale": ()}, r"guidance_scale=\(\): must be a finite number"),
        ({"guidance_scale": "7"}, r"guidance_scale='7': must be a finite number"),
        ({"guidance_scale": {}}, r"guidance_scale=\{\}: must be a finite number"),
        ({"guidance_scale": True}, r"guidance_scale=True: must be a finite number"),
        ({"seed": -1}, r"seed=-1: must be a whole number from 0 to 9223372036854775807, or None to draw one"),
        ({"seed": MAX_SEED + 1}, r"seed=9223372036854775808: must be a whole number"),
        ({"seed": 1.0}, r"seed=1\.0: must be a whole number"),
        ({"sample_solver": "ddpm"}, r"sample_solver='ddpm': choose one of unipc, dpm\+\+, euler"),
        ({"sample_solver": None}, r"sample_solver=None: choose one of"),
        ({"prompt": 3}, r"prompt=3: must be text"),
        ({"prompt": b"cat"}, r"prompt=b'cat': must be text"),
        ({"negative_prompt": ["a"]}, r"negative_prompt=\['a'\]: must be text"),
        ({"role": None}, r"role=None: must be text"),
        ({"save_dir": ""}, r"save_dir='': is empty; leave it out or name a path"),
        ({"save_path": ""}, r"save_path='': is empty"),
        ({"save_path": "out/"}, r"save_path='out/': must end in \.mp4"),
        ({"save_dir": "a\0b"}, r"save_dir='a\\x00b': holds a zero byte"),
        ({"save_path": "out/clip.json"}, r"save_path='out/clip\.json': must end in \.mp4"),
        ({"priority": 1.5}, r"priority=1\.5: must be a whole number"),
        ({"size": 5}, r"size=5: must be \(width, height\)"),
        ({"size": (160,)}, r"size=\(160,\): must be \(width, height\)"),
        ({"size": (160, 96), "height": 64}, r"size=\(160, 96\): contradicts height=64; give one of them"),
        ({"frame_num": 5, "num_frames": 9}, r"frame_num=5: contradicts num_frames=9; give one of them"),
        (
            {"flexcache": "magic"},
            r"strategy='magic': choose one of blockdance, dbcache, .*pab, taylorseer, teacache",
        ),
        ({"flexcache": 3}, r"flexcache=3: must be text"),
        ({"flexcache_params": "pab"}, r"flexcache_params='pab': must be FlexCacheParams or a dict"),
        (
            {"flexcache_params": {"ratio": 1, 2: 3}},
            r"flexcache_params=\['2', 'ratio'\]: legal keys: cache_ratio",
        ),
    ],
    ids=str,
)
def test_an_illegal_value_is_refused_with_its_key_and_a_remedy(values, message):
    with pytest.raises(ValueError, match=message):
        DiffusionUserParams(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cache_ratio": 1.1}, r"cache_ratio=1\.1: must lie in \[0, 1\]"),
        ({"cache_ratio": math.nan}, r"cache_ratio=nan"),
        ({"warmup": -1}, r"warmup=-1: must be a whole number, 0 or more"),
        ({"cooldown": 1.5}, r"cooldown=1\.5: must be a whole number"),
        ({"strategy": 7}, r"strategy=7: must be text"),
    ],
    ids=str,
)
def test_an_illegal_reuse_setting_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FlexCacheParams(**values)


@pytest.mark.parametrize("key", ["height", "num_frames", "fps", "guidance_scale", "seed"])
def test_a_whole_number_beyond_the_range_of_float_is_refused(key):
    with pytest.raises(ValueError, match=rf"{key}=1000.*: must be"):
        DiffusionUserParams(**{key: 10**400 + 2})


def test_a_request_without_arguments_is_legal_and_leaves_defaults_open():
    params = DiffusionUserParams()
    assert (params.prompt, params.role, params.sample_solver) == ("", "user", "unipc")
    assert (params.height, params.width, params.num_frames, params.seed) == (None, None, None, None)


def test_no_prompt_means_an_empty_one():
    assert DiffusionUserParams(prompt=None).prompt == ""


@pytest.mark.parametrize("size", [(848, 480), [848, 480]])
def test_size_is_width_then_height(size):
    params = DiffusionUserParams(size=size, width=848)
    assert (params.width, params.height, params.size) == (848, 480, (848, 480))


def test_width_and_height_set_size_and_num_frames_sets_frame_num():
    params = DiffusionUserParams(width=64, height=32, num_frames=5)
    assert (params.size, params.frame_num) == ((64, 32), 5)
    assert DiffusionUserParams(frame_num=9).num_frames == 9


def test_one_side_alone_leaves_size_open():
    assert DiffusionUserParams(width=64).size is None


def test_the_ends_of_the_seed_range_are_legal():
    assert [DiffusionUserParams(seed=seed).seed for seed in (0, MAX_SEED)] == [0, MAX_SEED]


@pytest.mark.parametrize(("given", "kept"), [(7, 7), (-0.5, -0.5), ([3, 4], (3, 4)), ((3.0,), (3.0,))])
def test_guidance_is_one_number_or_a_tuple(given, kept):
    assert DiffusionUserParams(guidance_scale=given).guidance_scale == kept


@pytest.mark.parametrize("name", ["DPM++", " dpm++ "])
def test_a_solver_is_found_in_any_case(name):
    assert DiffusionUserParams(sample_solver=name).sample_solver == "dpm++"


@pytest.mark.parametrize("name", [None, "", "none", "OFF", " Disable ", "disabled"])
def test_words_for_no_reuse_mean_none(name):
    assert DiffusionUserParams(flexcache=name).resolve_flexcache_params() is None
    assert DiffusionUserParams(flexcache_params={"strategy": name}).resolve_flexcache_params() is None


def test_a_strategy_is_found_in_any_case():
    assert DiffusionUserParams(flexcache="PAB").resolve_flexcache_params() == FlexCacheParams(
        "pab", 0.5, 5, 5
    )


def test_reuse_parameters_win_over_the_name_and_may_be_a_dict():
    params = DiffusionUserParams(flexcache="pab", flexcache_params={"strategy": "TeaCache", "warmup": 0})
    assert params.resolve_flexcache_params() == FlexCacheParams("teacache", warmup=0)


def test_a_request_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DiffusionUserParams().seed = 3


def test_another_seed_makes_another_request():
    params = DiffusionUserParams(prompt="a", size=(64, 32), frame_num=5, seed=1)
    assert dataclasses.replace(params, seed=2) == DiffusionUserParams(
        prompt="a", size=(64, 32), frame_num=5, seed=2
    )


def test_another_size_or_length_makes_another_request_whichever_name_the_first_was_given_by():
    params = DiffusionUserParams(prompt="a", size=(64, 32), frame_num=5)
    other = dataclasses.replace(params, width=128, num_frames=9)
    assert other == DiffusionUserParams(prompt="a", width=128, height=32, num_frames=9)
    assert (other.size, other.frame_num) == ((128, 32), 9)
    assert dataclasses.replace(params, width=None, height=None).size is None
    with pytest.raises(ValueError, match=r"size=\(16, 16\): contradicts width=64; give one of them"):
        dataclasses.replace(params, size=(16, 16))


def test_aliases_cannot_be_changed_and_come_back_from_the_fields():
    params = DiffusionUserParams(size=(64, 32), frame_num=5)
    for name in ("size", "frame_num"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(params, name, None)
    assert DiffusionUserParams(**dataclasses.asdict(params)) == params


def test_reuse_that_leaves_no_step_to_reuse_is_refused_where_the_steps_are_known():
    message = r"warmup \+ cooldown = 10 must be below num_inference_steps=10; lower them or take more steps"
    with pytest.raises(ValueError, match=message):
        DiffusionUserParams(flexcache="pab", num_inference_steps=10)
    with pytest.raises(ValueError, match=message):
        DiffusionUserParams(flexcache_params={"strategy": "teacache"}, num_inference_steps=10)
    assert DiffusionUserParams(flexcache="pab", num_inference_steps=11).flexcache == "pab"
    assert DiffusionUserParams(flexcache="pab").num_inference_steps is None
    assert DiffusionUserParams(flexcache="none", num_inference_steps=4).resolve_flexcache_params() is None
