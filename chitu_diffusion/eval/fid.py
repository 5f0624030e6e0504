"""Fréchet inception distance over frames: at most 16 of each matched video, evenly spaced."""

import torch
from torch import Tensor

from chitu_diffusion.eval._base import Pair
from chitu_diffusion.eval._frames import Frames, read_pair
from chitu_diffusion.eval._frechet import FrechetMetric, accepted, checked_rows

INCEPTION = "inception-2015-12-05.pt"
BATCH = 32  # frames that the network sees at once


class Metric(FrechetMetric):
    """Of matched pairs, the frames that psnr and ssim look at."""

    name = "fid"
    weights_file = INCEPTION
    sample = "frame"

    def features(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A row a frame, of as many frames of each video; sizes may differ, as the network resizes."""
        frames = read_pair(pair, same_size=False)
        return self._rows(frames.generated), self._rows(frames.reference)

    def _rows(self, frames: Frames) -> Tensor:
        return torch.cat([frame_rows(self.extractor, part, self.device) for part in _parts(frames)])


@torch.inference_mode()
def frame_rows(extractor: torch.nn.Module, frames: Frames, device: torch.device) -> Tensor:
    """Features [n, D] of uint8 frames [n, H, W, 3]; the network gets [n, 3, H, W] uint8 and resizes them."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().to(device)
    return checked_rows(extractor(pixels, **accepted(extractor, return_features=True)), len(frames))


def _parts(frames: Frames) -> list[Frames]:
    return [frames[start : start + BATCH] for start in range(0, len(frames), BATCH)]
