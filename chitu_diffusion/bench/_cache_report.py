"""The report of `chitu bench flexcache`: clips, rows, their means; as a table, JSON, CSV and the plot."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from chitu_diffusion.bench._scatter import Mark, scatter
from chitu_diffusion.bench._setup import Report, say

EXACT = "exact"
WHOLE = frozenset({"blocks", "velocity"})  # kinds of sites that stand for whole forwards


@dataclass(frozen=True)
class Clip:
    """One video: what was computed for it and how near it is to the exact one of the same seed."""

    prompt: int  # its place in the list
    seed: int
    computed: dict[str, int]  # by kind of site
    reused: dict[str, int]
    peak_gb: float  # kept by the cache, in 10^9 bytes
    scores: dict[str, float | None]  # None: infinite, for equal clips


@dataclass(frozen=True)
class Summary:
    """Means over the clips of a row."""

    clips: int
    dit_s: float | None  # None: not timed
    speed_up: float | None  # against the exact clips
    share: float  # of the sites `kinds` that were computed
    kinds: tuple[str, ...]
    forwards: float | None  # of the transformer, whole ones; None where parts of them were reused
    peak_gb: float  # the highest
    equal: int  # clips that are the exact ones, which have no PSNR
    scores: dict[str, float | None]


@dataclass(frozen=True)
class Row:
    """A strategy at a ratio, or `exact`."""

    strategy: str
    ratio: float | None
    dit_s: tuple[float, ...]  # of each clip whose time counts
    clips: tuple[Clip, ...]
    reason: str | None  # why there is nothing
    summary: Summary | None = None

    @property
    def name(self) -> str:
        """As tables and the plot have it."""
        return self.strategy if self.ratio is None else f"{self.strategy} {self.ratio:g}"


@dataclass(frozen=True, kw_only=True)
class FlexCacheReport(Report):
    """The JSON file."""

    attention: str
    steps: int
    guidance: tuple[float, ...]
    warmup: int
    cooldown: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    forwards: int  # of an exact clip
    judge: str | None
    missing: dict[str, str]  # metrics that could not be, and why
    shard: str | None  # I/N of a part
    time_only: bool  # no clip was compared
    timed: str  # where the times are from
    rows: tuple[Row, ...]


def summarised(report: FlexCacheReport) -> FlexCacheReport:
    """The report with the means of every row that has clips."""
    exact = next(row for row in report.rows if row.strategy == EXACT)
    exact_s = fmean(exact.dit_s) if exact.dit_s else None
    rows = (replace(row, summary=_summary(row, exact_s, report.forwards)) for row in report.rows)
    return replace(report, rows=tuple(rows))


def _summary(row: Row, exact_s: float | None, forwards: int) -> Summary | None:
    if not row.clips or row.reason is not None:
        return None
    computed, reused = (
        sum(sum(counts.values()) for counts in each)
        for each in ([clip.computed for clip in row.clips], [clip.reused for clip in row.clips])
    )
    kinds = {kind for clip in row.clips for kind in (*clip.computed, *clip.reused)}
    share = computed / (computed + reused) if computed + reused else 1.0
    dit_s = fmean(row.dit_s) if row.dit_s else None
    names = row.clips[0].scores
    return Summary(
        clips=len(row.clips),
        dit_s=dit_s,
        speed_up=None if dit_s is None or exact_s is None else exact_s / dit_s,
        share=share,
        kinds=tuple(sorted(kinds)),
        forwards=share * forwards if kinds <= WHOLE else None,
        peak_gb=max(clip.peak_gb for clip in row.clips),
        equal=sum("psnr" in clip.scores and clip.scores["psnr"] is None for clip in row.clips),
        scores={name: _mean(clip.scores[name] for clip in row.clips) for name in names},
    )


def _mean(values: Iterable[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return fmean(finite) if finite else None


def write(report: FlexCacheReport, out: Path) -> None:
    """The JSON file into `out`; of a whole report the CSV and the plot too. Says where they are."""
    stem = f"flexcache_{report.model}_{report.size}"
    texts = {".json": json.dumps(asdict(report), indent=2) + "\n"}
    if report.shard is not None:
        stem += "_shard{}of{}".format(*report.shard.split("/"))
    elif report.time_only:
        stem += "_times"
    else:
        texts |= {".csv": table(report), ".svg": plot(report)}
    say("")
    for suffix, text in texts.items():
        path = out / f"{stem}{suffix}"
        path.write_text(text, encoding="utf-8")
        say(str(path))


def table(report: FlexCacheReport) -> str:
    """A row a line, as CSV."""
    scores = score_names(report)
    fixed = ("clips", "dit_s", "speed_up", "forwards", "share", "kinds", "peak_gb", "equal")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["strategy", "ratio", *fixed, *scores, *report.missing, "reason"])
    for row in report.rows:
        values: dict[str, Any] = {} if row.summary is None else asdict(row.summary)
        found = [values.get(key) for key in fixed]
        if values:
            found[fixed.index("kinds")] = " ".join(values["kinds"])
            found += [values["scores"].get(name) for name in scores]
        else:
            found += [None] * len(scores)
        writer.writerow([row.strategy, row.ratio, *found, *report.missing.values(), row.reason])
    return file.getvalue()


def score_names(report: FlexCacheReport) -> list[str]:
    """The scores that clips have, those of the comparison first."""
    names = (name for row in report.rows for clip in row.clips for name in clip.scores)
    found = dict.fromkeys(names)
    return sorted(found, key=lambda name: (name not in ("psnr", "ssim", "lpips"), list(found).index(name)))


def plot(report: FlexCacheReport) -> str:
    """Speed-up against PSNR, a mark a row, as SVG."""
    marks = []
    for row in report.rows:
        found = row.summary
        psnr = None if found is None else found.scores.get("psnr")
        if found is not None and found.speed_up is not None and psnr is not None:
            marks.append(Mark(row.name, row.strategy, found.speed_up, psnr))
    where = report.environment
    clips = max((row.summary.clips for row in report.rows if row.summary), default=0)
    caption = (
        f"{where.device}, torch {where.torch}, {report.dtype}, {where.date[:10]}; means of {clips} clips"
    )
    title = f"{report.model} {report.size}, {report.steps} steps: against the same run without a cache"
    return scatter(marks, title, ("speed-up of denoising", "PSNR, dB"), caption)


def show(report: FlexCacheReport) -> None:
    """The table, on standard output."""
    scales = ", ".join(f"{scale:g}" for scale in report.guidance)
    what = f"{report.steps} steps, guidance {scales}, {report.dtype}, attention {report.attention}"
    say(f"\n{report.model} {report.size}, {what}, {report.weights} weights, {report.environment.device}")
    exact = f"{report.forwards} forwards without a cache"
    say(f"warm-up {report.warmup}, cool-down {report.cooldown}; {exact}; times of {report.timed}")
    names = score_names(report)
    columns = "".join(f"{name:>{_width(name)}}" for name in names)
    say(
        f"{'':<16}{'clips':>6}{'DiT s':>9}{'speed-up':>10}{'forwards':>10}{'share':>7}{'kept GB':>9}{columns}"
    )
    for row in report.rows:
        say(f"{row.name:<16}{_figures(row, names)}")
    for name, why in report.missing.items():
        say(f"no {name}: {why}")
    if any(row.summary and row.summary.equal for row in report.rows):
        say("a clip that equals the exact one counts for no PSNR")
    if report.time_only:
        say("no clip was compared")
    elif report.weights == "random":
        say("weights are random: scores say nothing of the model")


def _figures(row: Row, names: Sequence[str]) -> str:
    found = row.summary
    if found is None:
        return f"  {row.reason or 'no clip'}"
    columns = (
        f"{found.clips:>6}",
        _number(found.dit_s, 9, 2),
        _number(found.speed_up, 10, 2),
        _number(found.forwards, 10, 1),
        f"{found.share:>7.0%}",
        _number(found.peak_gb, 9, 4),
        *(_number(found.scores.get(name), _width(name), 2 if name == "psnr" else 3) for name in names),
    )
    return "".join(columns)


def _width(name: str) -> int:
    return max(len(name) + 2, 8)


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'' if value is None else f'{value:.{digits}f}':>{width}}"
