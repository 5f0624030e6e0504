"""Startup: how long `Engine(...)` takes from files in the page cache, by network, beside what is possible.

    python docs/benchmarks/startup.py --dir /var/tmp [--pth] [--rounds 3] [--out FILE.json]

Writes a checkpoint of random weights in the official layout and the released dtypes into a directory inside
--dir (17.5 GB; with --pth 11.4 GB more for the text encoder as .pth), which it removes. Its pages are then in
memory, if memory suffices, so disks are not measured. Floors: the same files read by as many threads, and a
copy of pinned memory. Imports and CUDA's context come before; pinned memory is allocated in the first round.
"""

import argparse
import gc
import json
import logging
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_module

from chitu_core import memory
from chitu_core.config import Config, ModelConfig, load
from chitu_core.environment import Environment
from chitu_core.weights import Staging
from chitu_diffusion.engine import Engine
from chitu_diffusion.survey import DEMO_TOKENIZER
from chitu_diffusion.task import TaskPool

KEYS = Path(__file__).parents[2] / "tests" / "data" / "keys"  # of the 14B model; sizes are replaced
DIT_KEYS = KEYS / "dit_wan2.1_t2v_14b_and_wan2.2_t2v_a14b_each_expert.tsv"
GB = 1e9

Shapes = dict[str, tuple[int, ...]]


class Timings(logging.Handler):
    """Collects what `weights.load` logs: network, GB, seconds, GB/s."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.networks: dict[str, dict[str, float]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        label, *numbers = record.args
        self.networks[label] = dict(zip(("gb", "seconds", "gb_per_s"), numbers, strict=True))


def read_shapes(table: Path, sizes: Mapping[int, int], layers: int) -> Shapes:
    """Official names and shapes of a network, with the sizes of another model of the family."""
    shapes: Shapes = {}
    for row in table.read_text().splitlines()[1:]:
        name, shape, _ = row.split("\t")
        parts = name.split(".")
        if parts[0] != "blocks" or int(parts[1]) < layers:
            shapes[name] = tuple(sizes.get(int(size), int(size)) for size in shape.split("x"))
    return shapes


def shapes_of(model: ModelConfig) -> tuple[Shapes, Shapes, Shapes]:
    """Of the transformer, the text encoder and the VAE."""
    dit, text, vae = model.transformer, model.encoder, model.vae
    of_dit = {5120: dit.dim, 30720: 6 * dit.dim, 13824: dit.ffn_dim, 256: dit.freq_dim, 4096: dit.text_dim}
    of_text = {256384: text.vocab_size, 4096: text.dim, 10240: text.ffn_dim, 64: text.num_heads}
    of_vae = {96 * n: vae.base_dim * n for n in (1, 2, 4, 8, 12)}
    return (
        read_shapes(DIT_KEYS, of_dit, dit.num_layers),
        read_shapes(KEYS / "t5_umt5_xxl_encoder.tsv", of_text, text.num_layers),
        read_shapes(KEYS / "vae_wan2.1.tsv", of_vae, 0),
    )


def random_bytes(dtype: torch.dtype) -> np.ndarray:
    """Some MB of small numbers, which every tensor repeats."""
    return (torch.randn(2**23) * 0.02).to(dtype).view(torch.uint8).numpy()


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def write_safetensors(file: Path, shapes: Shapes, dtype: torch.dtype) -> None:
    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + num_bytes(shape, dtype)
        header[key] = {"dtype": name, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = random_bytes(dtype).data
    with file.open("wb", buffering=0) as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= handle.write(block[:end])


def write_pth(file: Path, shapes: Shapes, dtype: torch.dtype) -> None:
    torch.serialization.set_crc32_options(False)  # a second of computing for each GB
    block = random_bytes(dtype)
    state = {}
    for key, shape in shapes.items():
        state[key] = torch.empty(shape, dtype=dtype)
        content = state[key].view(-1).view(torch.uint8).numpy()
        for begin in range(0, content.nbytes, block.nbytes):
            part = content[begin : begin + block.nbytes]
            part[:] = block[: part.nbytes]
    torch.save(state, file)


def write_checkpoint(folder: Path, model: ModelConfig) -> list[Path]:
    """An official checkpoint with the text encoder as safetensors; each file by a process of its own, so that
    this one's peak of memory is that of loading."""
    size, (dit, text, vae) = model.transformer, shapes_of(model)
    config = {"_class_name": "WanModel", "model_type": "t2v", "text_len": model.encoder.text_len}
    config |= {key: size.__dict__[key] for key in ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers")}
    config |= {key: size.__dict__[key] for key in ("in_dim", "out_dim", "eps")}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copytree(DEMO_TOKENIZER, folder / model.encoder.t5_tokenizer)
    transformer = folder / "diffusion_pytorch_model.safetensors"
    encoder = (folder / model.encoder.t5_checkpoint).with_suffix(".safetensors")
    autoencoder = folder / model.vae.checkpoint
    in_children([
        (write_safetensors, transformer, dit, torch.float32),
        (write_safetensors, encoder, text, torch.bfloat16),
        (write_pth, autoencoder, vae, torch.float32),
    ])  # fmt: skip
    return [encoder, autoencoder, transformer]


def in_children(calls: list[tuple]) -> None:
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        for done in [pool.submit(*call) for call in calls]:
            done.result()


def read_floor(files: list[Path], staging: Staging) -> float:
    """GB/s at which as many threads read the files, each piece into a buffer that the thread has already."""

    def pieces() -> Iterator[tuple[int, int]]:
        for handle in handles:
            for offset in range(0, os.fstat(handle).st_size, staging.buffer_bytes):
                yield handle, offset

    def read(job: tuple[int, list[tuple[int, int]]]) -> int:
        number, mine = job
        return sum(os.preadv(handle, [buffers[number]], offset) for handle, offset in mine)

    handles = [os.open(file, os.O_RDONLY) for file in files]
    buffers = [np.ones(staging.buffer_bytes, np.uint8) for _ in range(staging.readers)]
    every = list(pieces())
    jobs = [(number, every[number :: staging.readers]) for number in range(staging.readers)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(staging.readers) as pool:
        total = sum(pool.map(read, jobs))
    seconds = time.perf_counter() - begin
    for handle in handles:
        os.close(handle)
    return total / GB / seconds


def copy_floor() -> float | None:
    """GB/s of a copy from pinned memory to the GPU, the best of five; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    source = torch.ones(2**28, dtype=torch.uint8, pin_memory=True)
    target, seconds = torch.empty(2**28, dtype=torch.uint8, device="cuda"), []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return source.nbytes / GB / min(seconds)


def build_once(config: Config) -> dict:
    """One construction: seconds in all and by network, peaks in GiB. The host's is of the process so far."""
    gc.collect()
    timings, logger = Timings(), logging.getLogger("chitu_core.weights")
    logger.setLevel(logging.INFO)
    logger.addHandler(timings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    memory.reset_peak(device)
    begin = time.perf_counter()
    engine = Engine(config, TaskPool(), Environment())
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = memory.peak(device)
    engine.close()
    logger.removeHandler(timings)
    rest = seconds - sum(network["seconds"] for network in timings.networks.values())
    return {
        "total_s": seconds, "rest_s": rest, "networks": timings.networks,
        "host_peak_gib": peak.host_gib, "device_peak_gib": peak.device_gib,
    }  # fmt: skip


def measure(config: Config, files: list[Path], rounds: int) -> dict:
    """The rounds of one form of the checkpoint, with the floor of reading its files."""
    read_floor(files, Staging())  # brings pages back that the writing of other files displaced
    floor = read_floor(files, Staging())
    runs = [build_once(config) for _ in range(rounds)]
    return {"files": {file.name: file.stat().st_size for file in files}, "read_gb_per_s": floor, "runs": runs}


def show(form: str, found: dict) -> None:
    runs = found["runs"]
    print(f"\ntext encoder as {form}: reading alone {found['read_gb_per_s']:.1f} GB/s")
    print(f"{'network':<14}{'GB':>7}{'median s':>10}{'GB/s':>8}   rounds, s")
    for name, first in runs[0]["networks"].items():
        seconds = [run["networks"][name]["seconds"] for run in runs]
        rounds = " ".join(f"{value:.2f}" for value in seconds)
        median = statistics.median(seconds)
        print(f"{name:<14}{first['gb']:>7.2f}{median:>10.2f}{first['gb'] / median:>8.1f}   {rounds}")
    for key, name in (("rest_s", "the rest"), ("total_s", "Engine(...)")):
        seconds = [run[key] for run in runs]
        rounds = " ".join(f"{value:.2f}" for value in seconds)
        print(f"{name:<14}{'':>7}{statistics.median(seconds):>10.2f}{'':>8}   {rounds}")
    print(f"peak: host {runs[-1]['host_peak_gib']} GiB, device {runs[-1]['device_peak_gib']} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True, help="where there is room for the checkpoint")
    parser.add_argument("--model", default="Wan2.1-T2V-1.3B", help="one with a single expert")
    parser.add_argument("--pth", action="store_true", help="then the text encoder as .pth too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/startup.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        overrides = [
            f"models={options.model}",
            f"models.ckpt_dir={folder}",
            f"output.root_dir={name}/outputs",
        ]
        with initialize_config_module("chitu_core.config", version_base=None):
            config = load(compose("serve_config", overrides=overrides))
        begin = time.perf_counter()
        files = write_checkpoint(folder, config.models)  # before CUDA is used: children are forks
        pth = folder / config.models.encoder.t5_checkpoint
        if options.pth:
            hidden = pth.with_suffix(".later")
            in_children([(write_pth, hidden, shapes_of(config.models)[1], torch.bfloat16)])
        print(f"written in {time.perf_counter() - begin:.1f} s", flush=True)
        has_gpu = torch.cuda.is_available()
        record: dict = {
            "device": torch.cuda.get_device_name() if has_gpu else "cpu",
            "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__,
            "python": platform.python_version(), "model": options.model, "staging": Staging().__dict__,
        }  # fmt: skip
        torch.zeros(1, device="cuda" if has_gpu else "cpu")
        record["safetensors"] = measure(config, files, options.rounds)
        show("safetensors", record["safetensors"])
        if options.pth:
            hidden.rename(pth)  # it goes before a .safetensors of the same stem
            record["pth"] = measure(config, [pth, *files[1:]], options.rounds)
            show("pth", record["pth"])
    record["copy_gb_per_s"] = copy_floor()  # last, for torch keeps the pinned memory
    print(f"\n{record['device']}, {record['cores']} cores, pinned copy {record['copy_gb_per_s']} GB/s")
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
