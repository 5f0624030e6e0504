"""The engine on the demo model: a step is a stage step, tasks are independent, failures stay their own."""

import dataclasses
import errno
import json
import logging
import os
import weakref
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from checkpoints import random_weights, write_diffusers
from engines import SMALL, clear, composed, configured, latents_of, new_engine, run, submit
from torch import distributed as dist

from chitu_core import attention
from chitu_core import logging as chitu_logging
from chitu_core.attention import Attention
from chitu_core.environment import Environment
from chitu_diffusion import (
    DiffusionBackend,
    DiffusionTask,
    DiffusionTaskPool,
    DiffusionTaskStatus,
    DiffusionTaskType,
    DiffusionUserParams,
    DiffusionUserRequest,
    chitu_generate,
    chitu_init,
    chitu_is_terminated,
    chitu_start,
    chitu_terminate,
    generator,
    media,
)
from chitu_diffusion.engine import BackendState, Engine
from chitu_diffusion.task import DiffusionTaskBuffer, TaskPool

Status, Stage = DiffusionTaskStatus, DiffusionTaskType


def first_of(world):
    """The environment of rank 0 of so many on this machine; nobody waits at the address."""
    return Environment(world_size=world, local_world_size=world, master_addr="127.0.0.1", master_port=29999)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One engine for all tests that leave it as they found it."""
    root = tmp_path_factory.mktemp("outputs")
    engine = new_engine(f"output.root_dir={root}", "infer.schedule_policy=round_robin")
    yield engine
    engine.close()


@pytest.fixture
def engine(built):
    yield built
    clear(built)


@pytest.fixture
def facade(tmp_path, monkeypatch, own_loggers):
    """The arguments of `chitu_init`; the process's engine, pool and loggers are as before afterwards."""
    monkeypatch.setattr(DiffusionBackend, "engine", None)
    DiffusionTaskPool.reset()
    yield composed("infer.op_impl=cpu", f"output.root_dir={tmp_path / 'outputs'}")
    chitu_terminate()
    DiffusionTaskPool.reset()


def count_calls(monkeypatch, engine):
    """Names of the branches that are predicted from now on."""
    calls, predict = [], engine.generator._predict

    def counted(task, branch):
        calls.append(branch)
        return predict(task, branch)

    monkeypatch.setattr(engine.generator, "_predict", counted)
    return calls


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


# --- one request


def test_one_step_is_one_encoding_one_denoising_step_or_one_decoding(engine):
    task, seen = submit(engine, num_inference_steps=3), []
    while not task.is_finished():
        engine.step()
        seen.append((task.phase, task.current_step))
    assert seen == [("denoising", 0), ("denoising", 1), ("denoising", 2), ("decoding", 3), ("finished", 3)]


def test_a_step_without_tasks_returns(engine):
    engine.step()
    assert engine.pool.is_empty()


def test_the_video_has_the_size_length_and_rate_that_were_asked_for(engine):
    task = submit(engine, size=(48, 32), fps=8)
    run(engine)
    assert task.status == Status.Completed, task.error_message
    assert iio.imread(task.buffer.save_path, plugin="pyav").shape == (5, 32, 48, 3)
    assert iio.immeta(task.buffer.save_path, plugin="pyav")["fps"] == 8


def test_the_record_beside_the_video_holds_what_was_run(engine):
    task = submit(engine, negative_prompt=None, role="me")
    run(engine)
    with open(os.path.splitext(task.buffer.save_path)[0] + ".json", encoding="utf-8") as file:
        record = json.load(file)
    assert record == json.loads(json.dumps(dataclasses.asdict(task.result)))
    assert (record["filename"], record["task_id"]) == (os.path.basename(task.buffer.save_path), task.task_id)
    assert (record["seed"], record["step"], record["prompt"], record["role"]) == (7, 2, "a red circle", "me")
    assert (record["latent_shape"], record["seq_len"], record["experts"]) == ([16, 2, 4, 4], 8, ["dit"])
    assert (record["guidance_scale"], record["sample_solver"], record["negative_prompt"]) == (
        [4.0],
        "unipc",
        "",
    )
    assert set(record["seconds"]) == {"TextEncode", "Denoise", "VAEDecode", "total"}
    assert record["warnings"] == ["num_inference_steps=2 differs from the 20 of demo"]


def test_a_finished_task_holds_its_path_and_step_count_alone(engine):
    task = submit(engine)
    run(engine)
    assert task.buffer == DiffusionTaskBuffer(current_step=2, save_path=task.result.video_path)
    assert task.started_at <= task.finished_at
    assert task.get_elapsed_time() > 0
    assert engine.generator.get_progress(task) == 1


def test_equal_requests_get_names_with_2_and_3(tmp_path, engine):
    tasks = [submit(engine, save_dir=str(tmp_path)) for _ in range(3)]
    run(engine)
    stem = "a_red_circle_seed7_step2"
    assert [task.result.filename for task in tasks] == [f"{stem}.mp4", f"{stem}_2.mp4", f"{stem}_3.mp4"]
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_save_path_wins_makes_its_folder_and_overwrites(tmp_path, engine):
    path = tmp_path / "new" / "clip.mp4"
    for _ in range(2):
        task = submit(engine, save_path=str(path), save_dir=str(tmp_path / "unused"))
        run(engine)
        assert task.buffer.save_path == str(path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["clip.json", "clip.mp4"]
    assert not (tmp_path / "unused").exists()


def test_the_log_of_a_run_holds_every_stage_of_its_first_task(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="chitu_diffusion")
    engine = new_engine(f"output.root_dir={tmp_path}")
    task = submit(engine)
    run(engine)
    engine.close()
    text = (engine.folder.path / "run.log").read_text("utf-8")
    for part in ("event=END stage=TextEncode", "step=1/2 pct=50.0%", "step=2/2 pct=100.0%", "video_saved="):
        assert f"task_id={task.task_id} | " in text
        assert part in text


def test_a_prompt_beyond_512_tokens_is_cut_and_said_so_in_log_and_result(engine, caplog):
    task = submit(engine, prompt="red " * 600)
    run(engine)
    [_, remark] = task.result.warnings
    assert remark.startswith("prompt is longer than 512 tokens; ")
    assert remark in caplog.text


# --- guidance and experts


@pytest.mark.parametrize("scale", [-1, 0, 1])
def test_without_guidance_one_branch_runs_and_no_negative_prompt_is_encoded(engine, monkeypatch, scale):
    calls, task = count_calls(monkeypatch, engine), submit(engine, guidance_scale=scale)
    engine.step()
    assert task.buffer.negative_embeddings is None
    run(engine)
    assert calls == ["cond", "cond"]


def test_with_guidance_both_branches_run_in_each_step(engine, monkeypatch):
    calls = count_calls(monkeypatch, engine)
    submit(engine, guidance_scale=2)
    run(engine)
    assert calls == ["cond", "uncond"] * 2


def test_the_negative_prompt_steers_and_an_empty_one_is_not_the_default(tmp_path):
    overrides = ["models.encoder.default_negative_prompt='a blue square'"]
    engine = new_engine(f"output.root_dir={tmp_path}", *overrides)
    tasks = [submit(engine, negative_prompt=text) for text in (None, "a blue square", "")]
    default, same, empty = latents_of(engine, *tasks)
    engine.close()
    assert torch.equal(default, same)
    assert not torch.equal(default, empty)


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a14b")
    write_diffusers(folder / "weights", random_weights(experts=2))
    engine = new_engine(
        f"output.root_dir={folder}", "models=Wan2.2-T2V-A14B", f"models.ckpt_dir={folder / 'weights'}"
    )
    yield engine
    engine.close()


def test_timesteps_from_875_on_use_the_high_noise_expert_and_its_guidance(two_experts, monkeypatch):
    used, guided = [], generator.guided_velocity

    def recorded(predict, scale, pair):
        task = predict.args[0]
        used.append((task.buffer.sampler.timesteps[task.current_step], task.buffer.expert, scale))
        return guided(predict, scale)

    monkeypatch.setattr(generator, "guided_velocity", recorded)
    task = submit(two_experts, num_inference_steps=8, save_dir=str(two_experts.config.output.root_dir))
    run(two_experts)
    assert task.status == Status.Completed, task.error_message
    assert {timestep >= 875 for timestep, *_ in used} == {True, False}
    for timestep, expert, scale in used:
        assert (expert, scale) == (("high_noise", 4.0) if timestep >= 875 else ("low_noise", 3.0))
    assert task.result.experts == ("high_noise", "low_noise")


def test_experts_may_differ_in_whether_they_are_guided(two_experts, monkeypatch):
    calls = count_calls(monkeypatch, two_experts)
    task = submit(two_experts, num_inference_steps=8, guidance_scale=(1, 4))
    [latents] = latents_of(two_experts, task)
    assert list(task.buffer.text_caches) == ["cond"]  # what was made for the former expert is let go
    timesteps = [t for t in generator_timesteps(two_experts, 8) if t >= 875]
    assert calls == ["cond", "uncond"] * len(timesteps) + ["cond"] * (8 - len(timesteps))
    assert torch.isfinite(latents).all()


def generator_timesteps(engine, steps):
    from chitu_diffusion.samplers.unipc import Sampler

    return Sampler(steps, engine.config.models.sampler.sample_shift).timesteps


# --- repeatability


def test_the_same_seed_twice_gives_bit_equal_latents_and_another_does_not(engine):
    tasks = [submit(engine, seed=seed) for seed in (1, 1, 2)]
    first, again, other = latents_of(engine, *tasks)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_seed_that_was_drawn_is_recorded_and_gives_the_same_video_again(engine):
    task = submit(engine, seed=None)
    seed = task.params.seed
    [first] = latents_of(engine, task)
    [again] = latents_of(engine, submit(engine, seed=seed))
    assert torch.equal(first, again)
    last = submit(engine, seed=None)
    run(engine)
    assert last.result.seed == last.params.seed


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_interleaved_tasks_give_what_they_give_alone(engine, solver):
    requests = [
        {"role": "a", "seed": 1, "num_inference_steps": 4, "sample_solver": solver},
        {"role": "b", "seed": 2, "num_inference_steps": 3, "prompt": "a blue ring", "size": (48, 32)},
        {"role": "c", "seed": 1, "num_inference_steps": 4, "guidance_scale": 0, "num_frames": 9},
    ]
    alone = [latents_of(engine, submit(engine, **request))[0] for request in requests]
    together = latents_of(engine, *[submit(engine, **request) for request in requests])
    for expected, actual in zip(alone, together, strict=True):
        assert torch.equal(actual, expected)  # the same operations in the same order: no tolerance


def test_two_engines_do_not_see_each_other(engine, tmp_path):
    [expected] = latents_of(engine, submit(engine))
    other = new_engine(f"output.root_dir={tmp_path}")
    tasks = [submit(one) for one in (engine, other)]
    for _ in range(3):
        engine.step()
        other.step()
    assert all(torch.equal(task.buffer.latents, expected) for task in tasks)
    other.close()
    run(engine)
    assert [task.status for task in tasks] == [Status.Completed, Status.Cancelled]


def test_a_serialized_task_starts_denoising_again_and_ends_on_the_same_latents(engine):
    task = submit(engine, seed=None, num_inference_steps=3)
    copies = []
    for _ in range(3):
        engine.step()
        copies.append(DiffusionTask.deserialize(task.serialize()))
    assert [copy.current_step for copy in copies] == [0, 1, 2]
    [expected] = latents_of(engine, task)
    for copy in copies:
        engine.step()  # carries out the cancelling of `task`
        engine.pool.remove(task.task_id)
        engine.pool.add(copy)
        [actual] = latents_of(engine, copy)
        assert torch.equal(actual, expected)
        task = copy


def test_a_task_serialized_before_decoding_is_decoded(engine, monkeypatch):
    task = submit(engine)
    while task.task_type != Stage.VAEDecode:
        engine.step()
    copy = DiffusionTask.deserialize(task.serialize())
    engine.pool.cancel(task.task_id)
    engine.step()
    engine.pool.remove(task.task_id)
    calls = count_calls(monkeypatch, engine)
    engine.pool.add(copy)
    run(engine)
    assert (copy.status, copy.error_message, calls) == (Status.Completed, None, [])
    assert copy.result.experts == ("dit",)


# --- scheduling


def served(engine, *tasks):
    """Which task each step advances, until all have ended."""
    order, before = [], {task.task_id: (task.status, task.task_type, task.current_step) for task in tasks}
    while not engine.pool.all_finished():
        engine.step()
        now = {task.task_id: (task.status, task.task_type, task.current_step) for task in tasks}
        [moved] = [index for index, task in enumerate(tasks) if now[task.task_id] != before[task.task_id]]
        order.append(moved)
        before = now
    return order


def test_round_robin_serves_roles_in_turn(engine):
    tasks = [submit(engine, role=role) for role in ("a", "a", "b")]
    engine.scheduler._last_role = None
    assert served(engine, *tasks) == [0, 2] * 4 + [1] * 4


def test_fifo_and_priority_order_whole_requests(tmp_path):
    fifo = new_engine(f"output.root_dir={tmp_path}")
    priority = new_engine(f"output.root_dir={tmp_path}", "infer.schedule_policy=priority")
    for engine, expected in ((fifo, [0] * 4 + [1] * 4 + [2] * 4), (priority, [1] * 4 + [0] * 4 + [2] * 4)):
        tasks = [submit(engine, priority=value) for value in (1, 5, 1)]
        assert served(engine, *tasks) == expected
        engine.close()


def test_no_more_than_max_reqs_tasks_hold_denoising_state(tmp_path):
    engine = new_engine(
        f"output.root_dir={tmp_path}", "infer.schedule_policy=round_robin", "infer.max_reqs=2"
    )
    tasks = [submit(engine, role=str(index)) for index in range(4)]
    most = 0
    while not engine.pool.all_finished():
        engine.step()
        most = max(most, sum(task.buffer.latents is not None for task in tasks))
    assert most == 2
    assert all(task.status == Status.Completed for task in tasks)
    engine.close()


# --- cancelling and failing


@pytest.mark.parametrize("steps_before", [0, 1, 2, 3])
def test_a_cancelled_task_ends_with_the_next_step_and_holds_nothing(engine, steps_before):
    task = submit(engine)
    for _ in range(steps_before):
        engine.step()
    assert engine.pool.cancel(task.task_id)
    engine.step()
    assert (task.status, task.error_message) == (Status.Cancelled, "cancelled")
    assert task.buffer == DiffusionTaskBuffer(current_step=max(0, steps_before - 1))
    assert engine.pool.all_finished()
    assert not engine.pool.cancel(task.task_id)


def test_the_step_that_cancels_one_task_advances_another(engine):
    first, second = submit(engine), submit(engine)
    engine.step()
    engine.pool.cancel(first.task_id)
    engine.step()
    assert (first.status, second.phase) == (Status.Cancelled, "denoising")
    run(engine)
    assert second.status == Status.Completed


STAGES = {
    "encode": lambda engine: (engine.pipeline.prompt_encoder, "tokenize"),  # embeddings are kept
    "denoise": lambda engine: (engine.generator, "_predict"),
    "decode": lambda engine: (engine.pipeline.vae, "decode"),
    "write": lambda _: (media.VideoWriter, "put"),
    "record": lambda _: (generator, "write_json"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_task_that_raises_fails_with_its_message_and_the_next_goes_on(engine, monkeypatch, tmp_path, stage):
    failing = submit(engine, save_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage](engine), raising(KeyError("broken")))
        run(engine)
    assert (failing.status, failing.error_message) == (Status.Failed, "KeyError: 'broken'")
    assert (failing.result, failing.buffer.save_path) == (None, None)
    assert (failing.buffer.latents, failing.buffer.text_embeddings, failing.buffer.text_caches) == (
        None,
        None,
        {},
    )
    assert engine.pool.all_finished()
    following = submit(engine)
    run(engine)
    assert following.status == Status.Completed
    assert [path.suffix for path in tmp_path.iterdir()] == ([".mp4"] if stage == "record" else [])


def test_a_failure_between_two_tasks_leaves_the_other_as_it_is_alone(engine, monkeypatch):
    [expected] = latents_of(engine, submit(engine))
    good, bad = submit(engine, role="a"), submit(engine, role="b", prompt="bad")
    predict = engine.generator._predict

    def picky(task, branch):
        if task is bad:
            raise RuntimeError("only this one")
        return predict(task, branch)

    monkeypatch.setattr(engine.generator, "_predict", picky)
    [actual] = latents_of_good(engine, good)
    assert bad.error_message == "RuntimeError: only this one"
    assert torch.equal(actual, expected)


def latents_of_good(engine, task):
    while task.task_type != Stage.VAEDecode:
        engine.step()
    return [task.buffer.latents.clone()]


OUT_OF_MEMORY = [
    pytest.param(raising(torch.OutOfMemoryError("CUDA out of memory")), id="cuda"),
    pytest.param(raising(MemoryError("no more")), id="python"),
    pytest.param(
        lambda *_: torch.empty(10**14),  # beyond the address space: refused without being tried
        id="torch-cpu",
    ),
]


@pytest.mark.parametrize("fail", OUT_OF_MEMORY)
def test_out_of_memory_fails_the_task_with_advice_and_the_engine_goes_on(engine, monkeypatch, fail):
    task = submit(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.generator, "_predict", fail)
        run(engine)
    following = submit(engine)
    run(engine)
    assert following.status == Status.Completed
    assert task.status == Status.Failed
    assert task.error_message.startswith(
        "out of memory; ask for a smaller size, fewer frames, infer.max_reqs=1, or a higher "
        "infer.diffusion.low_mem_level"
    )


def test_a_failed_task_keeps_no_tensor_alive(engine, monkeypatch):
    monkeypatch.setattr(logging.getLogger("chitu_diffusion.engine"), "disabled", True)  # pytest keeps records
    task = submit(engine)
    engine.step()
    engine.step()
    latents = weakref.ref(task.buffer.latents)

    def fail(task, branch):
        raise RuntimeError  # made here: `raising` would keep its error, and the error its frames

    monkeypatch.setattr(engine.generator, "_predict", fail)
    engine.step()
    assert task.status == Status.Failed
    assert latents() is None


def test_a_latent_that_is_not_finite_fails_in_place_of_a_black_video(engine, monkeypatch, tmp_path):
    predict = engine.generator._predict
    monkeypatch.setattr(engine.generator, "_predict", lambda *args: predict(*args) * torch.nan)
    task = submit(engine, save_dir=str(tmp_path))
    run(engine)
    assert task.error_message.startswith(
        "FloatingPointError: denoising in torch.float32 gave values that are not"
    )
    assert "check the checkpoint" in task.error_message
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_fails_the_task_and_leaves_no_half_file(engine, monkeypatch, tmp_path):
    task = submit(engine, save_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(media.os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
        run(engine)
    assert task.status == Status.Failed
    assert "No space left on device" in task.error_message
    assert str(tmp_path) in task.error_message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["save_dir", "save_path"])
def test_a_place_that_cannot_be_written_fails_before_anything_is_encoded(engine, monkeypatch, tmp_path, key):
    (tmp_path / "file").touch()
    monkeypatch.setattr(engine.pipeline.prompt_encoder, "tokenize", raising(AssertionError("too late")))
    task = submit(engine, **{key: str(tmp_path / "file" / "sub" / "clip.mp4")})
    run(engine)
    assert task.status == Status.Failed
    assert task.error_message.startswith(f"ValueError: {key}: cannot write into {tmp_path / 'file'}")


def test_a_request_that_does_not_fit_is_refused_at_the_pool(engine):
    with pytest.raises(ValueError, match=r"guidance_scale=\(1, 2\): demo takes one value"):
        submit(engine, guidance_scale=(1, 2))
    cache = {"strategy": "teacache", "warmup": 15}
    with pytest.raises(ValueError, match=r"warmup \+ cooldown = 20 must be below num_inference_steps=20"):
        submit(engine, flexcache_params=cache, num_inference_steps=None)
    with pytest.raises(ValueError, match=r"task_id='x' has no request"):
        engine.pool.add(DiffusionTask("x"))
    request = DiffusionUserRequest("y", DiffusionUserParams(), torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"init_image: demo makes video from text alone"):
        engine.pool.add(DiffusionTask.from_user_request(request))
    assert engine.pool.is_empty()


# --- building and ending


def test_a_checkpoint_that_is_empty_or_missing_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        with pytest.raises(ValueError, match=rf"models\.ckpt_dir=.*{name}"):
            new_engine(f"output.root_dir={tmp_path}", f"models.ckpt_dir={tmp_path / name}")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    write_diffusers(tmp_path / "weights", random_weights())
    file = tmp_path / "weights" / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["model"]["vocab"] += [[f"surplus{number}", -99.0] for number in range(500)]
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(
        ValueError, match=r"text encoder has 384 rows: .*wrong tokenizer for this text encoder"
    ):
        new_engine(
            f"output.root_dir={tmp_path}", "models=Wan2.1-T2V-1.3B", f"models.ckpt_dir={tmp_path / 'weights'}"
        )


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (4, ["infer.diffusion.cp_size=3"], r"infer\.diffusion\.cp_size=3: .*legal: 2, 4 or auto"),
        (3, ["infer.diffusion.cfg_size=2"], r"infer\.diffusion\.cfg_size=2: .*legal: 1 or auto"),
        (4, ["infer.dp_size=3"], r"infer\.dp_size=3: .*legal: 1, 2, 4"),
        (4, ["infer.dp_size=2", "infer.diffusion.cp_size=4"], r"cp_size=4: .*legal: 1, 2 or auto"),
        (4, ["infer.diffusion.cfg_size=1", "infer.diffusion.cp_size=2"], r"cp_size=2: .*legal: 4 or auto"),
    ],
)
def test_degrees_that_do_not_fill_the_world_are_refused_before_a_group_exists(
    tmp_path, monkeypatch, world, overrides, message
):
    monkeypatch.setattr(dist, "init_process_group", raising(AssertionError("too late")))
    with pytest.raises(ValueError, match=message):
        new_engine(f"output.root_dir={tmp_path}", *overrides, environment=first_of(world))


def test_ranks_without_an_address_to_meet_at_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", raising(AssertionError("too late")))
    for name, environment in (
        ("MASTER_ADDR", dataclasses.replace(first_of(2), master_addr=None)),
        ("MASTER_PORT", dataclasses.replace(first_of(2), master_port=None)),
    ):
        with pytest.raises(ValueError, match=f"{name} is not set, but WORLD_SIZE=2; .* torchrun or srun"):
            new_engine(f"output.root_dir={tmp_path}", environment=environment)


class WithoutLse(Attention):
    """What sparge is on a GPU: a kernel that parts of a sequence cannot use."""

    is_exact = False

    def __init__(self):
        super().__init__("sparge")

    @classmethod
    def unavailable(cls, variant, place):
        return None

    def __call__(self, *_):
        raise AssertionError("never called")


def test_a_kernel_that_gives_no_lse_is_refused_for_a_ring_before_a_group_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", raising(AssertionError("too late")))
    choose, create = attention.choose, attention.create

    def chosen(name, place, **options):
        return name if name == "sparge" else choose(name, place, **options)

    def made(name, place, **options):
        return WithoutLse() if name == "sparge" else create(name, place, **options)

    monkeypatch.setattr(attention, "choose", chosen)
    monkeypatch.setattr(attention, "create", made)
    overrides = ["infer.attn_type=sparge", "infer.diffusion.cfg_size=1", "infer.diffusion.up_limit=1"]
    with pytest.raises(
        ValueError, match=r"infer\.attn_type=sparge .* ring of 2 ranks .*choose one of .*sdpa"
    ):
        new_engine(f"output.root_dir={tmp_path}", *overrides, environment=first_of(2))


def test_a_refused_engine_leaves_no_log_handler_behind(tmp_path):
    before = list(logging.getLogger("chitu_diffusion").handlers)
    with pytest.raises(ValueError, match="dp_size"):
        new_engine(f"output.root_dir={tmp_path}", "infer.dp_size=3", environment=first_of(4))
    assert logging.getLogger("chitu_diffusion").handlers == before


def test_a_closed_engine_cancels_what_is_left_and_takes_no_more(tmp_path):
    engine = new_engine(f"output.root_dir={tmp_path}", "output.enable_timer_dump=true")
    done = submit(engine)
    run(engine)
    left = submit(engine)
    engine.step()
    engine.close()
    engine.close()
    assert (done.status, left.status, left.error_message) == (
        Status.Completed,
        Status.Cancelled,
        "terminated",
    )
    assert engine.state == BackendState.Terminated
    assert "denoise" in (engine.folder.path / "time_stats.csv").read_text()
    with pytest.raises(RuntimeError, match="this engine is terminated"):
        engine.step()


def test_an_engine_whose_last_files_cannot_be_written_is_terminated_all_the_same(tmp_path, monkeypatch):
    engine = new_engine(f"output.root_dir={tmp_path}")
    monkeypatch.setattr(engine.folder, "close", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        engine.close()
    assert engine.state == BackendState.Terminated


# --- the facade


def finish():
    while not DiffusionTaskPool.all_finished():
        chitu_generate()


def test_the_five_functions_make_a_video(facade):
    assert DiffusionBackend.state == BackendState.Uninitialized
    chitu_init(facade, logging_level=logging.ERROR)
    assert DiffusionBackend.state == BackendState.Initialized
    chitu_start()
    assert DiffusionBackend.state == BackendState.Running
    task = DiffusionTask.from_user_request(DiffusionUserParams(**SMALL))
    DiffusionTaskPool.add(task)
    finish()
    assert os.path.isfile(task.buffer.save_path)
    assert DiffusionTaskPool.get_statistics()["finished"] == 1
    assert DiffusionBackend.args.models.name == "demo"
    assert len(DiffusionBackend.model_pool) == 1
    assert DiffusionBackend.scheduler.policy == "fifo"
    assert DiffusionBackend.memory_used("now").startswith("now: no device, host peak ")
    chitu_terminate()
    assert chitu_is_terminated()


def test_nothing_works_before_init_but_asking_and_ending(facade):
    for function in (chitu_start, chitu_generate):
        with pytest.raises(RuntimeError, match="there is no engine; call chitu_init first"):
            function()
    assert not chitu_is_terminated()
    chitu_terminate()
    assert not chitu_is_terminated()


def test_a_second_init_is_refused_until_the_first_engine_is_terminated(facade):
    chitu_init(facade, logging_level=logging.ERROR)
    engine = DiffusionBackend.engine
    with pytest.raises(RuntimeError, match="chitu_init was called before; call chitu_terminate first"):
        chitu_init(facade, logging_level=logging.ERROR)
    assert DiffusionBackend.engine is engine
    chitu_terminate()
    chitu_init(facade, logging_level=logging.ERROR)
    task = DiffusionTask.from_user_request(DiffusionUserParams(**SMALL))
    DiffusionTaskPool.add(task)
    finish()
    assert task.status == Status.Completed


def test_an_init_that_fails_can_be_repeated(facade):
    facade.models.ckpt_dir = "/nowhere"
    with pytest.raises(ValueError, match=r"models\.ckpt_dir=/nowhere"):
        chitu_init(facade, logging_level=logging.ERROR)
    assert DiffusionBackend.state == BackendState.Uninitialized
    facade.models.ckpt_dir = None
    chitu_init(facade, logging_level=logging.ERROR)
    assert DiffusionBackend.state == BackendState.Initialized


def test_tasks_that_came_before_the_engine_are_completed_or_fail_by_themselves(facade):
    good = DiffusionTask.from_user_request(DiffusionUserParams(**SMALL))
    bad = DiffusionTask.from_user_request(DiffusionUserParams(**SMALL, guidance_scale=(1, 2)))
    for task in (bad, good):
        DiffusionTaskPool.add(task)
    chitu_init(facade, logging_level=logging.ERROR)
    assert (bad.status, bad.error_message[:22]) == (Status.Failed, "guidance_scale=(1, 2):")
    finish()
    assert good.status == Status.Completed


def test_a_terminate_signal_ends_the_engine_once(facade):
    chitu_init(facade, logging_level=logging.ERROR)
    task = DiffusionTask.from_user_request(DiffusionUserParams(**SMALL))
    DiffusionTaskPool.add(task)
    chitu_generate()
    signal = DiffusionTask.create_terminate_signal()
    DiffusionTaskPool.add(signal)
    finish()
    assert chitu_is_terminated()
    assert (task.status, task.error_message) == (Status.Cancelled, "terminated")
    assert signal.status == Status.Completed
    chitu_init(facade, logging_level=logging.ERROR)
    chitu_generate()
    assert not chitu_is_terminated()


def test_bad_keys_of_a_composed_configuration_are_refused(facade):
    facade.infer.max_reqs = 0
    with pytest.raises(ValueError, match=r"infer\.max_reqs=0"):
        chitu_init(facade, logging_level=logging.ERROR)


def test_another_network_under_the_name_of_the_demo_model_is_refused(tmp_path):
    write_diffusers(tmp_path / "weights", random_weights())
    with pytest.raises(
        ValueError, match=r"models\.ckpt_dir=.* holds another network than models=demo.*add models="
    ):
        new_engine(f"output.root_dir={tmp_path}", f"models.ckpt_dir={tmp_path / 'weights'}")


def test_the_run_log_begins_with_the_model(tmp_path):
    chitu_logging.setup(Environment(), logging.INFO)
    engine = new_engine(f"output.root_dir={tmp_path}")
    task = submit(engine, num_inference_steps=1)
    run(engine)
    engine.close()
    log = (Path(task.buffer.save_path).parent / "run.log").read_text("utf-8")
    assert "model demo on cpu" in log
    assert "checkpoint" in log
    assert "event=START stage=TextEncode" in log


def test_an_engine_that_cannot_take_over_the_pool_stops_to_listen(tmp_path):
    pool = TaskPool()
    pool.add(DiffusionTask("x", req="no request"))
    listening = list(logging.getLogger("chitu_diffusion").handlers)
    with pytest.raises(AttributeError):
        Engine(configured("infer.op_impl=cpu", f"output.root_dir={tmp_path}"), pool, Environment())
    assert logging.getLogger("chitu_diffusion").handlers == listening


def test_a_task_that_another_rank_could_not_end_has_no_result(engine):
    task = submit(engine)
    task.result, task.buffer.save_path = "the leader's record", "video.mp4"
    engine.ledger.finish(task, Status.Failed, "rank 1: out of memory")
    assert (task.result, task.buffer.save_path) == (None, None)
