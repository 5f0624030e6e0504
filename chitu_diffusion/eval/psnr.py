"""Peak signal-to-noise ratio in dB, by scikit-image: 10 log10(255^2 / mean squared error) of a frame."""

import numpy as np

from chitu_diffusion.eval._base import EvalOptions, require
from chitu_diffusion.eval._frame_metric import FrameMetric
from chitu_diffusion.eval._frames import Frames


class Metric(FrameMetric):
    """Mean over the frames that differ, then over the videos that do: equal frames have an infinite PSNR."""

    name = "psnr"
    unit = "dB"

    def __init__(self, options: EvalOptions) -> None:  # noqa: ARG002  # one signature for all metrics
        self._psnr = require("skimage.metrics", "scikit-image").peak_signal_noise_ratio

    def score(self, generated: Frames, reference: Frames) -> list[float | None]:
        """dB of each frame, over all its pixels and channels; None for equal frames."""
        pairs = zip(generated.astype(np.float64), reference.astype(np.float64), strict=True)
        return [None if np.array_equal(a, b) else float(self._psnr(b, a, data_range=255)) for a, b in pairs]
