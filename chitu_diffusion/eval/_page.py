"""The page of an evaluation: one HTML file with the numbers, frames side by side, and their difference.

Pictures are PNGs inside the page, so that the file can be sent. No script, nothing fetched."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

import imageio.v3 as iio
import numpy as np

from chitu_diffusion.eval._base import Pair, UnfitPair, UnreadableVideo
from chitu_diffusion.eval._frames import Frames, read_pair
from chitu_diffusion.eval._records import EvalRecord, number

_MOST_PAIRS = 12  # with pictures; more would make the file too large to open
_WIDTH = 400  # px; larger frames are shown by every second, third, ... pixel
_GAIN = 4  # of differences, so that small ones are seen
_STYLE = """
:root { color-scheme: light dark; --line: #c8ccd2; --quiet: #5b6470; --good: #1a7f37; --bad: #b42318; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444b55; --quiet: #a3adba; --good: #56d364; --bad: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem 1rem .35rem 0; text-align: left; }
th, td { vertical-align: top; }
tbody th { font-weight: 500; } .message { min-width: 18rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.success, .skipped, .failed { white-space: nowrap; }
.success { color: var(--good); } .skipped { color: var(--quiet); } .failed { color: var(--bad); }
.note { color: var(--quiet); margin: .25rem 0; overflow-wrap: anywhere; }
.frames { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .75rem; max-width: 62rem; }
figure { margin: 0; } figcaption { color: var(--quiet); font-size: .85rem; }
img { display: block; width: 100%; height: auto; image-rendering: pixelated; border: 1px solid var(--line); }
"""


def page(title: str, facts: dict[str, str], records: Sequence[EvalRecord], pairs: Sequence[Pair]) -> str:
    """The page as text; `facts` head it. A pair that cannot be shown is named with the reason."""
    shown = _worst_first(records, pairs)[:_MOST_PAIRS]
    parts = [f"<h1>{_text(title)}</h1>", _facts(facts), "<h2>Scores</h2>", _scores(records)]
    videos = _per_video(records)
    if videos:
        parts += ["<h2>Each video</h2>", videos]
    if shown:
        parts += ["<h2>Frames</h2>", _introduction(len(shown), len(pairs))]
        parts += [_pictures(pair) for pair in shown]
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n<title>{_text(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    """Escaped, and without what UTF-8 cannot hold."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


def _facts(facts: dict[str, str]) -> str:
    rows = "\n".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in facts.items())
    return f"<dl>\n{rows}\n</dl>"


def _table(head: Sequence[str], rows: Iterable[str], numbers: Sequence[int]) -> str:
    cells = "".join(
        f'<th scope="col"{_number(place in numbers)}>{_text(name)}</th>' for place, name in enumerate(head)
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    table = f"<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="wide"><table>\n{table}\n</table></div>'


def _number(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _scores(records: Sequence[EvalRecord]) -> str:
    rows = []
    for record in records:
        result = record.result or {}
        better = {True: "higher", False: "lower"}.get(result.get("higher_is_better", ""), "")
        rows.append(
            f'<th scope="row">{_text(record.type)}</th>'
            f'<td class="{_text(record.status)}">{_text(record.status)}</td>'
            f'<td class="number">{_headline(record)}</td><td>{better}</td>'
            f'<td class="message">{_text(record.message)}</td>'
        )
    return _table(["metric", "status", "score", "better", "note"], rows, [2])


def _headline(record: EvalRecord) -> str:
    """The score, or a line for each of several."""
    return _text(record.headline).replace(", ", "<br>")


def _per_video(records: Sequence[EvalRecord]) -> str:
    """A row a video, a column a metric that scores frames."""
    columns = {record.type: _scores_by_name(record) for record in records}
    columns = {name: scores for name, scores in columns.items() if scores}
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    rows = []
    for name in names:
        cells = "".join(
            f'<td class="number">{_text(_score(scores.get(name)))}</td>' for scores in columns.values()
        )
        rows.append(f'<th scope="row">{_text(name)}</th>{cells}')
    return _table(["video", *columns], rows, range(1, len(columns) + 1)) if rows else ""


def _scores_by_name(record: EvalRecord) -> dict[str, dict[str, Any]]:
    per_video = (record.result or {}).get("per_video", [])
    return {video["video_name"]: video for video in per_video if "score" in video}


def _score(video: dict[str, Any] | None) -> str:
    if video is None:
        return "-"
    return "identical" if video["score"] is None else number(video["score"])


def _worst_first(records: Sequence[EvalRecord], pairs: Sequence[Pair]) -> list[Pair]:
    """By PSNR where it was measured, else as they came."""
    scores = next((_scores_by_name(record) for record in records if record.type == "psnr"), {})
    values = {name: video["score"] for name, video in scores.items() if video["score"] is not None}
    return sorted(pairs, key=lambda pair: values.get(pair.generated.name, float("inf")))


def _introduction(shown: int, total: int) -> str:
    which = "all" if shown == total else f"{shown} of {total}, those of lowest PSNR where it was measured"
    gain = f"Differences are absolute, amplified {_GAIN} times."
    return f'<p class="note">First, middle and last compared frame; videos: {which}. {gain}</p>'


def _pictures(pair: Pair) -> str:
    """Rows of generated, reference, difference."""
    assert pair.reference is not None
    title = f"<h3>{_text(pair.generated.name)}</h3>"
    about = f"reference: {pair.reference.name}, found by {pair.matched_by}"
    try:
        frames = read_pair(pair, same_size=True)
    except (UnfitPair, UnreadableVideo) as error:
        return f'<section>{title}<p class="note">{_text(about)}. Not shown: {_text(error)}</p></section>'
    about += f"; {frames.note}" if frames.note else ""
    places = sorted({0, len(frames.generated) // 2, len(frames.generated) - 1})
    figures = []
    for place in places:
        ours, theirs = frames.generated[place], frames.reference[place]
        difference = np.abs(ours.astype(np.int16) - theirs) * _GAIN
        pictures = {"generated": ours, "reference": theirs, "difference": difference.clip(0, 255)}
        for name, picture in pictures.items():
            caption = f"{name}, {place + 1} of {len(frames.generated)}"
            figures.append(_figure(picture.astype(np.uint8), caption))
    rows = '<div class="frames">\n' + "\n".join(figures) + "\n</div>"
    return f'<section>{title}<p class="note">{_text(about)}</p>\n{rows}</section>'


def _figure(picture: Frames, caption: str) -> str:
    """A picture [H, W, 3] inside the page."""
    every = -(-picture.shape[1] // _WIDTH)
    small = np.ascontiguousarray(picture[::every, ::every])
    data = base64.b64encode(iio.imwrite("<bytes>", small, extension=".png")).decode("ascii")
    height, width = small.shape[:2]
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}" width="{width}" height="{height}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
