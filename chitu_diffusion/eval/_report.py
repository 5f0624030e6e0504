"""Files of an evaluation: a JSON for each metric, summary.json, report.html; a run directory gets copies.

Source of folders and names: mission.md 2.6 and 8."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from chitu_core import __version__
from chitu_diffusion.eval._base import Pair
from chitu_diffusion.eval._page import page
from chitu_diffusion.eval._records import EvalRecord
from chitu_diffusion.media import unique_path, write_json, write_text

logger = logging.getLogger(__name__)

SUMMARY, PAGE = "summary.json", "report.html"


@dataclass(frozen=True)
class Folders:
    """Where files go: `vbench` those of that metric, `main` all else, `copies` everything once more."""

    main: Path = Path("eval_out")
    vbench: Path = Path("vbench_out")
    copies: Path | None = None


@dataclass(frozen=True)
class Subject:
    """What was evaluated: the videos, their pairs, and the names of those that have no reference."""

    generated: str = ""  # their folder
    reference: str | None = None
    videos: tuple[Pair, ...] = ()  # all of them, without reference
    pairs: tuple[Pair, ...] = ()
    unmatched: tuple[str, ...] = ()
    problem: str = ""  # why nothing can be compared
    failure: str = ""  # why there is no video

    def encode(self) -> str:
        """As text for other ranks."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def decode(cls, text: str) -> "Subject":
        """What another rank encoded."""
        values = json.loads(text)
        for name in ("videos", "pairs"):
            values[name] = tuple(_pair(one) for one in values[name])
        return cls(**{**values, "unmatched": tuple(values["unmatched"])})


def _pair(values: dict[str, Any]) -> Pair:
    reference = None if values["reference"] is None else Path(values["reference"])
    return Pair(**{**values, "generated": Path(values["generated"]), "reference": reference})


@dataclass(frozen=True)
class Report:
    """Everything that is written about one evaluation; `attachments` by metric, then by name."""

    subject: Subject
    records: Sequence[EvalRecord]
    attachments: dict[str, dict[str, Any]] = field(default_factory=dict)
    created_at: datetime = field(default_factory=datetime.now)

    def write(self, folders: Folders) -> list[Path]:
        """Write all files and return their paths. Raises OSError if a folder cannot be written into."""
        text = page("Evaluation", self._facts(), self.records, self.subject.pairs)
        written: list[Path] = []
        places = [(folders.main, folders.vbench)]
        if folders.copies is not None:
            places.append((folders.copies, folders.copies))
        for main, vbench in places:
            files = [main / SUMMARY, main / PAGE]
            for record in self.records:
                files += self._write_record(record, vbench if record.type == "vbench" else main)
            main.mkdir(parents=True, exist_ok=True)
            write_json(main / SUMMARY, self._summary(files))
            write_text(main / PAGE, text)
            written += files
            logger.info("evaluation written to %s", main)
        return written

    def _write_record(self, record: EvalRecord, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{_file_name(record.type)}_{self.created_at:%Y%m%d_%H%M%S}"
        contents = {"eval_results": record, **self.attachments.get(record.type, {})}
        paths = []
        for ending, content in contents.items():
            paths.append(unique_path(folder / f"{stem}_{ending}.json"))
            write_json(paths[-1], content)
        return paths

    def _facts(self) -> dict[str, str]:
        subject = self.subject
        facts = {
            "generated": subject.generated,
            "reference": subject.reference or "none",
            "videos": f"{len(subject.videos)}, of which {len(subject.pairs)} have a reference",
            "without reference": ", ".join(subject.unmatched),
            "made": self.created_at.isoformat(" ", "seconds"),
        }
        return {key: value for key, value in facts.items() if value}

    def _summary(self, files: Sequence[Path]) -> dict[str, Any]:
        subject = self.subject
        return {
            "created_at": self.created_at.isoformat(timespec="seconds"),
            "generated": subject.generated,
            "reference": subject.reference,
            "num_videos": len(subject.videos),
            "pairs": [
                {"generated": str(pair.generated), "reference": str(pair.reference), "by": pair.matched_by}
                for pair in subject.pairs
            ],
            "unmatched": subject.unmatched,
            "metrics": [
                {
                    "type": record.type,
                    "status": record.status,
                    "message": record.message,
                    "score": record.score,
                    "is_identical": (record.result or {}).get("is_identical", False),
                    "dimensions": (record.result or {}).get("dimensions"),
                }
                for record in self.records
            ],
            "files": [str(path.absolute()) for path in files],
            "versions": {"chitu-diffusion": __version__, "torch": torch.__version__},
        }


def _file_name(metric: str) -> str:
    """A metric's name as part of a file name; one that is unknown may hold anything."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in metric)[:64]
