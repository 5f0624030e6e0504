"""The VAE on a GPU: kernels at odd sizes against fp64, a decode in either format, chunks that never wait."""

import warnings

import pytest
import torch
from oracles import randomise, relative_error
from torch import Tensor
from torch.nn import functional as F

from chitu_core.ops import conv as ops
from chitu_diffusion.media import to_pixels
from chitu_diffusion.vaes._footprint import footprint
from chitu_diffusion.vaes._tile_plan import TilePlan, plan_tiles
from chitu_diffusion.vaes._tiles import decode_tiled, encode_tiled
from chitu_diffusion.vaes.wan import WanVAE, wan21

pytestmark = pytest.mark.gpu

LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # sums are fp32; then one rounding
LIBRARY = 1e-5  # fp32 of cuDNN, which may transform before it multiplies
EPS = 1e-26
SIDES = [(1, 1, 1), (3, 7, 5), (2, 37, 61), (5, 60, 104)]


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def has_shifted(dtype: torch.dtype = torch.bfloat16) -> bool:
    return ops.prefers_shifted(torch.empty(1, 1, 1, 96, device="cuda", dtype=dtype), 96)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In fp64 by one product: cuDNN's own sums are what we compare with elsewhere."""
    frames, height, width = (side - 2 for side in x.shape[:3])
    windows = (
        x.double().unfold(0, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)
    )  # [T, H, W, 27 C], C slowest
    assert windows.shape[:3] == (frames, height, width)
    return F.linear(windows, weight.double().flatten(1), bias.double())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("dim", [32, 96, 192, 384])
@pytest.mark.parametrize("sides", SIDES)
def test_norm_and_silu_agree_with_fp64(sides, dim, dtype):
    frames, height, width = sides
    x, weight = random(*sides, dim, dtype=dtype), (1 + 0.1 * random(dim, seed=1)).to(dtype)
    expected = F.silu(F.rms_norm(x.double(), (dim,), weight.double(), EPS))
    for halo in (0, 1):
        whole = torch.full(
            (frames + 2, height + 2 * halo, width + 2, dim), torch.nan, device="cuda", dtype=dtype
        )
        out = whole[2:] if halo else whole[2:, :, 1:-1]  # a part of rows, as in a strip
        ops.rms_norm_silu(x, weight, EPS, out)
        inside = out[:, halo : halo + height, halo : halo + width]
        assert relative_error(inside, expected) <= LIMITS[dtype]
        assert torch.equal(out, F.pad(inside, (0, 0, halo, halo, halo, halo)))
        assert whole[:2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_add", [False, True])
@pytest.mark.parametrize("dims", [(96, 96), (32, 64), (128, 128), (96, 3)])
@pytest.mark.parametrize("sides", SIDES)
def test_products_of_shifted_rows_agree_with_fp64(sides, dims, with_add, dtype):
    if not has_shifted(dtype):
        pytest.skip("cuDNN convolves here")
    dim, dim_out = dims
    x = F.pad(random(*(side + 2 for side in sides), dim, dtype=dtype)[:, 1:-1, 1:-1], (0, 0, 1, 1, 1, 1))
    weight = random(dim_out, dim, 3, 3, 3, dtype=dtype, seed=1) / (27 * dim) ** 0.5
    bias, add = random(dim_out, dtype=dtype, seed=2), random(*sides, dim_out, dtype=dtype, seed=3)
    y = ops.shifted_conv3d(x, ops.flat_taps(weight), bias, add if with_add else None)
    expected = conv3d(x, weight, bias) + (add if with_add else 0)
    assert y.shape == (*sides, dim_out)
    assert relative_error(y, expected) <= LIMITS[dtype]


def test_a_clip_of_more_values_than_32_bits_count_is_convolved_to_its_end():
    if not has_shifted():
        pytest.skip("cuDNN convolves here")
    sides, dim = (13, 1088, 1920), 96  # 2.6e9 values, 5 GB
    x = torch.zeros(sides[0] + 2, sides[1] + 2, sides[2] + 2, dim, device="cuda", dtype=torch.bfloat16)
    gamma, last = (
        torch.ones(dim, device="cuda", dtype=torch.bfloat16),
        random(3, *sides[1:], dim, dtype=torch.bfloat16),
    )
    ops.rms_norm_silu(last, gamma, EPS, x[-3:])
    weight = random(dim, dim, 3, 3, 3, dtype=torch.bfloat16, seed=1) / (27 * dim) ** 0.5
    taps, bias = ops.flat_taps(weight), random(dim, dtype=torch.bfloat16, seed=2)
    tail = ops.shifted_conv3d(x[-3:].clone(), taps, bias)
    assert torch.equal(ops.shifted_conv3d(x, taps, bias)[-1:], tail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sides", [(1, 1), (5, 7), (60, 104)])
def test_a_folded_convolution_agrees_with_the_one_after_doubling(sides, dtype):
    x, bias = random(2, *sides, 64, dtype=dtype), random(32, dtype=dtype, seed=2)
    weight = random(32, 64, 3, 3, dtype=dtype, seed=1) / 24
    y = ops.conv2d_nearest2x(x, ops.fold_nearest2x(weight), bias)
    doubled = x.permute(0, 3, 1, 2).double().repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(doubled, weight.double(), bias.double(), padding=1).permute(0, 2, 3, 1)
    assert relative_error(y, expected) <= max(LIMITS[dtype], LIBRARY)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return randomise(WanVAE(wan21(96)), seed=0).cuda().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def half(vae) -> WanVAE:
    model = WanVAE(wan21(96)).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    model.load_state_dict(vae.state_dict())
    return model


def decode(vae: WanVAE, latent: Tensor, chunk: int = 1) -> Tensor:
    return torch.cat(list(vae.decode(latent, chunk)), dim=1)


def test_a_float32_decode_equals_that_of_a_cpu():
    vae = randomise(WanVAE(wan21(32)), seed=0).requires_grad_(False)
    latent, video = random(16, 3, 5, 7), random(3, 9, 40, 56, seed=1).clamp(-1, 1)
    expected = decode(vae, latent.cpu()), vae.encode(video.cpu())
    vae.cuda()
    assert relative_error(decode(vae, latent, 2).cpu(), expected[0]) <= 5 * LIBRARY
    assert relative_error(vae.encode(video, latent_frames_per_chunk=2).cpu(), expected[1]) <= 5 * LIBRARY


def test_a_bfloat16_decode_is_close_to_float32(vae, half):
    latent, video = random(16, 4, 15, 23), random(3, 9, 120, 184, seed=1).clamp(-1, 1)
    error = relative_error(decode(half, latent, 2), decode(vae, latent))
    print(f"decode {error:.2e}, encode {relative_error(half.encode(video), vae.encode(video)):.2e}")
    assert error <= 2e-2


@pytest.mark.parametrize("chunk", [2, 3, 9])
def test_any_chunking_gives_the_same_within_rounding(half, chunk):  # cuDNN may take another kernel
    latent, video = random(16, 5, 15, 23), random(3, 17, 120, 184, seed=1).clamp(-1, 1)
    assert relative_error(decode(half, latent, chunk), decode(half, latent)) <= 1e-2
    chunked = half.encode(video, latent_frames_per_chunk=chunk)
    assert relative_error(chunked, half.encode(video)) <= 1e-2


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_chunk_never_waits_for_the_device(half, chunk):
    list(half.decode(random(16, 5, 15, 23), chunk))  # compiles
    chunks = half.decode(random(16, 5, 15, 23), chunk)
    next(chunks)  # the statistics of the latent are uploaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest = list(chunks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(part.shape[1] for part in rest) == 17 - (1 if chunk == 1 else 5)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("with_add", [False, True])
def test_bias_and_residual_are_added_to_what_the_library_convolves(dtype, with_add):
    conv = torch.nn.Conv3d(48, 192, 3, device="cuda", dtype=dtype).requires_grad_(False)
    x, add = random(4, 9, 11, 48, dtype=dtype), random(2, 9, 11, 192, dtype=dtype, seed=1)
    y = ops.convolve(conv, x, (0, 1, 1), add if with_add else None)
    expected = conv3d(F.pad(x, (0, 0, 1, 1, 1, 1)), conv.weight, conv.bias)
    assert y.is_contiguous()
    limit = LIBRARY if dtype == torch.float32 else 2 * LIMITS[dtype]  # the product is rounded before the sum
    assert relative_error(y, expected + add.double() if with_add else expected) <= limit


def test_layers_of_96_channels_take_the_shifted_convolution(half):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuDNN convolves here")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        decode(half, random(16, 1, 15, 23))
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["shifted_conv3d_kernel"] == 6
    assert counts["line_products_kernel"] == counts["sum_lines_kernel"] == 1  # to colours
    assert counts["rms_norm_silu_kernel"] == 2 * 14 + 1
    assert counts["interleave2x_kernel"] == 3


@pytest.mark.parametrize("chunk", [1, 2])
def test_exact_tiles_in_bfloat16_are_the_whole_within_rounding(half, chunk):  # cuDNN may take another kernel
    latent, video = random(16, 3, 15, 23), random(3, 9, 120, 184, seed=1).clamp(-1, 1)
    plan = TilePlan("exact", (15, 23), ((0, 8), (8, 15)), ((0, 12), (12, 23)), 0, 1.0)
    tiled = torch.cat(
        list(decode_tiled(half, latent, plan, chunk, lambda frames: frames.permute(1, 2, 3, 0)))
    )
    assert relative_error(tiled.permute(3, 0, 1, 2), decode(half, latent, chunk)) <= 1e-2
    encoded = encode_tiled(half, video.cpu(), plan, chunk)
    assert relative_error(encoded, half.encode(video, latent_frames_per_chunk=chunk)) <= 1e-2


def test_the_host_waits_for_no_chunk_of_a_tile(half):
    latent = random(16, 3, 15, 23)
    plan = TilePlan("exact", (15, 23), ((0, 8), (8, 15)), ((0, 12), (12, 23)), 0, 1.0)
    list(decode_tiled(half, latent, plan, 1, to_pixels))  # kernels are chosen here
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            list(decode_tiled(half, latent, plan, 1, to_pixels))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in found if "synchronizing" in str(one.message)]
    assert len(waits) <= 5, waits  # statistics of the latent, and a constant for each of three upsamplings


@pytest.mark.parametrize("is_tiled", [False, True])
@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_memory_is_as_foretold(half, name, is_tiled):
    net, sides = half.get_submodule(name), (60, 104)
    plan = plan_tiles(net, *sides, 256, 192) if is_tiled else plan_tiles(net, *sides, 1024, 768)
    capability = torch.cuda.get_device_capability()
    foretold = footprint(half, net, (3, *sides), 1, plan, dtype=torch.bfloat16, capability=capability)
    latent, video = random(16, 3, *sides), torch.zeros(3, 9, 480, 832)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    if name == "decoder":
        for _ in decode_tiled(half, latent, plan, 1, to_pixels):
            pass
    else:
        encode_tiled(half, video, plan)
    added = torch.cuda.max_memory_allocated() - held
    weights = 2 * sum(parameter.numel() for parameter in half.parameters())
    print(f"foretold {(foretold.total - weights) / 2**20:.0f} MiB, measured {added / 2**20:.0f}")
    assert foretold.total - weights == pytest.approx(added, rel=0.25)
