"""Fréchet distances between two sets of features, by torchmetrics in float64.

Features come from a TorchScript file of the user's; nothing is fetched. A subclass says what is one sample: a
frame or a video. Source: Heusel et al. 2017 (arXiv:1706.08500)."""

import base64
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from chitu_diffusion.eval._base import (
    EvalOptions,
    Measured,
    Outcome,
    Pair,
    Unavailable,
    UnfitPair,
    UnreadableVideo,
    require,
)


class FrechetMetric(ABC):
    """The distance between the features of generated and of reference videos; 0 for equal ones."""

    name: ClassVar[str]
    weights_file: ClassVar[str]  # in eval.weights_dir
    sample: ClassVar[str]  # what one row of features is made of
    needs_reference = True

    def __init__(self, options: EvalOptions) -> None:
        self._distance = require("torchmetrics.image.fid", "torchmetrics").FrechetInceptionDistance
        self.device = torch.device(options.device)
        self.extractor = load_extractor(options.weights_dir, self.weights_file, self.device)

    @abstractmethod
    def features(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Rows [n, D] of the generated video and of its reference. Raises UnreadableVideo or UnfitPair."""

    def measure(self, pairs: Sequence[Pair]) -> list[Measured]:
        """The features of each pair, as text."""
        return [self._measure_one(pair) for pair in pairs]

    def combine(self, measured: Sequence[Measured]) -> Outcome:
        """The distance of all rows. Raises Unavailable for fewer than two of a set, ValueError if it is not
        a number."""
        values = [one.value or {} for one in measured]
        ours, theirs = (
            torch.cat([_decoded(value[side]) for value in values]) for side in ("generated", "reference")
        )
        fewest, width = min(len(ours), len(theirs)), ours.shape[1]
        if fewest < 2:
            raise Unavailable(f"{self.name} needs 2 or more {self.sample}s of each set, got {fewest}")
        # NOTE: the rows of all ranks are here; by default, torchmetrics would wait for the other ranks
        distance = self._distance(feature=_Rows(width), sync_on_compute=False).set_dtype(torch.float64)
        distance.update(theirs, real=True)
        distance.update(ours, real=False)
        score = float(distance.compute())
        if not math.isfinite(score):
            raise ValueError(f"the distance is {score}; the features are not finite")
        is_small = fewest <= width
        result: dict[str, Any] = {
            "metric": self.name,
            "status": "success",
            "score": score,
            "unit": "",
            "higher_is_better": False,
            "backend": self.weights_file,
            "backend_note": f"one sample is a {self.sample}",
            "num_pairs": len(values),
            "num_samples": [len(ours), len(theirs)],
            "num_features": width,
            "is_small_sample": is_small,
        }
        note = f"{fewest} {self.sample}s are few for {width} features: the distance is biased upwards"
        return Outcome(result, note if is_small else "")

    def _measure_one(self, pair: Pair) -> Measured:
        name = pair.generated.name
        try:
            ours, theirs = self.features(pair)
        except UnfitPair as error:
            return Measured(name, reason=str(error))
        except UnreadableVideo as error:
            return Measured(name, reason=str(error), is_broken=True)
        return Measured(name, {"generated": _encoded(ours), "reference": _encoded(theirs)})


class _Rows(nn.Module):
    """Stands for the network, whose features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, rows: Tensor) -> Tensor:  # [n, D]
        return rows


def load_extractor(weights_dir: str | None, file_name: str, device: torch.device) -> Any:
    """A TorchScript network from `eval.weights_dir`. Raises Unavailable naming the file and the remedy."""
    if weights_dir is None:
        raise Unavailable(f"no features without {file_name}; name its folder with eval.weights_dir")
    path = Path(weights_dir) / file_name
    if not path.is_file():
        raise Unavailable(f"{path} is not there; put the TorchScript file into eval.weights_dir")
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise Unavailable(f"{path} is no TorchScript file ({first}); fetch it again") from error


def accepted(extractor: Any, **wanted: bool) -> dict[str, bool]:
    """Those of the options that the network's forward takes."""
    known = {argument.name for argument in extractor.forward.schema.arguments}
    return {name: value for name, value in wanted.items() if name in known}


def checked_rows(features: Tensor, count: int) -> Tensor:
    """Features as [count, D] on the host. Raises ValueError for other shapes."""
    rows = features.flatten(1) if features.dim() > 1 else features[:, None]
    if len(rows) != count:
        raise ValueError(f"the network made {tuple(features.shape)} of {count} samples; it must give [n, D]")
    return rows.cpu()


def _encoded(rows: Tensor) -> dict[str, Any]:
    values = rows.to(torch.float64).numpy()
    return {"shape": list(values.shape), "float64": base64.b64encode(values.tobytes()).decode("ascii")}


def _decoded(text: dict[str, Any]) -> Tensor:
    values = np.frombuffer(base64.b64decode(text["float64"]), dtype=np.float64)
    return torch.from_numpy(values.reshape(text["shape"]).copy())
