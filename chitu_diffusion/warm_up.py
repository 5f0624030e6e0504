"""Every network run once at a size, so that the first request finds kernels chosen and blocks compiled."""

import logging
import time
from collections.abc import Iterable

import torch

from chitu_core.config import VideoSize
from chitu_diffusion.prepare import Pipeline
from chitu_diffusion.sequence import NO_SHARD

logger = logging.getLogger(__name__)

_LATENT_FRAMES_DECODED = 5  # the first chunk, and one or two of the others, whatever the chunk is


def warm_up(pipeline: Pipeline, sizes: Iterable[VideoSize], device: torch.device) -> None:
    """Encode a text, predict once with each expert and decode the first frames, for each of `sizes`.

    On several ranks all must call it. Logs the seconds of each size. Raises RuntimeError naming the size that
    fails.
    """
    for size in sizes:
        begin = time.perf_counter()
        try:
            _run_once(pipeline, size, device)
        except RuntimeError as error:
            raise RuntimeError(f"infer.warmup={size}: {error}") from error
        logger.info("warm-up at %s: %.1f s", size, time.perf_counter() - begin)


def _run_once(pipeline: Pipeline, size: VideoSize, device: torch.device) -> None:
    spec, shard = pipeline.spec, pipeline.tokens or NO_SHARD
    with pipeline.residency.text():
        embeddings = pipeline.prompt_encoder.embed(pipeline.prompt_encoder.tokenize("warm-up"))[None]
    latent = torch.randn(1, *spec.latent_shape(size.num_frames, size.height, size.width), device=device)
    t = torch.tensor(500, device=device)
    for name, dit in pipeline.experts.items():
        pipeline.residency.enter(name)
        pipeline.forward(dit, latent, t, dit.encode_text(embeddings), shard=shard)
    pipeline.residency.leave()
    for _ in pipeline.pixels(latent[0, :, :_LATENT_FRAMES_DECODED]):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
