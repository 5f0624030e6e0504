"""The demo model's videos, judged by what they show: the judge measures pixels and knows no caption."""

import argparse
import json

import imageio.v3 as iio
import pytest
import torch
from engines import new_engine
from shapeworld import canonical, compare, judge, rows, sample_attrs

from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

SEED = 20261120


def make_videos(count: int, root: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Videos [count, 3, 17, 96, 160] in [-1, 1] as written to their files, and what their prompts ask for."""
    wanted = sample_attrs(count, torch.Generator().manual_seed(SEED), split="heldout")
    engine = new_engine("infer.op_impl=torch", f"output.root_dir={root}")
    tasks = []
    for seed, row in enumerate(rows(wanted)):
        tasks.append(DiffusionTask.from_user_request(DiffusionUserParams(prompt=canonical(row), seed=seed)))
        engine.pool.add(tasks[-1])
    while not engine.pool.all_finished():
        engine.step()
    engine.close()
    assert all(task.result is not None for task in tasks), [task.error_message for task in tasks]
    frames = [
        torch.from_numpy(iio.imread(task.buffer.save_path, plugin="pyav")) for task in tasks
    ]  # [F, H, W, 3]
    return torch.stack(frames).permute(0, 4, 1, 2, 3) / 127.5 - 1, wanted


def judged(count: int, root: str) -> dict[str, float]:
    """Share of videos that show what was asked for, per attribute."""
    videos, wanted = make_videos(count, root)
    verdict = compare(judge(videos), wanted)
    return {key: float(verdict[key].float().mean()) for key in ("color", "bg", "dir", "shape", "all")}


@pytest.mark.slow
def test_64_held_out_prompts_show_what_they_ask_for(tmp_path):
    share = judged(64, str(tmp_path))
    print(share)
    assert share["color"] >= 0.97
    assert share["bg"] >= 0.97
    assert share["dir"] >= 0.95
    assert share["shape"] >= 0.80


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="judge COUNT videos of the demo model and print the shares as JSON"
    )
    parser.add_argument("count", type=int, nargs="?", default=256)
    parser.add_argument("--root", default="outputs/quality")
    options = parser.parse_args()
    print(json.dumps(judged(options.count, options.root)))
