"""Engines at every low-memory level: the video of level 0, bit for bit, and memory that stays what it was."""

import gc
import json
import logging
from pathlib import Path

import engines
import pytest
import torch
from checkpoints import random_weights, write_official
from engines import submit
from oracles import relative_error

from chitu_diffusion import prepare
from chitu_diffusion.scheduler import DiffusionScheduler
from chitu_diffusion.task import DiffusionTaskStatus, DiffusionTaskType
from chitu_diffusion.vaes._tile_plan import TilePlan

LEVEL = "infer.diffusion.low_mem_level="
FP8 = "infer.diffusion.stream_dtype=float8_e4m3fn"


@pytest.fixture
def new_engine(tmp_path):
    made = []

    def make(*overrides):
        made.append(engines.new_engine(f"output.root_dir={tmp_path}", *overrides))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def run(engine, **options):
    """Latents at the end of denoising, the pictures before they are compressed, and the task."""
    task = submit(engine, **options)
    while task.task_type != DiffusionTaskType.VAEDecode:
        engine.step()
        assert task.is_running(), task.error_message
    latents = task.buffer.latents
    with torch.inference_mode():
        pictures = torch.cat(list(engine.pipeline.pixels(latents)))
    engine.step()
    assert task.status == DiffusionTaskStatus.Completed, task.error_message
    return latents, pictures, task


def assert_same(engine, expected, **options):
    latents, pictures, _ = run(engine, **options)
    assert torch.equal(latents, expected[0])
    assert torch.equal(pictures, expected[1])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the demo model makes at level 0."""
    engine = engines.new_engine(f"output.root_dir={tmp_path_factory.mktemp('outputs')}")
    outcome = run(engine)
    engine.close()
    return outcome


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{LEVEL}2"],
        [f"{LEVEL}3"],
        [f"{LEVEL}4"],
        [f"{LEVEL}4", "infer.diffusion.resident_gb=0.0135"],  # three blocks of eight
        [f"{LEVEL}4", "infer.diffusion.resident_gb=1"],
    ],
)
def test_every_level_makes_the_same_video(new_engine, demo, overrides):
    engine = new_engine(*overrides)
    assert_same(engine, demo)
    assert engine.pipeline.residency.device_bytes == 0


def test_tiles_make_the_same_pictures_within_rounding(new_engine):
    wide = {"size": (160, 96), "num_inference_steps": 1}
    latents, pictures, _ = run(new_engine(), **wide)
    engine = new_engine(f"{LEVEL}1", "infer.vae_tile_px=128", "infer.vae_tile_stride_px=96")
    plan = engine.pipeline.tile_plan(*latents.shape[-2:])
    assert (plan.mode, len(plan.tiles) > 1) == ("exact", True)
    tiled_latents, tiled, task = run(engine, **wide)
    assert torch.equal(tiled_latents, latents)
    assert (tiled.int() - pictures.int()).abs().max() <= 1  # a sum in another order may round the other way
    assert (tiled != pictures).double().mean() < 1e-3
    assert task.result.approximations == ()


def test_blended_tiles_are_named_in_the_result(new_engine, monkeypatch):
    plan = TilePlan("blended", (12, 20), ((0, 12),), ((0, 12), (8, 20)), 4, 1.2)
    monkeypatch.setattr(prepare, "plan_tiles", lambda *_: plan)  # exact ones fit at every size that is small
    *_, task = run(new_engine(f"{LEVEL}1"), size=(160, 96), num_frames=1, num_inference_steps=1)
    assert task.result.approximations == ("VAE in blended tiles",)


def test_two_experts_change_places_and_make_the_same_video(new_engine, tmp_path):
    checkpoint = write_official(tmp_path / "two", random_weights(experts=2))
    model = ["models=Wan2.2-T2V-A14B", f"models.ckpt_dir={checkpoint}"]
    options = {"num_inference_steps": 4, "guidance_scale": (3.0, 4.0)}
    expected = run(new_engine(*model), **options)
    assert expected[2].result.experts == ("high_noise", "low_noise")
    for level in (2, 3, 4):
        engine = new_engine(*model, f"{LEVEL}{level}")
        assert_same(engine, expected, **options)
        assert engine.pipeline.residency.device_bytes == 0


def test_quantised_layers_can_live_on_the_host(new_engine):
    expected = run(new_engine("quant=fp8"))
    for level in (3, 4):
        assert_same(new_engine("quant=fp8", f"{LEVEL}{level}"), expected)


def test_fp8_storage_costs_a_few_percent_and_is_named(new_engine, demo):
    engine = new_engine(f"{LEVEL}4", FP8)
    latents, _, task = run(engine, num_inference_steps=2)
    assert 1e-4 < relative_error(latents, demo[0]) < 5e-2  # 3 bits, of which sums over a row leave about 2 %
    said = ("streamed linear weights: float8_e4m3fn",)
    assert task.result.approximations == said
    record = json.loads(Path(task.result.video_path).with_suffix(".json").read_text())
    assert tuple(record["approximations"]) == said
    assert demo[2].result.approximations == ()


def live_bytes():
    """The memory of all slabs and device buffers of this process: tensors of bytes."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.dtype == torch.uint8 and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("level", [3, 4])
def test_memory_is_flat_over_twenty_requests(new_engine, level):
    engine = new_engine(f"{LEVEL}{level}")
    held = []
    for seed in range(20):
        task = submit(engine, seed=seed, num_inference_steps=1, size=(16, 16), num_frames=1)
        while not task.is_finished():
            engine.step()
        assert task.status == DiffusionTaskStatus.Completed, task.error_message
        engine.pool.remove(task.task_id)
        assert engine.pipeline.residency.device_bytes == 0
        if seed in (1, 19):
            held.append(live_bytes())
    assert held[0] == held[1] > 0


@pytest.mark.parametrize("level", [3, 4])
def test_a_cancelled_task_leaves_room_for_the_next(new_engine, demo, level):
    engine = new_engine(f"{LEVEL}{level}")
    task = submit(engine)
    engine.step()
    engine.step()
    assert engine.pipeline.residency.device_bytes > 0
    engine.pool.cancel(task.task_id)
    engine.step()
    assert task.status == DiffusionTaskStatus.Cancelled
    assert_same(engine, demo)


@pytest.mark.parametrize(("level", "expected"), [(2, "abab"), (3, "aaaa"), (4, "aaaa")])
def test_from_level_three_on_a_task_runs_to_its_end_before_another_begins(new_engine, level, expected):
    engine = new_engine(f"{LEVEL}{level}", "infer.schedule_policy=round_robin")
    tasks = {role: submit(engine, role=role) for role in "ab"}
    done, seen = dict.fromkeys(tasks, None), ""
    while not all(task.is_finished() for task in tasks.values()):
        engine.step()
        for role, task in tasks.items():
            now = (task.status, task.task_type, task.current_step)
            if now != done[role] and task.started_at is not None:
                seen += role
                done[role] = now
    assert seen.startswith(expected)
    assert all(task.status == DiffusionTaskStatus.Completed for task in tasks.values())


class Alternating(DiffusionScheduler):
    """Takes the task with the fewest steps done, whatever has begun."""

    def schedule(self, pool):
        tasks = sorted(pool.unfinished(), key=lambda task: task.current_step)
        return [tasks[0].task_id] if tasks else []


@pytest.mark.parametrize("level", [3, 4])
def test_a_scheduler_of_ones_own_may_let_tasks_alternate(new_engine, demo, level):
    engine = new_engine(f"{LEVEL}{level}")
    engine.scheduler = Alternating()
    tasks, latents = [submit(engine), submit(engine)], {}
    while not all(task.is_finished() for task in tasks):
        engine.step()
        latents |= {task.task_id: task.buffer.latents for task in tasks if task.buffer.latents is not None}
    assert all(torch.equal(latents[task.task_id], demo[0]) for task in tasks)


def test_a_warm_up_brings_what_it_runs(new_engine, demo):
    engine = new_engine(f"{LEVEL}3", "infer.warmup=[32x32x5]")
    assert engine.pipeline.residency.device_bytes == 0
    assert_same(engine, demo)


def test_the_log_says_what_lives_where(new_engine, caplog):
    with caplog.at_level(logging.INFO):
        new_engine(f"{LEVEL}4")
    said = [record.message for record in caplog.records if "low_mem_level=4" in record.message]
    assert any("runs to its end" in message for message in said)
    assert any(
        "text_encoder: 0.00473 GB on the host, all of 3 blocks streamed" in message for message in said
    )
    assert any("dit: 0.0338 GB on the host, 8 of 8 blocks streamed, " in message for message in said)
