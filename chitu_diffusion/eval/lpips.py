"""Learned perceptual distance of frames, by the package lpips with AlexNet: 0 for equal frames.

Source: Zhang et al. 2018 (arXiv:1801.03924); sizes and ranges as mission.md 8. The package takes AlexNet's
weights from torchvision, which fetches them once."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from chitu_diffusion.eval._base import EvalOptions, Unavailable, require
from chitu_diffusion.eval._frame_metric import FrameMetric
from chitu_diffusion.eval._frames import Frames

_SIDE = 224  # pixels that AlexNet sees
_TORCHVISION = "; it needs a torchvision that was built for this torch"


class Metric(FrameMetric):
    """Mean over the frames of a video, then over videos, in float32."""

    name = "lpips"
    higher_is_better = False

    def __init__(self, options: EvalOptions) -> None:
        self._device = torch.device(options.device)
        package = require("lpips", "lpips", _TORCHVISION)
        try:
            network = package.LPIPS(net="alex", verbose=False)
        except OSError as error:  # no way to the weights
            remedy = "put them into torch.hub's folder (TORCH_HOME), or run once with a network"
            raise Unavailable(f"AlexNet's weights cannot be read ({error}); {remedy}") from error
        self._network = network.to(self._device, torch.float32).eval()

    @torch.inference_mode()
    def score(self, generated: Frames, reference: Frames) -> list[float | None]:
        """The distance of each frame, 0 or more."""
        with torch.autocast(self._device.type, enabled=False):
            distances = self._network(self._input(generated), self._input(reference))
        return [float(value) for value in distances.reshape(len(generated))]

    def _input(self, frames: Frames) -> Tensor:
        """Frames [n, H, W, 3] as [n, 3, 224, 224] in [-1, 1]."""
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(self._device, torch.float32) / 127.5 - 1
        return interpolate(pixels, (_SIDE, _SIDE), mode="bilinear", align_corners=False)
