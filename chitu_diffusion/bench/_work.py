"""The computations that are measured, each as a value: one forward, one decode, one encode; and their times.

A work holds its network and inputs alone, and the engine that made them is closed, so that memory is that of
the work. Inputs are random from a fixed seed: two works of one configuration compute the same.
"""

import argparse
import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from chitu_core import memory
from chitu_core.memory import MemoryPeak
from chitu_core.timing import Span
from chitu_diffusion.bench._floor import dit_work
from chitu_diffusion.bench._setup import Subject, Video, build_engine, config_of, subject_of, video_of
from chitu_diffusion.encoders.tokenizer import END_ID, TokenizedPrompt
from chitu_diffusion.flops import decode_flops, encode_flops, umt5_flops
from chitu_diffusion.prepare import Pipeline
from chitu_diffusion.sequence import NO_SHARD
from chitu_diffusion.vaes.wan import WanVAE

SEED = 0
TIMESTEP = 500
WARM_UP = 1  # untimed calls after the first one
CHECKED_LATENT_FRAMES = 3  # of a decode, whose whole video would take gigabytes to compare


T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """One computation, its operations, and a smaller one whose result can be compared."""

    compute: Callable[[], object]
    compute_sample: Callable[[], Tensor]
    flops: int

    @torch.inference_mode()
    def run(self) -> None:
        """Do it, and keep nothing."""
        self.compute()

    @torch.inference_mode()
    def sample(self) -> Tensor:
        """A result, in fp32 on the host."""
        return self.compute_sample().float().cpu()


@dataclass(frozen=True)
class Opened(Generic[T]):
    """What was made of an engine before it was closed, and what it was an engine of."""

    made: T
    subject: Subject
    attention: str
    video: Video


@dataclass(frozen=True)
class Timing:
    """Times of one work; the first call, by the host's clock, may compile and is in no other figure."""

    first_s: float
    median_ms: float
    min_ms: float
    max_ms: float
    all_ms: tuple[float, ...]

    def __str__(self) -> str:
        span = f"{self.min_ms:,.2f} to {self.max_ms:,.2f}"
        head = f"{self.median_ms:,.2f} ms, median of {len(self.all_ms)}, {span}"
        return f"{head}; first call {self.first_s:.2f} s"


@dataclass(frozen=True)
class Measured:
    """What a verb of one network reports: times, speed, memory with what the weights take of it."""

    timing: Timing
    tflops: float
    weights_gib: float | None  # None on a CPU
    peak_memory: MemoryPeak


def measure(work: Work, device: torch.device, repeats: int) -> Measured:
    """Run a work once, then once more, then `repeats` times for the record; the peak is over all of them."""
    held = held_gib(device)
    memory.reset_peak(device)
    first_s = first_call(work.run, device)
    for _ in range(WARM_UP):
        work.run()
    times = timed(work.run, device, repeats)
    timing = Timing(first_s, statistics.median(times), min(times), max(times), tuple(times))
    return Measured(timing, work.flops / timing.median_ms / 1e9, held, memory.peak(device))


def first_call(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call by the host's clock, until the device has done it."""
    begin = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - begin


def timed(run: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Milliseconds of each of `count` calls on the device's clock; nothing waits in between."""
    spans = [Span(device) for _ in range(count)]
    for span in spans:
        with span:
            run()
    return [span.milliseconds() for span in spans]


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held_gib(device: torch.device) -> float | None:
    """Memory that tensors hold on the device now, in GiB; None on a CPU."""
    return round(torch.cuda.memory_allocated(device) / memory.GIB, 3) if device.type == "cuda" else None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def open_work(
    options: argparse.Namespace, make: Callable[[Pipeline, torch.device, Video], T], extra: Sequence[str] = ()
) -> Opened[T]:
    """Build an engine from the options and more overrides, make works of its networks, and close it.

    Networks that the works do not hold are let go. Raises ValueError for options that cannot be.
    """
    config = config_of(options, extra)
    video = video_of(options, config.models)
    engine = build_engine(config)
    attention = engine.pipeline.attention.name
    made = make(engine.pipeline, engine.device, video)
    engine.close()
    free(engine.device)
    return Opened(made, subject_of(engine), attention, video)


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more; an engine is a cycle of references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.inference_mode()
def dit_forward(pipeline: Pipeline, device: torch.device, video: Video) -> Work:
    """One branch of one step of the expert for timestep 500; the text is encoded before, as in a run."""
    spec, shard = pipeline.spec, pipeline.tokens or NO_SHARD
    dit = pipeline.experts[spec.select_expert(TIMESTEP).name]
    shape = spec.latent_shape(video.num_frames, video.height, video.width)
    noise = torch.Generator(device).manual_seed(SEED)
    latents = torch.randn(1, *shape, generator=noise, device=device)  # [1, C, T, h, w] fp32
    text = torch.randn(1, dit.config.text_len, dit.config.text_dim, generator=noise, device=device)
    pipeline.residency.enter(spec.select_expert(TIMESTEP).name)
    cache, t = dit.encode_text(text), torch.tensor(TIMESTEP, device=device)
    predict = pipeline.forward  # not the pipeline, whose other networks are to be let go

    def forward() -> Tensor:
        return predict(dit, latents, t, cache, shard=shard)

    return Work(forward, forward, dit_work(dit.config, spec.seq_len(shape)).flops)


def vae_decode(pipeline: Pipeline, device: torch.device, video: Video) -> Work:
    """Decoding random latents to the chunks of frames that a run writes."""
    return decode_work(pipeline.vae, random_latents(pipeline, device, video), pipeline.vae_chunk)


def decode_work(vae: WanVAE, latents: Tensor, chunk: int = 1) -> Work:
    """Decoding a normalised latent [z, T, h, w], `chunk` frames at once; the sample is of the first."""
    few = latents[:, :CHECKED_LATENT_FRAMES]
    return Work(
        lambda: deque(vae.decode(latents, chunk), maxlen=0),
        lambda: torch.cat([frames.cpu() for frames in vae.decode(few, chunk)], dim=1),
        decode_flops(vae.config, *latents.shape[1:]),
    )


def vae_encode(pipeline: Pipeline, device: torch.device, video: Video) -> Work:
    """Encoding a random video."""
    vae, noise = pipeline.vae, torch.Generator(device).manual_seed(SEED)
    shape = (3, video.num_frames, video.height, video.width)
    pixels = torch.rand(shape, generator=noise, device=device) * 2 - 1  # fp32 in [-1, 1]
    _, *latent = pipeline.spec.latent_shape(video.num_frames, video.height, video.width)
    chunk = pipeline.vae_chunk

    def encode() -> Tensor:
        return vae.encode(pixels, latent_frames_per_chunk=chunk)

    return Work(encode, encode, encode_flops(vae.config, *latent))


def t5_encode(pipeline: Pipeline, device: torch.device, video: Video) -> Work:  # noqa: ARG001  (all alike)
    """Encoding one prompt that fills the text."""
    encoder, length = pipeline.prompt_encoder, pipeline.spec.text_len
    size = encoder.encoder.config
    ids = torch.randint(3, size.vocab_size, (length - 1,), generator=torch.Generator().manual_seed(SEED))
    prompt = TokenizedPrompt((*ids.tolist(), END_ID), num_dropped=0)
    residency = pipeline.residency

    def encode() -> Tensor:
        with residency.text():
            return encoder.embed(prompt)

    return Work(encode, encode, umt5_flops(size, length))


def random_latents(pipeline: Pipeline, device: torch.device, video: Video) -> Tensor:
    """A normalised latent [z, T, h, w] fp32."""
    shape = pipeline.spec.latent_shape(video.num_frames, video.height, video.width)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(SEED), device=device)
