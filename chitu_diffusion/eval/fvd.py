"""Fréchet video distance: features of whole clips from a video network (I3D), of at most 16 frames each.

Source: Unterthiner et al. 2018 (arXiv:1812.01717); input as the TorchScript I3D of StyleGAN-V expects it."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from chitu_diffusion.eval._base import Pair
from chitu_diffusion.eval._frames import Frames, read_pair
from chitu_diffusion.eval._frechet import FrechetMetric, accepted, checked_rows

_SIDE = 224  # pixels


class Metric(FrechetMetric):
    """Of matched pairs, a row a video. Without the network there is no FVD: see frame_fid."""

    name = "fvd"
    weights_file = "i3d_torchscript.pt"
    sample = "video"

    def features(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A row of each video."""
        frames = read_pair(pair, same_size=False)
        return self._row(frames.generated), self._row(frames.reference)

    @torch.inference_mode()
    def _row(self, frames: Frames) -> Tensor:
        """Features [1, D] of frames [n, H, W, 3]; the network gets [1, 3, n, 224, 224] in [-1, 1]."""
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(self.device, torch.float32) / 127.5 - 1
        sized = interpolate(pixels, (_SIDE, _SIDE), mode="bilinear", align_corners=False)
        clip = sized.transpose(0, 1)[None]  # [1, 3, n, 224, 224]
        options = accepted(self.extractor, rescale=False, resize=False, return_features=True)
        return checked_rows(self.extractor(clip, **options), 1)
