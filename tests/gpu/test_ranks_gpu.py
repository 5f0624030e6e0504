"""Several GPUs through NCCL: every layout gives what one GPU gives, and a rank that fails ends the job.

Run as a program by its own tests, once a rank: `python test_ranks_gpu.py FOLDER`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chitu_core.arena import Lane
from chitu_core.attention import Place, choose, create, spread
from chitu_core.distributed import Degrees, open_mesh
from chitu_core.environment import Environment
from chitu_core.weights import randomise
from chitu_diffusion.guidance import guided_velocity
from chitu_diffusion.models.wan import WanConfig, WanDiT
from chitu_diffusion.placing import Placing
from chitu_diffusion.vaes._strips import Strips
from chitu_diffusion.vaes.wan import WAN21_LATENTS_MEAN, WAN21_LATENTS_STD, WanVAE, WanVAEConfig

pytestmark = [pytest.mark.gpu, pytest.mark.dist]

DIT = WanConfig(512, 1024, 4, 4, 256, 64, 32, 16, 16, (1, 2, 2), 1e-6)
VAE = WanVAEConfig(16, 16, (1, 2, 4, 4), 1, (False, True, True), WAN21_LATENTS_MEAN, WAN21_LATENTS_STD)
LAYOUTS = {
    2: [Degrees(cfg=2), Degrees(ulysses=2), Degrees(ring=2)],
    4: [
        Degrees(cfg=2, ulysses=2),
        Degrees(ulysses=4),
        Degrees(ring=4),
        Degrees(ring=2, ulysses=2),
        Degrees(dp=2, ring=2),
    ],
}
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2}  # sums in another order; one rounding to 8 bits more


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What each rank of a run on 2 or 4 GPUs found."""
    count = min(4, torch.cuda.device_count()) // 2 * 2
    if count < 2 or count == 3:
        pytest.skip("needs 2 or 4 GPUs")
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in place.items()}
        ranks.append(subprocess.Popen([sys.executable, __file__, str(folder)], env=env))
    assert [rank.wait(timeout=300) for rank in ranks] == [0] * count
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def test_every_layout_equals_one_gpu(measured):
    for found in measured:
        for dtype, limit in LIMITS.items():
            assert all(error <= limit for error in found[dtype].values()), found[dtype]


def test_streamed_blocks_give_what_resident_ones_do_in_every_layout(measured):
    for found in measured:
        assert found["streamed"], "no layout"
        assert all(found["streamed"].values()), found["streamed"]


def test_decoding_in_strips_equals_one_gpu(measured):
    assert measured[0]["vae"] <= 1e-5, measured[0]  # fp32 with TF32 off: the same sums
    assert measured[0]["pixels"] <= 1


@torch.inference_mode()
def measure(folder: Path) -> None:
    environment = Environment.read()
    device = torch.device("cuda", environment.local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False
    found: dict = {name: {} for name in (*LIMITS, "streamed")}
    for degrees in LAYOUTS[environment.world_size]:
        mesh = open_mesh(degrees, environment, device)
        for name in LIMITS:
            found[name][str(degrees)] = layout_error(mesh, getattr(torch, name), device)
        found["streamed"][str(degrees)] = streams_alike(mesh, device)
        mesh.close()
    mesh = open_mesh(Degrees(ulysses=environment.world_size), environment, device)
    found["vae"], found["pixels"] = vae_error(mesh, device)
    mesh.close()
    (folder / f"{environment.rank}.json").write_text(json.dumps(found))


def layout_error(mesh, dtype, device) -> float:
    """Relative error of the guided velocity against this GPU alone."""
    dit = make_dit(0, dtype, device)
    expected, actual = velocity(dit, None, dtype, device), velocity(dit, mesh, dtype, device)
    return float((actual - expected).norm() / expected.norm())


def streams_alike(mesh, device) -> bool:
    """Whether level 4 gives the bits of level 0, in passes that are queued without a wait."""
    resident, streamed = (make_dit(level, torch.bfloat16, device) for level in (0, 4))
    expected = velocity(resident, mesh, torch.bfloat16, device)
    passes = [velocity(streamed, mesh, torch.bfloat16, device) for _ in range(3)]
    return all(torch.equal(found, expected) for found in passes)


def make_dit(level, dtype, device) -> WanDiT:
    def fill(module, _, dtype_of, __, home):
        randomise(module, device=device, dtype_of=dtype_of, seed=1, home=home)

    with torch.inference_mode(False):  # as an engine is built: where parameters lie may change later
        with torch.device("meta"):
            dit = WanDiT(DIT)
        Placing(level, False, 0, fill, Lane(device)).expert(dit, "dit", dtype)
    return dit.requires_grad_(False)


def velocity(dit, mesh, dtype, device) -> torch.Tensor:
    """The guided velocity of an uneven number of tokens, by the ranks of a mesh or by this GPU alone."""
    place = Place("cuda", torch.cuda.get_device_capability(device), dtype, 128)
    attention = create(choose("auto", place, key="attention"), place)
    split, pair = {}, None
    if mesh is not None:
        shard, pair = mesh.tokens(), mesh.branches()
        attention = spread(attention, mesh, shard)
        split = {} if shard is None else {"shard": shard}
    for block in dit.block_list():
        block.self_attn.attention = attention
    draw = torch.Generator(device).manual_seed(2)
    latent = torch.randn(1, 16, 5, 18, 22, generator=draw, device=device)  # 495 tokens
    texts = {
        name: dit.encode_text(torch.randn(1, 9, 64, generator=draw, device=device))
        for name in ("cond", "uncond")
    }
    t = torch.tensor(500, device=device)
    return guided_velocity(lambda branch: dit(latent, t, texts[branch], **split), 4.0, pair)


def vae_error(mesh, device) -> tuple[float, float]:
    """Relative error of this rank's strip, and the largest difference of collected bytes."""
    with torch.device("meta"):
        vae = WanVAE(VAE)
    randomise(vae, device=device, dtype_of=lambda _: torch.float32, seed=1)
    latent = torch.randn(16, 3, 9, 14, generator=torch.Generator(device).manual_seed(3), device=device)
    strips = Strips(mesh.line(), 9, 14)
    error, difference = 0.0, 0.0
    for whole, part in zip(vae.decode(latent), vae.decode(latent, strips=strips), strict=True):
        expected = strips.cut(whole.permute(1, 2, 3, 0), 8).permute(3, 0, 1, 2)
        error = max(error, float((part - expected).norm() / expected.norm()))
        pixels = strips.collect(((part + 1) * 127).to(torch.uint8).permute(1, 2, 3, 0).contiguous(), 8)
        if pixels is not None:
            wanted = ((whole + 1) * 127).to(torch.uint8).permute(1, 2, 3, 0)
            difference = max(difference, float((pixels.int() - wanted.int()).abs().max()))
    return error, difference


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
