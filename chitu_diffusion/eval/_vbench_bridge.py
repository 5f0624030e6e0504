"""Run by the Python of eval.vbench_python, which knows vbench and nothing of this project.

`python _vbench_bridge.py REQUEST REPLY`: reads videos, dimensions, device and folder; writes averages and
per_video, by dimension, or unavailable with the reason."""

from __future__ import annotations  # the other Python may be an old one

import json
import sys
from pathlib import Path
from typing import Any


def main(request_file: str, reply_file: str) -> None:
    """Score the videos of a request and write the reply."""
    request = json.loads(Path(request_file).read_text("utf-8"))
    try:
        import torch
        from vbench import VBench
    except ImportError as error:
        reply: dict[str, Any] = {"unavailable": str(error)}
    else:
        judge = VBench(torch.device(request["device"]), "", request["folder"])
        judge.evaluate(
            videos_path=request["videos"],
            name="chitu",
            dimension_list=request["dimensions"],
            mode="custom_input",
        )
        found = json.loads((Path(request["folder"]) / "chitu_eval_results.json").read_text("utf-8"))
        reply = {
            "averages": {name: float(found[name][0]) for name in request["dimensions"]},
            "per_video": {name: _by_video(found[name][1]) for name in request["dimensions"]},
        }
    Path(reply_file).write_text(json.dumps(reply), encoding="utf-8")


def _by_video(results: list[dict[str, Any]]) -> dict[str, float]:
    return {Path(result["video_path"]).name: float(result["video_results"]) for result in results}


if __name__ == "__main__":
    main(*sys.argv[1:])
