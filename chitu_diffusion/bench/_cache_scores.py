"""How near a clip is to the exact one, and what a judge of the demo model's clips finds in it."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from chitu_diffusion.eval import lpips, psnr, ssim
from chitu_diffusion.eval._base import EvalOptions, Unavailable
from chitu_diffusion.eval._frame_metric import FrameMetric
from chitu_diffusion.eval._frames import Frames

_METRICS: dict[str, type[FrameMetric]] = {"psnr": psnr.Metric, "ssim": ssim.Metric, "lpips": lpips.Metric}
_RIGHT = {"shape": "shape", "color": "colour", "dir": "direction", "bg": "background"}  # of a verdict
_MEASURED = ("iou", "path_err")


class Similarity:
    """Frame metrics against a reference; `missing` says which could not be, and why."""

    def __init__(self, device: torch.device) -> None:
        self.missing: dict[str, str] = {}
        self._metrics: dict[str, FrameMetric] = {}
        options = EvalOptions(str(device))
        for name, metric in _METRICS.items():
            try:
                self._metrics[name] = metric(options)  # type: ignore[call-arg]  # as eval makes them
            except Unavailable as error:
                self.missing[name] = str(error)

    def scores(self, frames: Frames, reference: Frames) -> dict[str, float | None]:
        """Means over the frames [n, H, W, 3] that differ; None where all are equal and the score infinite."""
        found = {}
        for name, metric in self._metrics.items():
            finite = [score for score in metric.score(frames, reference) if score is not None]
            found[name] = fmean(finite) if finite else None
        return found


@dataclass(frozen=True)
class Judge:
    """A module that measures what a clip shows: its `parse`, `judge` and `compare`."""

    path: Path
    parse: Callable[[str], dict[str, int]]  # a caption to attributes
    judge: Callable[[Tensor], dict[str, Tensor]]  # clips [n, 3, F, H, W] in [-1, 1] to what they show
    compare: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]

    def scores(self, frames: Frames, prompt: str) -> dict[str, float | None]:
        """1 or 0 for each attribute that `prompt` names; overlap with a clean shape; error of the path."""
        wanted = {key: torch.tensor([value]) for key, value in self.parse(prompt).items()}
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
        shown = self.judge(video)
        verdict = self.compare(shown, wanted)
        right = {name: float(verdict[key]) for key, name in _RIGHT.items()}
        return {**right, **{name: float(shown[name]) for name in _MEASURED}}


def load_judge(path: Path, prompts: Sequence[str]) -> Judge:
    """The judge in a file of Python. Raises ValueError for another file, and for prompts it cannot parse."""
    found = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if found is None or found.loader is None:
        raise ValueError(f"--judge={path}: no file of Python; name one with parse, judge and compare")
    module: Any = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    absent = [name for name in ("parse", "judge", "compare") if name not in vars(module)]
    if absent:
        raise ValueError(f"--judge={path}: has no {', '.join(absent)}")
    judge = Judge(path, module.parse, module.judge, module.compare)
    for prompt in prompts:
        unnamed = [name for key, name in _RIGHT.items() if key not in judge.parse(prompt)]
        if unnamed:
            raise ValueError(f"--judge={path}: finds no {', '.join(unnamed)} in the prompt {prompt!r}")
    return judge
