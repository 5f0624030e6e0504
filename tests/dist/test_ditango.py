"""DiTango on several ranks: exact where everything is computed, and the right stale state everywhere else.

fp32 under gloo. Ranks add in another order than a ring, so 1e-5 of the output's norm is allowed.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import distributed as dist

from chitu_core.attention import spread
from chitu_core.attention.torch_sdpa import Backend
from chitu_core.distributed import Degrees, collectives
from chitu_core.distributed.mesh import ParallelMesh, _with_groups
from chitu_core.timing import Timer
from chitu_core.weights import randomise
from chitu_diffusion.flex_cache import _ditango_exchange
from chitu_diffusion.flex_cache._base import Course, Model, Services, Sizes, Step
from chitu_diffusion.flex_cache._calibration import NOTHING
from chitu_diffusion.flex_cache.strategy.ditango import Knobs, Strategy
from chitu_diffusion.guidance import Prediction, guided_prediction
from chitu_diffusion.models.wan import WanConfig, WanDiT
from chitu_diffusion.seam import Site

pytestmark = pytest.mark.dist

LAYERS, HEADS, DIM, STEPS = 3, 4, 8, 10
LAYOUTS = {  # degrees and group size
    "ring 4, groups of 2": (Degrees(ring=4), 2),
    "ring 4, groups of 1": (Degrees(ring=4), 1),
    "ring 2 x ulysses 2": (Degrees(ring=2, ulysses=2), 2),
    "ring 2": (Degrees(ring=2), 1),
}
EXACT = {"gate": 0.0}  # every step is an anchor
SELECTIVE = {"gate": 10.0, "quantile": 0.5, "tau_max": 3}  # one anchor


def course(degrees: Degrees, steps: int = STEPS, warmup: int = 2) -> Course:
    model = Model("tiny", LAYERS, ("only",), NOTHING, degrees.ring, degrees.ulysses)
    levels = tuple(Step(i, 1000 - 10 * i, 1 - i / steps, 1 - (i + 1) / steps, "only") for i in range(steps))
    return Course(model, levels, warmup, 1, 1.0, 0, torch.float32)


class Run:
    """The attention of a few layers, step by step, on this rank of a layout; inputs drift from step to step."""

    def __init__(self, layout: str, tokens: int, knobs: dict, steps: int = STEPS) -> None:
        self.degrees, group_size = LAYOUTS[layout]
        self.mesh = _with_groups(ParallelMesh(self.degrees, dist.get_rank()), "gloo")
        self.shard, self.tokens, self.steps = self.mesh.tokens(), tokens, steps
        self.padding, self.dtype = 0.0, torch.float32
        self.installed = spread(Backend(), self.mesh, self.shard)
        plan, agree = course(self.degrees, steps), self.mesh.agreement()
        self.settings = Strategy.complete(Knobs(group_size=group_size, **knobs), 0.5, plan.model)
        self.strategy = Strategy(plan, self.settings, Services(agree, lambda *_: None, self.installed))

    def whole(self, step: int, branch: str, layer: int) -> list[torch.Tensor]:
        """q, k, v of all tokens; what changes grows with the layer."""
        draw = torch.Generator().manual_seed(layer * 2 + (branch == "uncond"))
        fixed, moving = torch.randn(2, 3, 1, self.tokens, HEADS, DIM, generator=draw)
        return list((fixed + 0.05 * (layer + 1) * step * moving).to(self.dtype).float())

    def step(self, index: int, branches=("cond", "uncond")) -> list[torch.Tensor]:
        """What the attention of every branch and layer gives on this rank."""
        self.strategy.enter_step(index)
        outputs = []

        def compute() -> Prediction:
            for branch in branches:
                self.strategy.enter_branch(branch)
                for layer in range(LAYERS):
                    qkv = tuple(self.split(x) for x in self.whole(index, branch, layer))
                    site, signal = Site("attention", layer), torch.zeros(6, 1)
                    outputs.append(self.strategy.around(site, lambda x: self.installed(*x), qkv, signal))
            return Prediction(outputs[-1], outputs[-1])

        self.strategy.velocity(compute, torch.zeros(1))
        return outputs

    def split(self, x: torch.Tensor) -> torch.Tensor:
        part = self.shard.split(x).to(self.dtype)
        rank = self.mesh.cp_index
        part[:, max(self.tokens - rank * part.shape[1], 0) :] = self.padding
        return part

    def exact(self, index: int, branches=("cond", "uncond")) -> list[torch.Tensor]:
        inputs = [self.whole(index, branch, layer) for branch in branches for layer in range(LAYERS)]
        return [self.installed(*(self.shard.split(x) for x in qkv)) for qkv in inputs]

    def distance(self, found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
        """The largest relative difference over all ranks' real tokens."""
        pairs = zip(map(self.shard.join, found), map(self.shard.join, expected), strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    # what a rank must hold, by a direct formula and without the classes under test

    def part(self, index: int) -> tuple[slice, slice]:
        """Tokens, with padding, and heads that ring position `index` has after the exchange of heads."""
        u, place = self.degrees.ulysses, self.mesh.place
        length, heads = -(-self.tokens // self.degrees.cp) * u, HEADS // u
        return slice(index * length, (index + 1) * length), slice(
            place.ulysses * heads, (place.ulysses + 1) * heads
        )

    def direct(self, step: int, branch: str, layer: int, positions: list[int], *, all_heads: bool = False):
        """Output and LSE of this rank's queries over the keys of ring positions, and how many keys."""
        rows, heads = self.part(self.mesh.place.ring)
        q, k, v = (x[:, :, slice(None) if all_heads else heads] for x in self.whole(step, branch, layer))
        q = q[:, rows]
        keys = [token for p in positions for token in range(self.tokens)[self.part(p)[0]]]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, keys]) * DIM**-0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, keys]), scores.logsumexp(-1), len(keys)

    def members(self, group: int) -> list[int]:
        """Ring positions of a group, seen from this rank: its own position is in none."""
        ring, m = self.mesh.place.ring, self.settings.members
        chunk = (ring // m + group) % self.settings.groups
        return [p for p in range(chunk * m, (chunk + 1) * m) if p != ring]


def largest_errors(layout: str) -> dict[int, tuple[float, int]]:
    """By tokens: the largest error of any step, and how many steps reused."""
    found = {}
    for tokens in (45, 48, 9):
        run = Run(layout, tokens, EXACT, steps=5)
        worst = max(run.distance(run.step(index), run.exact(index)) for index in range(run.steps))
        found[tokens] = worst, run.strategy.tally.reused_steps
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_that_compute_everything_equal_exact_attention(run_ranks, layout):
    for rank in run_ranks(LAYOUTS[layout][0].world, largest_errors, layout):
        for error, reused_steps in rank.values():
            assert error <= 1e-5
            assert reused_steps == 0


@dataclass
class Followed:
    """What a selective run showed on one rank."""

    state_error: float  # of all states at the end, against attention at the step when each was computed
    output_error: float  # of all selective steps, against the merge of those and fresh ones
    ages: set[int]  # of states that were merged
    codes: dict[tuple[int, int, int], int]
    sent: list[tuple[int, int]]  # a step: bytes between ring positions, and what its plan says
    counts: tuple[int, int]  # computed, reused
    kept: tuple[int, int]  # peak bytes, footprint
    epsilon: float
    is_emptied: bool


class Follower:
    """Takes a run through its steps and computes beside it, by formula, what must come out."""

    def __init__(self, run: Run) -> None:
        self.run, self.since = run, {}
        self.state_error, self.output_error, self.ages = 0.0, 0.0, set()

    def outputs(self, index: int, branch: str, layer: int) -> torch.Tensor | None:
        """Own keys of this step and every group's of the step when it was last computed, [1, s, H, D]."""
        run, ring = self.run, self.run.mesh.place.ring
        steps = {ring: index}
        for group in range(run.settings.groups):
            step = self.since.get((layer, group), index)
            self.ages.add(index - step)
            steps |= dict.fromkeys(run.members(group), step)
        parts = []
        for position, step in steps.items():
            out, lse, size = run.direct(step, branch, layer, [position], all_heads=True)
            parts += [(out, lse)] if size else []
        weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(-1, -2).unsqueeze(-1)
        whole = sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True))
        length = -(-run.tokens // run.degrees.cp)
        return whole[:, run.mesh.place.ulysses * length :][:, :length]

    def step(self, index: int) -> None:
        run = self.run
        found = iter(run.step(index))
        codes = run.strategy._cells._codes
        for layer in range(LAYERS):
            for group in range(run.settings.groups):
                if codes[index, layer, group] in (1, 2):
                    self.since[layer, group] = index
        for branch in ("cond", "uncond"):
            for layer in range(LAYERS):
                out, expected = next(found), self.outputs(index, branch, layer)
                if expected.numel() and not run.strategy.is_forced:
                    error = (out[:, : expected.shape[1]] - expected).norm() / expected.norm()
                    self.output_error = max(self.output_error, float(error))

    def check_states(self) -> None:
        run = self.run
        for (branch, layer), states in run.strategy._states.items():
            for group in range(run.settings.first, run.settings.groups):
                step, state = self.since[layer, group], states.get(group)
                out, lse, size = run.direct(step, branch, layer, run.members(group))
                assert (state is None) == (size == 0)
                if size and out.numel():
                    rows = out.shape[1]
                    error = max(
                        (state.out[:, :rows] - out).norm() / out.norm(),
                        (state.lse[..., :rows] - lse).abs().max(),
                    )
                    self.state_error = max(self.state_error, float(error))


def planned_bytes(run: Run) -> int:
    """What one step of two branches sends by its plan: keys and values, once for every visited position."""
    members, computed = run.settings.members, run.strategy._computed
    visits = sum(members - (group == 0) for row in computed for group, is_ in enumerate(row) if is_)
    length = -(-run.tokens // run.degrees.cp)
    return 2 * visits * 2 * length * HEADS * DIM * run.dtype.itemsize


@dataclass(frozen=True)
class Twist:
    """What is unusual in a run."""

    is_reversed: bool = False  # keys go the other way after the anchor
    padding: float = 0.0  # what padded tokens hold
    dtype: torch.dtype = torch.float32


def follow(layout: str, tokens: int, twist: Twist = Twist()) -> Followed:
    run = Run(layout, tokens, SELECTIVE)
    run.padding, run.dtype = twist.padding, twist.dtype
    follower, sent, bytes_sent = Follower(run), [], [0]
    whole = collectives.dist.batch_isend_irecv

    def counted(batch):
        bytes_sent[0] += sum(one.tensor.nbytes for one in batch if one.op is dist.isend)
        return whole(batch)

    try:
        collectives.dist.batch_isend_irecv = counted
        for index in range(STEPS - 1):  # the last one is forced, and the states are of interest
            bytes_sent[0] = 0
            follower.step(index)
            sent.append((bytes_sent[0], planned_bytes(run)))
            if twist.is_reversed and not run.strategy._planner.is_anchor:
                straight = _ditango_exchange.Rotation.peers
                run.strategy._rotation.peers = lambda a, b: straight(run.strategy._rotation, a, b)[::-1]
    finally:
        collectives.dist.batch_isend_irecv = whole
    follower.check_states()
    strategy, tally = run.strategy, run.strategy.tally
    length = -(-tokens // run.degrees.cp)
    sizes = Sizes(length * HEADS * DIM * twist.dtype.itemsize, length * HEADS * DIM * 4, 0, LAYERS, 2, HEADS, length)
    kept = strategy.kept.peak_bytes, Strategy.footprint(run.settings, sizes)
    codes = dict(strategy._cells._codes)
    epsilon = strategy._planner.epsilon
    strategy.forget()
    counts = tally.computed["attention"], tally.reused["attention"]
    is_emptied = strategy.kept.bytes == 0
    found = follower.state_error, follower.output_error, follower.ages
    return Followed(*found, codes, sent, counts, kept, epsilon, is_emptied)


@pytest.fixture(scope="module")
def followed(run_ranks):
    """By layout and tokens, what each rank saw; every run is made once."""
    found = {}

    def get(layout: str, tokens: int) -> list[Followed]:
        if (layout, tokens) not in found:
            found[layout, tokens] = run_ranks(LAYOUTS[layout][0].world, follow, layout, tokens)
        return found[layout, tokens]

    return get


CASES = [(layout, tokens) for layout in LAYOUTS for tokens in (45, 9)]


@pytest.mark.parametrize(("layout", "tokens"), CASES)
def test_a_kept_state_is_attention_to_its_group_when_it_was_computed(followed, layout, tokens):
    for rank in followed(layout, tokens):
        assert rank.state_error <= 1e-5


@pytest.mark.parametrize(("layout", "tokens"), CASES)
def test_a_selective_step_merges_stale_and_fresh_states(followed, layout, tokens):
    for rank in followed(layout, tokens):
        assert rank.output_error <= 1e-5
        assert {0, 1, 2} <= rank.ages  # fresh ones, and some of several ages
        assert max(rank.ages) <= SELECTIVE["tau_max"]


def test_states_kept_in_half_precision_cost_no_more_than_its_rounding(run_ranks):
    # as for a ring in test_parallel_dit.py: bf16 rounds by 2**-9 at most, 3e-3 in norm with that of the parts
    for rank in run_ranks(4, follow, "ring 4, groups of 2", 45, Twist(dtype=torch.bfloat16)):
        assert rank.output_error <= 5e-3
        assert rank.kept[0] <= rank.kept[1]


def test_keys_that_rotate_the_other_way_would_be_noticed(run_ranks):
    for rank in run_ranks(4, follow, "ring 4, groups of 1", 45, Twist(is_reversed=True)):
        assert rank.output_error > 0.1
        assert rank.state_error > 0.1


@pytest.mark.parametrize(("layout", "tokens"), CASES)
def test_all_ranks_decide_alike_and_both_reuse_and_compute(followed, layout, tokens):
    first, *others = followed(layout, tokens)
    assert all(other.codes == first.codes for other in others)
    assert {first.codes[2, layer, 0] for layer in range(LAYERS)} == {1}  # the anchor is step `warmup`
    assert set(first.codes.values()) == {0, 1, 2, 3}
    degrees, group_size = LAYOUTS[layout]
    is_empty = group_size == degrees.ulysses  # group 0, of which a rank's own keys are no part
    codes = [code for (_, _, group), code in first.codes.items() if group >= is_empty]
    assert first.counts == (2 * sum(code != 3 for code in codes), 2 * codes.count(3))  # of two branches


@pytest.mark.parametrize("layout", ["ring 4, groups of 2", "ring 2 x ulysses 2"])
def test_padding_takes_part_in_no_statistic(run_ranks, followed, layout):
    plain = followed(layout, 45)
    for rank, other in zip(run_ranks(4, follow, layout, 45, Twist(padding=1e3)), plain, strict=True):
        assert rank.codes == other.codes
        assert rank.epsilon == pytest.approx(other.epsilon, rel=1e-6)
        assert rank.output_error <= 1e-5


@pytest.mark.parametrize(("layout", "tokens"), CASES)
def test_a_reused_group_sends_nothing(followed, layout, tokens):
    for rank in followed(layout, tokens):
        assert all(actual == planned for actual, planned in rank.sent)
        assert rank.sent[3] != rank.sent[2]
        if LAYOUTS[layout][1] == LAYOUTS[layout][0].ulysses:  # a group is one position of the ring
            assert rank.sent[3] == (0, 0)  # the step after the anchor reuses all


@pytest.mark.parametrize(("layout", "tokens"), CASES)
def test_what_is_kept_stays_within_the_footprint_and_is_let_go(followed, layout, tokens):
    for rank in followed(layout, tokens):
        peak, footprint = rank.kept
        assert 0 < peak <= footprint
        assert rank.is_emptied


CONFIG = WanConfig(48, 96, 4, LAYERS, 32, 24, 12, 4, 4, (1, 2, 2), 1e-6)


@torch.no_grad()
def denoise(
    degrees: Degrees, group_size: int, knobs: dict | None, timer: Timer | None = None
) -> tuple[torch.Tensor, dict, int]:
    """Velocities of a few Euler steps of a whole transformer, decisions, and reused steps; exact without knobs."""
    mesh = _with_groups(ParallelMesh(degrees, dist.get_rank()), "gloo")
    with torch.device("meta"):
        dit = WanDiT(CONFIG)
    randomise(dit, device=torch.device("cpu"), dtype_of=lambda _: torch.float32, seed=3)
    shard, pair = mesh.tokens(), mesh.branches()
    attention = spread(Backend(), mesh, shard)
    for block in dit.block_list():
        block.self_attn.attention = attention
    draw = torch.Generator().manual_seed(5)
    latent = torch.randn(4, 5, 6, 6, generator=draw)  # 45 tokens
    texts = {name: dit.encode_text(torch.randn(1, 7, 24, generator=draw)) for name in ("cond", "uncond")}
    plan, strategy, velocities = course(degrees, 8), None, []
    if knobs is not None:
        settings = Strategy.complete(Knobs(group_size=group_size, **knobs), 0.5, plan.model)
        timer = timer or Timer(torch.device("cpu"), enabled=False)
        services = Services(mesh.agreement(), lambda *_: None, attention, timer.span)
        strategy = Strategy(plan, settings, services)

    def predict(time, branch):
        if strategy is not None:
            strategy.enter_branch(branch)
        return dit(latent[None], torch.tensor(time), texts[branch], shard=shard, around=strategy)[0]

    for step in plan.steps:
        compute = partial(guided_prediction, partial(predict, step.timestep), 4.0, pair)
        if strategy is None:
            velocity = compute().guided
        else:
            strategy.enter_step(step.index)
            velocity = strategy.velocity(compute, latent)
        velocities.append(velocity)
        latent = latent + (step.sigma_next - step.sigma) * velocity
    codes, reused = (strategy._cells._codes, strategy.tally.reused_steps) if strategy else ({}, 0)
    return torch.stack(velocities), codes, reused


WHOLE = {"cfg 2 x ring 2": (Degrees(cfg=2, ring=2), 1), "ring 2 x ulysses 2": (Degrees(ring=2, ulysses=2), 2)}


@pytest.mark.parametrize("layout", WHOLE)
def test_a_transformer_that_computes_everything_equals_the_exact_one(run_ranks, layout):
    expected = run_ranks(4, denoise, *WHOLE[layout], None)
    for (actual, *_), (exact, *_) in zip(run_ranks(4, denoise, *WHOLE[layout], EXACT), expected, strict=True):
        assert (actual - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("layout", WHOLE)
def test_ranks_of_a_replica_decide_alike_and_agree_on_every_velocity(run_ranks, layout):
    first, *others = run_ranks(4, denoise, *WHOLE[layout], SELECTIVE)
    assert first[2] >= 3  # steps in which something was reused
    for velocities, codes, _ in others:
        assert codes == first[1]
        assert torch.equal(velocities, first[0])


def timed(degrees: Degrees, group_size: int) -> dict[str, int]:
    timer = Timer(torch.device("cpu"), enabled=True)
    denoise(degrees, group_size, SELECTIVE, timer)
    return {row.name: row.samples for row in timer.statistics()}


def test_calls_are_timed_by_what_they_compute(run_ranks):
    for found in run_ranks(4, timed, *WHOLE["ring 2 x ulysses 2"]):
        calls = {name: count for name, count in found.items() if "attn" in name}
        assert set(calls) <= {"anchor_attn", "sele_attn_0", "sele_attn_1", "sele_attn_2"}
        assert calls["anchor_attn"] >= 2 * LAYERS  # of both branches
        assert sum(calls.values()) > calls["anchor_attn"]
        assert found["ditango_plan_sync"] == 5  # of 8 steps, two forced at the start and one at the end


def test_a_ratio_near_zero_computes_everything_in_a_transformer_too(run_ranks):
    for *_, reused_steps in run_ranks(4, denoise, *WHOLE["cfg 2 x ring 2"], {"gate": 6e-7, "quantile": 1e-6}):
        assert reused_steps == 0
