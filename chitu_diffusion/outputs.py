"""Where a run's files go and what they are called: run directory, video names, side files, Hydra's dump.

Only rules about folders and names; how a file is written is in media.py. Source: reference/mission.md 2.6."""

import re
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from chitu_diffusion.media import RECORD_SUFFIX, write_json, write_text

NAME_BYTES = 255  # the longest file name of common file systems, in UTF-8
RESERVED_BYTES = 16  # left free in a stem, for "_12" and the extension
HYDRA_MODES = {
    "video_dir": "video_dir",
    "same_as_video": "video_dir",
    "relocate": "video_dir",
    "off": "off",
    "disable": "off",
    "none": "off",
    "default": "default",
}


@dataclass(frozen=True)
class RequestRecord:
    """One entry of request_params.json; `params` is a dataclass of what the user asked for."""

    request_id: str
    params: object


@dataclass(frozen=True)
class _RequestFile:
    requests: tuple[RequestRecord, ...]


@dataclass(frozen=True)
class _MetaFile:
    model_name: str
    created_at: str
    num_requests: int
    output_dir: str


def run_directory(root: Path, tag: str, prompt: str, model_name: str, now: datetime) -> Path:
    """Create and return `<root>/[<tag>_]<prompt>_<YYYYmmdd_HHMMSS>_<model>`, with _2, _3, ... if it exists.
    Raises OSError if it cannot be created; `check_writable` says so earlier and better."""
    parts = [
        _ascii_slug(tag, 32),
        _ascii_slug(prompt, 32) or "prompt",
        f"{now:%Y%m%d_%H%M%S}",
        _ascii_slug(model_name, 64) or "model",
    ]
    name = "_".join(part for part in parts if part)
    root.mkdir(parents=True, exist_ok=True)
    directory, count = root / name, 1
    while not _create(directory):  # creating, not looking, decides: two jobs may start in the same second
        count += 1
        directory = root / f"{name}_{count}"
    return directory


def video_stem(prompt: str, seed: int | None, steps: int | None) -> str:
    """Name of a video without its extension: `<prompt>_seed<seed|none>_step<steps|none>`; Unicode is kept,
    and the name is safe: no separator, control character or leading dot, at most 255 bytes with extension."""
    ending = f"_seed{'none' if seed is None else seed}_step{'none' if steps is None else steps}"
    return _unicode_slug(prompt, NAME_BYTES - RESERVED_BYTES - len(ending)) + ending


def write_run_files(
    run_dir: Path,
    requests: Sequence[RequestRecord],
    *,
    model_name: str,
    created_at: datetime,
    config_yaml: str,
) -> None:
    """Write request_params.json, run_meta.json and run_config.yaml (the resolved configuration, as text)."""
    write_json(run_dir / "request_params.json", _RequestFile(tuple(requests)))
    created = created_at.isoformat(timespec="seconds")
    meta = _MetaFile(model_name, created, len(requests), str(run_dir.absolute()))
    write_json(run_dir / "run_meta.json", meta)
    write_text(run_dir / "run_config.yaml", config_yaml)


def relocate_hydra(mode: str, hydra_output_dir: Path | None, run_dir: Path) -> None:
    """Apply output.hydra_dump_mode to Hydra's `.hydra` folder: `video_dir` moves it into the run directory
    and removes the folder it leaves if that is empty and not the current one, `off` deletes it, `default`
    leaves all untouched. Without a Hydra output directory there is nothing to do. Raises ValueError for an
    unknown mode."""
    action = HYDRA_MODES.get(mode.strip().lower())
    if action is None:
        raise ValueError(f"output.hydra_dump_mode must be one of {', '.join(HYDRA_MODES)}, got {mode!r}")
    if action == "default" or hydra_output_dir is None:
        return
    source, target = hydra_output_dir / ".hydra", run_dir / ".hydra"
    if not source.is_dir():
        return
    if action == "video_dir":
        if source.resolve() == target.resolve():
            return
        shutil.copytree(source, target, dirs_exist_ok=True)
    shutil.rmtree(source)
    if action == "video_dir":
        _remove_if_empty(hydra_output_dir)


def drop_hydra(mode: str, hydra_output_dir: Path) -> None:
    """Remove the `.hydra` that a rank above 0 got from Hydra, and the folder if that leaves it empty, unless
    the mode is `default`; several ranks may share one."""
    if HYDRA_MODES.get(mode.strip().lower()) == "default":
        return
    shutil.rmtree(hydra_output_dir / ".hydra", ignore_errors=True)
    _remove_if_empty(hydra_output_dir)


def check_writable(path: Path, key: str) -> None:
    """Create the directory `path` and try a file in it. `key` is the setting that names it: `save_dir`,
    `output.root_dir`, or `save_path`, which names a file: its folder is meant, and the names of video and
    record are looked at. Raises ValueError."""
    directory = path.parent if key == "save_path" else path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(
            f"{key}: cannot write into {directory} ({error.strerror}); name another one"
        ) from error
    if key == "save_path":
        for file in (path, path.with_suffix(RECORD_SUFFIX)):
            _check_file(file)


def _check_file(file: Path) -> None:
    """Ask the file system whether a file may have this name. Raises ValueError."""
    try:
        is_directory = stat.S_ISDIR(file.stat().st_mode)
    except FileNotFoundError:
        return
    except OSError as error:  # such as a name that is too long
        raise ValueError(
            f"save_path: cannot write {file} ({error.strerror}); name another video file"
        ) from error
    if is_directory:
        raise ValueError(f"save_path: {file} is a directory; name another video file, or use save_dir")


def _create(directory: Path) -> bool:
    try:
        directory.mkdir()
    except FileExistsError:
        return False
    return True


def _remove_if_empty(directory: Path) -> None:
    """Remove a directory, but not the one that the process is in."""
    with suppress(OSError):  # not empty, or gone
        if not directory.samefile(Path()):
            directory.rmdir()


def _ascii_slug(text: str, limit: int) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", text).lower().strip("_")[:limit].rstrip("_")


def _unicode_slug(text: str, limit_bytes: int) -> str:
    """Lower-case, at most 64 characters; what a shell, a path or a terminal would misread becomes `_`."""
    marked = "".join("_" if _is_unsafe(character) else character for character in text.lower())
    slug = re.sub("_+", "_", marked).lstrip("._")[:64]
    cut = slug.encode()[:limit_bytes].decode(errors="ignore")  # a character cut in half is dropped
    return cut.rstrip("_") or "prompt"


def _is_unsafe(character: str) -> bool:  # Cc control, Cf invisible (text direction), Cs half of a broken pair
    is_invisible = unicodedata.category(character) in ("Cc", "Cf", "Cs")
    return is_invisible or character.isspace() or character in '\\/:*?"<>|'
