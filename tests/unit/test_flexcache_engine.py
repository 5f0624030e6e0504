"""Cache strategies in an engine on the demo model: requests, records, memory, tasks beside each other."""

import dataclasses
import json
import logging
from pathlib import Path

import engines
import pytest
import torch
from checkpoints import random_weights, write_diffusers
from engines import clear, new_engine, run

from chitu_diffusion import DiffusionTaskStatus as Status

PAB = {"strategy": "pab", "warmup": 2, "cooldown": 1}
FEATURE = 8 * 256 * 4  # 2 latent frames of 2 x 2 tokens, in fp32


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    overrides = ["infer.schedule_policy=round_robin", "infer.diffusion.enable_flexcache=true"]
    engine = new_engine(f"output.root_dir={tmp_path_factory.mktemp('outputs')}", *overrides)
    yield engine
    engine.close()


@pytest.fixture
def engine(built):
    yield built
    clear(built)


def submit(engine, reuse=None, **changes):
    return engines.submit(engine, **({"num_inference_steps": 12} | changes), flexcache_params=reuse)


def latents_of(engine, *tasks):
    latents = engines.latents_of(engine, *tasks)
    engine.step()  # carries out the calling off
    return latents


def test_the_record_says_what_was_reused_and_kept(engine, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        task = submit(engine, PAB, save_dir=str(tmp_path))
        run(engine)
    found = json.loads(Path(task.result.video_path).with_suffix(".json").read_text())
    reuse = found["flexcache"]
    assert reuse == dataclasses.asdict(task.result.flexcache) | {
        "pictures": list(task.result.flexcache.pictures)
    }
    assert {key: reuse[key] for key in ("strategy", "cache_ratio", "warmup", "cooldown", "knobs")} == {
        "strategy": "pab",
        "cache_ratio": 0.5,
        "warmup": 2,
        "cooldown": 1,
        "knobs": {"self_range": 2, "cross_range": 3},
    }
    assert reuse["computed"] == {"self_attn": 2 * 8 * 8, "cross_attn": 2 * 8 * 6}  # branches, blocks, steps
    assert reuse["reused"] == {"self_attn": 2 * 8 * 4, "cross_attn": 2 * 8 * 6}
    assert reuse["reused_steps"] == 7
    assert reuse["peak_gb"] == round(2 * 2 * 8 * FEATURE / 1e9, 4)
    assert [Path(path).name for path in reuse["pictures"]] == [
        "pab_policy_timestep_pos.ppm",
        "pab_policy_timestep_pos.png",
    ]
    assert all(Path(path).parent == tmp_path for path in reuse["pictures"])
    assert found["approximations"] == ["flexcache: pab reused features in 7 steps"]
    assert "flexcache=pab Knobs(self_range=2, cross_range=3)" in caplog.text


def test_a_ratio_of_0_builds_no_strategy(engine):
    [plain] = latents_of(engine, submit(engine))
    task = submit(engine, {"strategy": "teacache", "cache_ratio": 0})  # which the demo could be refused for
    [latents] = latents_of(engine, task)
    assert task.params.knobs is None
    assert torch.equal(latents, plain)


def test_tasks_that_alternate_do_not_see_each_other(engine):
    asked = [None, PAB, {"strategy": "meancache", "cache_ratio": 1, "warmup": 1, "cooldown": 1}]
    asked.append({"strategy": "fbcache", "warmup": 1, "cooldown": 1, "extra": {"threshold": 1.0}})
    alone = [latents_of(engine, submit(engine, one))[0] for one in asked]
    together = [submit(engine, one, role=str(index)) for index, one in enumerate(asked)]
    for latents, expected in zip(latents_of(engine, *together), alone, strict=True):
        assert torch.equal(latents, expected)
    assert not any(torch.equal(alone[0], other) for other in alone[1:])


def test_a_task_that_does_not_fit_beside_others_waits_and_then_runs(tmp_path):
    needed = 2 * 2 * 8 * FEATURE
    overrides = ["infer.schedule_policy=round_robin", "infer.diffusion.enable_flexcache=true"]
    engine = new_engine(
        f"output.root_dir={tmp_path}", *overrides, f"infer.diffusion.flexcache_max_gb={1.5 * needed / 1e9}"
    )
    try:
        first, second = submit(engine, PAB, role="a"), submit(engine, PAB, role="b")
        third = submit(engine, role="c", num_inference_steps=2)
        assert first.cache_bytes == needed
        while not first.is_finished():
            assert second.status == Status.Pending
            engine.step()
        assert third.status == Status.Completed  # it needs no room
        run(engine)
        assert second.status == Status.Completed
    finally:
        engine.close()


def test_a_task_that_never_fits_fails_with_the_figure_and_the_others_go_on(tmp_path):
    engine = new_engine(
        f"output.root_dir={tmp_path}",
        "infer.diffusion.enable_flexcache=true",
        "infer.diffusion.flexcache_max_gb=0.0001",
    )
    try:
        task, other = submit(engine, PAB), submit(engine, num_inference_steps=2)
        assert task.status == Status.Failed
        assert "flexcache=pab would keep 0.000262 GB on a rank" in task.error_message
        assert "infer.diffusion.flexcache_max_gb=0.0001; raise it" in task.error_message
        run(engine)
        assert other.status == Status.Completed
    finally:
        engine.close()


def test_a_strategy_without_a_calibration_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "none.yaml").write_text("{}")
    overrides = ["infer.diffusion.enable_flexcache=true"]
    overrides.append(f"infer.diffusion.flexcache_calibration={tmp_path / 'none.yaml'}")
    engine = new_engine(f"output.root_dir={tmp_path}", *overrides)
    try:
        with pytest.raises(ValueError, match="flexcache=teacache: demo has no calibration for it"):
            submit(engine, {"strategy": "teacache", "warmup": 1, "cooldown": 1})
        assert engine.pool.is_empty()
    finally:
        engine.close()


def test_a_calibration_that_is_missing_stops_the_engine(tmp_path):
    key = "infer.diffusion.flexcache_calibration"
    with pytest.raises(ValueError, match=rf"{key}=absent\.yaml: absent\.yaml: no such calibration"):
        new_engine(f"output.root_dir={tmp_path}", f"{key}=absent.yaml")


def test_a_request_is_served_exactly_and_says_so_where_reuse_is_off(tmp_path):
    engine = new_engine(f"output.root_dir={tmp_path}")
    try:
        task = submit(engine, PAB | {"extra": {"self_range": 2}}, num_inference_steps=4)
        run(engine)
        assert task.result.flexcache is None
        assert task.result.approximations == ()
        [warning] = [text for text in task.result.warnings if "flexcache" in text]
        assert warning.startswith("flexcache=pab is ignored")
        assert "infer.diffusion.enable_flexcache is false" in warning
    finally:
        engine.close()


def test_the_first_step_of_the_second_expert_is_computed(tmp_path):
    write_diffusers(tmp_path / "weights", random_weights(experts=2))
    overrides = ["models=Wan2.2-T2V-A14B", f"models.ckpt_dir={tmp_path / 'weights'}"]
    engine = new_engine(f"output.root_dir={tmp_path}", *overrides, "infer.diffusion.enable_flexcache=true")
    try:
        reuse = {"strategy": "taylorseer", "warmup": 1, "cooldown": 0, "extra": {"interval": 4, "order": 0}}
        task = submit(engine, reuse)
        run(engine)
        assert task.status == Status.Completed, task.error_message
        codes = task.buffer.flexcache
        assert codes is None  # freed with the rest
        record = task.result.flexcache
        timesteps = [t for t in _timesteps(engine) if t >= 875]
        fresh = {0} | {index for index in range(12) if (index - 1) % 4 == 0} | {len(timesteps)}
        assert record.computed == {"blocks": 2 * len(fresh)}
        assert record.reused == {"blocks": 2 * (12 - len(fresh))}
    finally:
        engine.close()


def _timesteps(engine):
    from chitu_diffusion.samplers.unipc import Sampler

    return Sampler(12, engine.config.models.sampler.sample_shift).timesteps
