"""Which reference belongs to which video: by file name, then prompt, seed and steps; by order only if asked.

Prompt, seed and steps come from the JSON beside a video, else from a name as outputs.py writes it. Each
reference is used once. Source: mission.md 8, without its pairing of unrelated videos."""

import json
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chitu_diffusion.eval._base import Pair
from chitu_diffusion.outputs import video_stem

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif")
_NAME = re.compile(r"(?P<slug>.+)_seed(?P<seed>\d+)_step(?P<steps>\d+)(?:_\d+)?", re.IGNORECASE)  # _2: taken


@dataclass(frozen=True)
class Video:
    """A file and what it shows; None where nothing tells."""

    path: Path
    prompt: str | None = None
    seed: int | None = None
    steps: int | None = None

    def identity(self, *, with_steps: bool = True) -> str | None:
        """Prompt, seed and steps as one name, equal for videos that should match; None if one is unknown."""
        if self.prompt is None or self.seed is None or (with_steps and self.steps is None):
            return None
        return video_stem(self.prompt, self.seed, self.steps if with_steps else None)


def find_videos(folder: Path) -> list[Video]:
    """The videos of a folder by name, hidden ones left out. Raises OSError where it cannot be listed."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    records = _side_cars(path for path in files if path.suffix.lower() == ".json")
    videos = []
    for path in files:
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            record = records.get(path.name, records.get(path.stem))
            videos.append(_from_name(path) if record is None else _from_record(path, record))
    return videos


def pair_up(generated: Sequence[Video], references: Sequence[Video], how: str) -> list[Pair]:
    """Pairs in the order of `generated`; `how` is match, ignore_steps or order (of names, in both)."""
    if how == "order":
        first, second = (
            sorted(videos, key=lambda video: video.path.name) for videos in (generated, references)
        )
        return [_pair(one, other, "order") for one, other in zip(first, second, strict=False)]
    rules: list[tuple[str, Callable[[Video], Hashable | None]]] = [
        ("file name", lambda video: video.path.name),
        ("prompt, seed and steps", lambda video: video.identity()),
    ]
    if how == "ignore_steps":
        rules.append(("prompt and seed", lambda video: video.identity(with_steps=False)))
    left, found = list(references), {}
    for matched_by, key_of in rules:
        for place, video in enumerate(generated):
            key = key_of(video)
            if place in found or key is None:
                continue
            match = next((other for other in left if key_of(other) == key), None)
            if match is not None:
                left.remove(match)
                found[place] = _pair(video, match, matched_by)
    return [found[place] for place in sorted(found)]


def _pair(generated: Video, reference: Video, matched_by: str) -> Pair:
    return Pair(generated.path, reference.path, matched_by, generated.prompt or "")


def _from_name(path: Path) -> Video:
    found = _NAME.fullmatch(path.stem)
    if found is None:
        return Video(path)
    return Video(path, found["slug"], int(found["seed"]), int(found["steps"]))


def _from_record(path: Path, record: dict[str, Any]) -> Video:
    """What the side-car says; what it leaves out, the name may say."""
    named = _from_name(path)
    prompt, seed, steps = record.get("prompt"), record.get("seed"), record.get("step")
    return Video(
        path,
        prompt if isinstance(prompt, str) else named.prompt,
        seed if isinstance(seed, int) else named.seed,
        steps if isinstance(steps, int) else named.steps,
    )


def _side_cars(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Records by the file name that they give, and by their own stem; other JSON is none of ours."""
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            record = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and {"prompt", "seed"} & record.keys():
            records.setdefault(path.stem, record)
            if isinstance(record.get("filename"), str):
                records[record["filename"]] = record
    return records
