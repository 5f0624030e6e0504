"""The VAE tile by tile: exact tiles against the whole, blended ones, plans, and memory said beforehand."""

import collections
import copy
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from engines import new_engine
from oracles import randomise, relative_error
from shapeworld import render, sample_attrs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from chitu_core.ops import conv as ops
from chitu_diffusion.media import to_pixels
from chitu_diffusion.prepare import Pipeline
from chitu_diffusion.vaes import _tiles
from chitu_diffusion.vaes._calls import Size
from chitu_diffusion.vaes._footprint import footprint
from chitu_diffusion.vaes._tile_plan import TilePlan, _overlapping, _weighed, plan_tiles, stops
from chitu_diffusion.vaes._tiles import TileStream, decode_tiled, encode_tiled
from chitu_diffusion.vaes.wan import Decoder, Encoder, Stream, WanVAE, apply, wan21

FP32 = 1e-5  # relative L2: convolutions of other sizes sum in another order
FP64 = 1e-13
MEMORY = 0.1  # of a prediction, which leaves attention and small things out
H100 = (9, 0)
MEASURED = Path(__file__).parents[2] / "docs" / "benchmarks" / "vae_h100.json"


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return randomise(WanVAE(wan21(8)), seed=0).requires_grad_(False)


@pytest.fixture(scope="module")
def full() -> WanVAE:
    with torch.device("meta"):
        return WanVAE(wan21(96))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_video(rows: int, columns: int, frames: int = 9) -> Tensor:
    return random(3, frames, 8 * rows, 8 * columns).clamp(-1, 1)


def evenly(side: int, parts: int) -> tuple[tuple[int, int], ...]:
    return tuple(pairwise(side * index // parts for index in range(parts + 1)))


def exact(rows: int, columns: int, *parts: int) -> TilePlan:
    return TilePlan("exact", (rows, columns), evenly(rows, parts[0]), evenly(columns, parts[1]), 0, 1.0)


def as_floats(frames: Tensor) -> Tensor:  # [3, n, H, W] to pictures that are not rounded
    return frames.permute(1, 2, 3, 0)


def decode(vae: WanVAE, latent: Tensor, chunk: int = 1) -> Tensor:
    return as_floats(torch.cat(list(vae.decode(latent, chunk)), dim=1))


def decode_by(plan: TilePlan, vae: WanVAE, latent: Tensor, chunk: int = 1) -> Tensor:
    return torch.cat(list(decode_tiled(vae, latent, plan, chunk, as_floats)))


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(("sides", "parts"), [((3, 17), (1, 2)), ((19, 2), (2, 1)), ((9, 11), (2, 3))])
def test_exact_tiles_decode_the_whole(vae, sides, parts, chunk):
    latent = random(16, 3, *sides)
    assert relative_error(decode_by(exact(*sides, *parts), vae, latent, chunk), decode(vae, latent)) <= FP32


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(("sides", "parts"), [((2, 13), (1, 2)), ((13, 1), (2, 1)), ((9, 7), (2, 3))])
def test_exact_tiles_encode_the_whole(vae, sides, parts, chunk):
    video = random_video(*sides)
    assert relative_error(encode_tiled(vae, video, exact(*sides, *parts), chunk), vae.encode(video)) <= FP32


def test_a_single_frame_goes_through_tiles(vae):
    latent, video, plan = random(16, 1, 3, 17), random_video(3, 17, frames=1), exact(3, 17, 1, 2)
    assert relative_error(decode_by(plan, vae, latent), decode(vae, latent)) <= FP32
    assert relative_error(encode_tiled(vae, video, plan), vae.encode(video)) <= FP32


def test_chunks_have_the_frames_of_a_decode_of_the_whole(vae):
    latent = random(16, 4, 3, 17)
    parts = decode_tiled(vae, latent, exact(3, 17, 1, 2), 3, as_floats)
    assert [part.shape for part in parts] == [(9, 24, 136, 3), (4, 24, 136, 3)]


def error_of_a_tile(net: Encoder | Decoder, x: Tensor, trimmed: tuple[int, ...], by: Sequence[int]) -> float:
    """Of the left half, with smaller halos at some stops, in fp64: the furthest positions add little."""
    kept = [
        replace(stop, halo=stop.halo - by[index] * (index in trimmed))
        for index, stop in enumerate(stops(net.fine))
    ]
    columns = x.shape[2] // kept[0].scale
    tile = ((0, 1), (0, columns // 2))
    whole = apply(net.fine, x, Stream())[:, :, : kept[-1].scale * columns // 2]
    return relative_error(TileStream(net, tile, (1, columns), kept).feed(x), whole)


@pytest.mark.parametrize("trimmed", [(), (0, 1), (2,), (3,)])  # the first two are the same place
def test_a_decoder_needs_every_position_of_the_halo(vae, trimmed):
    net = copy.deepcopy(vae.decoder).double()
    error = error_of_a_tile(net, random(1, 1, 18, 32).double(), trimmed, by=(1, 1, 1, 1, 0))
    assert (error <= FP64) == (not trimmed)


@pytest.mark.parametrize("trimmed", [(), (0,), (1,), (2,), (3,)])
def test_an_encoder_needs_every_position_of_the_halo(vae, trimmed):
    net = copy.deepcopy(vae.encoder).double()
    error = error_of_a_tile(
        net, random(1, 8, 96, 3).double(), trimmed, by=(1, 2, 2, 2, 0)
    )  # pairs stay whole
    assert (error <= FP64) == (not trimmed)


def test_a_plan_of_the_whole_changes_no_bit(vae):
    latent, video = random(16, 2, 3, 5), random_video(3, 5, frames=5)
    plan = plan_tiles(vae.decoder, 3, 5, 256, 192)
    assert (plan.mode, plan.tiles, plan.work) == ("whole", (((0, 3), (0, 5)),), 1.0)
    assert torch.equal(decode_by(plan, vae, latent), decode(vae, latent))
    assert torch.equal(encode_tiled(vae, video, plan), vae.encode(video))


def test_one_blended_tile_is_the_whole(vae):
    latent, video = random(16, 2, 3, 5), random_video(3, 5, frames=5)
    plan = TilePlan("blended", (3, 5), ((0, 3),), ((0, 5),), 2, 1.0)
    assert relative_error(decode_by(plan, vae, latent), decode(vae, latent)) <= 1e-3  # sums are fp16
    assert relative_error(encode_tiled(vae, video, plan), vae.encode(video)) <= FP32


@pytest.mark.parametrize("overlap", [1, 2, 3, 6])  # at 6 of 8 three tiles meet
@pytest.mark.parametrize("scale", [1, 8])
def test_shares_of_blended_tiles_sum_to_one_everywhere(overlap, scale):
    plan = TilePlan(
        "blended", (20, 11), _overlapping(20, 8, overlap), _overlapping(11, 8, overlap), overlap, 1.0
    )
    total = torch.zeros(20 * scale, 11 * scale, 1)
    for tile, share in zip(plan.tiles, _tiles._weights(plan, scale), strict=True):
        total[_tiles._place(tile, scale)] += share
        assert share.min() > 0
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.fixture(scope="module")
def demo() -> Iterator[Pipeline]:
    engine = new_engine("infer.op_impl=torch")
    yield engine.pipeline
    engine.close()


def test_blended_tiles_of_the_demo_are_close_to_the_whole(demo):
    vae = demo.vae
    attributes = sample_attrs(1, torch.Generator().manual_seed(0), split="train")
    (video,) = render(attributes, 1, 96, 128, torch.Generator().manual_seed(0)).clamp(-1, 1)
    latent, spans = vae.encode(video), (_overlapping(12, 8, 2), _overlapping(16, 8, 2))
    plan = TilePlan("blended", (12, 16), *spans, 2, 1.0)
    assert len(plan.tiles) == 6
    whole = torch.cat([to_pixels(chunk) for chunk in vae.decode(latent)])
    error = torch.cat(list(decode_tiled(vae, latent, plan, 1, to_pixels))).double() - whole
    ratio = 10 * torch.log10(255**2 / error.square().mean())
    tiled = encode_tiled(vae, video, plan)
    print(f"decode {ratio:.1f} dB, encode {relative_error(tiled, latent):.3f}")
    assert ratio >= 40
    assert relative_error(tiled, latent) <= 0.25


def test_tiles_of_256_pixels_decode_and_encode_both_sizes_of_the_release_exactly(full):
    for sides in ((60, 104), (90, 160)):
        plans = [plan_tiles(net, *sides, 256, 192) for net in (full.decoder, full.encoder)]
        assert [plan.mode for plan in plans] == ["exact", "exact"]
        assert all(len(plan.rows) > 1 and len(plan.columns) > 1 for plan in plans)
        assert [plan.work < most for plan, most in zip(plans, (1.35, 1.65), strict=True)] == [True, True]


@pytest.mark.parametrize("tile_px", [64, 128, 192, 256, 512])
@pytest.mark.parametrize("sides", [(60, 104), (33, 91)])
@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_tiles_cover_the_image_and_with_their_halo_fit_into_a_tile(full, name, sides, tile_px):
    net = full.get_submodule(name)
    plan = plan_tiles(net, *sides, tile_px, tile_px * 3 // 4)
    margin = {"decoder": 8, "encoder": 36}[name] * (plan.mode == "exact")
    for side, spans in zip(sides, (plan.rows, plan.columns), strict=True):
        assert (spans[0][0], spans[-1][1]) == (0, side)
        assert [stop - start for (_, stop), (start, _) in pairwise(spans)] == [plan.overlap] * (
            len(spans) - 1
        )
        for start, stop in spans if len(spans) > 1 else ():
            edges = max(0, 8 * start - margin), min(8 * side, 8 * stop + margin)
            assert edges[1] - edges[0] <= tile_px
    assert plan.work <= 2


def test_one_side_is_cut_where_two_take_too_much_work(full):
    plan = plan_tiles(full.decoder, 90, 160, 64, 48)
    assert (plan.mode, len(plan.rows), len(plan.columns)) == ("exact", 1, 27)


def test_tiles_are_blended_where_the_halo_takes_too_much_work(full):
    plan = plan_tiles(full.encoder, 90, 160, 128, 96)
    assert (plan.mode, plan.overlap) == ("blended", 4)


@pytest.fixture(scope="module")
def uncomputed() -> Callable[..., None]:
    """Decode or encode with a VAE of full size, counting; tensors have sizes and no values."""
    mode = FakeTensorMode()
    with mode:
        vae = WanVAE(wan21(96)).requires_grad_(False)

    def run(count, name: str, dtype: torch.dtype, latent: Size, chunk: int, plan: TilePlan | None) -> None:
        frames, rows, columns = latent
        with pytest.MonkeyPatch.context() as patch, mode:
            patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # an operator of values alone
            for parameter in vae.parameters():
                parameter.data = torch.empty_like(parameter, dtype=dtype)
            z, video = torch.empty(16, *latent), torch.empty(3, 4 * frames - 3, 8 * rows, 8 * columns)
            with count:
                if name == "encoder":
                    vae.encode(video, None, chunk) if plan is None else encode_tiled(vae, video, plan, chunk)
                    return
                parts = vae.decode(z, chunk) if plan is None else decode_tiled(vae, z, plan, chunk, to_pixels)
                collections.deque(parts, maxlen=0)

    return run


@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_work_is_that_of_the_convolutions_run(full, uncomputed, name):
    flops, plan = [], exact(26, 30, 1, 3)
    for cut in (plan, None):
        counter = FlopCounterMode(display=False)
        uncomputed(counter, name, torch.float32, (2, 26, 30), 1, cut)
        flops.append(counter.get_total_flops())
    print(f"{_weighed(full.get_submodule(name), plan).work:.3f} {flops[0] / flops[1]:.3f}")
    assert _weighed(full.get_submodule(name), plan).work == pytest.approx(flops[0] / flops[1], rel=0.05)


@pytest.mark.parametrize(
    ("tile_px", "stride_px", "message"),
    [
        (250, 192, "infer.vae_tile_px must be a multiple of 8, got 250"),
        (256, 190, "infer.vae_tile_stride_px must be a multiple of 8, got 190"),
        (56, 48, "infer.vae_tile_px must be at least 64, got 56"),
        (256, 256, "infer.vae_tile_stride_px must be above 0 and below infer.vae_tile_px = 256, got 256"),
        (256, 0, "infer.vae_tile_stride_px must be above 0 .*, got 0"),
        (256, -8, "infer.vae_tile_stride_px must be above 0 .*, got -8"),
    ],
)
def test_tiles_that_cannot_be_are_refused(vae, tile_px, stride_px, message):
    with pytest.raises(ValueError, match=message):
        plan_tiles(vae.decoder, 60, 104, tile_px, stride_px)


def test_tiles_refuse_what_the_whole_refuses_at_once(vae):
    plan = exact(3, 17, 1, 2)
    with pytest.raises(ValueError, match="latent_frames_per_chunk must be >= 1, got 0"):
        decode_tiled(vae, random(16, 1, 3, 17), plan, 0, as_floats)
    with pytest.raises(ValueError, match="frames must be 4 n \\+ 1, got 4"):
        encode_tiled(vae, random_video(3, 17, frames=4), plan)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [
            tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)
        ]
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage not in self._known and not any(storage is other for other in given):
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.live -= size


def live_peak(run: Callable[..., None], name: str, dtype: torch.dtype, latent: Size, *how) -> int:
    """Bytes made and alive at once, without what waits for the last tile."""
    (frames, rows, columns), waiting, count = latent, 0, LiveBytes()
    if how[-1] is not None:
        pictures = 3 * (4 * frames - 3) * 64 * rows * columns
        waiting = frames * rows * columns * 384 * dtype.itemsize + (pictures if name == "decoder" else 0)
    run(count, name, dtype, latent, *how)
    return count.peak - waiting


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("parts", [None, (2, 1)])
@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_memory_is_foretold(full, uncomputed, monkeypatch, name, parts, is_fused):
    monkeypatch.setattr(ops, "is_fused", lambda x: is_fused)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H100)
    sides, net, chunk = (32, 20), full.get_submodule(name), 2 if is_fused else 1
    dtype, capability = (torch.bfloat16, H100) if is_fused else (torch.float32, None)
    plan = None if parts is None else exact(*sides, *parts)
    foretold = footprint(full, net, (3, *sides), chunk, plan, dtype=dtype, capability=capability)
    live = live_peak(uncomputed, name, dtype, (3, *sides), chunk, plan)
    added = foretold.total - dtype.itemsize * sum(parameter.numel() for parameter in full.parameters())
    print(f"foretold {added / 2**20:.0f} MiB, {added / live:.3f} of what is")
    assert added == pytest.approx(live, rel=MEMORY)


@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_tiles_take_less_memory_than_the_whole(uncomputed, name):
    plans = None, exact(8, 60, 1, 3)
    whole, tiled = (live_peak(uncomputed, name, torch.bfloat16, (2, 8, 60), 1, plan) for plan in plans)
    assert tiled < 0.6 * whole


@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_memory_of_an_h100_is_foretold(full, name):
    runs = json.loads(MEASURED.read_text())["decode" if name == "decoder" else "encode"]
    for label, run in runs.items():
        if not label.startswith("ours"):
            continue
        dtype, chunk = torch.bfloat16 if "bf16" in label else torch.float32, int(label.split()[-1])
        net = full.get_submodule(name)
        foretold = footprint(full, net, (21, 60, 104), chunk, dtype=dtype, capability=H100)
        print(label, (foretold.past + foretold.activations) / 2**30 / run["added_gib"])
        assert (foretold.past + foretold.activations) / 2**30 == pytest.approx(run["added_gib"], rel=0.02)
