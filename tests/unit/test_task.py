"""Tasks and their pool: ids, phases, wishes and counts, without an engine."""

import itertools
import time

import pytest

from chitu_diffusion.task import (
    DiffusionTask,
    DiffusionTaskBuffer,
    DiffusionTaskPool,
    DiffusionTaskStatus,
    DiffusionTaskType,
    DiffusionUserParams,
    DiffusionUserRequest,
    TaskPool,
)

Status, Stage = DiffusionTaskStatus, DiffusionTaskType


def new_task(**values):
    return DiffusionTask.from_user_request(DiffusionUserParams(**values))


def test_a_task_made_from_parameters_is_pending_under_a_new_id_of_eight_hexadecimal_digits():
    task, other = new_task(prompt="a cat"), new_task()
    assert len(task.task_id) == 8
    assert int(task.task_id, 16) >= 0
    assert task.task_id != other.task_id
    assert (task.status, task.task_type, task.phase) == (Status.Pending, Stage.TextEncode, "pending")
    assert task.req.request_id == task.task_id
    assert (task.user_params.prompt, task.error_message, task.result) == ("a cat", None, None)


def test_a_task_made_from_a_request_keeps_its_id():
    request = DiffusionUserRequest("mine", DiffusionUserParams(prompt="a"))
    task = DiffusionTask.from_user_request(request)
    assert (task.task_id, task.req) == ("mine", request)


def test_a_request_without_parameters_has_defaults():
    request = DiffusionUserRequest("r")
    assert (request.get_role(), request.get_prompt(), request.get_n_prompt()) == ("user", "", "")
    full = DiffusionUserRequest("r", DiffusionUserParams(role="me", prompt="a", negative_prompt="b"))
    assert (full.get_role(), full.get_prompt(), full.get_n_prompt()) == ("me", "a", "b")


def test_stages_and_statuses_have_the_documented_numbers():
    stages = {"TextEncode": 1, "VAEEncode": 2, "Denoise": 3, "VAEDecode": 4, "Terminate": 5}
    statuses = {"Pending": 1, "Running": 2, "Completed": 3, "Failed": 4, "Cancelled": 5}
    assert {stage.name: stage.value for stage in Stage} == stages
    assert {status.name: status.value for status in Status} == statuses


@pytest.mark.parametrize(
    ("status", "stage", "phase"),
    [
        (Status.Pending, Stage.TextEncode, "pending"),
        (Status.Running, Stage.TextEncode, "encoding"),
        (Status.Running, Stage.Denoise, "denoising"),
        (Status.Running, Stage.VAEDecode, "decoding"),
        (Status.Completed, Stage.VAEDecode, "finished"),
        (Status.Failed, Stage.Denoise, "failed"),
        (Status.Cancelled, Stage.Denoise, "cancelled"),
    ],
)
def test_the_phase_follows_from_status_and_stage(status, stage, phase):
    task = new_task()
    task.status, task.task_type = status, stage
    assert task.phase == phase
    assert task.is_finished() == task.is_completed() == (phase in ("finished", "failed", "cancelled"))
    assert task.is_running() == phase.endswith("ing") * (phase != "pending")


def test_elapsed_time_is_zero_before_the_start_runs_on_and_stops_at_the_end():
    task = new_task()
    assert task.get_elapsed_time() == 0
    task.started_at = time.time() - 5
    assert 5 <= task.get_elapsed_time() < 10
    task.finished_at = task.started_at + 2
    assert task.get_elapsed_time() == pytest.approx(2)


def test_a_terminate_signal_counts_as_ended_and_never_as_running():
    signal = DiffusionTask.create_terminate_signal(reason="enough")
    assert signal.task_id.startswith("terminate_signal_")
    assert (signal.req, signal.signal_data["reason"]) == (None, "enough")
    assert signal.is_terminate_signal()
    assert signal.is_completed()
    assert not signal.is_running()
    assert DiffusionTask.create_terminate_signal("0x").task_id == "0x"


def test_a_pool_keeps_tasks_in_the_order_in_which_they_came_and_each_id_once():
    pool, tasks = TaskPool(), [new_task() for _ in range(3)]
    assert [pool.add(task) for task in (*tasks, tasks[0])] == [True, True, True, False]
    assert pool.id_list == pool.get_pending_tasks() == [task.task_id for task in tasks]
    assert pool.get(tasks[1].task_id) is tasks[1]
    assert pool.get("unknown") is None


def test_an_empty_pool_has_all_finished():
    pool = TaskPool()
    assert pool.is_empty()
    assert pool.all_finished()


@pytest.mark.parametrize("status", [Status.Completed, Status.Failed, Status.Cancelled])
def test_a_pool_has_finished_when_every_task_has_ended_in_any_way(status):
    pool, task = TaskPool(), new_task()
    pool.add(task)
    assert not pool.all_finished()
    task.status = status
    assert pool.all_finished()


def test_held_back_tasks_enter_together():
    pool, tasks = TaskPool(), [new_task(), new_task()]
    for task in tasks:
        pool.enqueue(task)
    assert pool.is_empty()
    pool.add_all_queued()
    assert pool.id_list == [task.task_id for task in tasks]
    assert pool.pending_queue == []


def test_a_removed_task_is_forgotten_and_holds_nothing_but_its_path():
    pool, task = TaskPool(), new_task()
    task.buffer = DiffusionTaskBuffer(current_step=3, seq_len=4, save_path="a.mp4")
    pool.add(task)
    pool.remove(task.task_id)
    assert pool.is_empty()
    assert pool.id_list == []
    assert task.buffer == DiffusionTaskBuffer(save_path="a.mp4")


def test_an_unknown_or_running_task_cannot_be_removed():
    pool, task = TaskPool(), new_task()
    with pytest.raises(ValueError, match=r"task_id='nobody' is not in the pool"):
        pool.remove("nobody")
    pool.add(task)
    task.status = Status.Running
    with pytest.raises(ValueError, match=rf"task_id='{task.task_id}' is running; cancel it first"):
        pool.remove(task.task_id)


def test_cancel_sets_a_wish_and_refuses_what_is_unknown_or_has_ended():
    pool, task = TaskPool(), new_task()
    pool.add(task)
    assert not pool.cancel("nobody")
    assert pool.cancel(task.task_id)
    assert (task.cancel_requested, task.status) == (True, Status.Pending)
    task.status = Status.Completed
    assert not pool.cancel(task.task_id)


def test_statistics_count_every_phase_and_no_signal():
    pool = TaskPool()
    pool.add(DiffusionTask.create_terminate_signal())
    for status, stage in [
        (Status.Running, Stage.Denoise),
        (Status.Running, Stage.Denoise),
        (Status.Failed, None),
    ]:
        task = new_task()
        task.status, task.task_type = status, stage or task.task_type
        pool.add(task)
    counts = pool.get_statistics()
    assert counts == {
        "pending": 0,
        "encoding": 0,
        "denoising": 2,
        "decoding": 0,
        "finished": 0,
        "failed": 1,
        "cancelled": 0,
    }


def test_a_refused_task_does_not_enter():
    def refuse(task):
        raise ValueError("does not fit")

    pool = TaskPool()
    pool.attach(refuse)
    with pytest.raises(ValueError, match="does not fit"):
        pool.add(new_task())
    assert pool.is_empty()


def test_two_pools_do_not_see_each_other_and_reset_empties_one():
    pool, other = TaskPool(), TaskPool()
    pool.add(new_task())
    pool.enqueue(new_task())
    assert other.is_empty()
    pool.reset()
    assert (pool.pool, pool.id_list, pool.pending_queue) == ({}, [], [])


def test_the_process_pool_is_one_pool_under_documented_names():
    task = new_task()
    try:
        assert DiffusionTaskPool.add(task)
        assert DiffusionTaskPool.pool == {task.task_id: task}
        assert DiffusionTaskPool.id_list == [task.task_id]
        assert DiffusionTaskPool.get(task.task_id) is task
        assert not DiffusionTaskPool.all_finished()
    finally:
        DiffusionTaskPool.reset()
    assert DiffusionTaskPool.is_empty()
    assert DiffusionTaskPool.pool == {}


def test_processes_that_make_the_same_tasks_find_the_same_ids(monkeypatch):
    def ids_of_a_process(*prompts):
        monkeypatch.setattr(DiffusionTask, "_made", itertools.count())
        return [new_task(prompt=prompt).task_id for prompt in prompts]

    first = ids_of_a_process("a cat", "a dog", "a cat")
    assert ids_of_a_process("a cat", "a dog", "a cat") == first
    assert len(set(first)) == 3
    assert ids_of_a_process("a cat", "a cow", "a cat")[1] != first[1]


def test_a_replica_shares_in_its_own_tasks_and_in_those_that_none_has_begun():
    pool, tasks = TaskPool(), [new_task(prompt=str(number)) for number in range(4)]
    for task, replica in zip(tasks, (None, 0, 1, None), strict=True):
        task.replica = replica
        pool.add(task)
    assert pool.share(1).id_list == [tasks[index].task_id for index in (0, 2, 3)]
    assert pool.share(0).unfinished() == [tasks[0], tasks[1], tasks[3]]
    assert pool.share(0).get(tasks[2].task_id) is None


@pytest.mark.parametrize("name", [5, None, "", b"mine"])
def test_a_request_whose_id_is_no_text_is_refused(name):
    with pytest.raises(ValueError, match=r"request_id=.*: must be text that is not empty"):
        DiffusionUserRequest(name)


def test_a_request_of_anything_but_parameters_is_refused():
    with pytest.raises(ValueError, match=r"params=\{'prompt': 'a'\}: must be DiffusionUserParams, or None"):
        DiffusionUserRequest("mine", {"prompt": "a"})
