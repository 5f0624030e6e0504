"""VBench's scores of videos by themselves, from a Python environment of its own (eval.vbench_python).

VBench pins packages that this project cannot live with, so it runs as a subprocess, one for each rank that
has videos. A request and a reply pass as JSON files. Source: Huang et al. 2024 (arXiv:2311.17982)."""

import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from chitu_diffusion.eval._base import EvalOptions, Measured, Outcome, Pair, Unavailable

DIMENSIONS = (  # those of mission.md 8: what VBench scores without prompts of its own
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
SUFFIXES = (".mp4", ".gif")
_BRIDGE = Path(__file__).with_name("_vbench_bridge.py")
_LAST_LINES = 5  # of what a failed process wrote


class Metric:
    """VBench in custom mode: a number between 0 and 1 for each dimension, higher is better."""

    needs_reference = False

    def __init__(self, options: EvalOptions) -> None:
        if options.vbench_python is None:
            raise Unavailable("eval.vbench_python is not set; name the Python of an environment with vbench")
        found = shutil.which(options.vbench_python)
        if found is None:
            raise Unavailable(f"eval.vbench_python={options.vbench_python} is no program; name a Python")
        self._python = found
        self._device = options.device

    def measure(self, pairs: Sequence[Pair]) -> list[Measured]:
        """Scores of the generated videos. Raises Unavailable if the environment has no vbench, RuntimeError
        with the last lines of its output if it fails."""
        names = [f"{place:04d}{pair.generated.suffix.lower()}" for place, pair in enumerate(pairs)]
        readable = [name for name in names if name.endswith(SUFFIXES)]
        reply: dict[str, Any] = {}
        if readable:
            with tempfile.TemporaryDirectory(prefix="vbench-") as folder:
                reply = self._run(Path(folder), dict(zip(names, pairs, strict=True)), readable)
        reason = f"VBench reads {' and '.join(SUFFIXES)}"
        measured = []
        for name, pair in zip(names, pairs, strict=True):
            if name not in readable:
                measured.append(Measured(pair.generated.name, reason=reason))
                continue
            scores = {dimension: by_name.get(name) for dimension, by_name in reply["per_video"].items()}
            value = {"path": str(pair.generated), "prompt": pair.prompt, "scores": scores}
            measured.append(Measured(pair.generated.name, {**value, "averages": reply["averages"]}))
        return measured

    def combine(self, measured: Sequence[Measured]) -> Outcome:
        """VBench's average of each dimension: over ranks, weighted by their videos."""
        values = [one.value or {} for one in measured]
        averages = {name: fmean(value["averages"][name] for value in values) for name in DIMENSIONS}
        if not all(math.isfinite(average) for average in averages.values()):
            raise ValueError(f"VBench replied {averages}")
        per_video = [
            {"video_name": one.name, "scores": value["scores"]}
            for one, value in zip(measured, values, strict=True)
        ]
        result = {
            "metric": "vbench",
            "status": "success",
            "dimensions": averages,
            "higher_is_better": True,
            "num_videos": len(values),
            "per_video": per_video,
        }
        full_info = [
            {"prompt_en": value["prompt"], "dimension": list(DIMENSIONS), "video_list": [value["path"]]}
            for value in values
        ]
        return Outcome(result, attachments={"full_info": full_info})

    def _run(self, folder: Path, pairs: dict[str, Pair], readable: Sequence[str]) -> dict[str, Any]:
        videos, request, reply = folder / "videos", folder / "request.json", folder / "reply.json"
        videos.mkdir()
        for name in readable:
            (videos / name).symlink_to(pairs[name].generated.absolute())
        said = {"videos": str(videos), "dimensions": list(DIMENSIONS)}
        said |= {"device": self._device, "folder": str(folder / "results")}
        request.write_text(json.dumps(said), encoding="utf-8")
        # -I: neither PYTHONPATH nor this folder, whose vbench.py is not the package
        command = [self._python, "-I", str(_BRIDGE), str(request), str(reply)]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if ended.returncode != 0 or not reply.is_file():
            last = " | ".join((ended.stderr or ended.stdout).strip().splitlines()[-_LAST_LINES:])
            raise RuntimeError(f"VBench ended with status {ended.returncode}: {last or 'it said nothing'}")
        return _checked(json.loads(reply.read_text("utf-8")), self._python)


def _checked(reply: Any, python: str) -> dict[str, Any]:
    if isinstance(reply, dict) and "unavailable" in reply:
        remedy = f"{python} -m pip install vbench"
        raise Unavailable(f"vbench cannot be imported by {python} ({reply['unavailable']}); {remedy}")
    parts = [reply.get("averages"), reply.get("per_video")] if isinstance(reply, dict) else []
    if not parts or not all(isinstance(part, dict) and set(DIMENSIONS) <= part.keys() for part in parts):
        raise RuntimeError("VBench's reply lacks averages or per_video of a dimension")
    return {"averages": parts[0], "per_video": parts[1]}
