"""How ranks are shared out: every world up to 64 ranks, the head counts of all models, what is refused."""

import itertools

import pytest

from chitu_core.distributed import Degrees, plan_degrees

WORLDS = range(1, 65)
HEADS = (4, 12, 40)  # demo, 1.3B, 14B and A14B
NODES = (1, 2, 4, 8, None)
LIMITS = (1, 2, 3, 4, 8, 81)


@pytest.mark.parametrize("heads", HEADS)
def test_every_plan_fills_the_world_and_takes_the_largest_legal_ulysses(heads):
    for world, limit, needs_cfg, node in itertools.product(WORLDS, LIMITS, (True, False), NODES):
        for dp in (size for size in range(1, world + 1) if world % size == 0):
            plan = plan_degrees(world, heads, limit, needs_cfg, dp=dp, ranks_per_node=node)
            assert plan.world == world
            assert (plan.dp, plan.cfg) == (dp, 2 if needs_cfg and world // dp % 2 == 0 else 1)

            def is_legal(ulysses, cp=plan.cp, limit=limit, node=node or world):
                return not (cp % ulysses or heads % ulysses or node % ulysses) and ulysses <= limit

            assert is_legal(plan.ulysses)
            assert not any(is_legal(size) for size in range(plan.ulysses + 1, plan.cp + 1))


@pytest.mark.parametrize("degrees", [Degrees(2, 2, 3, 4), Degrees(1, 1, 1, 1), Degrees(3, 1, 2, 1)])
def test_ranks_and_places_are_one_to_one_with_ulysses_fastest(degrees):
    places = [degrees.place(rank) for rank in range(degrees.world)]
    assert len(set(places)) == degrees.world
    assert [degrees.rank(place) for place in places] == list(range(degrees.world))
    assert [place.ulysses for place in places[: degrees.ulysses]] == list(range(degrees.ulysses))
    assert [place.dp for place in places] == sorted(place.dp for place in places)


def test_a_ulysses_group_never_leaves_its_node():
    for world, heads, node in itertools.product(WORLDS, HEADS, (1, 2, 4, 6, 8)):
        plan = plan_degrees(world, heads, 8, True, ranks_per_node=node)
        for first in range(0, world, plan.ulysses):
            assert first // node == (first + plan.ulysses - 1) // node


@pytest.mark.parametrize(
    ("world", "heads", "limit", "needs_cfg", "expected"),
    [
        (1, 12, 8, True, (1, 1, 1)),
        (2, 12, 8, True, (2, 1, 1)),
        (4, 12, 8, True, (2, 1, 2)),
        (8, 12, 8, True, (2, 1, 4)),
        (8, 12, 8, False, (1, 2, 4)),  # 8 does not divide 12 heads
        (8, 40, 8, False, (1, 1, 8)),
        (6, 40, 4, False, (1, 3, 2)),  # 4 does not divide 6 ranks
        (3, 12, 8, True, (1, 1, 3)),
        (16, 40, 8, True, (2, 1, 8)),
        (16, 12, 81, True, (2, 2, 4)),
        (5, 12, 8, True, (1, 5, 1)),
    ],
)
def test_known_plans(world, heads, limit, needs_cfg, expected):
    plan = plan_degrees(world, heads, limit, needs_cfg)
    assert (plan.cfg, plan.ring, plan.ulysses) == expected


def test_what_is_fixed_is_kept():
    assert plan_degrees(4, 12, 8, True, cfg=1) == Degrees(1, 1, 1, 4)
    assert plan_degrees(4, 12, 8, False, cfg=2) == Degrees(1, 2, 1, 2)
    assert plan_degrees(4, 12, 8, True, cp=4) == Degrees(1, 1, 1, 4)
    assert plan_degrees(4, 12, 1, False, cp=2) == Degrees(1, 2, 2, 1)
    assert plan_degrees(8, 12, 8, True, dp=2, cfg=2, cp=2) == Degrees(2, 2, 1, 2)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"dp": 3}, r"infer\.dp_size=3: must divide the 4 rank\(s\); legal: 1, 2, 4"),
        (
            {"cfg": 2, "world": 3},
            r"infer\.diffusion\.cfg_size=2: 3 rank\(s\) work on a task; legal: 1 or auto",
        ),
        (
            {"cp": 3},
            r"infer\.diffusion\.cp_size=3: .* must be the 4 rank\(s\) there are; legal: 2, 4 or auto",
        ),
        ({"cp": 4, "cfg": 2}, r"infer\.diffusion\.cp_size=4: .*; legal: 2 or auto"),
        ({"cp": 2, "cfg": 1, "dp": 1}, r"infer\.diffusion\.cp_size=2: .*; legal: 4 or auto"),
    ],
)
def test_what_does_not_multiply_to_the_world_is_refused_with_the_legal_values(fixed, message):
    world = fixed.pop("world", 4)
    with pytest.raises(ValueError, match=message):
        plan_degrees(world, 12, 8, True, **fixed)
