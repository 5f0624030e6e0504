"""Requests are completed from their model: nothing stays open, and what does not fit the model is refused."""

import dataclasses

import pytest
from engines import configured

from chitu_diffusion.params import MAX_SEED, DiffusionUserParams, FlexCacheParams
from chitu_diffusion.resolve import remarks, resolve


def model(name, **fields):
    return dataclasses.replace(configured(f"models={name}", "models.ckpt_dir=x").models, **fields)


@pytest.fixture(scope="module")
def small():
    return model("Wan2.1-T2V-1.3B")


@pytest.fixture(scope="module")
def two_experts():
    return model("Wan2.2-T2V-A14B")


def test_open_fields_take_the_model_defaults(small):
    params = resolve(DiffusionUserParams(prompt="a cat"), small)
    assert (params.height, params.width, params.num_frames) == (
        small.video.height,
        small.video.width,
        small.video.num_frames,
    )
    assert (params.fps, params.num_inference_steps, params.sample_shift) == (16, 50, 5.0)
    assert params.guidance_scale == small.sampler.guidance_scale
    open_fields = [name for name, value in vars(params).items() if value is None]
    assert open_fields == ["save_dir", "save_path", "flexcache", "knobs"]


def test_what_the_user_said_wins_over_the_model(small):
    said = {"height": 480, "width": 848, "num_frames": 81, "num_inference_steps": 4, "guidance_scale": 7.0}
    said |= {
        "fps": 24,
        "seed": 3,
        "role": "me",
        "priority": 2,
        "sample_solver": "euler",
        "save_path": "a.mp4",
    }
    params = resolve(DiffusionUserParams(prompt="a", **said), small)
    assert {key: getattr(params, key) for key in said} == said | {"guidance_scale": (7.0,)}


def test_no_negative_prompt_means_the_model_default_and_an_empty_one_stays_empty(small):
    assert small.encoder.default_negative_prompt != ""
    texts = [
        resolve(DiffusionUserParams(negative_prompt=text), small).negative_prompt for text in (None, "", "x")
    ]
    assert texts == [small.encoder.default_negative_prompt, "", "x"]


def test_a_seed_is_drawn_anew_for_each_request_without_one(small):
    seeds = {resolve(DiffusionUserParams(), small).seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_seed_zero_is_kept(small):
    assert resolve(DiffusionUserParams(seed=0), small).seed == 0


def test_guidance_of_two_experts_is_low_noise_then_high_noise(two_experts):
    asked = [None, 5, (2.0, 6.0)]
    found = [
        resolve(DiffusionUserParams(guidance_scale=scale), two_experts).guidance_scale for scale in asked
    ]
    assert found == [(3.0, 4.0), (5.0, 5.0), (2.0, 6.0)]


def test_guidance_zero_is_not_the_default(small):
    assert resolve(DiffusionUserParams(guidance_scale=0), small).guidance_scale == (0.0,)


def test_guidance_for_experts_that_are_not_there_is_refused(small, two_experts):
    with pytest.raises(ValueError, match=r"guidance_scale=\(1, 2\): .*1\.3B takes one value"):
        resolve(DiffusionUserParams(guidance_scale=(1, 2)), small)
    with pytest.raises(
        ValueError, match=r"guidance_scale=\(1,\): .*A14B takes one value or \(low noise, high"
    ):
        resolve(DiffusionUserParams(guidance_scale=(1,)), two_experts)


def test_more_steps_than_the_model_has_timesteps_are_refused(small):
    with pytest.raises(ValueError, match=r"num_inference_steps=1001: must be at most 1000"):
        resolve(DiffusionUserParams(num_inference_steps=1001), small)


def test_reuse_that_leaves_no_step_of_the_models_own_to_reuse_is_refused(small):
    cache = FlexCacheParams("pab", warmup=30, cooldown=20)
    with pytest.raises(ValueError, match=r"warmup \+ cooldown = 50 must be below num_inference_steps=50"):
        resolve(DiffusionUserParams(flexcache_params=cache), small)
    assert resolve(
        DiffusionUserParams(flexcache="pab", num_inference_steps=11), small
    ).flexcache == FlexCacheParams("pab")


def test_unusual_requests_are_remarked_on(small):
    usual = DiffusionUserParams(num_inference_steps=50, num_frames=81)
    odd = DiffusionUserParams(num_inference_steps=30, num_frames=161, flexcache="pab")
    assert remarks(resolve(usual, small), small, flexcache_is_enabled=False) == []
    steps, frames, reuse = remarks(resolve(odd, small), small, flexcache_is_enabled=False)
    assert "num_inference_steps=30 differs from the 50" in steps
    assert "num_frames=161 is more than the 81" in frames
    assert "flexcache=pab is ignored" in reuse
    assert len(remarks(resolve(odd, small), small, flexcache_is_enabled=True)) == 2


@pytest.mark.parametrize(("scale", "is_remarked"), [(5.0, False), (1.0, True), (0.0, True)])
def test_a_request_that_leaves_half_of_the_ranks_without_work_of_their_own_is_remarked_on(
    small, scale, is_remarked
):
    params = resolve(DiffusionUserParams(guidance_scale=scale, num_inference_steps=50), small)
    assert remarks(params, small, flexcache_is_enabled=False, cfg_size=1) == []
    found = remarks(params, small, flexcache_is_enabled=False, cfg_size=2)
    assert ["infer.diffusion.cfg_size=2" in remark for remark in found] == [True] * is_remarked


def test_one_expert_without_guidance_is_enough_for_that_remark(two_experts):
    params = resolve(DiffusionUserParams(guidance_scale=(3.0, 1.0), num_inference_steps=40), two_experts)
    assert len(remarks(params, two_experts, flexcache_is_enabled=False, cfg_size=2)) == 1
