"""Streamed blocks under context parallelism: each rank streams its own, and the bits are those of resident ones."""

import pytest
import torch
from torch import distributed as dist

from chitu_core.arena import Lane
from chitu_core.attention._parallel import spread
from chitu_core.attention.torch_sdpa import Backend
from chitu_core.distributed import Degrees
from chitu_core.distributed.mesh import ParallelMesh, _with_groups
from chitu_core.weights import randomise
from chitu_diffusion.models.wan import WanConfig, WanDiT
from chitu_diffusion.placing import Placing

pytestmark = pytest.mark.dist

CPU = torch.device("cpu")
CONFIG = WanConfig(48, 96, 4, 3, 32, 24, 12, 4, 4, (1, 2, 2), 1e-6)
LAYOUTS = {"ulysses 2": Degrees(ulysses=2), "ring 2": Degrees(ring=2)}


def fill(module, _, dtype_of, __, home):
    randomise(module, device=CPU, dtype_of=dtype_of, seed=3, home=home)


@torch.inference_mode()
def velocities(degrees: Degrees, level: int) -> list[torch.Tensor]:
    """Three forwards of fixed inputs on this rank, with a block or two out of turn in the second."""
    mesh = _with_groups(ParallelMesh(degrees, dist.get_rank()), "gloo")
    with torch.inference_mode(False):
        with torch.device("meta"):
            dit = WanDiT(CONFIG)
        guest = Placing(level, False, 0, fill, Lane(CPU)).expert(dit.eval(), "dit", torch.float32)
    if guest is not None:
        guest.bring()
    shard = mesh.tokens()
    for block in dit.block_list():
        block.self_attn.attention = spread(Backend(), mesh, shard)
    draw = torch.Generator().manual_seed(5)
    text = dit.encode_text(torch.randn(1, 7, 24, generator=draw))
    latent = torch.randn(1, 4, 5, 6, 6, generator=draw)  # 45 tokens, which 2 does not divide
    return [
        dit(latent, torch.tensor(500), text, shard=shard, around=around) for around in (None, Skipping(), None)
    ]


class Skipping:
    """A strategy that leaves the first block out."""

    sites = frozenset({"block"})

    def around(self, site, compute, x, signal):  # noqa: ARG002
        return compute(x) if site.layer else x


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_stream_their_own_blocks_and_predict_the_same(run_ranks, layout):
    degrees = LAYOUTS[layout]
    expected = run_ranks(2, velocities, degrees, 0)
    for level in (3, 4):
        for actual, resident in zip(run_ranks(2, velocities, degrees, level), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(actual, resident, strict=True))
