"""Cache strategies on several ranks: all decide alike, and what comes out is what one rank gives."""

import caches
import pytest
import torch

from chitu_core.distributed import Degrees

pytestmark = pytest.mark.dist

# thresholds that a run on this model crosses now and then, so that a decision is one
KNOBS = {
    "blockdance": {"boundary": 0.6, "group": 2},
    "dbcache": {"threshold": 0.6, "front": 2, "back": 1},
    "easycache": {"threshold": 0.8},
    "fbcache": {"threshold": 0.6},
    "magcache": {"threshold": 0.12, "max_reuses": 2},
    "meancache": {"fresh_steps": 17},
    "pab": {"self_range": 2, "cross_range": 3},
    "taylorseer": {"interval": 3},
    "teacache": {"threshold": 1.5},
}
LAYOUTS = {
    "cfg 2": Degrees(cfg=2),
    "ulysses 2": Degrees(ulysses=2),
    "cfg 2 x ring 2": Degrees(cfg=2, ring=2),
    "ring 2 x ulysses 2": Degrees(ring=2, ulysses=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KNOBS)
def test_every_rank_decides_as_one_rank_does(run_ranks, name, layout):
    degrees = LAYOUTS[layout]
    alone = caches.denoise(name, KNOBS[name])
    assert sum(alone.reused.values()) > 0
    assert sum(alone.computed.values()) > 0
    ranks = run_ranks(degrees.world, caches.denoise, name, KNOBS[name], degrees)
    share = 1 if "velocity" in alone.reused else degrees.cfg  # of the branches; a guided velocity has none
    for rank in ranks:
        assert {kind: share * count for kind, count in rank.reused.items()} == alone.reused
        assert {kind: share * count for kind, count in rank.computed.items()} == alone.computed
        assert (rank.latents - alone.latents).norm() <= 1e-5 * alone.latents.norm()  # another order of sums
        assert torch.equal(rank.latents, ranks[0].latents)
    if "velocity" not in alone.reused:  # a rank keeps its own tokens, of its own branches
        assert max(rank.peak_bytes for rank in ranks) <= 1.1 * alone.peak_bytes / degrees.world
