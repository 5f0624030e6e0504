"""Several GPUs of one machine, random weights: guided steps of Wan2.1-T2V-1.3B under each split, the VAE on
strips, a forward of 14B, beside one GPU and beside diffusers, which --peer needs.

    torchrun --nproc_per_node 4 docs/benchmarks/h200_multi_gpu.py --peer --out FILE.json
    torchrun --nproc_per_node 2 docs/benchmarks/h200_multi_gpu.py --out FILE.json  # CFG 2, and two replicas

Both sides: bf16, eager, attention by cuDNN, 512 rows of text. A time is the median of 5 (14B, VAE: 3) after a
warm-up, by CUDA events on rank 0 after a barrier. A case that fails is named and the next one runs; the file
is written after every case. `--tiny` rehearses all of it on CPUs, with the demo model's sizes.
"""

import argparse
import gc
import json
import logging
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from hydra import compose, initialize_config_module
from torch import Tensor
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile

from chitu_core import weights
from chitu_core.config import InferConfig, load
from chitu_core.distributed import Degrees, ParallelMesh, RankChannel, open_mesh, plan_degrees
from chitu_core.environment import Environment
from chitu_core.timing import Span
from chitu_diffusion.attention_plan import plan_attention
from chitu_diffusion.guidance import BOTH, guided_velocity
from chitu_diffusion.media import to_pixels
from chitu_diffusion.models.wan import WanDiT
from chitu_diffusion.sequence import NO_SHARD
from chitu_diffusion.survey import Survey, pick_device, pick_dtype, survey
from chitu_diffusion.vaes._strips import Strips
from chitu_diffusion.vaes.wan import WanVAE

SIZES = (("Wan2.1-T2V-1.3B", (16, 21, 60, 104), 5), ("Wan2.1-T2V-14B", (16, 21, 90, 160), 3))
TINY_SIZES = (("demo", (16, 5, 12, 20), 2), ("demo", (16, 3, 8, 12), 2))  # model, latent [C, T, h, w], runs
# a split is what plan_degrees is told besides the ranks; nothing: what the engine plans by itself
SPLITS = {"cfg2": {}, "cfg2_u2": {}, "fa4": {}, "dp2": {"dp": 2}, "u4": {"cfg": 1}}
SPLITS |= {"ring4": {"cfg": 1, "up_limit": 1}, "u2_ring2": {"cfg": 1, "up_limit": 2}}
PEERS = {"one": {}, "u4": {"ulysses_degree": 4}, "ring4": {"ring_degree": 4}, "14b": {"ulysses_degree": 4}}
CASES = {2: ("one", "cfg2", "dp2"), 4: ("one", "cfg2_u2", "u4", "ring4", "u2_ring2", "peer_one", "peer_u4")}
CASES[4] += ("peer_ring4", "vae_float32", "vae_bfloat16", "14b", "peer_14b", "fa4", "profile")
GROUPS = {  # a kernel belongs to the first group that has a word of its name
    "communication, waiting included": r"nccl|gloo|c10d",
    "attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|nvjet|xmma|splitk|cutlass|cublas|mm\b",
    "copies and casts": r"copy|memcpy|memset|\bcat",
    "element-wise, norms and the rest": "",
}
SENDS = {  # bytes that leave this rank, by the functions that chitu_core.distributed calls
    "all_to_all_single": lambda _, x, group: x.nbytes - x.nbytes // group.size(),
    "batch_isend_irecv": lambda batch: sum(one.tensor.nbytes for one in batch if one.op is dist.isend),
    "all_gather": lambda _, x, group: x.nbytes * (group.size() - 1),
}
BURST = 20  # all-to-alls in one measurement, for ranks leave a barrier 0.1 ms apart
PATIENCE = timedelta(seconds=120)  # with the other ranks: one that failed alone must not hang the rest
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError)
FAILURES += (ImportError, OSError)


def count(sent: Counter, name: str, exchange: Callable, *tensors: object, **options: object) -> object:
    sent[name] += SENDS[name](*tensors, **options)
    return exchange(*tensors, **options)


def surveyed(model: str, device: torch.device, dtype: torch.dtype) -> tuple[InferConfig, Survey]:
    overrides = [f"models={model}", "debug.skip_model_load=true"]
    with initialize_config_module("chitu_core.config", version_base=None):
        config = load(compose("serve_config", overrides=overrides))
    return config.infer, survey(config, device, dtype)


class Network:
    """A transformer with random weights and a request's inputs, the same on every rank."""

    def __init__(self, size: tuple, device: torch.device, dtype: torch.dtype) -> None:
        model, shape, self.runs = size
        self.infer, self.found = surveyed(model, device, dtype)
        self.config, self.time = self.found.sizes.dit, torch.tensor(500, device=device)
        with torch.device("meta"):
            self.dit = WanDiT(self.config)
        dtype_of = partial(WanDiT.weight_dtype, dtype=dtype)
        self.found.fill(self.dit, "transformer", dtype_of, WanDiT.parts_of, weights.ON_DEVICE)
        draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        rows = (1, self.config.text_len, self.config.text_dim)
        self.latent, self.texts = draw(shape), {name: self.dit.encode_text(draw(rows)) for name in BOTH}
        self.tokens = self.latent[0].numel() // math.prod(self.config.patch_size)

    def step(self, mesh: ParallelMesh, attn_type: str, guidance: float) -> Callable[[], Tensor]:
        """A guided step as the generator takes it on this rank; at guidance 1 it is one forward."""
        infer, place, tokens = replace(self.infer, attn_type=attn_type), self.found.place, mesh.tokens()
        plan = plan_attention(infer, place, self.config.num_layers, mesh.degrees.ring)
        plan.spread(mesh, tokens).install(self.dit)
        forward = partial(self.dit, self.latent[None], self.time, shard=tokens or NO_SHARD)
        return partial(guided_velocity, lambda name: forward(self.texts[name])[0], guidance, mesh.branches())

    def compare_bytes(self, sent: Counter, degrees: Degrees, branches: int) -> dict:
        """What a rank sent in so many forwards, and the formula of docs/multi_gpu.md."""
        tokens, size = math.ceil(self.tokens / degrees.cp), self.found.place.dtype.itemsize
        tensors = branches * self.config.num_layers * tokens * self.config.dim * size  # q, k or v
        heads = branches * tokens * self.config.out_dim * math.prod(self.config.patch_size) * 4
        formula = Counter(
            all_to_all_single=4 * tensors * (degrees.ulysses - 1) // degrees.ulysses,
            batch_isend_irecv=2 * tensors * (degrees.ring - 1),
            all_gather=heads * (degrees.cp - 1) + self.latent.nbytes * (degrees.cfg - 1),
        )
        return {"bytes": sent, "bytes_formula": formula, "bytes_equal": sent == formula}


class Bench:
    """The cases. All ranks call each method; what rank 0 returns is recorded."""

    def __init__(self, options: argparse.Namespace, environment: Environment) -> None:
        self.out, self.environment, self.begin = options.out, environment, time.perf_counter()
        self.rank, self.world = environment.rank, environment.world_size
        self.device = pick_device("cpu" if options.tiny else "torch", environment.local_rank)
        self.dtype, self.on_gpu = pick_dtype("auto", self.device), self.device.type == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.on_gpu else "gloo", timeout=PATIENCE)
        self.kernel = "sdpa_cudnn" if self.on_gpu else "sdpa"
        self.channel, self.alone = RankChannel(dist.group.WORLD), ParallelMesh()
        self.sizes = TINY_SIZES if options.tiny else SIZES
        self.small = Network(self.sizes[0], self.device, self.dtype)
        self.meshes: dict[Degrees, ParallelMesh] = {}
        self.velocity: Tensor | None = None  # of one GPU, on rank 0
        name = torch.cuda.get_device_name() if self.on_gpu else "cpu"
        self.record: dict = {"device": name, "torch": torch.__version__, "sizes": self.sizes}

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"{time.perf_counter() - self.begin:6.1f} s  {text}", flush=True)

    def run(self, name: str) -> None:
        """One case on all ranks; it failed if it failed on any."""
        self.say(f"{name} ...")
        kinds = {"peer": self.peer, "vae": self.vae, "profile": self.profile}
        result, failure = None, ""
        try:
            result = kinds.get(name.partition("_")[0], self.split)(name)
        except FAILURES as error:
            failure = f"{type(error).__name__}: {error}"[:500]
            print(f"rank {self.rank}, {name}: {failure}", flush=True)  # the others may hang, and never say it
        torch.set_default_dtype(torch.float32)  # a peer that failed left its own
        failures = Counter(filter(None, self.channel.gather(failure)))  # each, and on how many ranks
        self.record[name] = {"failed": failures} if failures else result
        if self.rank == 0 and self.out is not None:
            self.out.write_text(json.dumps(self.record, indent=2) + "\n")
        self.say(f"{name}: {json.dumps(self.record[name])}")
        gc.collect()
        torch.cuda.empty_cache()

    def mesh(self, name: str) -> ParallelMesh:
        """The mesh of a split, opened once and kept: opening takes seconds."""
        told = {"up_limit": 8, "needs_cfg": True} | SPLITS[name]
        degrees = plan_degrees(self.world, self.small.config.num_heads, **told)
        if degrees not in self.meshes:
            self.meshes[degrees] = open_mesh(degrees, self.environment, self.device)
        return self.meshes[degrees]

    def measure(self, call: Callable, runs: int, *, is_alone: bool = False) -> tuple[dict, Counter, object]:
        """Milliseconds and bytes of `call`, and its result; alone: on rank 0, while the others go on."""
        if is_alone and self.rank > 0:
            return {}, Counter(), None
        times = []
        for _ in range(1 + runs):
            if not is_alone:
                dist.all_reduce(torch.zeros(1))  # a barrier on the host
            sent: Counter = Counter()
            counting = {name: partial(count, sent, name, getattr(dist, name)) for name in SENDS}
            with mock.patch.multiple(dist, **counting), Span(self.device) as span:
                result = call()
            times.append(round(span.milliseconds(), 3))
        times = sorted(times[1:])
        middle = statistics.median(times)
        return {"ms": middle, "min": times[0], "max": times[-1], "runs": runs}, sent, result

    def split(self, name: str) -> dict:
        """A guided step, or a forward of 14B: time, bytes, distance from one GPU, and what to hope for."""
        attn_type, is_alone, is_large = "fa4" if name == "fa4" else self.kernel, name == "one", name == "14b"
        network = Network(self.sizes[1], self.device, self.dtype) if is_large else self.small
        mesh = self.alone if is_alone else self.mesh("u4" if is_large else name)
        step = network.step(mesh, attn_type, guidance=1.0 if is_large else 5.0)
        times, sent, velocity = self.measure(step, network.runs, is_alone=is_alone)
        if is_alone:
            self.velocity = velocity
            return times
        degrees, branches, exchange = mesh.degrees, 1 if is_large else len(BOTH) // mesh.degrees.cfg, 0.0
        if mesh.ulysses is not None:
            numbers = 3 * math.ceil(network.tokens / degrees.cp) * network.config.dim  # q, k, v of a layer
            block = network.latent.new_zeros(numbers, dtype=self.dtype)
            once = partial(dist.all_to_all_single, torch.empty_like(block), block, group=mesh.ulysses)
            exchange = self.measure(lambda: [once() for _ in range(BURST)], 3)[0]["ms"] / BURST
        slowest = max(map(float, self.channel.gather(str(times["ms"]))))
        times |= {"degrees": str(degrees), "attention": attn_type, "slowest_rank_ms": slowest}
        times |= network.compare_bytes(sent, degrees, branches) | {"exchange_ms": exchange}
        one, layers = self.record.get("one", {}), branches * network.config.num_layers
        if "ms" in one and not is_large:
            hope = one["ms"] / degrees.replica + layers * 4 / 3 * exchange
            error = float((velocity - self.velocity).norm() / self.velocity.norm())
            times |= {"speedup": round(degrees.dp * one["ms"] / slowest, 3), "error": error}
            times |= {"ceiling": f"{hope:.2f} ms = one / {degrees.replica} + {layers} x 4/3 x exchange"}
        return times

    def peer(self, name: str) -> dict:
        """One forward of diffusers' transformer; beside it half of our guided step, at 14B our forward."""
        from diffusers import ContextParallelConfig, WanTransformer3DModel

        name, is_large = name.removeprefix("peer_"), name == "peer_14b"
        model_name, shape, runs = self.sizes[is_large]
        config = surveyed(model_name, self.device, self.dtype)[1].sizes.dit
        torch.set_default_dtype(self.dtype)
        with self.device:
            latent, text = torch.randn(1, *shape), torch.randn(1, config.text_len, config.text_dim)
            model = WanTransformer3DModel(
                num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads,
                ffn_dim=config.ffn_dim, num_layers=config.num_layers, text_dim=config.text_dim,
            ).eval().requires_grad_(False)  # fmt: skip
        torch.set_default_dtype(torch.float32)
        model.set_attention_backend("_native_cudnn" if self.on_gpu else "native")
        if PEERS[name]:
            model.enable_parallelism(config=ContextParallelConfig(**PEERS[name]))
        call = partial(model, latent, torch.tensor([500], device=self.device), text, return_dict=False)
        times, *_ = self.measure(call, runs, is_alone=not PEERS[name])
        ours = self.record.get(name, {}).get("ms")
        return times | {"ours_ms": ours and ours / (1 if is_large else len(BOTH))}

    def vae(self, name: str) -> dict:
        """Decode a clip to uint8 pictures on rank 0: by itself, then by strips on all ranks."""
        dtype, found, latent = getattr(torch, name.removeprefix("vae_")), self.small.found, self.small.latent
        with torch.device("meta"):
            vae = WanVAE(found.sizes.vae)
        found.fill(vae, "vae", lambda _: dtype, weights.whole, weights.ON_DEVICE)
        strips = Strips(self.mesh("u4").line(), *latent.shape[-2:])

        def decode(strips: Strips | None) -> list[Tensor | None]:
            chunks = map(to_pixels, vae.decode(latent, strips=strips))
            return [strips.collect(chunk, vae.config.stride[1]) if strips else chunk for chunk in chunks]

        one, _, whole = self.measure(partial(decode, None), 3, is_alone=True)
        times, _, joined = self.measure(partial(decode, strips), 3)
        if self.rank > 0:
            return {}
        levels = max(int((a.short() - b.short()).abs().max()) for a, b in zip(whole, joined, strict=True))
        return times | {"one": one, "speedup": round(one["ms"] / times["ms"], 3), "levels_apart": levels}

    def profile(self, _: str) -> dict:
        """Kernel milliseconds of a guided step on rank 0, by group, and the largest: one GPU, and a mesh."""
        tables, kind = {}, ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU
        for name, mesh in (("cfg2_u2", self.mesh("cfg2_u2")), ("one", self.alone)):
            step = self.small.step(mesh, self.kernel, guidance=5.0)
            with profile(activities=[kind]) as trace:
                self.measure(step, 1, is_alone=mesh is self.alone)  # two steps
            table, largest = Counter(dict.fromkeys(GROUPS, 0.0)), Counter()
            for event in trace.key_averages():
                key, device = event.key.lower(), event.device_type.name
                spent = event.self_device_time_total if self.on_gpu else event.self_cpu_time_total
                if device == kind.name and not key.startswith("nccl:"):  # which is a span, no kernel
                    largest[key[:150]] += spent / 2000
                    table[next(group for group in GROUPS if re.search(GROUPS[group], key))] += spent / 2000
            tables[name] = dict(table) | {"largest": dict(largest.most_common(12))}
        return tables


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="on CPUs, with small sizes")
    parser.add_argument("--only", metavar="NAME,...", help="some of the cases")
    parser.add_argument("--peer", action="store_true", help="diffusers too")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options, environment = parser.parse_args(), Environment.read()
    known = CASES.get(environment.world_size, ())
    default = ",".join(name for name in known if options.peer or not name.startswith("peer"))
    only = set((options.only or default).split(","))
    if only.difference(known):
        raise SystemExit(f"cases: {', '.join(known) or 'none, but for 4 ranks or 2; start them by torchrun'}")
    names = [n for n in known if n in only or (n == "one" and only & SPLITS.keys())]  # ratios need one GPU
    logging.disable(logging.WARNING)  # every rank would say that weights are random
    with torch.inference_mode():
        bench = Bench(options, environment)
        for name in names:
            bench.run(name)
    failed = [name for name in names if "failed" in bench.record[name]]
    bench.say(f"done; failed: {', '.join(failed) or 'none'}")
    for mesh in bench.meshes.values():
        mesh.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
