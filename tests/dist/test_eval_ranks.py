"""Ranks share an evaluation: the scores of one rank, bit for bit, and one message where one of them fails."""

import os
from dataclasses import asdict
from pathlib import Path

import pytest
from clips import noise, write_clip, write_networks
from torch import distributed as dist

from chitu_core.config import EvalConfig
from chitu_core.distributed import RankChannel, open_channel
from chitu_core.environment import Environment
from chitu_diffusion.eval import psnr
from chitu_diffusion.eval._base import EvalOptions, Unavailable
from chitu_diffusion.eval._report import Folders
from chitu_diffusion.eval.manager import Team, evaluate

METRICS = ("psnr", "ssim", "fid", "frame_fid", "fvd", "vbench", "nonsense")


def score(folder: str, metrics: tuple[str, ...] = METRICS, fault: str = "") -> list[dict]:
    """The records of this rank; only rank 0 knows where the videos are."""
    rank, size = dist.get_rank(), dist.get_world_size()
    root = Path(folder)
    config = EvalConfig(
        eval_type=metrics,
        reference_path=str(root / "reference") if rank == 0 else None,
        pairing="match",
        weights_dir=str(root / "nets"),
        vbench_python=None,
    )
    if fault and rank == 1:
        psnr.Metric.measure = {"error": fail, "missing": lack}[fault]
    try:
        team = Team(RankChannel(dist.group.WORLD if size > 1 else None), rank, size)
        out = root / f"out_{size}"
        source = root / "generated" if rank == 0 else Path("nowhere")
        return [asdict(record) for record in evaluate(source, config, "cpu", Folders(out, out), team)]
    finally:
        if fault and rank == 1:
            del psnr.Metric.measure


def fail(metric, pairs):
    raise ZeroDivisionError("by design")


def lack(metric, pairs):
    raise Unavailable("no package here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("eval")
    for seed, name in enumerate("abcde"):
        write_clip(root / "reference" / f"{name}.mkv", noise(seed))
        write_clip(root / "generated" / f"{name}.mkv", noise(seed) + 1 + seed)
    (root / "generated" / "c.mkv").write_bytes(b"broken")
    write_networks(root / "nets")
    return str(root)


@pytest.mark.dist
def test_two_and_three_ranks_equal_one(run_ranks, folder):
    (alone,) = run_ranks(1, score, folder)
    assert [record["status"] for record in alone] == ["success"] * 5 + ["skipped"] * 2
    assert alone[0]["result"]["left_out"][0]["video_name"] == "c.mkv"
    for world in (2, 3):
        assert run_ranks(world, score, folder) == [alone] * world
        names = {name.partition("_2")[0] for name in os.listdir(Path(folder) / f"out_{world}")}
        assert names == {*METRICS, "report.html", "summary.json"}  # each once, by rank 0


@pytest.mark.dist
def test_more_ranks_than_videos_is_no_error(run_ranks, folder):
    root = Path(folder) / "few"
    for name in ("generated", "reference"):
        write_clip(root / name / "a.mkv", noise(len(name)))
    records = run_ranks(3, score, str(root), ("psnr",))
    assert [one["status"] for (one,) in records] == ["success"] * 3
    assert records[0] == records[1] == records[2]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("error", "failed", "rank 1: ZeroDivisionError: by design"),
        ("missing", "skipped", "rank 1: no package here"),
    ],
)
def test_a_fault_on_one_rank_is_the_same_message_on_all_and_the_next_metric_goes_on(
    run_ranks, folder, fault, status, message
):
    records = run_ranks(3, score, folder, ("psnr", "ssim"), fault)
    assert records[0] == records[1] == records[2]
    first, second = records[0]
    assert (first["status"], first["message"], first["result"]) == (status, message, None)
    assert second["status"] == "success"


@pytest.mark.dist
def test_a_fault_of_rank_0_before_the_work_is_known_to_all(run_ranks, folder):
    records = run_ranks(2, score, str(Path(folder) / "nets"), ("psnr",))
    assert records[0] == records[1]
    assert records[0][0]["status"] == "failed"


def hear_all() -> list[str]:
    rank, size = dist.get_rank(), dist.get_world_size()
    place = Environment(rank=rank, world_size=size, master_addr="localhost", master_port=1)
    with open_channel(place) as channel:
        return channel.gather(f"rank {rank}")


@pytest.mark.dist
def test_a_channel_opens_without_a_mesh(run_ranks):
    assert run_ranks(2, hear_all) == [["rank 0", "rank 1"]] * 2
    with open_channel(Environment()) as channel:
        assert channel.gather("alone") == ["alone"]
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"), open_channel(Environment(world_size=2)):
        pass
