"""`chitu bench vae`: decoding, and on request encoding, of a video, without writing it.

Where the autoencoder does not compute in fp32, its first frames are held against fp32 with the same weights.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from chitu_diffusion.bench._measure import figures
from chitu_diffusion.bench._setup import (
    Report,
    Video,
    add_common,
    check_counts,
    heading,
    make_folder,
    say,
    write_report,
)
from chitu_diffusion.bench._work import (
    Measured,
    Work,
    decode_work,
    free,
    measure,
    open_work,
    random_latents,
    relative_error,
    vae_encode,
)
from chitu_diffusion.prepare import Pipeline
from chitu_diffusion.survey import dtype_name
from chitu_diffusion.vaes.wan import WanVAE


@dataclass(frozen=True, kw_only=True)
class VaeReport(Report):
    """The JSON file; the error is relative L2 of the first frames against fp32, None where that computes."""

    vae_dtype: str
    vae_chunk: int  # latent frames at once
    latent_shape: tuple[int, ...]
    decode: Measured
    decode_flops: int
    encode: Measured | None
    encode_flops: int | None
    float32_error: float | None


@dataclass(frozen=True)
class _Works:
    vae: WanVAE
    chunk: int
    latents: Tensor
    decode: Work
    encode: Work | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `chitu bench vae`."""
    add_common(parser, repeats=3)
    parser.add_argument("--encode", action="store_true", help="measure encoding too")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write the file. Raises ValueError naming option, value and remedy."""
    check_counts(options, ("repeats",))
    make_folder(options)

    def make(pipeline: Pipeline, device: torch.device, video: Video) -> _Works:
        latents = random_latents(pipeline, device, video)
        encode = vae_encode(pipeline, device, video) if options.encode else None
        decode = decode_work(pipeline.vae, latents, pipeline.vae_chunk)
        return _Works(pipeline.vae, pipeline.vae_chunk, latents, decode, encode)

    opened = open_work(options, make)
    works, device = opened.made, opened.subject.device
    decode = measure(works.decode, device, options.repeats)
    free(device)
    encode = None if works.encode is None else measure(works.encode, device, options.repeats)
    report = VaeReport(
        **heading(options, "vae", add_arguments, opened.video.name, opened.subject),
        vae_dtype=dtype_name(works.vae.conv2.weight.dtype),
        vae_chunk=works.chunk,
        latent_shape=tuple(works.latents.shape),
        decode=decode,
        decode_flops=works.decode.flops,
        encode=encode,
        encode_flops=None if works.encode is None else works.encode.flops,
        float32_error=float32_error(works.vae, works.latents),
    )
    _print(report)
    write_report(report, "vae", options.out)
    return 0


def float32_error(vae: WanVAE, latents: Tensor) -> float | None:
    """Relative L2 of the first decoded frames against fp32 with the same weights; None if it is in fp32."""
    if vae.conv2.weight.dtype == torch.float32:
        return None
    with torch.device("meta"):
        exact = WanVAE(vae.config)
    exact.load_state_dict({name: value.float() for name, value in vae.state_dict().items()}, assign=True)
    return relative_error(decode_work(vae, latents).sample(), decode_work(exact, latents).sample())


def _print(report: VaeReport) -> None:
    frames = f"{report.latent_shape[1]} latent frames, {report.vae_chunk} at once"
    where = f"VAE in {report.vae_dtype}, {report.weights} weights, {report.environment.device}"
    say(f"{report.model} {report.size}, {frames}, {where}")
    for name, measured, flops in (
        ("decode", report.decode, report.decode_flops),
        ("encode", report.encode, report.encode_flops),
    ):
        if measured is None or flops is None:
            continue
        say(f"{name:<12} {measured.timing}")
        say(f"{'':<12} {figures(measured.tflops)} TFLOP/s of {figures(flops / 1e12)} TFLOP")
        if measured.peak_memory.device_gib is not None:
            held = f"of which weights and inputs {measured.weights_gib:.2f}"
            say(f"{'':<12} peak {measured.peak_memory.device_gib:.2f} GiB, {held}")
    if report.float32_error is not None:
        say(f"error        {report.float32_error:.3g} against fp32")
