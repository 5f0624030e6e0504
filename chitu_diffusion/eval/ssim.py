"""Structural similarity of frames, by scikit-image: 1 for equal frames.

Source: Wang et al. 2004, with scikit-image's uniform window of 7 pixels, channels averaged."""

import numpy as np

from chitu_diffusion.eval._base import EvalOptions, UnfitPair, require
from chitu_diffusion.eval._frame_metric import FrameMetric
from chitu_diffusion.eval._frames import Frames

_WINDOW = 7  # pixels


class Metric(FrameMetric):
    """Mean over the frames of a video, then over videos."""

    name = "ssim"

    def __init__(self, options: EvalOptions) -> None:  # noqa: ARG002  # one signature for all metrics
        self._ssim = require("skimage.metrics", "scikit-image").structural_similarity

    def score(self, generated: Frames, reference: Frames) -> list[float | None]:
        """The similarity of each frame, at most 1. Raises UnfitPair for frames smaller than the window."""
        if min(generated.shape[1:3]) < _WINDOW:
            raise UnfitPair(f"frames must be {_WINDOW} pixels or more on each side")
        pairs = zip(generated.astype(np.float64), reference.astype(np.float64), strict=True)
        return [float(self._ssim(b, a, win_size=_WINDOW, channel_axis=-1, data_range=255)) for a, b in pairs]
