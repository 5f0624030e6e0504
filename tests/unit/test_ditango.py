"""DiTango without other ranks: plans by hand, routes, the picture, legal layouts, what is measured."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from engines import new_engine, submit

from chitu_core.distributed import Degrees
from chitu_diffusion.flex_cache._base import Model
from chitu_diffusion.flex_cache._calibration import NOTHING
from chitu_diffusion.flex_cache._ditango_exchange import Rotation, State, Visit, join, route
from chitu_diffusion.flex_cache._ditango_picture import ANCHOR, COMPUTED, FORCED, REUSED, Cells
from chitu_diffusion.flex_cache._ditango_plan import Planner
from chitu_diffusion.flex_cache._ditango_states import LayerStates
from chitu_diffusion.flex_cache._kept import Kept
from chitu_diffusion.flex_cache.strategy.ditango import Knobs, Settings, Strategy
from chitu_diffusion.params import FlexCacheParams

T, F = True, False


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def planner(quantile=0.5, gate=0.3, tau_max=8, layers=2, groups=3, first=0):
    return Planner(layers, groups, first=first, gate=gate, quantile=quantile, tau_max=tau_max)


def test_the_first_planned_step_is_an_anchor_and_the_next_reuses_everything():
    plan = planner()
    assert plan.is_anchor
    assert plan.computed.all()
    plan.advance(3, table([1, 2, 3], [4, 5, 6]), 0.0)
    assert not plan.is_anchor
    assert not plan.computed.any()


def test_the_step_after_an_anchor_sets_the_threshold_and_later_ones_keep_it():
    plan = planner()
    plan.advance(3, table([0, 0, 0], [0, 0, 0]), 0.0)
    plan.advance(4, table([1, 2, 3], [4, 5, 6]), 0.1)
    assert plan.epsilon == 4  # entry int(6 * 0.5) of six in order
    assert plan.computed.tolist() == [[F, F, F], [T, T, T]]
    plan.advance(5, table([2, 4, 6], [8, 10, 12]), 0.2)  # of layer 1, just computed, nothing is left
    assert plan.epsilon == 4
    assert plan.computed.tolist() == [[F, T, T], [F, F, F]]


def test_a_change_at_the_gate_makes_the_next_step_an_anchor():
    plan = planner()
    plan.advance(3, table([0, 0, 0], [0, 0, 0]), 0.0)
    plan.advance(4, table([1, 2, 3], [4, 5, 6]), 0.3)
    assert plan.is_anchor
    assert plan.computed.all()


def test_a_state_older_than_tau_max_is_computed():
    plan = planner(tau_max=2, quantile=1.0)
    plan.advance(3, table([0, 0, 0], [0, 0, 0]), 0.0)
    plan.advance(4, table([1, 1, 1], [1, 1, 2]), 0.1)
    assert plan.computed.tolist() == [[F, F, F], [F, F, T]]
    plan.advance(5, table([1, 1, 1], [1, 1, 2]), 0.1)  # the others are 3 steps old at step 6
    assert plan.computed.tolist() == [[T, T, T], [T, T, F]]


def test_below_half_the_step_after_an_anchor_computes_what_drifts_most():
    plan = planner(quantile=0.25, gate=0.1)
    plan.advance(3, table([1, 2, 3], [4, 5, 6]), 0.0)  # against the step before
    assert plan.epsilon == 2  # entry int(6 * 0.25)
    assert plan.computed.tolist() == [[F, T, T], [T, T, T]]
    plan.advance(4, table([3, 4, 5], [6, 7, 8]), 0.1)
    assert (plan.epsilon, plan.is_anchor) == (4, True)
    plan.advance(5, table([6, 4, 4], [4, 4, 4]), 0.0)  # the first is 2 steps old, the others 1
    assert plan.computed.tolist() == [[F, T, T], [T, T, T]]


def test_a_ratio_near_zero_computes_everything():
    plan = planner(quantile=1e-6, gate=0.6e-6)
    for step in range(3, 12):  # what drifts less and less
        assert plan.computed.all()
        plan.advance(step, table([1, 2, 3], [4, 5, 6]) / step, 0.0 if plan.is_anchor else 0.01)


def test_an_empty_group_takes_part_in_no_decision():
    plan = planner(first=1)
    plan.advance(3, table([0, 0, 0], [0, 0, 0]), 0.0)
    assert plan.computed.tolist() == [[T, F, F], [T, F, F]]
    plan.advance(4, table([0, 2, 3], [0, 5, 6]), 0.1)
    assert plan.epsilon == 5  # entry 2 of four
    assert plan.computed.tolist() == [[T, F, F], [T, T, T]]


def test_a_reset_makes_an_anchor_of_the_next_step():
    plan = planner()
    plan.advance(3, table([1, 2, 3], [4, 5, 6]), 0.0)
    plan.reset()
    assert plan.is_anchor
    assert plan.computed.all()
    assert plan.epsilon is None


def test_a_route_turns_inside_a_chunk_and_hops_over_what_is_left_out():
    assert route((T, F, T), 2) == (Visit(0, 0), Visit(0, 1), Visit(2, 1), Visit(2, 0))
    assert route((T, F, F, T), 1) == (Visit(0, 0), Visit(3, 0))
    assert route((F, F), 2) == (Visit(0, 0),)


def rotation(index, size, members, total=0):
    line, tokens = SimpleNamespace(index=index, size=size), SimpleNamespace(total=total)
    return Rotation(SimpleNamespace(line=line, tokens=tokens, kernel=None), members)


def test_rank_5_of_8_in_groups_of_2_counts_chunks_from_its_own():
    rank = rotation(5, 8, 2)
    assert [rank.source(Visit(group, 0)) // 2 for group in range(4)] == [2, 3, 0, 1]
    assert [rank.source(Visit(0, turn)) for turn in range(2)] == [5, 4]


@pytest.mark.parametrize(("size", "members"), [(4, 1), (4, 2), (8, 2), (6, 3), (12, 4)])
def test_what_ranks_send_is_what_the_next_visit_needs_whatever_is_left_out(size, members):
    ranks = [rotation(index, size, members) for index in range(size)]
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        computed = (torch.rand(size // members, generator=draw) < 0.5).tolist()
        visits = route(computed, members)
        held = list(range(size))  # whose keys each rank has
        for here, there in itertools.pairwise(visits):
            targets, givers = zip(*(rank.peers(here, there) for rank in ranks), strict=True)
            assert all(targets[giver] == index for index, giver in enumerate(givers))
            held = [held[giver] for giver in givers]
            assert held == [rank.source(there) for rank in ranks]
        for rank, position in zip(ranks, range(size), strict=True):
            chunks = [(position // members + j) % (size // members) for j, is_ in enumerate(computed) if is_]
            wanted = {c * members + m for c in chunks for m in range(members)} | {position}
            found = [rank.source(visit) for visit in visits]
            assert len(found) == len(set(found))
            assert set(found) == wanted


def test_padding_is_no_real_token():
    real = [rotation(index, 4, 1, total=9).real_tokens(3) for index in range(4)]
    assert real == [3, 3, 3, 0]


def test_a_state_without_keys_joins_as_nothing():
    state = State(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1))
    assert join(None, state) is state
    assert join(state, None) is state
    out, lse = join(state, State(torch.full((1, 1, 1, 2), 3.0), torch.zeros(1, 1, 1)))
    assert out.flatten().tolist() == [2, 2]  # equal weights
    assert lse.item() == pytest.approx(0.693147, abs=1e-6)  # log 2


def state_of(lse):
    return State(torch.zeros(1, 2, 1, 4), torch.tensor([[[*lse]]]))


def test_errors_are_weights_of_the_anchor_times_the_drift_since_a_state_was_computed():
    kept = LayerStates(Kept(), "layer", range(3))
    kept.refer(4, torch.tensor([[[1.0], [0.0]]]), range(3), is_anchor=False)  # the step before the anchor
    for group, lse in enumerate(((3.0, 4.0), (0.0, 5.0))):
        kept.put(group, state_of(lse), torch.float32)
    kept.put(2, None, torch.float32)  # all of its keys are padding
    kept.weigh(state_of((6.0, 8.0)), 2)  # norms 10, 5, 5: mean 20 / 3, spread 5 sqrt(2) / 3
    share = torch.tensor([0.0, -5 / (5 * 2**0.5 / 3), -5 / (5 * 2**0.5 / 3)]).softmax(0)[1]
    vector = torch.tensor([[[4.0], [4.0]]])  # (3, 4) from the reference
    torch.testing.assert_close(kept.errors(vector), torch.stack((share, share, share * 0)) * 5)
    kept.refer(5, vector, range(3), is_anchor=True)
    later = torch.tensor([[[4.0], [6.0]]])
    torch.testing.assert_close(kept.change(later), torch.tensor(2 / 32**0.5))
    kept.refer(6, later, [1], is_anchor=False)  # group 1 was computed
    assert kept.errors(later).tolist() == [pytest.approx(float(share) * 2), 0, 0]


def test_vectors_that_nothing_refers_to_are_dropped():
    found = Kept()
    kept = LayerStates(found, "layer", range(2))
    vector = torch.zeros(1, 8, 1)
    kept.refer(0, vector.clone(), range(2), is_anchor=False)
    assert found.bytes == 32
    kept.refer(1, vector.clone(), range(2), is_anchor=True)
    assert found.bytes == 32
    kept.refer(2, vector.clone(), [0], is_anchor=False)
    kept.refer(3, vector.clone(), [1], is_anchor=False)
    assert found.bytes == 96  # the anchor's and each group's
    kept.refer(4, vector.clone(), [], is_anchor=False)
    assert found.bytes == 96


def test_a_picture_has_the_colours_separators_and_precedence_of_the_contract():
    cells = Cells(2, 2)
    for step, codes in enumerate(((FORCED,) * 4, (ANCHOR,) * 4, (COMPUTED, REUSED, REUSED, COMPUTED))):
        for row, code in enumerate(codes):
            cells.mark(step, row // 2, row % 2, code)
    cells.mark(0, 0, 0, ANCHOR)  # another branch: an anchor is stronger than a forced step
    cells.mark(2, 0, 1, COMPUTED)  # computed is stronger than reused
    cells.mark(2, 1, 1, REUSED)
    picture = cells.picture("name")
    assert (picture.stem, picture.width, picture.height) == ("name", 24, 32)
    pixels = [picture.rgb[i : i + 3] for i in range(0, len(picture.rgb), 3)]
    column = [[tuple(pixels[(8 * row + 7) * 24 + 8 * step]) for row in range(4)] for step in range(3)]
    grey, green, blue, yellow = (160, 160, 160), (30, 180, 80), (50, 120, 230), (250, 210, 70)
    assert column == [[green, grey, grey, grey], [green] * 4, [blue, blue, yellow, blue]]
    dark, light = (30, 30, 30), (245, 245, 245)
    rows = [tuple(pixels[y * 24 + 20]) for y in range(32)]
    assert rows[:3] == [dark, dark, blue]
    assert rows[8:10] == [light, blue]
    assert rows[16:19] == [dark, dark, yellow]
    assert rows[24:26] == [light, blue]


def test_a_run_of_no_steps_has_no_picture():
    assert Cells(1, 2).picture("name") is None


def model(degrees, **facts):
    return Model("tiny", 30, ("only",), NOTHING, degrees.ring, degrees.ulysses, **facts)


def test_the_ratio_sets_gate_and_quantile_and_an_expert_setting_wins():
    found = Strategy.complete(Knobs(), 0.5, model(Degrees(ring=4)))
    assert found == Settings(2, gate=0.3, quantile=0.5, tau_max=8, groups=2, members=2)
    asked = Knobs(4, gate=0.1, quantile=0.9, tau_max=3)
    found = Strategy.complete(asked, 1.0, model(Degrees(ring=4, ulysses=2)))
    assert found == Settings(4, gate=0.1, quantile=0.9, tau_max=3, groups=2, members=2)


@pytest.mark.parametrize(
    ("degrees", "group_size", "remedy"),
    [
        (Degrees(ulysses=4), 2, r"set infer\.diffusion\.up_limit=2"),
        (Degrees(ulysses=8), 2, r"set infer\.diffusion\.up_limit=2"),
        (Degrees(ring=2, ulysses=2), 1, "set group_size to one of 2$"),
        (Degrees(ring=4), 3, "set group_size to one of 1, 2$"),
        (Degrees(ring=2), 2, "set group_size to one of 1$"),
        (Degrees(ulysses=2), 2, r"set infer\.diffusion\.up_limit=1 and group_size to one of 1$"),
    ],
)
def test_a_layout_that_cannot_be_cut_is_refused_with_the_remedy(degrees, group_size, remedy):
    with pytest.raises(ValueError, match=rf"group_size={group_size} does not fit ring .*{remedy}"):
        Strategy.complete(Knobs(group_size), 0.5, model(degrees))


def test_a_schedule_of_attention_is_refused():
    with pytest.raises(ValueError, match=r"infer\.attn_schedule"):
        Strategy.complete(Knobs(), 0.5, model(Degrees(ring=4), has_attention_schedule=True))


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"group_size": 0}, "group_size=0"), ({"quantile": 1.1}, "quantile=1.1"), ({"tau_max": 0}, "tau_max=0")],
)
def test_a_setting_out_of_range_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Knobs(**setting)


@pytest.mark.parametrize(
    ("degrees", "size"),
    [
        (Degrees(ring=2), 1),
        (Degrees(ring=4), 2),
        (Degrees(ring=2, ulysses=2), 2),
        (Degrees(ring=2, ulysses=4), 4),
    ],
)
def test_groups_are_of_two_or_of_as_few_as_fit(degrees, size):
    assert Strategy.complete(Knobs(), 0.5, model(degrees)).group_size == size


@pytest.mark.parametrize(("ulysses", "limit"), [(2, 1), (4, 2), (8, 2)])
def test_without_a_ring_a_plain_request_is_told_the_limit_that_makes_one(ulysses, limit):
    with pytest.raises(ValueError, match=rf"ulysses {ulysses}: .*up_limit={limit}"):
        Strategy.complete(Knobs(), 0.5, model(Degrees(ulysses=ulysses)))


def test_without_other_ranks_the_strategy_is_idle():
    assert "none share a sequence" in Strategy.idle(model(Degrees(cfg=2)))
    assert Strategy.idle(model(Degrees(ring=2))) is None


def test_a_request_to_one_rank_is_computed_in_full_with_a_warning(tmp_path):
    engine = new_engine(f"output.root_dir={tmp_path}", "infer.diffusion.enable_flexcache=true")
    task = submit(engine, flexcache_params=FlexCacheParams("ditango", warmup=0, cooldown=0))
    for _ in range(4):
        engine.step()
    engine.close()
    assert task.result.flexcache is None
    assert [w for w in task.warnings if w.startswith("flexcache=ditango: ") and "every step is computed" in w]
