"""Which attention the blocks hold at which step, and what the record says about it."""

from dataclasses import replace

import pytest
import torch
from engines import configured, new_engine, run, submit
from parity.test_dit import TINY

from chitu_core import attention
from chitu_core.attention import Attention, Place
from chitu_core.config import AttentionScheduleConfig
from chitu_core.timing import Timer
from chitu_diffusion.attention_plan import AttentionPlan, plan_attention
from chitu_diffusion.models.wan import WanDiT

CPU = Place("cpu", None, torch.float32, 16)
EXACT = attention.create("sdpa", CPU)


class Lossy(Attention):
    """Rounds the output and counts its calls."""

    is_exact = False

    def __init__(self) -> None:
        super().__init__("rough")
        self.calls = 0

    @classmethod
    def unavailable(cls, variant, place):
        return None

    def __call__(self, q, k, v):
        self.calls += 1
        return EXACT(q, k, v).half().to(q.dtype)


def plan(first: int = 0, last: int = 0, layers: tuple[int, ...] = ()) -> AttentionPlan:
    return AttentionPlan(Lossy(), EXACT, EXACT, AttentionScheduleConfig(first, last, layers))


def held(dit: WanDiT) -> list[str]:
    return [block.self_attn.attention.name for block in dit.block_list()]


def test_blocks_hold_the_chosen_attention_but_for_named_layers():
    dit = WanDiT(TINY)
    plan(layers=(0, 2)).install(dit)
    assert held(dit) == ["sdpa", "rough", "sdpa"]
    assert all(block.cross_attn.attention is EXACT for block in dit.block_list())


def test_first_and_last_steps_are_exact():
    dit, scheduled = WanDiT(TINY), plan(first=2, last=1, layers=(1,))
    scheduled.install(dit)
    middle = []
    for step in range(6):
        scheduled.enter_step(dit, step, total=6)
        assert held(dit)[1] == "sdpa"
        middle.append(held(dit)[0])
    assert middle == ["sdpa", "sdpa", "rough", "rough", "rough", "sdpa"]


def test_the_record_says_what_was_approximated():
    assert plan().approximations(6) == ("self-attention: rough in 6 of 6 steps",)
    assert plan(2, 1, (0, 1)).approximations(6) == (
        "self-attention: rough in 3 of 6 steps, blocks 0, 1 excepted",
    )
    assert plan(first=6).approximations(6) == ()
    assert replace(plan(), chosen=EXACT).approximations(6) == ()


def test_steps_are_counted_for_each_request(tmp_path):
    engine = new_engine("infer.op_impl=torch", f"output.root_dir={tmp_path}")
    scheduled = plan(first=1, last=1)
    engine.generator.pipeline = replace(engine.pipeline, attention=scheduled)
    scheduled.install(engine.pipeline.experts["dit"])
    tasks = [
        submit(engine, role=role, num_frames=1, num_inference_steps=steps)
        for steps, role in ((3, "a"), (5, "b"))
    ]
    run(engine)
    engine.close()
    blocks, branches = 8, 2
    assert scheduled.chosen.calls == (1 + 3) * blocks * branches
    assert [task.result.approximations[0] for task in tasks] == [
        "self-attention: rough in 1 of 3 steps",
        "self-attention: rough in 3 of 5 steps",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["infer.attn_schedule.exact_first_steps=2"],
            r"attn_schedule is set, but infer.attn_type=auto is exact",
        ),
        (["infer.attn_schedule.exact_layers=[8]"], r"exact_layers=\[8\]: the model has blocks 0 to 7"),
        (["infer.cross_attn_type=sage"], r"infer.cross_attn_type='sage' approximates"),
    ],
)
def test_a_schedule_that_cannot_apply_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_attention(configured(*overrides).infer, CPU, num_layers=8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("infer.attn_schedule.exact_last_steps=-1", r"exact_last_steps=-1: must be 0 or more"),
        ("infer.attn_schedule.exact_layers=[-1]", r"exact_layers=\[-1\]: must be block numbers"),
        ("infer.attn_config.sparsity_ratio=1.0", r"sparsity_ratio=1.0: must lie in \[0, 1\)"),
    ],
)
def test_illegal_settings_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        configured(override)


def test_the_record_names_both_backends(tmp_path):
    engine = new_engine("infer.op_impl=torch", f"output.root_dir={tmp_path}")
    task = submit(engine, num_frames=1, num_inference_steps=1)
    run(engine)
    engine.close()
    assert (task.result.attention, task.result.cross_attention) == ("sdpa", "sdpa")
    assert task.result.approximations == ()


def test_attention_that_ranks_share_is_timed_on_request():
    timer = Timer(torch.device("cpu"), enabled=True)
    shared, dit = replace(plan(first=1, layers=(0,)), timer=timer, ranks=2), WanDiT(TINY)
    shared.install(dit)
    assert held(dit) == held_by(plan(first=1, layers=(0,)))
    shared.enter_step(dit, 0, 4)
    q = torch.randn(1, 3, 2, 16)
    for block in dit.block_list():
        block.self_attn.attention(q, q, q)
    (row,) = timer.statistics()
    assert (row.name, row.samples) == ("cp2_attn", len(dit.block_list()))


def held_by(plain: AttentionPlan) -> list[str]:
    dit = WanDiT(TINY)
    plain.install(dit)
    return held(dit)
