"""Fréchet inception distance over every frame of every matched video: no motion in it, and no FVD.

What is reported elsewhere as FVD for want of a video network is this."""

from pathlib import Path

import torch
from torch import Tensor

from chitu_diffusion.eval._base import Pair
from chitu_diffusion.eval._frames import facts_of, frame_batches
from chitu_diffusion.eval._frechet import FrechetMetric
from chitu_diffusion.eval.fid import BATCH, INCEPTION, frame_rows


class Metric(FrechetMetric):
    """Of matched pairs, all frames, however many each video has."""

    name = "frame_fid"
    weights_file = INCEPTION
    sample = "frame"

    def features(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A row a frame."""
        assert pair.reference is not None
        return self._rows(pair.generated), self._rows(pair.reference)

    def _rows(self, path: Path) -> Tensor:
        facts_of(path)  # a broken file is found before the network works on its beginning
        parts = frame_batches(path, BATCH)
        return torch.cat([frame_rows(self.extractor, part, self.device) for part in parts])
