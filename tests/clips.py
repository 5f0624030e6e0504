"""Small video files without loss, for tests of evaluation, and extractors small enough to be made there."""

from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor, nn

INCEPTION, I3D = "inception-2015-12-05.pt", "i3d_torchscript.pt"


def noise(seed: int, frames: int = 6, height: int = 16, width: int = 24) -> np.ndarray:
    """uint8 [frames, height, width, 3], far enough from 0 and 255 for an error to be added."""
    return np.random.default_rng(seed).integers(40, 200, (frames, height, width, 3)).astype(np.uint8)


def write_clip(path: Path, frames: np.ndarray, fps: int = 16) -> Path:
    """FFV1 in Matroska: the frames come back as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_empty_clip(path: Path) -> Path:
    """A well-formed file whose video stream has no frame."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = 16, 24, "bgr0"
        container.start_encoding()
    return path


def write_sound(path: Path) -> Path:
    """A file that has a sound and no picture."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


class FrameNetwork(nn.Module):
    """Takes frames as Inception's TorchScript does: the mean of each channel, in units of 1."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.dtype == torch.uint8
        assert return_features
        return images.double().mean(dim=(2, 3)) / 255


class ClipNetwork(nn.Module):
    """Takes clips as I3D's TorchScript does: the mean, and how much a frame differs from the next."""

    def forward(
        self, clip: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        assert not rescale
        assert not resize
        assert return_features
        assert clip.shape[3] == 224
        motion = (clip[:, :, 1:] - clip[:, :, :-1]).abs().mean(dim=(1, 2, 3, 4))
        return torch.stack([clip.mean(dim=(1, 2, 3, 4)), motion], dim=1)


def write_networks(folder: Path) -> Path:
    """Both extractors under the names that the metrics look for."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.jit.script(FrameNetwork()).save(str(folder / INCEPTION))
    torch.jit.script(ClipNetwork()).save(str(folder / I3D))
    return folder
