"""One GPU: what our interface to an attention kernel costs over the bare call, and what lossy ones cost.

    python docs/benchmarks/attention_h200.py [--out FILE.json]   # needs flash-attn-4, sageattention==1.0.6

Bare call and backend are timed in turn (A B A B ...) by CUDA events on the same random q, k, v [1, L, H, 128]
in bf16; the error is relative L2 against fp32 attention over the first 256 queries. Then the demo model makes
the same held-out prompts exactly and with each backend: the judge's shares, and PSNR against exact videos.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from shapeworld import canonical, compare, judge, rows, sample_attrs

from chitu_core import attention
from chitu_core.attention import Place
from chitu_core.config import load
from chitu_core.environment import Environment
from chitu_diffusion.engine import Engine
from chitu_diffusion.task import DiffusionTask, DiffusionTaskType, DiffusionUserParams, TaskPool

SHAPES = ((32760, 12), (33390, 12), (75600, 40))
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def bare_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def bare_calls() -> dict[str, Call]:
    from flash_attn.cute import flash_attn_func
    from sageattention import sageattn

    return {
        "fa4": lambda q, k, v: flash_attn_func(q, k, v, return_lse=True)[0],
        "sdpa_cudnn": bare_cudnn,
        "sage1": lambda q, k, v: sageattn(q, k.clone(), v, tensor_layout="NHD"),  # it changes k in place
    }


def milliseconds(call: Call, inputs: tuple[Tensor, ...], queued: int = 4) -> float:
    """Of one call, several of them queued as the layers of a model are, so that the host runs ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call(*inputs)
    start.record()
    for _ in range(queued):
        call(*inputs)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / queued


def error(call: Call, inputs: tuple[Tensor, ...]) -> float:
    q, k, v = (t.transpose(1, 2).float() for t in inputs)
    expected = torch.softmax(q[:, :, :256] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
    actual = call(*inputs)[:, :256].transpose(1, 2).float()
    return ((actual - expected).norm() / expected.norm()).item()


def overheads(rounds: int) -> list[dict]:
    place, table = Place("cuda", torch.cuda.get_device_capability(), torch.bfloat16, 128), []
    for length, heads in SHAPES:
        inputs = tuple(
            torch.randn(1, length, heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        for name, bare in bare_calls().items():
            ours = attention.create(name, place)
            for call in (bare, ours):
                call(*inputs)  # compiles
            pairs = [(milliseconds(bare, inputs), milliseconds(ours, inputs)) for _ in range(rounds)]
            bare_ms, ours_ms = (statistics.median(times) for times in zip(*pairs, strict=True))
            row = {"backend": name, "length": length, "heads": heads, "bare_ms": bare_ms, "ours_ms": ours_ms}
            row |= {"ratio": ours_ms / bare_ms, "tflops": 4 * heads * length**2 * 128 / ours_ms / 1e9}
            row |= {"error": error(ours, inputs), "bare_error": error(bare, inputs)}
            table.append(row)
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()},
                flush=True,
            )
    return table


def cross(rounds: int) -> list[dict]:
    """Exact backends on 512 keys, which rank otherwise than long sequences do."""
    place, table = Place("cuda", torch.cuda.get_device_capability(), torch.bfloat16, 128), []
    for length, heads in SHAPES[::2]:
        q = torch.randn(1, length, heads, 128, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, 512, heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for name in ("fa4", "sdpa_cudnn", "sdpa_flash", "sdpa"):
            call = attention.create(name, place)
            call(q, k, v)
            times = [milliseconds(call, (q, k, v)) for _ in range(rounds)]
            table.append({"backend": name, "length": length, "heads": heads, "ms": statistics.median(times)})
            print(table[-1], flush=True)
    return table


def demo_videos(attn_type: str, count: int) -> tuple[Tensor, dict]:
    """Decoded videos [count, 3, 17, 96, 160], straight from the decoder, and what was asked for."""
    wanted = sample_attrs(count, torch.Generator().manual_seed(20261120), split="heldout")
    with initialize_config_module("chitu_core.config", version_base=None):
        overrides = [f"infer.attn_type={attn_type}", "output.root_dir=/tmp/bench"]
        engine = Engine(load(compose("serve_config", overrides=overrides)), TaskPool(), Environment())
    videos = []
    for seed, row in enumerate(rows(wanted)):
        task = DiffusionTask.from_user_request(DiffusionUserParams(prompt=canonical(row), seed=seed))
        engine.pool.add(task)
        while task.task_type != DiffusionTaskType.VAEDecode:
            engine.step()
        videos.append(torch.cat(list(engine.pipeline.vae.decode(task.buffer.latents)), dim=1))
        engine.pool.cancel(task.task_id)
        engine.step()
    engine.close()
    return torch.stack(videos), wanted


def quality(names: list[str], count: int) -> list[dict]:
    table, exact = [], None
    for name in names:
        videos, wanted = demo_videos(name, count)
        exact = videos if exact is None else exact
        share = {key: value.float().mean().item() for key, value in compare(judge(videos), wanted).items()}
        mse = ((videos - exact) / 2).square().flatten(1).mean(1)
        psnr = None if name == names[0] else (-10 * mse.log10()).mean().item()
        table.append(
            {"backend": name, "psnr_db": psnr, **{key: share[key] for key in ("color", "bg", "dir", "shape")}}
        )
        print(table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/attention_h200.json"))
    options = parser.parse_args()
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    with torch.inference_mode():
        record["overhead"] = overheads(options.rounds)
        record["cross"] = cross(options.rounds)
    record["demo"] = quality(["sdpa_math", "fa4", "sdpa_cudnn", "sage1"], options.count)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
