"""Shards of `chitu bench flexcache`, made side by side on one GPU, joined to one report."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from chitu_diffusion.bench._cache_report import Clip, FlexCacheReport, Row, summarised
from chitu_diffusion.bench._setup import Machine

_ALIKE = ("model", "size", "dtype", "weights", "overrides", "steps", "guidance", "warmup", "cooldown")
_OF_SHARDS = (*_ALIKE, "prompts", "seeds", "judge", "missing")


def merge(folder: Path) -> FlexCacheReport:
    """The shards in a folder as one report; times are those of a `--time-only` run there, else of shard 0.

    Raises ValueError where shards are missing, or are not of one run.
    """
    shards = sorted(map(read, folder.glob("flexcache_*_shard*.json")), key=_place)
    if not shards:
        raise ValueError(
            f"--merge={folder}: holds no shard; run chitu bench flexcache --shard I/N --out there"
        )
    count = _count(shards[0])
    found = [(_place(one), _count(one)) for one in shards]
    if found != [(place, count) for place in range(count)]:
        there = ", ".join(f"{one.shard}" for one in shards)
        raise ValueError(f"--merge={folder}: needs each of {count} shards once, and holds {there}")
    for one in shards[1:]:
        _check_alike(folder, one, shards[0], _OF_SHARDS)
    whole = replace(shards[0], shard=None, timed=f"shard 0/{count}", rows=_joined(shards))
    for timed in map(read, folder.glob("flexcache_*_times.json")):
        _check_alike(folder, timed, whole, _ALIKE)
        times = {row.name: row.dit_s for row in timed.rows}
        absent = [row.name for row in whole.rows if row.name not in times]
        if absent:
            raise ValueError(f"--merge={folder}: the times lack {', '.join(absent)}; time the same rows")
        rows = tuple(replace(row, dit_s=times[row.name]) for row in whole.rows)
        whole = replace(whole, environment=timed.environment, timed=timed.timed, rows=rows)
    return summarised(whole)


def _joined(shards: Sequence[FlexCacheReport]) -> tuple[Row, ...]:
    rows = []
    for parts in zip(*(shard.rows for shard in shards), strict=True):
        clips = sorted(
            itertools.chain.from_iterable(part.clips for part in parts), key=lambda c: (c.prompt, c.seed)
        )
        reason = next((part.reason for part in parts if part.reason is not None), None)
        rows.append(replace(parts[0], clips=tuple(clips), reason=reason))
    return tuple(rows)


def _check_alike(folder: Path, one: FlexCacheReport, other: FlexCacheReport, keys: tuple[str, ...]) -> None:
    left, right = asdict(one), asdict(other)
    differing = [key for key in keys if left[key] != right[key]]
    if keys == _OF_SHARDS and [row.name for row in one.rows] != [row.name for row in other.rows]:
        differing.append("rows")
    if differing:
        raise ValueError(
            f"--merge={folder}: the runs differ in {', '.join(differing)}; keep one run a folder"
        )


def _place(report: FlexCacheReport) -> int:
    return int((report.shard or "0/1").partition("/")[0])


def _count(report: FlexCacheReport) -> int:
    return int((report.shard or "0/1").partition("/")[2])


def read(path: Path) -> FlexCacheReport:
    """A report from its JSON file. Raises ValueError for another file."""
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
        rows = tuple(map(_row, values.pop("rows")))
        machine = Machine(**values.pop("environment"))
        values = {key: tuple(each) if isinstance(each, list) else each for key, each in values.items()}
        return FlexCacheReport(environment=machine, rows=rows, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no report of chitu bench flexcache: {error}") from error


def _row(values: dict[str, Any]) -> Row:
    clips = tuple(Clip(**clip) for clip in values["clips"])
    return Row(values["strategy"], values["ratio"], tuple(values["dit_s"]), clips, values["reason"])
