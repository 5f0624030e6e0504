"""Policies: which task is advanced next, and how many may be under way."""

import pytest

from chitu_diffusion.scheduler import DiffusionScheduler
from chitu_diffusion.task import (
    DiffusionTask,
    DiffusionTaskStatus,
    DiffusionUserParams,
    DiffusionUserRequest,
    TaskPool,
)


def pool_of(*names, **priorities):
    """Tasks a1, a2, b1, ... of roles a, a, b in a pool without an engine."""
    pool = TaskPool()
    for name in names:
        params = DiffusionUserParams(role=name[0], priority=priorities.get(name, 0))
        task = DiffusionTask(name, req=DiffusionUserRequest(name, params))
        pool.add(task)
    return pool


def turns(scheduler, pool, count):
    """Ids of the next `count` turns; each one begins its task."""
    served = []
    for _ in range(count):
        [task_id] = scheduler.schedule(pool)
        pool.pool[task_id].status = DiffusionTaskStatus.Running
        served.append(task_id)
    return served


def test_fifo_serves_the_oldest_task_until_it_ends():
    pool, scheduler = pool_of("a1", "b1"), DiffusionScheduler()
    assert turns(scheduler, pool, 3) == ["a1"] * 3
    pool.pool["a1"].status = DiffusionTaskStatus.Failed
    assert turns(scheduler, pool, 2) == ["b1"] * 2


def test_priority_serves_the_largest_first_and_equals_by_age():
    pool, scheduler = pool_of("a1", "b1", "c1", b1=2, c1=2), DiffusionScheduler("priority")
    order = []
    while scheduler.can_schedule(pool):
        order += turns(scheduler, pool, 1)
        pool.pool[order[-1]].status = DiffusionTaskStatus.Completed
    assert order == ["b1", "c1", "a1"]


def test_a_more_urgent_task_overtakes_one_under_way():
    pool, scheduler = pool_of("a1"), DiffusionScheduler("priority")
    assert turns(scheduler, pool, 1) == ["a1"]
    urgent = DiffusionUserRequest("b1", DiffusionUserParams(priority=1))
    pool.add(DiffusionTask("b1", req=urgent))
    assert turns(scheduler, pool, 1) == ["b1"]


def test_round_robin_serves_roles_in_turn_each_by_its_oldest_task():
    pool, scheduler = pool_of("a1", "a2", "b1", "c1"), DiffusionScheduler("round_robin")
    assert turns(scheduler, pool, 6) == ["a1", "b1", "c1"] * 2
    pool.pool["a1"].status = DiffusionTaskStatus.Completed
    pool.pool["c1"].status = DiffusionTaskStatus.Completed
    assert turns(scheduler, pool, 4)[-2:] in (["a2", "b1"], ["b1", "a2"])


@pytest.mark.parametrize("policy", ["fifo", "priority", "round_robin"])
def test_no_more_tasks_than_max_reqs_are_under_way(policy):
    pool = pool_of("a1", "b1", "c1", "d1", c1=5, d1=9)
    scheduler = DiffusionScheduler(policy, max_reqs=2)
    served = set(turns(scheduler, pool, 12))
    assert len(served) == (1 if policy in ("fifo", "priority") else 2)
    under_way = [task for task in pool.unfinished() if task.is_running()]
    assert len(under_way) <= 2


def test_one_at_a_time_finishes_a_task_before_a_more_urgent_one_begins():
    pool, scheduler = pool_of("a1"), DiffusionScheduler("priority", max_reqs=1)
    assert turns(scheduler, pool, 1) == ["a1"]
    pool.add(DiffusionTask("b1", req=DiffusionUserRequest("b1", DiffusionUserParams(priority=9))))
    assert turns(scheduler, pool, 2) == ["a1", "a1"]


@pytest.mark.parametrize("policy", ["fifo", "priority", "round_robin"])
def test_one_by_one_a_task_runs_to_its_end_whatever_the_policy(policy):
    pool, scheduler = pool_of("a1"), DiffusionScheduler(policy, max_reqs=8, one_by_one=True)
    assert turns(scheduler, pool, 1) == ["a1"]
    pool.add(DiffusionTask("b1", req=DiffusionUserRequest("b1", DiffusionUserParams(role="b", priority=9))))
    assert turns(scheduler, pool, 3) == ["a1"] * 3
    pool.pool["a1"].status = DiffusionTaskStatus.Cancelled
    assert turns(scheduler, pool, 2) == ["b1"] * 2


def test_nothing_to_do_gives_an_empty_list():
    scheduler = DiffusionScheduler()
    assert scheduler.schedule(TaskPool()) == []
    assert not scheduler.can_schedule(TaskPool())


def test_an_unknown_policy_is_refused_with_the_legal_ones():
    with pytest.raises(ValueError, match=r"infer\.schedule_policy='fair' .* fifo, priority, round_robin"):
        DiffusionScheduler("fair")


def test_counts_tell_pending_from_running():
    pool, scheduler = pool_of("a1", "b1", "c1"), DiffusionScheduler(max_reqs=3)
    turns(scheduler, pool, 1)
    assert scheduler.get_pending_count(pool) == scheduler.get_queue_length(pool) == 2
    info = scheduler.get_scheduler_info(pool)
    assert info == {"policy": "fifo", "max_reqs": 3, "pending": 2, "running": 1}


def test_schedule_may_be_overridden():
    class Newest(DiffusionScheduler):
        def schedule(self, pool):
            return [task.task_id for task in pool.unfinished()[-1:]]

    assert Newest().schedule(pool_of("a1", "b1")) == ["b1"]
