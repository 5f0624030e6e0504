"""The VAE of Wan 2.1 at 832x480 on one GPU, random weights: its layers, a decode of 81 frames, an encode.

    python docs/benchmarks/vae_h100.py [--out FILE.json]   # needs diffusers; about a minute

Layers: every distinct convolution and norm of a chunk in the middle of a clip, of `--layer-chunk` latent
frames: the library's time with and without cuDNN's search, ours, and how many there are. Decode and encode:
ours and diffusers' AutoencoderKLWan in bf16 with the same weights, in turns, medians; then ours in fp32 once.
Memory is what a call adds. The error is against ours in fp32 without TF32, on a shorter clip. The profile
sorts the kernels of one decode. Both sides stop at frames on the device.
"""

import argparse
import gc
import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers import __version__ as diffusers_version
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from chitu_core.ops import conv as ops
from chitu_diffusion.vaes.wan import (
    WAN21_LATENTS_MEAN,
    WAN21_LATENTS_STD,
    RMSNorm,
    Stream,
    WanVAE,
    wan21,
)

KEYS = Path(__file__).parents[2] / "tests" / "data" / "keys" / "vae_wan2.1.tsv"
HEIGHT, WIDTH, LATENT_FRAMES, ERROR_FRAMES = 480, 832, 21, 5
BF16 = torch.bfloat16
GROUPS = (  # part of a kernel's name, in lower case: what it is; the first that fits
    ("shifted_conv3d", "shifted convolution"),
    ("line_products", "convolution to colours"),
    ("sum_lines", "convolution to colours"),
    ("rms_norm_silu", "norm and SiLU"),
    ("interleave2x", "interleave"),
    ("add_bias", "bias and residual"),
    ("fmha", "attention"),
    ("attention", "attention"),
    ("softmax", "attention"),
    ("conv", "convolutions of cuDNN"),
    ("xmma", "convolutions of cuDNN"),
    ("cudnn", "convolutions of cuDNN"),
    ("nchw", "layouts"),
    ("nhwc", "layouts"),
    ("gemm", "matrix products"),
    ("nvjet", "matrix products"),
    ("cutlass", "matrix products"),
    ("memcpy", "copies"),
    ("copy", "copies"),
    ("catarray", "copies"),
    ("memset", "fills"),
    ("fill", "fills"),
)


def random_vae() -> WanVAE:
    vae = WanVAE(wan21(96))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.data = 1 + 0.1 * noise
        elif name.endswith("bias"):
            parameter.data = 0.05 * noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    return vae.eval().requires_grad_(False)


def peer_of(vae: WanVAE) -> AutoencoderKLWan:
    table = [line.split("\t") for line in KEYS.read_text().splitlines()[1:]]
    weights, peer = vae.state_dict(), AutoencoderKLWan()
    peer.load_state_dict({theirs: weights[ours] for ours, _, theirs in table})
    return peer.to("cuda", BF16).eval().requires_grad_(False)


def milliseconds(call: Callable[[], object], count: int = 7) -> float:
    """Median of single calls on the device's clock, after two."""
    for _ in range(2):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


class Recorder(Stream):
    """A pass that counts its layers; it stands in for strips too, as the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Counter[tuple] = Counter()

    def stream(self) -> "Recorder":
        return self

    def cut(self, x: Tensor) -> Tensor:
        return x

    def conv3d(
        self, conv: nn.Conv3d, x: Tensor, norm: RMSNorm | None = None, add: Tensor | None = None
    ) -> Tensor:
        if norm is not None:
            self.layers["norm", tuple(x.shape), x.shape[-1], ops.prefers_shifted(x, conv.out_channels)] += 1
        self.layers["conv3d", tuple(x.shape), conv.out_channels, conv.kernel_size] += 1
        return super().conv3d(conv, x, norm, add)

    def double_conv2d(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        self.layers["double", tuple(x.shape), conv.out_channels, conv.kernel_size] += 1
        return super().double_conv2d(conv, x)


def conv3d_row(shape: tuple, dim_out: int, kernel: tuple) -> tuple[float, Callable, Callable]:
    frames, height, width, dim = shape
    conv = nn.Conv3d(dim, dim_out, kernel, device="cuda", dtype=BF16)
    clip = torch.randn(frames + kernel[0] - 1, height, width, dim, device="cuda", dtype=BF16)
    flops = 2.0 * frames * height * width * conv.weight.numel()
    library = lambda: ops.convolve(conv, clip, (0, kernel[1] // 2, kernel[2] // 2))  # noqa: E731
    if kernel != (3, 3, 3) or not ops.prefers_shifted(clip, dim_out):
        return flops, library, library
    padded, taps = F.pad(clip, (0, 0, 1, 1, 1, 1)), ops.flat_taps(conv.weight)
    return flops, library, lambda: ops.shifted_conv3d(padded, taps, conv.bias)


def double_row(shape: tuple, dim_out: int) -> tuple[float, Callable, Callable]:
    frames, height, width, dim = shape
    conv = nn.Conv2d(dim, dim_out, 3, padding=1, device="cuda", dtype=BF16)
    x, folded = torch.randn(shape, device="cuda", dtype=BF16), ops.fold_nearest2x(conv.weight)

    def library() -> Tensor:
        doubled = x[:, :, None, :, None].expand(frames, height, 2, width, 2, dim)
        return conv(doubled.reshape(frames, 2 * height, 2 * width, dim).permute(0, 3, 1, 2))

    flops = 2.0 * 4 * frames * height * width * conv.weight.numel()
    return flops, library, lambda: ops.conv2d_nearest2x(x, folded, conv.bias)


def norm_row(shape: tuple, halo: int) -> tuple[float, Callable, Callable]:
    """Bytes that must move, in place of operations."""
    frames, height, width, dim = shape
    x, weight = torch.randn(shape, device="cuda", dtype=BF16), torch.ones(dim, device="cuda", dtype=BF16)
    out = x.new_empty(frames, height + 2 * halo, width + 2 * halo, dim)
    eager = lambda: F.silu(F.rms_norm(x, (dim,), weight, 1e-26), inplace=True)  # noqa: E731
    return float(x.nbytes + out.nbytes), eager, lambda: ops.rms_norm_silu(x, weight, 1e-26, out)


@torch.no_grad()
def layer_table(vae: WanVAE, chunk: int) -> list[dict]:
    """Layers of the second chunk, the slowest first."""
    recorder = Recorder()
    chunks = vae.decode(random_latent(2 * chunk), chunk, recorder)
    next(chunks)
    recorder.layers.clear()
    next(chunks)
    rows = []
    for (kind, shape, dim_out, detail), count in recorder.layers.items():
        if kind == "conv3d":
            work, library, ours = conv3d_row(shape, dim_out, detail)
        elif kind == "double":
            work, library, ours = double_row(shape, dim_out)
        else:
            work, library, ours = norm_row(shape, int(detail))
        row = {
            "layer": kind,
            "input": "x".join(map(str, shape)),
            "out": dim_out,
            "detail": str(detail),
            "count": count,
        }
        row["library_ms"] = milliseconds(library)
        row["ours_ms"] = row["library_ms"] if ours is library else milliseconds(ours)
        if kind != "norm" and count * row["ours_ms"] > 1.0:
            torch.backends.cudnn.benchmark = True
            row["library_searched_ms"] = milliseconds(library)
            row["ours_searched_ms"] = row["library_searched_ms"] if ours is library else milliseconds(ours)
            torch.backends.cudnn.benchmark = False
        row["ours_rate"] = work / row["ours_ms"] / 1e9  # TFLOP/s, or TB/s of a norm
        row["ours_ms_per_latent_frame"] = count * row["ours_ms"] / chunk
        rows.append(row)
        del library, ours
    return sorted(rows, key=lambda row: -row["ours_ms_per_latent_frame"])


@torch.no_grad()
def attention_times(chunk: int) -> dict[str, float]:
    """The attention of the lowest level, whose head is wider than most kernels take: whole and in parts."""
    shape = (chunk, HEIGHT // 8 * (WIDTH // 8), 384)
    q, k, v = (torch.randn(shape, device="cuda", dtype=BF16) for _ in range(3))

    def in_parts() -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32).mul_(shape[-1] ** -0.5)
        return torch.bmm(scores.softmax(-1).to(BF16), v)

    def fused() -> Tensor:
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])

    return {"scaled_dot_product_attention_ms": milliseconds(fused), "in_parts_ms": milliseconds(in_parts)}


def random_latent(frames: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(16, frames, HEIGHT // 8, WIDTH // 8, device="cuda", generator=generator)


def video_of(vae: WanVAE, latent: Tensor, chunk: int) -> Tensor:
    return torch.cat(list(vae.decode(latent, chunk)), dim=1)


def decode_all(vae: WanVAE, latent: Tensor, chunk: int) -> None:
    for _ in vae.decode(latent, chunk):
        pass


def raw(latent: Tensor) -> Tensor:
    """The latent as diffusers' decoder takes it."""
    mean, std = (
        torch.tensor(values, device="cuda").view(-1, 1, 1, 1)
        for values in (WAN21_LATENTS_MEAN, WAN21_LATENTS_STD)
    )
    return (latent * std + mean)[None].to(BF16)


@torch.no_grad()
def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Each call once to warm up, then all of them in turns; seconds are the median, memory the most."""
    seconds: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, float] = defaultdict(float)
    for turn in range(rounds + 1):
        for name, call in calls.items():
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
            peaks[name] = max(peaks[name], (torch.cuda.max_memory_allocated() - held) / 2**30)
    return {
        name: {"s": statistics.median(values), "added_gib": peaks[name], "all_s": values}
        for name, values in seconds.items()
    }


@torch.no_grad()
def errors(half: WanVAE, full: WanVAE, peer: AutoencoderKLWan) -> dict[str, float]:
    """Relative L2 of decoded videos against ours in fp32 without TF32."""
    latent = random_latent(ERROR_FRAMES)
    torch.backends.cudnn.allow_tf32 = False
    expected = video_of(full, latent, 1).double()
    torch.backends.cudnn.allow_tf32 = True

    def error(video: Tensor) -> float:
        return float((video.double() - expected).norm() / expected.norm())

    found = {f"ours bf16, chunk {chunk}": error(video_of(half, latent, chunk)) for chunk in (1, 2, 4)}
    found["ours fp32 with TF32"] = error(video_of(full, latent, 2))
    found["diffusers bf16"] = error(peer.decode(raw(latent)).sample[0])
    return found


def profile_decode(vae: WanVAE, latent: Tensor, chunk: int) -> dict:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        decode_all(vae, latent, chunk)
        torch.cuda.synchronize()
    groups: dict[str, float] = defaultdict(float)
    kernels = []
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CUDA or not event.self_device_time_total:
            continue
        name, spent_ms = event.key, event.self_device_time_total / 1e3
        group = next((group for part, group in GROUPS if part in name.lower()), "others")
        groups[group] += spent_ms
        kernels.append({"kernel": name[:120], "group": group, "count": event.count, "ms": round(spent_ms, 3)})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {"groups_ms": dict(sorted(groups.items(), key=lambda item: -item[1])), "kernels": kernels[:30]}


def show(rows: list[dict], chunk: int) -> None:
    print(f"\nlayers, chunks of {chunk}; ms of one call; TFLOP/s (TB/s of a norm); ms a latent frame")
    for row in rows:
        searched = row.get("library_searched_ms")
        print(
            f"{row['layer']:7} {row['input']:>18} -> {row['out']:<4} {row['detail']:10} x{row['count']:<3}"
            f" library {row['library_ms']:.3f}"
            + (f" (searched {searched:.3f}, ours {row['ours_searched_ms']:.3f})" if searched else "")
            + f" ours {row['ours_ms']:.3f} at {row['ours_rate']:.1f}: {row['ours_ms_per_latent_frame']:.2f}"
        )
    total = sum(row["ours_ms_per_latent_frame"] for row in rows)
    print(f"floor: {total:.1f} ms a latent frame, {total * LATENT_FRAMES / 1e3:.3f} s a video", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layer-chunk", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/vae_h100.json"))
    options = parser.parse_args()
    record: dict = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "diffusers": diffusers_version,
        "cudnn": torch.backends.cudnn.version(), "size": f"{WIDTH}x{HEIGHT}", "latent_frames": LATENT_FRAMES,
    }  # fmt: skip
    source = random_vae()
    peer, half, full = peer_of(source), WanVAE(wan21(96)), source.cuda()
    half.load_state_dict(source.state_dict())
    half = half.to("cuda", BF16).eval().requires_grad_(False)

    record["layers"] = layer_table(half, options.layer_chunk)
    show(record["layers"], options.layer_chunk)
    record["attention"] = attention_times(options.layer_chunk)
    print("attention of a chunk, not in the floor", record["attention"], flush=True)
    gc.collect()
    torch.cuda.empty_cache()

    latent = random_latent(LATENT_FRAMES)
    calls: dict[str, Callable[[], object]] = {
        f"ours bf16, chunk {chunk}": lambda chunk=chunk: decode_all(half, latent, chunk)
        for chunk in (1, 2, 4)
    }
    calls["diffusers bf16"] = lambda: peer.decode(raw(latent)).sample
    record["decode"] = in_turns(calls, options.rounds)
    calls = {"ours fp32 (TF32), chunk 2": lambda: decode_all(full, latent, 2)}
    record["decode"] |= in_turns(calls, rounds=1)
    print("\ndecode", json.dumps(record["decode"], indent=1), flush=True)

    record["errors"] = errors(half, full, peer)
    print("\nrelative L2", json.dumps(record["errors"], indent=1), flush=True)

    video = torch.rand(3, 4 * LATENT_FRAMES - 3, HEIGHT, WIDTH, device="cuda") * 2 - 1
    calls = {
        f"ours bf16, chunk {chunk}": lambda chunk=chunk: half.encode(video, latent_frames_per_chunk=chunk)
        for chunk in (1, 2)
    }
    calls["diffusers bf16"] = lambda: peer.encode(video[None].to(BF16)).latent_dist.mode()
    record["encode"] = in_turns(calls, options.rounds)
    calls = {"ours fp32 (TF32), chunk 2": lambda: full.encode(video, latent_frames_per_chunk=2)}
    record["encode"] |= in_turns(calls, rounds=1)
    print("\nencode", json.dumps(record["encode"], indent=1), flush=True)

    record["profile"] = profile_decode(half, latent, 2)
    print("\nprofile", json.dumps(record["profile"], indent=1), flush=True)
    theirs = record["decode"]["diffusers bf16"]["s"]
    record["ratio"] = theirs / record["decode"]["ours bf16, chunk 2"]["s"]
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\ndecode of {4 * LATENT_FRAMES - 3} frames: {record['ratio']:.2f} times as fast as diffusers")


if __name__ == "__main__":
    main()
