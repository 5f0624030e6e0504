"""Cache strategies: what each of them computes, reuses and keeps, by hand; off they change no bit."""

import dataclasses
import itertools
import math

import caches
import pytest
import torch
from PIL import Image

from chitu_core import plugins
from chitu_core.distributed.mesh import ParallelMesh
from chitu_diffusion.compilation import choose_block_call
from chitu_diffusion.flex_cache._base import Model, Services, Sizes
from chitu_diffusion.flex_cache._calibration import PACKAGED, Calibration, TeaFit, packaged, read
from chitu_diffusion.flex_cache._picture import timeline, write
from chitu_diffusion.flex_cache.strategy import magcache, meancache, teacache
from chitu_diffusion.flex_cache.strategy.taylorseer import lagrange
from chitu_diffusion.guidance import Prediction
from chitu_diffusion.params import STRATEGY_PACKAGE, FlexCacheParams, strategy_class
from chitu_diffusion.samplers.euler import Sampler as Euler
from chitu_diffusion.samplers.unipc import Sampler

NAMES = [
    name for name in plugins.names(STRATEGY_PACKAGE) if name != "ditango"
]  # test_ditango.py: several ranks
COUNT = 12
NEVER = {  # settings under which nothing is reused; meancache has a table, so its run is forced
    "blockdance": {"group": 1},
    "dbcache": {"threshold": 0.0},
    "easycache": {"threshold": 0.0},
    "fbcache": {"threshold": 0.0},
    "magcache": {"max_reuses": 0},
    "meancache": {},
    "pab": {"self_range": 1, "cross_range": 1},
    "taylorseer": {"interval": 1},
    "teacache": {"threshold": 0.0},
}
ALWAYS = {  # settings under which something is
    "blockdance": {"boundary": 0.6, "group": 2},
    "dbcache": {"threshold": 9.0, "front": 2, "back": 1, "max_reuses": 2},
    "easycache": {"threshold": 99.0, "max_reuses": 2},
    "fbcache": {"threshold": 9.0, "max_reuses": 2},
    "magcache": {"threshold": 9.0, "max_reuses": 2},
    "meancache": {"fresh_steps": 17},
    "pab": {"self_range": 2, "cross_range": 3},
    "taylorseer": {"interval": 3},
    "teacache": {"threshold": 9.0, "max_reuses": 2},
}


@pytest.fixture(scope="module")
def exact():
    return caches.denoise(None, {})


def test_every_strategy_has_a_row_here():
    assert set(NEVER) == set(ALWAYS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_that_never_reuses_changes_no_bit(exact, name):
    forced, last = (COUNT - 1, 0) if name == "meancache" else (2, 1)
    ran = caches.denoise(name, NEVER[name], warmup=forced, cooldown=last)
    assert torch.equal(ran.latents, exact.latents)
    assert not ran.reused


@pytest.fixture(scope="module")
def compiled():
    """Blocks that are compiled once for all strategies."""
    return choose_block_call("on", ParallelMesh())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_blocks_with_a_strategy_that_never_reuses_are_near(exact, compiled, name):
    forced, last = (COUNT - 1, 0) if name == "meancache" else (2, 1)
    ran = caches.denoise(name, NEVER[name], warmup=forced, cooldown=last, call_block=compiled)
    assert (ran.latents - exact.latents).norm() <= 1e-5 * exact.latents.norm()


def layers(computed, reused):
    return computed * caches.CONFIG.num_layers, reused * caches.CONFIG.num_layers


@pytest.mark.parametrize(
    ("name", "kind", "computed", "reused"),
    [  # 12 steps, the first two and the last forced; two branches
        ("teacache", "blocks", 2 * 6, 2 * 6),  # computed 0 1 4 7 10 11
        ("magcache", "blocks", 2 * 6, 2 * 6),
        ("taylorseer", "blocks", 2 * 6, 2 * 6),  # computed 0 1, 2 5 8, 11
        ("meancache", "velocity", 5, 7),  # the table's 0 1 5 11, and 10 if it were forced
        ("easycache", "velocity", 6, 6),
        ("pab", "self_attn", *(2 * n for n in layers(8, 4))),  # reused 3 5 7 9
        ("pab", "cross_attn", *(2 * n for n in layers(6, 6))),  # computed 0 1, 2 5 8, 11
        ("blockdance", "block", 2 * (12 * 5 - 3 * 3), 2 * 3 * 3),  # 3 of 5 blocks at 6 8 10
        ("fbcache", "block", 2 * (6 * 5 + 6 * 1), 2 * 6 * 4),
        ("dbcache", "block", 2 * (6 * 5 + 6 * 3), 2 * 6 * 2),
    ],
)
def test_counts_are_those_of_the_schedule_by_hand(name, kind, computed, reused):
    ran = caches.denoise(name, ALWAYS[name])
    if name == "meancache":
        computed, reused = 4, 8
    assert (ran.computed[kind], ran.reused[kind]) == (computed, reused)


@pytest.mark.parametrize("name", NAMES)
def test_memory_that_is_kept_stays_within_what_was_announced(name):
    ran = caches.denoise(name, ALWAYS[name])
    feature = 45 * caches.CONFIG.dim * 4
    sizes = Sizes(feature, feature, 4 * math.prod(caches.GRID) * 4, caches.CONFIG.num_layers, 2, 4, 45)
    strategy = strategy_class(name)
    model = Model("tiny", caches.CONFIG.num_layers, ("dit",), caches.calibration(COUNT))
    knobs = strategy.complete(strategy.knobs_type(**ALWAYS[name]), 0.5, model)
    announced = strategy.footprint(knobs, sizes)
    assert 0 < ran.peak_bytes <= announced
    assert ran.peak_bytes >= announced / 2  # not much more is asked for than is used


# --- what the ratio means

TABLE = {  # at cache_ratio 0.5 and 1
    "taylorseer": [{"interval": 3}, {"interval": 5}],
    "pab": [{"self_range": 2, "cross_range": 3}, {"self_range": 3, "cross_range": 5}],
    "meancache": [{"fresh_steps": 30}, {"fresh_steps": 10}],
    "easycache": [{"threshold": 0.05}, {"threshold": 0.20}],
    "blockdance": [{"boundary": 0.6, "group": 2}, {"boundary": 0.8, "group": 3}],
    "fbcache": [{"threshold": 0.05}, {"threshold": 0.12}],
    "dbcache": [{"threshold": 0.08}, {"threshold": 0.16}],
}
BY_MODEL = {
    ("teacache", "Wan2.1-T2V-1.3B"): [{"threshold": 0.07}, {"threshold": 0.20}],
    ("teacache", "Wan2.1-T2V-14B"): [{"threshold": 0.14}, {"threshold": 0.30}],
    ("magcache", "Wan2.1-T2V-1.3B"): [
        {"threshold": 0.12, "max_reuses": 2},
        {"threshold": 0.12, "max_reuses": 4},
    ],
    ("magcache", "Wan2.1-T2V-14B"): [
        {"threshold": 0.12, "max_reuses": 2},
        {"threshold": 0.24, "max_reuses": 6},
    ],
}


def completed(name, ratio, model):
    experts = ("high_noise", "low_noise") if "A14B" in model else ("dit",)
    strategy = strategy_class(name)
    return strategy.complete(strategy.knobs_type(), ratio, Model(model, 30, experts, packaged(model)))


@pytest.mark.parametrize(
    ("name", "model", "rows"),
    [(name, "Wan2.1-T2V-1.3B", rows) for name, rows in TABLE.items()]
    + [(*key, rows) for key, rows in BY_MODEL.items()],
)
def test_a_ratio_stands_for_the_settings_of_the_table(name, model, rows):
    for ratio, row in zip((0.5, 1.0), rows, strict=True):
        knobs = completed(name, ratio, model)
        assert {key: getattr(knobs, key) for key in row} == pytest.approx(row)


def test_an_expert_setting_wins_over_the_ratio():
    strategy = strategy_class("pab")
    model = Model("any", 30, ("dit",), Calibration())
    assert strategy.complete(strategy.knobs_type(self_range=7), 1.0, model).self_range == 7
    assert strategy.complete(strategy.knobs_type(self_range=7), 1.0, model).cross_range == 5


SCHEDULED = ["magcache", "teacache", "taylorseer", "meancache", "pab", "blockdance"]


@pytest.mark.parametrize("name", SCHEDULED)
def test_more_ratio_never_computes_more(name):
    """Of 50 steps of Wan2.1-T2V-1.3B; the share of blocks for blockdance, of attention for pab."""
    shares = []
    for ratio in [step / 20 for step in range(1, 21)]:
        run = dataclasses.replace(caches.course(50, 5, 5), model=model_13b())
        services = Services(lambda x: x, smooth_signal, None)
        strategy = strategy_class(name)
        cache = strategy(run, strategy.complete(strategy.knobs_type(), ratio, run.model), services)
        cache.prepare()
        shares.append(share_computed(cache))
    assert all(after <= before for before, after in itertools.pairwise(shares)), shares
    assert shares[-1] < shares[0]


def model_13b():
    return Model("Wan2.1-T2V-1.3B", 30, ("dit",), packaged("Wan2.1-T2V-1.3B"))


def smooth_signal(name, timesteps):
    """A modulation whose relative change grows along the run, as Wan's does, from 0.01 to 0.06."""
    values = [1.0]
    for index in range(len(timesteps) - 1):
        values.append(values[-1] * (1 + 0.01 + 0.05 * index / len(timesteps)))
    return torch.tensor(values)[:, None, None].expand(-1, 6, 4)


def share_computed(cache):
    if cache.name == "pab":
        due = [cache._is_due(kind, step) for kind in cache._ranges for step in range(50)]
        return (sum(due) + 50 * (2 - len(cache._ranges))) / 100
    if cache.name == "blockdance":
        return 1 - (1 - sum(cache.fresh) / 50) * (cache._boundary + 1) / 30
    return sum(cache.fresh) / 50


# --- schedules

FIRST_TEN = list(range(10))
PUBLISHED = [  # the authors' settings, without warm-up and cool-down of ours
    ("Wan2.1-T2V-1.3B", 0.12, 2, 0.2, [*FIRST_TEN, *range(12, 43, 3), 44, 46, 48, 49]),
    ("Wan2.1-T2V-1.3B", 0.12, 4, 0.2, [*FIRST_TEN, 14, 19, 24, 29, 34, 38, 41, 44, 46, 48, 49]),
    (
        "Wan2.1-T2V-1.3B",
        0.06,
        3,
        0.2,
        [*FIRST_TEN, 13, 17, 21, 25, 29, 32, 35, 38, 40, 42, 44, 46, 47, 48, 49],
    ),
    ("Wan2.1-T2V-14B", 0.12, 2, 0.2, [*FIRST_TEN, *range(12, 43, 3), 44, 46, 48, 49]),
    ("Wan2.1-T2V-14B", 0.24, 6, 0.2, [*FIRST_TEN, 16, 23, 30, 36, 41, 44, 47, 49]),
    ("Wan2.2-T2V-A14B", 0.06, 2, 0.4, [*FIRST_TEN, 12, 15, 18, 21, 24, *range(26, 32), 33, 35, 37, 38, 39]),
]


@pytest.mark.parametrize(("model", "threshold", "most", "retention", "fresh"), PUBLISHED)
def test_magcache_takes_the_published_steps(model, threshold, most, retention, fresh):
    table = packaged(model).magcache
    count = sum(len(one.sigmas) for one in table.experts.values())
    run = caches.course(count, switch=26 if len(table.experts) == 2 else None)
    ratios = [ratio for one in table.experts.values() for ratio in (1.0, *one.cond)]
    knobs = magcache.Knobs(threshold, most, retention)
    assert [index for index, one in enumerate(magcache.schedule(run, ratios, knobs)) if one] == fresh


def test_magcache_ratios_of_half_the_steps_multiply_to_the_same_decay():
    table = packaged("Wan2.1-T2V-1.3B").magcache.experts["dit"]
    assert magcache.ratios_at(table, table.sigmas) is table
    few = magcache.ratios_at(table, Sampler(25, 5.0).sigmas[:-1])
    # the coarser grid ends earlier, so its decay is that of the fine one up to there
    last = Sampler(25, 5.0).sigmas[24]
    until = next(index for index, sigma in enumerate(table.sigmas) if sigma <= last + 1e-6)
    assert math.prod(few.cond) == pytest.approx(math.prod(table.cond[:until]), rel=1e-3)
    assert math.prod(few.cond) < math.prod(few.cond[:-1]) < 1.03


def test_magcache_scales_a_stale_residual_by_the_ratios_since_it_was_made():
    run = caches.course(COUNT, 2, 1, calibration=caches.calibration(COUNT))
    cache = caches.make("magcache", run, threshold=9.0, max_reuses=3, scales_residual=True)
    x = torch.ones(1, 4, 8)
    site = magcache.Site("blocks")
    for index in range(6):
        cache.enter_step(index)
        for branch, ratio in (("cond", 0.98), ("uncond", 0.97)):
            cache.enter_branch(branch)
            out = cache.around(site, lambda x: x + 2, x, None)
            reuses = index - 1 if 2 <= index <= 4 else 0
            torch.testing.assert_close(out, 1 + 2 * torch.full_like(x, ratio**reuses))


def test_teacache_adds_estimates_up_and_computes_where_the_fit_says_nothing():
    fit = TeaFit((1.0, 0.0), 0.01, 0.5)
    run = caches.course(10, 1, 1, calibration=with_fit(fit))
    changes = [-1, 0.04, 0.04, 0.04, 0.04, 0.6, 0.04, 0.005, 0.04, 0.04]
    knobs = teacache.Knobs(0.1, max_reuses=4)
    #        forced  .04    .08    .12   .04    beyond .04   below .04    forced
    expected = [True, False, False, True, False, True, False, True, False, True]
    assert list(teacache.schedule(run, changes, knobs)) == expected


def test_teacache_reuses_at_most_so_many_in_a_row():
    run = caches.course(10, 1, 1, calibration=with_fit(TeaFit((1.0, 0.0))))
    fresh = teacache.schedule(run, [-1] + [0.001] * 9, teacache.Knobs(1.0, max_reuses=3))
    assert [index for index, one in enumerate(fresh) if one] == [0, 4, 8, 9]


@pytest.mark.parametrize("model", ["Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"])
def test_published_polynomials_say_nothing_where_they_are_not_positive(model):
    fit = packaged(model).teacache.experts["dit"]
    assert fit(0.0) is None
    assert fit(0.15) is None
    assert fit(0.03) > 0


def with_fit(fit):
    known = caches.calibration(10)
    return dataclasses.replace(known, teacache=dataclasses.replace(known.teacache, experts={"dit": fit}))


def test_teacache_measures_the_relative_change_of_the_modulation():
    run = caches.course(6, switch=3)
    signals = {"high": torch.tensor([1.0, 2.0, 3.0]), "low": torch.tensor([0.0, 4.0, 5.0])}
    found = teacache.changes_of(run, lambda name, _: signals[name][:, None, None].expand(-1, 6, 4))
    assert found.tolist() == [-1, 1, 0.5, -1, -1, 0.25]  # a change from nothing is no change


@pytest.mark.parametrize("budget", meancache.TABLES)
def test_meancache_takes_its_table_at_50_steps_and_the_same_share_at_others(budget):
    table = meancache.TABLES[budget]
    assert len(table.steps) == budget == len(table.orders) + 1
    fresh, orders = meancache.schedule(caches.course(50), table)
    assert tuple(index for index, one in enumerate(fresh) if one) == table.steps
    gaps = zip(table.steps, table.steps[1:], table.orders, strict=False)
    for before, after, order in gaps:
        assert all(orders[step] == order for step in range(before + 1, after))
    for count in range(2, 130):
        fresh, _ = meancache.schedule(caches.course(count), table)
        assert sum(fresh) == max(1, round(budget * count / 50))


def test_meancache_extrapolates_by_the_mean_velocity_of_its_records():
    run = caches.course(10)
    cache = caches.make("meancache", run, fresh_steps=30)
    cache.prepare()
    cache.fresh = (True,) * 4 + (False,) * 6
    cache._orders = (2,) * 10
    draw = torch.Generator().manual_seed(0)
    sampler, x = Sampler(10, caches.SHIFT), torch.randn(3, 4, generator=draw)
    latents, velocities = [x], []
    for index in range(4):
        cache.step = run.steps[index]
        velocities.append(torch.randn(3, 4, generator=draw))
        x = sampler.step(velocities[-1], x)
        cache.leave_step(latents[-1], x, velocities[-1])
        latents.append(x)
    cache.step = run.steps[4]
    s = sampler.sigmas
    mean = (latents[4] - latents[2]) / (s[4] - s[2])
    slope = (velocities[2] - mean) / (s[4] - s[2])
    expected = velocities[3] - slope * (s[5] - s[4])
    actual = cache.velocity(lambda: pytest.fail("computed"), x)
    torch.testing.assert_close(actual, expected)


def test_meancache_of_order_1_under_euler_repeats_the_velocity():
    run = caches.course(4)
    cache = caches.make("meancache", run, fresh_steps=10)
    cache.enter_step(0)
    sampler, x, v = Euler(4, caches.SHIFT), torch.randn(2, 3), torch.randn(2, 3)
    cache.leave_step(x, sampler.step(v, x), v)
    cache.fresh, cache._orders, cache.step = (True, False, False, True), (1,) * 4, run.steps[1]
    torch.testing.assert_close(cache.velocity(lambda: pytest.fail("computed"), x), v)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylorseer_continues_a_polynomial_of_its_order_exactly(order):
    run = caches.course(COUNT, 1, 1)
    cache = caches.make("taylorseer", run, interval=2, order=order)
    site, x = magcache.Site("blocks"), torch.zeros(1, 2, 3)
    value = lambda index: sum(run.steps[index].sigma ** power for power in range(order + 1))  # noqa: E731
    for index in range(COUNT):
        cache.enter_step(index)
        cache.enter_branch("cond")
        out = cache.around(site, lambda x, index=index: x + value(index), x, None)
        if index > 2 * order + 1:  # enough computed steps lie behind
            torch.testing.assert_close(out, torch.full_like(x, value(index)), atol=1e-4, rtol=1e-4)


def test_lagrange_weights_reproduce_their_nodes():
    assert lagrange([0.2, 0.5, 0.9], 0.5) == pytest.approx([0, 1, 0])
    assert sum(lagrange([0.2, 0.5, 0.9], 7.0)) == pytest.approx(1)


def test_easycache_follows_the_formula():
    """Against the rule written down once more, on outputs that change unevenly."""
    run = caches.course(20, 1, 1)
    cache = caches.make("easycache", run, threshold=0.2, retention=0.1, max_reuses=99)
    draw = torch.Generator().manual_seed(1)
    xs = [torch.randn(3, 4, generator=draw) for _ in range(20)]
    ys = [torch.randn(3, 4, generator=draw) * 0.1 + 1 for _ in range(20)]
    total, factor, fresh, seen = 0.0, None, [], None
    last_x, last_y = None, None
    for index, (x, y) in enumerate(zip(xs, ys, strict=True)):
        x = x * 0.01
        is_fresh = index < 2 or index == 19 or factor is None
        if not is_fresh:
            total += float(factor * (x - seen).abs().mean() / last_y.abs().mean())
            is_fresh = total >= 0.2
        called = []
        cache.enter_step(index)
        actual = cache.velocity(lambda y=y, called=called: called.append(1) or Prediction(2 * y, y), x)
        assert bool(called) == is_fresh, index
        if is_fresh:
            total = 0.0
            if last_y is not None:
                factor = (y - last_y).abs().mean() / (x - last_x).abs().mean()
            last_x, last_y = x, y
        torch.testing.assert_close(actual, 2 * last_y + (x - last_x))
        seen = x
        fresh.append(is_fresh)
    assert 2 < sum(fresh) < 20


def test_dbcache_lets_the_first_branch_of_a_step_decide_for_both():
    run = caches.course(6, 1, 1)
    cache = caches.make("dbcache", run, threshold=0.5)
    changes = {"cond": [1, 1.1, 9, 9, 9, 9], "uncond": [1, 50, 9, 9, 9, 9]}
    reused = []
    for index in range(6):
        cache.enter_step(index)
        for branch in ("cond", "uncond"):
            cache.enter_branch(branch)
            x = torch.zeros(1, 45, 2)
            for layer in range(5):
                step = changes[branch][index] if layer == 0 else 1
                x = cache.around(magcache.Site("block", layer), lambda x, step=step: x + step, x, None)
            reused.append(cache._is_reused())
            assert float(x[0, 0, 0]) == pytest.approx(
                changes[branch][index] + 4
            )  # the kept change of the middle is exact
    assert reused == [False, False, True, True, False, False, True, True, True, True, False, False]


def test_dbcache_leaves_padding_out_of_its_decision():
    run = caches.course(4, 1, 0, tokens=2)
    cache = caches.make("fbcache", run, threshold=0.5)
    for index in range(2):
        cache.enter_step(index)
        cache.enter_branch("cond")
        x = torch.zeros(1, 3, 2)
        for layer in range(5):
            change = torch.ones(1, 3, 2)
            change[:, 2] = 100.0 * index  # the third token is padding
            x = cache.around(magcache.Site("block", layer), lambda x, change=change: x + change, x, None)
    assert cache._is_reused()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_one_expert_is_used_for_the_next(name):
    """The first step of the second expert is computed, and so are all sites of it that come first."""
    names = ("high", "low")
    run = caches.course(COUNT, 1, 0, switch=6, calibration=caches.calibration(COUNT, names))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, calibration=split_calibration(run)))
    early = {"start": 0.1} if name == "blockdance" else {}
    cache = caches.make(name, run, **ALWAYS[name], **early)
    x, kinds, draw = torch.ones(1, 45, 4), [], torch.Generator().manual_seed(0)
    for index in range(8):
        cache.enter_step(index)
        reused_before = sum(cache.tally.reused.values())
        before = torch.randn(4, 3, generator=draw)
        velocity = cache.velocity(lambda before=before: Prediction(before, before), before)
        cache.leave_step(before, before, velocity)
        cache.enter_branch("cond")
        for kind in sorted(cache.sites):
            for layer in range(5) if kind != "blocks" else [None]:
                cache.around(magcache.Site(kind, layer), lambda x: x + 1, x, None)
        kinds.append(sum(cache.tally.reused.values()) - reused_before)
    assert kinds[6] == 0
    assert sum(kinds[:6]) > 0


def split_calibration(run):
    """MagCache's table in two."""
    known = caches.calibration(COUNT, ("high", "low"))
    sigmas = tuple(step.sigma for step in run.steps)
    ratios = {
        name: magcache.MagRatios(part, (0.98,) * 5, (0.97,) * 5)
        for name, part in (("high", sigmas[:6]), ("low", sigmas[6:]))
    }
    return dataclasses.replace(
        known, magcache=dataclasses.replace(known.magcache, experts=ratios, retention=0.2)
    )


# --- models that a strategy does not know


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        (
            "teacache",
            "Wan2.2-T2V-A14B",
            "flexcache=teacache: Wan2.2-T2V-A14B has no calibration for it; fit one",
        ),
        ("magcache", "mine", "flexcache=magcache: mine has no calibration for it; measure it by chitu bench"),
    ],
)
def test_a_strategy_without_a_calibration_refuses(name, model, message):
    with pytest.raises(ValueError, match=message):
        completed(name, 0.5, model)


def test_a_run_of_other_steps_than_were_measured_is_remarked():
    known = caches.calibration(COUNT)
    for name in ("teacache", "magcache"):
        assert caches.make(name, caches.course(COUNT, calibration=known)).remarks() == []
        [remark] = caches.make(name, caches.course(9, calibration=known)).remarks()
        assert f"flexcache={name}" in remark
        assert "12" in remark
        assert "9" in remark


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_calibrations_read(path):
    found = read(path)
    assert found.magcache is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such calibration; write one with chitu bench flexcache --calibrate"),
        ("[1, 2]", "must be a mapping"),
        ("teacache: {a: [", "not YAML"),
        ("teacache: 3", "teacache must be a mapping"),
        ("teacache: {steps: 50}", r"teacache\.experts is missing"),
        (
            "teacache: {steps: 5, shift: 3, thresholds: [1], experts: {dit: {coefficients: [1]}}}",
            r"teacache\.thresholds=\[1\] must be a list of 2 finite numbers",
        ),
        (
            "teacache: {steps: 5, shift: 3, thresholds: [1, 2], experts: {dit: {coefficients: [.nan]}}}",
            r"teacache\.experts\.dit\.coefficients=\[nan\] must be a list",
        ),
        (
            "magcache: {thresholds: [1, 2], max_reuses: [1, 2], retention: 0.2, "
            "experts: {dit: {sigmas: [0.5, 0.9], cond: [1], uncond: [1]}}}",
            r"magcache\.experts\.dit\.sigmas must decrease",
        ),
        (
            "magcache: {thresholds: [1, 2], max_reuses: [1, 2], retention: 0.2, "
            "experts: {dit: {sigmas: [0.9, 0.5], cond: [0], uncond: [1]}}}",
            r"magcache\.experts\.dit: ratios must be above 0",
        ),
    ],
)
def test_a_calibration_that_is_not_one_is_refused_with_file_and_key(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


# --- what a user may say


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extra": {"threshold": 1}}, r"extra=\{'threshold': 1\}: has no strategy"),
        ({"strategy": "pab", "cache_ratio": 0, "extra": {"self_range": 2}}, r"no effect at cache_ratio=0"),
        ({"strategy": "pab", "extra": {"range": 2}}, r"extra=\['range'\]: pab knows self_range, cross_range"),
        ({"strategy": "pab", "extra": 3}, r"extra=3: must be Knobs of pab, or a dict"),
        (
            {"strategy": "pab", "extra": {"self_range": 0}},
            r"self_range=0: must be a whole number, at least 1",
        ),
        ({"strategy": "pab", "extra": {"self_range": 2.0}}, r"self_range=2\.0: must be a whole number"),
        ({"strategy": "teacache", "extra": {"threshold": -1}}, r"threshold=-1: must be a finite number"),
        ({"strategy": "teacache", "extra": {"threshold": math.nan}}, r"threshold=nan: must be a finite"),
        ({"strategy": "teacache", "extra": {"max_reuses": True}}, r"max_reuses=True: must be a whole number"),
        ({"strategy": "meancache", "extra": {"fresh_steps": 20}}, r"fresh_steps=20: choose one of 30, 25"),
        ({"strategy": "taylorseer", "extra": {"order": 4}}, r"order=4: must be a whole .* at most 3"),
        ({"strategy": "taylorseer", "extra": {"variable": "t"}}, r"variable='t': choose one of sigma, step"),
        ({"strategy": "blockdance", "extra": {"boundary": 2}}, r"boundary=2: must be .* at most 1"),
        ({"strategy": "dbcache", "extra": {"front": 0}}, r"front=0: must be a whole number, at least 1"),
        ({"strategy": "easycache", "extra": {"retention": "x"}}, r"retention='x': must be a finite number"),
        ({"strategy": "magcache", "extra": {"retention": 1.5}}, r"retention=1\.5: must be .* at most 1"),
        ({"strategy": "fbcache", "extra": {"front": 2}}, r"extra=\['front'\]: fbcache knows threshold"),
    ],
    ids=str,
)
def test_an_illegal_setting_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FlexCacheParams(**values)


def test_typed_settings_and_a_dict_mean_the_same():
    typed = FlexCacheParams("teacache", extra=teacache.Knobs(0.1))
    assert FlexCacheParams("TeaCache", extra={"threshold": 0.1}) == typed


def test_dbcache_needs_a_block_in_the_middle():
    strategy = strategy_class("dbcache")
    with pytest.raises(ValueError, match="front=3 and back=2: must leave a block of the 5 of tiny"):
        strategy.complete(
            strategy.knobs_type(front=3, back=2), 0.5, Model("tiny", 5, ("dit",), Calibration())
        )


# --- pictures


def test_a_picture_has_a_square_a_step_in_the_documented_colours(tmp_path):
    picture = timeline("teacache_policy_timestep_pos", {0: 0, 1: 1, 2: 2}, strategy_class("teacache").palette)
    paths = write(picture, tmp_path)
    again = write(picture, tmp_path)  # another video of the same run
    assert [path.name for path in (*paths, *again)] == [
        "teacache_policy_timestep_pos.ppm",
        "teacache_policy_timestep_pos.png",
        "teacache_policy_timestep_pos_2.ppm",
        "teacache_policy_timestep_pos_2.png",
    ]
    assert paths[0].read_bytes().startswith(b"P6\n36 12\n255\n")
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (36, 12)
            corners = [image.getpixel(at) for at in ((0, 0), (12, 0), (24, 11))]
            assert corners == [(160, 160, 160), (255, 180, 40), (40, 140, 255)]


def test_pab_paints_the_deeper_blue_where_both_kinds_are_reused():
    codes = caches.denoise("pab", ALWAYS["pab"]).codes
    assert [codes[step] for step in range(12)] == [0, 0, 1, 3, 3, 2, 3, 3, 1, 3, 3, 0]


def test_teacache_says_where_a_run_is_not_as_it_was_fitted():
    run = caches.course(COUNT, calibration=caches.calibration(COUNT))
    for changed, words in (({"shift": 8.0}, "12 and 8"), ({"steps": run.steps[:-1]}, "11 and 3")):
        [remark] = caches.make("teacache", dataclasses.replace(run, **changed)).remarks()
        assert remark == f"flexcache=teacache: fitted at 12 steps and shift 3; this run has {words}"
