"""Scores the videos of a run, or of a folder: what is behind `chitu_run_eval` and `chitu eval`.

Which metrics there are, and what they do, is in eval/."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from chitu_core import logging as chitu_logging
from chitu_core.config import PAIRINGS, EvalConfig
from chitu_core.distributed import open_channel
from chitu_core.environment import Environment
from chitu_diffusion.engine import Engine
from chitu_diffusion.eval._records import FAILED, SUCCESS, EvalRecord
from chitu_diffusion.eval._report import PAGE, Folders
from chitu_diffusion.eval.manager import Team, evaluate, metric_names
from chitu_diffusion.outputs import check_writable
from chitu_diffusion.survey import pick_device


def evaluate_run(engine: Engine, environment: Environment) -> tuple[EvalRecord, ...]:
    """Score what an engine has finished, as its `eval.*` keys say; every rank must call this, best when the
    engine is closed and the memory free. The records of all metrics, none if none is asked for."""
    config = engine.config.eval
    if not config.eval_type:
        return ()
    results = [task.result for task in engine.pool.pool.values() if task.result is not None]
    run_dir = engine.folder.path or environment.current_output_dir
    folders = Folders(copies=None if run_dir is None else run_dir / "eval")
    with open_channel(environment) as channel:
        team = Team(channel, environment.rank, environment.world_size)
        return evaluate(results, config, str(engine.device), folders, team)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `chitu eval`."""
    parser.add_argument("generated", type=Path, metavar="GENERATED", help="folder of videos, such as a run's")
    parser.add_argument("--reference", metavar="DIR", help="folder of the videos to compare with")
    parser.add_argument("--metrics", default="psnr,ssim", help=f"with commas: {', '.join(metric_names())}")
    parser.add_argument("--pairing", default="match", choices=PAIRINGS, help="how references are found")
    parser.add_argument("--weights-dir", metavar="DIR", help="networks of fid, frame_fid and fvd")
    parser.add_argument("--vbench-python", metavar="FILE", help="Python of an environment with vbench")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for all files; ./eval_out when left out")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"), help="cpu: never a GPU")
    parser.add_argument("--json", action="store_true", help="print the records")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Score a folder's videos. 0 if a metric succeeded and none failed, else 1."""
    config = EvalConfig(
        eval_type=options.metrics,
        reference_path=options.reference,
        pairing=options.pairing,
        weights_dir=options.weights_dir,
        vbench_python=options.vbench_python,
    )
    generated: Path = options.generated
    if not config.eval_type:
        raise ValueError(f"--metrics={options.metrics!r} names none; choose from {', '.join(metric_names())}")
    if not generated.is_dir():
        raise ValueError(f"GENERATED={generated} is not a directory; name a folder of videos")
    environment = Environment.read()
    chitu_logging.setup(environment)
    op_impl = "cpu" if options.device == "cpu" else "torch"
    device = pick_device(op_impl, environment.local_rank, environment.local_world_size)
    folders = _folders(generated, options.out)
    check_writable(folders.main, "--out")
    with open_channel(environment) as channel:
        team = Team(channel, environment.rank, environment.world_size)
        records = evaluate(generated, config, str(device), folders, team)
    if environment.rank == 0:
        _tell(records, folders.main / PAGE, as_json=options.json)
    statuses = [record.status for record in records]
    return 0 if SUCCESS in statuses and FAILED not in statuses else 1


def _folders(generated: Path, out: Path | None) -> Folders:
    """A run directory gets copies, unless all is to go to one place."""
    if out is not None:
        return Folders(out, out)
    is_run = (generated / "run_meta.json").is_file()
    return Folders(copies=generated / "eval" if is_run else None)


def _tell(records: tuple[EvalRecord, ...], page: Path, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps([asdict(record) for record in records], indent=2) + "\n")
        return
    sys.stdout.write("".join(record.line + "\n" for record in records))
    if page.is_file():
        sys.stdout.write(f"page: {page.absolute()}\n")
