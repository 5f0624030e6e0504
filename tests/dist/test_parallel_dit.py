"""The transformer on several ranks equals the transformer on one; what travels is what the formulas say.

fp32: ranks add in another order, so 1e-5 of the output's norm is allowed; Ulysses alone adds in the same one.
"""

import pytest
import torch
from torch import distributed as dist

from chitu_core.attention import Attention, Place, create
from chitu_core.attention._parallel import Ring, merge, spread
from chitu_core.attention.torch_sdpa import Backend
from chitu_core.distributed import Degrees, collectives
from chitu_core.distributed.collectives import Pair, TokenShard
from chitu_core.distributed.mesh import ParallelMesh, _with_groups
from chitu_core.weights import randomise
from chitu_diffusion.compilation import choose_block_call
from chitu_diffusion.guidance import guided_velocity
from chitu_diffusion.models.wan import WanConfig, WanDiT

pytestmark = pytest.mark.dist

CONFIG = WanConfig(48, 96, 4, 3, 32, 24, 12, 4, 4, (1, 2, 2), 1e-6)
GRIDS = {45: (5, 6, 6), 48: (4, 6, 8), 9: (1, 6, 6), 2: (1, 2, 4)}  # tokens: latent frames, rows, columns
LAYOUTS = {
    "cfg 2": Degrees(cfg=2),
    "ulysses 2": Degrees(ulysses=2),
    "ulysses 4": Degrees(ulysses=4),
    "ring 2": Degrees(ring=2),
    "ring 4": Degrees(ring=4),
    "ring 2 x ulysses 2": Degrees(ring=2, ulysses=2),
    "cfg 2 x ulysses 2": Degrees(cfg=2, ulysses=2),
    "cfg 2 x ring 2": Degrees(cfg=2, ring=2),
    "dp 2 x ulysses 2": Degrees(dp=2, ulysses=2),
}


def make_dit() -> WanDiT:
    with torch.device("meta"):
        dit = WanDiT(CONFIG)
    randomise(dit, device=torch.device("cpu"), dtype_of=lambda _: torch.float32, seed=3)
    return dit.eval()


@torch.no_grad()
def velocity(degrees: Degrees, tokens: int, compile: str = "off") -> torch.Tensor:
    """The guided velocity of a fixed input on this rank of a mesh."""
    mesh = ParallelMesh(degrees)
    if degrees.world > 1:
        mesh = _with_groups(ParallelMesh(degrees, dist.get_rank()), "gloo")
    dit, shard = make_dit(), mesh.tokens()
    dit.call_block = choose_block_call(compile, mesh)
    for block in dit.block_list():
        block.self_attn.attention = spread(Backend(), mesh, shard)
    draw = torch.Generator().manual_seed(5)
    latent = torch.randn(1, 4, *GRIDS[tokens], generator=draw)
    texts = {name: dit.encode_text(torch.randn(1, 7, 24, generator=draw)) for name in ("cond", "uncond")}
    split = {} if shard is None else {"shard": shard}

    def predict(branch):
        return dit(latent, torch.tensor(500), texts[branch], **split)

    return guided_velocity(predict, 4.0, mesh.branches())


@pytest.mark.parametrize("tokens", GRIDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_rank(run_ranks, layout, tokens):
    degrees = LAYOUTS[layout]
    expected = velocity(Degrees(), tokens)
    results = run_ranks(degrees.world, velocity, degrees, tokens)
    for actual in results:
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
    # all ranks of a replica take the sampler's step with this, so they must not differ by a bit
    assert all(torch.equal(actual, results[0]) for actual in results)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [45, 48])
def test_compiled_blocks_exchange_heads_too(run_ranks, tokens):
    expected = velocity(Degrees(), tokens)
    for actual in run_ranks(2, velocity, LAYOUTS["ulysses 2"], tokens, "on"):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


def count_bytes(degrees: Degrees, tokens: int) -> dict[str, int]:
    """Bytes that this rank sends to others during one guided velocity, by kind."""
    sent = {"all_to_all": 0, "p2p": 0, "all_gather": 0}
    whole = {name: getattr(dist, name) for name in ("all_to_all_single", "batch_isend_irecv", "all_gather")}

    def all_to_all_single(output, x, group=None):
        sent["all_to_all"] += x.nbytes * (group.size() - 1) // group.size()
        return whole["all_to_all_single"](output, x, group=group)

    def batch_isend_irecv(operations):
        sent["p2p"] += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return whole["batch_isend_irecv"](operations)

    def all_gather(outputs, x, group=None):
        sent["all_gather"] += x.nbytes * (group.size() - 1)
        return whole["all_gather"](outputs, x, group=group)

    try:
        for function in (all_to_all_single, batch_isend_irecv, all_gather):
            setattr(collectives.dist, function.__name__, function)
        velocity(degrees, tokens)
    finally:
        for name, function in whole.items():
            setattr(collectives.dist, name, function)
    return sent


@pytest.mark.parametrize("layout", ["ulysses 4", "ring 4", "ring 2 x ulysses 2", "cfg 2 x ulysses 2"])
def test_what_travels_is_what_the_formulas_say(run_ranks, layout):
    degrees, tokens, element, patch = LAYOUTS[layout], 45, 4, 16
    local = -(-tokens // degrees.cp)
    width, layers, branches = CONFIG.dim, CONFIG.num_layers, 2 // degrees.cfg
    ulysses, ring = degrees.ulysses, degrees.ring
    expected = {  # q, k, v and the output; k and v of a chunk with a share of the heads; velocities
        "all_to_all": branches * layers * 4 * local * width * element * (ulysses - 1) // ulysses,
        "p2p": branches * layers * 2 * local * width * element * (ring - 1),
        "all_gather": branches * local * patch * element * (degrees.cp - 1)
        + (degrees.cfg - 1) * tokens * patch * element,
    }
    assert run_ranks(degrees.world, count_bytes, degrees, tokens) == [expected] * degrees.world


def test_merged_parts_equal_the_whole_in_any_order():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 33, 3, 16, generator=draw) for _ in range(3))
    kernel = Backend()
    whole, whole_lse = kernel.with_lse(q, k, v)
    parts = [kernel.with_lse(q, k[:, cut], v[:, cut]) for cut in (slice(0, 5), slice(5, 6), slice(6, 33))]
    for order in ((0, 1, 2), (2, 0, 1)):
        out, lse = parts[order[0]]
        for index in order[1:]:
            out, lse = merge(out, lse, *parts[index])
        torch.testing.assert_close(out, whole, atol=1e-6, rtol=0)  # fp32, another order of sums
        torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=0)


def test_a_part_that_nobody_looks_at_leaves_the_other_as_it_is():
    out, lse = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
    merged, merged_lse = merge(out, lse, torch.full_like(out, 7), torch.full_like(lse, -200.0))
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


def shares(tokens: int) -> list[list[int]]:
    shard = TokenShard(dist.group.WORLD)
    part = shard.split(torch.arange(1, tokens + 1)[None])
    assert torch.equal(shard.join(part), torch.arange(1, tokens + 1)[None])
    return part[0].tolist()


def test_a_sequence_is_cut_into_equal_parts_with_padding_at_its_end(run_ranks):
    assert run_ranks(4, shares, 9) == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert run_ranks(4, shares, 2) == [[1], [2], [0], [0]]


class Deaf(Attention):
    """A kernel without LSE."""

    @classmethod
    def unavailable(cls, variant, place):
        return None

    def __call__(self, q, k, v):  # noqa: ARG002
        return q


def refuse() -> str:
    with pytest.raises(ValueError, match="gives no log-sum-exp") as caught:
        Ring(Deaf("deaf"), dist.group.WORLD, TokenShard(dist.group.WORLD))
    return str(caught.value)


def test_a_kernel_without_lse_is_refused_in_a_ring(run_ranks):
    message = run_ranks(2, refuse)[0]
    assert "infer.attn_type=deaf" in message
    assert "sdpa" in message
    assert "infer.diffusion.up_limit" in message


def pair_of(value: int) -> list[int]:
    pair = Pair(dist.group.WORLD)
    return [int(part) for part in pair.both(torch.tensor(value + pair.index))]


def test_both_ranks_of_a_pair_get_both_values_in_rank_order(run_ranks):
    assert run_ranks(2, pair_of, 10) == [[10, 11], [10, 11]]


def half_precision(dtype: torch.dtype) -> float:
    """Relative difference of ring x ulysses and one rank in half precision."""
    mesh = _with_groups(ParallelMesh(Degrees(ring=2, ulysses=2), dist.get_rank()), "gloo")
    kernel = create("sdpa", Place("cpu", None, dtype, 16))
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 30, 4, 16, generator=draw).to(dtype) for _ in range(3))
    shard = mesh.tokens()
    parts = [shard.split(x) for x in (q, k, v)]
    out = shard.join(spread(kernel, mesh, shard)(*parts)).float()
    expected = kernel(q.float(), k.float(), v.float())
    return float((out - expected).norm() / expected.norm())


def test_parts_are_merged_in_fp32_whatever_the_kernel_computes_in(run_ranks):
    # bf16 has 8 bits: one rounding of the output is 2**-9 at most, 3e-3 in norm with those of the parts
    assert max(run_ranks(4, half_precision, torch.bfloat16)) <= 5e-3
