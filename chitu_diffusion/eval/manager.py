"""Evaluates finished videos: each metric on every rank's share of them, a record for each, then the files.

An evaluation never ends a run. What is missing makes a metric `skipped`, with the remedy; what goes wrong
makes it `failed`. All ranks return the same records. Source: mission.md 8."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from chitu_core import plugins
from chitu_core.config import EvalConfig
from chitu_core.distributed import RankChannel
from chitu_diffusion.eval._base import EvalOptions, Measured, MetricProtocol, Pair, Unavailable
from chitu_diffusion.eval._pairing import Video, find_videos, pair_up
from chitu_diffusion.eval._records import FAILED, SKIPPED, SUCCESS, EvalRecord
from chitu_diffusion.eval._report import Folders, Report, Subject
from chitu_diffusion.result import TaskResult

logger = logging.getLogger(__name__)

_PACKAGE = "chitu_diffusion.eval"


@dataclass(frozen=True)
class Team:
    """The ranks that evaluate together; every one of them must call `evaluate`."""

    channel: RankChannel
    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class _Share:
    """What one rank has to say of one metric: entries of its pairs, or why there are none."""

    status: str = SUCCESS
    message: str = ""
    measured: list[dict[str, Any]] = field(default_factory=list)


def metric_names() -> list[str]:
    """The metrics of this version, by file."""
    return [name for name in plugins.names(_PACKAGE) if name != "manager"]


def check_types(types: Sequence[str]) -> None:
    """Raise ValueError naming eval.eval_type for a metric that does not exist."""
    unknown = [name for name in types if name not in metric_names()]
    if unknown:
        raise ValueError(f"eval.eval_type={','.join(unknown)}: choose from {', '.join(metric_names())}")


def evaluate(
    source: Sequence[TaskResult] | Path, config: EvalConfig, device: str, folders: Folders, team: Team
) -> tuple[EvalRecord, ...]:
    """Compute every metric of `config` and write its files; the records, in order, the same on all ranks.

    `source` is what rank 0 finished, or a folder of videos; other ranks hear of it from rank 0. `device` is
    this rank's, as torch writes it. What goes wrong is in the records, or, if they cannot be written, logged.
    """
    subject = _agree_on_subject(source, config, team)
    options = EvalOptions(device, config.weights_dir, config.vbench_python)
    records, attachments = [], {}
    for name in config.eval_type:
        record, attachments[name] = _evaluate_one(name, subject, options, team)
        logger.log(logging.INFO if record.status == SUCCESS else logging.WARNING, "%s", record.line)
        records.append(record)
    if team.rank == 0 and records:
        try:
            Report(subject, records, attachments).write(folders)
        except Exception as error:  # neither may a full disk end the run
            logger.warning("the evaluation cannot be written: %s: %s", type(error).__name__, error)
    return tuple(records)


def _agree_on_subject(source: Sequence[TaskResult] | Path, config: EvalConfig, team: Team) -> Subject:
    """What rank 0 finds, or why it finds nothing, on every rank."""
    text = ""
    if team.rank == 0:
        try:
            subject = _look(source, config)
        except Exception as error:
            subject = Subject(failure=str(error))
        text = subject.encode()
    return Subject.decode(team.channel.agree(text))


def _look(source: Sequence[TaskResult] | Path, config: EvalConfig) -> Subject:
    """The videos and their references. Raises ValueError without a video."""
    videos = _videos_in(source) if isinstance(source, Path) else _videos_of(source)
    subject = Subject(
        generated=str(videos[0].path.parent.absolute()),
        reference=None if config.reference_path is None else str(Path(config.reference_path).absolute()),
        videos=tuple(Pair(video.path, prompt=video.prompt or "") for video in videos),
    )
    if config.reference_path is None:
        return replace(subject, problem="no reference videos; name their folder with eval.reference_path")
    folder = Path(config.reference_path)
    if not folder.is_dir():
        problem = f"eval.reference_path={folder} is not a directory; name a folder of reference videos"
        return replace(subject, problem=problem)
    pairs = pair_up(videos, find_videos(folder), config.pairing)
    paired = {pair.generated for pair in pairs}
    unmatched = tuple(video.path.name for video in videos if video.path not in paired)
    if config.pairing == "order":
        logger.warning("references are paired by the order of names, as eval.pairing=order asks for")
    if unmatched:
        logger.warning("without a reference in %s: %s", folder, ", ".join(unmatched))
    problem = ""
    if not pairs:
        problem = (
            f"no video has its reference in {folder}: equal file names, or equal prompt, seed and steps; "
            "see eval.pairing for other rules"
        )
    return replace(subject, pairs=tuple(pairs), unmatched=unmatched, problem=problem)


def _videos_of(results: Sequence[TaskResult]) -> list[Video]:
    """The videos of finished tasks; a file that is gone is left out, with a warning."""
    videos = []
    for result in results:
        path = Path(result.video_path)
        if path.is_file():
            videos.append(Video(path, result.prompt, result.seed, result.step))
        else:
            logger.warning("%s is gone and is not evaluated", path)
    folders = {video.path.parent for video in videos}
    if not videos:
        raise ValueError("there is no finished video to evaluate")
    if len(folders) > 1:
        remedy = "give all requests one save_dir, or evaluate each folder with `chitu eval`"
        raise ValueError(f"the videos lie in {len(folders)} folders; {remedy}")
    return videos


def _videos_in(folder: Path) -> list[Video]:
    videos = find_videos(folder)
    if not videos:
        raise ValueError(f"{folder} holds no video; name a folder of videos")
    return videos


def _evaluate_one(
    name: str, subject: Subject, options: EvalOptions, team: Team
) -> tuple[EvalRecord, dict[str, Any]]:
    """The record of one metric, and what to write beside it, on every rank."""
    metric, text = _measure(name, subject, options, team)
    shares = [_Share(**json.loads(heard)) for heard in team.channel.gather(text)]
    concluded = _conclude(name, metric, shares) if team.rank == 0 else ""
    record, attachments = json.loads(team.channel.agree(concluded))
    return EvalRecord(**record), attachments


def _measure(
    name: str, subject: Subject, options: EvalOptions, team: Team
) -> tuple[MetricProtocol | None, str]:
    """This rank's share as text; it raises nothing, so that no rank waits for another in vain."""
    metric = None
    try:
        if subject.failure:
            return None, _said(_Share(FAILED, subject.failure))
        if name not in metric_names():
            return None, _said(_Share(SKIPPED, f"unknown metric; choose from {', '.join(metric_names())}"))
        kind: type[Any] = plugins.load(_PACKAGE, name, "Metric", "eval.eval_type")
        if kind.needs_reference and subject.problem:
            return None, _said(_Share(SKIPPED, subject.problem))
        share = (subject.pairs if kind.needs_reference else subject.videos)[team.rank :: team.size]
        if not share:
            return None, _said(_Share())
        metric = kind(options)
        return metric, _said(_Share(measured=[asdict(one) for one in metric.measure(share)]))
    except Unavailable as missing:
        return metric, _said(_Share(SKIPPED, str(missing)))
    except Exception as error:  # any metric's failure becomes its record, here and in _conclude
        logger.warning("%s failed", name, exc_info=True)
        return metric, _said(_Share(FAILED, f"{type(error).__name__}: {error}"))


def _said(share: _Share) -> str:
    return json.dumps(asdict(share))


def _conclude(name: str, metric: MetricProtocol | None, shares: Sequence[_Share]) -> str:
    """The record and its attachments, as text that is valid JSON."""
    attachments: dict[str, Any] = {}
    try:
        record, attachments = _combine(name, metric, shares)
        json.dumps([asdict(record), attachments], allow_nan=False)
    except Unavailable as missing:
        record, attachments = EvalRecord(name, SKIPPED, str(missing)), {}
    except Exception as error:
        logger.warning("%s failed", name, exc_info=True)
        record, attachments = EvalRecord(name, FAILED, f"{type(error).__name__}: {error}"), {}
    return json.dumps([asdict(record), attachments])


def _combine(
    name: str, metric: MetricProtocol | None, shares: Sequence[_Share]
) -> tuple[EvalRecord, dict[str, Any]]:
    for status in (FAILED, SKIPPED):
        messages = {rank: share.message for rank, share in enumerate(shares) if share.status == status}
        if messages:
            return EvalRecord(name, status, _joined(messages, len(shares))), {}
    count = sum(len(share.measured) for share in shares)
    turns = (shares[place % len(shares)].measured[place // len(shares)] for place in range(count))
    measured = [Measured(**one) for one in turns]  # in the order of the pairs, as they were dealt out
    usable = [one for one in measured if one.value is not None]
    left_out = [one for one in measured if one.value is None]
    reasons = "; ".join(
        one.reason if one.name in one.reason else f"{one.name}: {one.reason}" for one in left_out
    )
    if not usable:
        status = FAILED if any(one.is_broken for one in left_out) else SKIPPED
        return EvalRecord(name, status, f"no video could be scored: {reasons}"), {}
    assert metric is not None
    outcome = metric.combine(usable)
    notes = [outcome.note] if outcome.note else []
    if left_out:
        notes.append(f"{len(left_out)} of {count} left out: {reasons}")
    left = [{"video_name": one.name, "message": one.reason} for one in left_out]
    result = {**outcome.result, "left_out": left}
    return EvalRecord(name, SUCCESS, "; ".join(notes), result), outcome.attachments


def _joined(messages: dict[int, str], ranks: int) -> str:
    """One message where all ranks say the same, else each with its rank."""
    if len(messages) == ranks and len(set(messages.values())) == 1:
        return messages[0]
    return "; ".join(f"rank {rank}: {message}" for rank, message in messages.items())
