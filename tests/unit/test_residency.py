"""Arenas, streamed blocks and who is on the device: the same bits as weights that stay.

On a CPU the device's buffers are other memory of the host and the copies are real. Everywhere here what has
been let go of is overwritten with NaN.
"""

from contextlib import nullcontext

import pytest
import torch
import torch._dynamo
from engines import configured
from oracles import relative_error
from torch import nn

from chitu_core import weights
from chitu_core.arena import Arena, Lane, copy_bytes
from chitu_core.block_stream import BlockStream, Streamed
from chitu_core.distributed import ParallelMesh
from chitu_core.slab import Selection, Slab, tensor_names
from chitu_diffusion.compilation import CompiledBlocks
from chitu_diffusion.cuda_graph import GraphedForward, choose_forward, plain_forward
from chitu_diffusion.encoders.umt5 import UMT5Config, UMT5Encoder
from chitu_diffusion.models.wan import WanConfig, WanDiT
from chitu_diffusion.placing import Placing, resident_blocks
from chitu_diffusion.residency import Residency

CPU = torch.device("cpu")
CONFIG = WanConfig(48, 96, 4, 5, 32, 24, 12, 4, 4, (1, 2, 2), 1e-6)
UMT5 = UMT5Config(97, 48, 48, 4, 80, 3)


def float32(_):
    return torch.float32


def make_dit(home=weights.ON_DEVICE, dit=None):
    if dit is None:
        with torch.device("meta"):
            dit = WanDiT(CONFIG)
    weights.randomise(dit, device=CPU, dtype_of=float32, seed=3, home=home)
    return dit.eval().requires_grad_(False)


def streamed_dit(**options):
    """A transformer whose blocks are streamed, and its stream."""
    with torch.device("meta"):
        dit = WanDiT(CONFIG)
    parts = [Selection(f"blocks.{i}", tensor_names(block)) for i, block in enumerate(dit.blocks)]
    slab = Slab(dit, parts, float32, CPU)
    make_dit(slab, dit)
    stream = BlockStream(dit, slab, slab.parcels, Lane(CPU), **{"poison": True} | options)
    dit.call_block = Streamed(stream, dit.block_list(), dit.call_block)
    return dit, stream


def placed_dit(level=4, packs=False, resident_bytes=0):
    """A transformer as an engine has it."""

    def fill(module, name, dtype_of, parts_of, home):
        assert name == "dit"
        assert parts_of is WanDiT.parts_of
        make_dit(home, module)

    with torch.device("meta"):
        dit = WanDiT(CONFIG)
    guest = Placing(level, packs, resident_bytes, fill, Lane(CPU)).expert(dit, "dit", torch.float32)
    return dit, guest


@torch.inference_mode()
def velocity(dit, seed=0, **options):
    draw = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, 4, 2, 4, 6, generator=draw)
    text = torch.randn(1, 7, 24, generator=draw)
    cache = make_dit().encode_text(text) if "plain_text" in options else dit.encode_text(text)
    return dit(latent, torch.tensor(500), cache, around=options.get("around"))


PLAIN_TEXT = {"plain_text": True}  # blocks are on the host outside their own call


def test_an_arena_brings_a_network_and_lets_go_of_it():
    with torch.device("meta"):
        dit = WanDiT(CONFIG)
    slab = Slab(dit, [Selection("", tensor_names(dit))], float32, CPU)
    make_dit(slab, dit)
    before = dict(dit.named_parameters())
    arena = Arena(dit, slab, slab.parcels[0], Lane(CPU), poison=True)
    home = {name: parameter.data_ptr() for name, parameter in before.items()}
    assert arena.device_bytes == 0
    for _ in range(2):
        with torch.inference_mode():
            arena.bring()
        assert arena.device_bytes == arena.num_bytes == slab.num_bytes
        brought = dict(dit.named_parameters())
        assert all(brought[name] is before[name] for name in before)  # compiled code knows them by identity
        assert not any(parameter.is_inference() for parameter in brought.values())
        assert not set(home.values()) & {parameter.data_ptr() for parameter in brought.values()}
        assert torch.equal(velocity(dit), velocity(make_dit()))
        late = dit.blocks[0].ffn[0].weight.data
        arena.release()
        assert arena.device_bytes == 0
        assert {name: parameter.data_ptr() for name, parameter in dit.named_parameters()} == home
        assert late.isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(dit.parameters(), make_dit().parameters(), strict=True))


def test_an_arena_without_room_on_the_device_stays_as_it_was(monkeypatch):
    dit, arena = placed_dit(level=3)

    def full(self, num_bytes):
        raise torch.OutOfMemoryError(f"no {num_bytes} bytes")

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "buffer", full)
        with pytest.raises(torch.OutOfMemoryError):
            arena.bring()
    assert arena.device_bytes == 0
    arena.bring()
    assert torch.equal(velocity(dit), velocity(make_dit()))


@pytest.mark.parametrize("is_cyclic", [True, False])
def test_streamed_blocks_predict_what_resident_ones_do(is_cyclic):
    dit, stream = streamed_dit(is_cyclic=is_cyclic)
    for seed in range(3):
        assert torch.equal(velocity(dit, seed, **PLAIN_TEXT), velocity(make_dit(), seed))
        assert stream.device_bytes == (stream.num_bytes if is_cyclic else 0)
    stream.release()
    assert stream.device_bytes == 0


def test_each_block_is_copied_once_a_pass_and_the_next_one_while_it_runs():
    events = []
    dit, stream = streamed_dit(
        copy=lambda target, source: events.append("copy") or copy_bytes(target, source)
    )
    inner = dit.call_block._call
    dit.call_block._call = lambda *args, **kwargs: events.append("block") or inner(*args, **kwargs)
    velocity(dit, **PLAIN_TEXT)
    assert events == ["copy", *["copy", "block"] * CONFIG.num_layers]  # the last copy is of the first block
    events.clear()
    velocity(dit, **PLAIN_TEXT)
    assert events == ["copy", "block"] * CONFIG.num_layers
    assert stream.num_bytes == 2 * stream._cargo[0].parcel.stored.num_bytes


def test_a_block_that_is_not_held_reads_no_buffer_and_a_buffer_that_was_let_go_of_reads_nan():
    dit, stream = streamed_dit()
    weight = dit.blocks[2].ffn[0].weight
    home = weight.data_ptr()
    with stream.holding(2):
        brought = weight.data
        assert weight.data_ptr() != home
        assert brought.isfinite().all()
    assert brought.isnan().all()
    assert weight.data_ptr() == home


class Skipping:
    """A strategy that computes some blocks of each pass only."""

    sites = frozenset({"block"})

    def __init__(self, passes):
        self.passes = iter(passes)

    def around(self, site, compute, x, signal):  # noqa: ARG002
        if site.layer == 0:
            self.computed = next(self.passes)
        return compute(x) if site.layer in self.computed else x


def test_blocks_out_of_order_are_fetched_when_they_are_asked_for():
    passes = [{0, 1, 2, 3, 4}, {0, 4}, {2}, {1, 3}, set(), {4}, {3, 4}, {0, 2, 4}]
    (dit, _), plain = streamed_dit(), make_dit()
    skipping, expected = Skipping(passes), Skipping(passes)
    for seed, _ in enumerate(passes):
        actual = velocity(dit, seed, around=skipping, **PLAIN_TEXT)
        assert torch.equal(actual, velocity(plain, seed, around=expected))


class Pieces(Skipping):
    """A strategy with a site inside the blocks, which then run as they are written."""

    sites = frozenset({"ffn"})

    def around(self, site, compute, x, signal):  # noqa: ARG002
        return 2 * compute(x)


def test_a_strategy_inside_a_block_finds_the_blocks_weights():
    dit, _ = streamed_dit()
    expected = velocity(make_dit(), around=Pieces(()))
    assert torch.equal(velocity(dit, around=Pieces(()), **PLAIN_TEXT), expected)


class FailingCopy:
    """Raises at the n-th copy, after it has copied a part."""

    def __init__(self, at):
        self.left = at

    def __call__(self, target, source):
        self.left -= 1
        half = target.nbytes // 2
        copy_bytes(target[:half], source[:half])
        if self.left == 0:
            raise RuntimeError("the link is down")
        copy_bytes(target[half:], source[half:])


@pytest.mark.parametrize("at", range(1, CONFIG.num_layers + 2))
@pytest.mark.parametrize("poison", [True, False])
def test_a_copy_that_raises_leaves_the_stream_usable(at, poison):
    dit, _ = streamed_dit(copy=FailingCopy(at), poison=poison)
    home = {name: parameter.data_ptr() for name, parameter in dit.named_parameters()}
    with pytest.raises(RuntimeError, match="the link is down"):
        velocity(dit, **PLAIN_TEXT)
    assert {name: parameter.data_ptr() for name, parameter in dit.named_parameters()} == home
    for seed in range(2):
        assert torch.equal(velocity(dit, seed, **PLAIN_TEXT), velocity(make_dit(), seed))


def test_a_block_that_raises_leaves_the_stream_usable():
    dit, _ = streamed_dit()
    inner, calls = dit.call_block._call, []

    def broken(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("a kernel failed")
        return inner(*args, **kwargs)

    dit.call_block._call = broken
    with pytest.raises(RuntimeError, match="a kernel failed"):
        velocity(dit, **PLAIN_TEXT)
    assert torch.equal(velocity(dit, **PLAIN_TEXT), velocity(make_dit()))


def block_bytes():
    dit, _ = placed_dit(level=3)
    return sum(parameter.nbytes for parameter in dit.blocks[0].parameters())


@pytest.mark.parametrize(("level", "kept"), [(0, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2), (4, 4), (4, 5)])
def test_a_placed_transformer_predicts_the_same_at_every_level(level, kept):
    dit, guest = placed_dit(level, resident_bytes=kept * block_bytes())
    if guest is not None:
        guest.bring()
    for seed in range(2):
        assert torch.equal(velocity(dit, seed), velocity(make_dit(), seed))
    if level == 4:
        per_block = dit.call_block._stream
        assert len(per_block._cargo) == CONFIG.num_layers - kept
        names = {name for cargo in per_block._cargo for name in cargo.parcel.selection.names}
        assert not any(
            name.startswith("cross_attn.k") for name in names
        )  # used once a prompt, not once a step
        assert dit.call_text._stream.device_bytes == 0  # which therefore lets go of its buffers


def test_resident_blocks_are_spread_evenly_and_fit_the_budget():
    sizes = [10] * 8
    assert [sorted(resident_blocks(sizes, budget)) for budget in (9, 10, 29, 30, 45, 79, 80)] == [
        [], [4], [2, 6], [1, 4, 6], [1, 3, 5, 7], [0, 1, 2, 4, 5, 6, 7], list(range(8)),
    ]  # fmt: skip
    assert resident_blocks([50, 10, 10, 50], 20) == frozenset(
        {2}
    )  # two would be the first and the last but one


def test_packed_blocks_compute_with_the_values_that_fp8_keeps():
    dit, stream = placed_dit(packs=True)
    expected = make_dit()
    for block in expected.blocks:
        for part in block.modules():
            if isinstance(part, nn.Linear):
                values = weights_of_fp8(part.weight)
                part.weight.data = values
    assert torch.equal(velocity(dit), velocity(expected))
    assert torch.equal(velocity(dit), velocity(expected))
    assert 1e-3 < relative_error(velocity(dit), velocity(make_dit())) < 5e-2  # 3 bits, averaged over a row
    assert stream.device_bytes == stream.num_bytes


def weights_of_fp8(weight):
    scales = weight.abs().amax(-1, keepdim=True) / 448
    return (weight * (1 / scales)).to(torch.float8_e4m3fn).float() * scales


@pytest.mark.parametrize("level", [0, 2, 3, 4])
def test_a_placed_text_encoder_encodes_the_same_at_every_level(level):
    def fill(module, _, dtype_of, __, home):
        weights.randomise(module, device=CPU, dtype_of=dtype_of, seed=1, home=home)

    encoders = []
    for each in (0, level):
        with torch.device("meta"):
            encoders.append(UMT5Encoder(UMT5))
        guest = Placing(each, False, 0, fill, Lane(CPU)).encoder(encoders[-1], torch.float32)
    ids = torch.tensor([[3, 17, 96, 1]])
    with torch.inference_mode(), Residency(guest, {}, CPU).text():
        assert torch.equal(encoders[1](ids), encoders[0](ids))
    assert guest is None or guest.device_bytes == 0


class FakeGuest:
    """Says what happens to it."""

    def __init__(self, name, events):
        self.name, self.events, self.num_bytes, self.device_bytes = name, events, 10, 0

    def fetch(self):
        if not self.device_bytes:
            self.events.append(f"fetch {self.name}")
        self.device_bytes = self.num_bytes

    def bring(self):
        self.fetch()
        self.events.append(f"bring {self.name}")

    def release(self):
        if self.device_bytes:
            self.events.append(f"release {self.name}")
        self.device_bytes = 0


SWAPPED = ["fetch high", "bring high", "bring high", "release high", "fetch low", "bring low"]
BESIDE = ["fetch high", "bring high", "fetch low", "bring high", "release high", "bring low"]


@pytest.mark.parametrize(("spare", "expected"), [(9, SWAPPED), (10, BESIDE)])
def test_the_second_expert_is_fetched_early_only_where_there_is_room(spare, expected):
    events = []
    guests = {name: FakeGuest(name, events) for name in ("high", "low")}
    residency = Residency(FakeGuest("text", []), guests, CPU)
    for step in [("high", "high"), ("high",), ("high", "low"), ("high",), ("low", None), ("low",)]:
        residency.enter(*step, spare_bytes=spare)
    assert events == expected
    assert residency.device_bytes == 10
    residency.leave()
    assert events == [*expected, "release low"]
    assert residency.device_bytes == 0


def test_the_text_encoder_and_an_expert_are_never_on_the_device_together():
    events = []
    residency = Residency(FakeGuest("text", events), {"dit": FakeGuest("dit", events)}, CPU)
    residency.enter("dit")  # of a task that was cancelled

    def encode():
        with residency.text():
            assert residency.device_bytes == 10
            raise RuntimeError("a broken encoder")

    with pytest.raises(RuntimeError, match="a broken encoder"):
        encode()
    assert events == ["fetch dit", "bring dit", "release dit", "fetch text", "bring text", "release text"]


def test_networks_without_a_guest_are_left_alone():
    residency = Residency(None, {}, CPU)
    with residency.text():
        residency.enter("dit", "dit")
    residency.leave()
    assert residency.device_bytes == 0


@pytest.mark.parametrize("level", [0, 2, 3, 4])
def test_recorded_graphs_are_for_weights_that_stay(level):
    def infer(mode):
        return configured(f"infer.diffusion.low_mem_level={level}", f"infer.use_cuda_graph={mode}").infer

    mesh, cuda = ParallelMesh(), torch.device("cuda")
    assert isinstance(choose_forward(infer("auto"), mesh, cuda), GraphedForward) == (level < 3)
    assert choose_forward(infer("off"), mesh, cuda) is plain_forward
    refusal = pytest.raises(
        ValueError, match=rf"use_cuda_graph=on: .*low_mem_level={level} moves the weights"
    )
    with refusal if level >= 3 else nullcontext():
        choose_forward(infer("on"), mesh, cuda)


@pytest.mark.slow
def test_compiled_blocks_are_streamed_through_one_graph():
    torch._dynamo.reset()
    plain = make_dit()
    plain.call_block = CompiledBlocks()
    expected = [velocity(plain, seed) for seed in range(3)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.device("meta"):
        dit = WanDiT(CONFIG)
    dit.call_block = CompiledBlocks()
    placing = Placing(4, False, 2 * block_bytes(), lambda module, *_: make_dit(_[-1], module), Lane(CPU))
    placing.expert(dit, "dit", torch.float32)
    for seed in range(3):
        assert torch.equal(velocity(dit, seed), expected[seed])
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    )  # resident or streamed, in either buffer
