"""Files of weights: which belong to a module, what their headers say, and how their bytes are read.

Safetensors are read by byte ranges, .pth through torch's map of the file. Leaves out where tensors go.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

Bytes = NDArray[np.uint8]
Read = Callable[[int, Bytes], None]  # fill an array with a tensor's bytes from this one on

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 5  # keys of one kind in a message; the rest is counted


@dataclass(frozen=True)
class TensorSource:
    """The files with one module's tensors: safetensors shards, with an index or without, or one .pth file."""

    files: tuple[Path, ...]
    index: Path | None = None


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as the header describes it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # of its first byte in a safetensors file; in a .pth file the tensor's number

    @property
    def num_bytes(self) -> int:
        """Length of the tensor as it is stored."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor of a file that is open for reading, from several threads at once."""

    entry: Entry
    read: Read


def find(folder: Path, stem: str) -> TensorSource:
    """The safetensors files `<stem>*` of a folder: those that the index lists; without an index, all.

    Raises ValueError for a folder without such a file and for an unreadable index.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_weight_map(index).values()))
        return TensorSource(tuple(folder / shard for shard in shards), index)
    files = tuple(sorted(folder.glob(f"{stem}*.safetensors")))
    if not files:
        raise ValueError(f"{folder} holds no {stem}*.safetensors; fetch the checkpoint again")
    return TensorSource(files)


def shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """Checkpoint key -> shape, from headers alone; raises ValueError for files that cannot be read."""
    return {entry.key: entry.shape for entry in entries_of(source)}


def entries_of(source: TensorSource) -> list[Entry]:
    """Every tensor of the source, from headers; raises ValueError for unreadable or inconsistent files."""
    listed = _weight_map(source.index) if source.index else {}
    for file in source.files:
        if not file.is_file():
            keys = [key for key, shard in listed.items() if shard == file.name]
            why = f"; {source.index} lists it for {some(keys)}" if source.index else ""
            raise ValueError(f"{file} does not exist{why}; fetch the checkpoint again")
    entries: list[Entry] = []
    seen: dict[str, Path] = {}
    for file in source.files:
        for entry in _header(file):
            if entry.key in seen:
                twice = f"tensor {entry.key} is both in {seen[entry.key]} and in {file}"
                raise ValueError(f"{twice}; keep one set of shards in the folder")
            seen[entry.key] = file
            entries.append(entry)
    lacking = [
        f"{key} in {shard}" for key, shard in listed.items() if key not in seen or seen[key].name != shard
    ]
    if lacking:
        raise ValueError(
            f"{source.index} lists tensors that are not there: {some(lacking)}; fetch the checkpoint again"
        )
    return entries


@contextmanager
def open_stored(entries: Iterable[Entry]) -> Iterator[list[Stored]]:
    """Hold the files of some tensors open, in the order in which tensors lie on disk.

    Raises ValueError for a file that cannot be opened; reading raises it for one that ends too early.
    """
    in_order = sorted(entries, key=lambda entry: (entry.file, entry.offset))
    with ExitStack() as stack:
        stored: list[Stored] = []
        for file, group in groupby(in_order, key=lambda entry: entry.file):
            if file.suffix == ".pth":
                state = _open_pth(file)
                stored += [Stored(entry, partial(_read_map, _bytes_of(state[entry.key]))) for entry in group]
            else:
                try:
                    handle = stack.enter_context(file.open("rb", buffering=0))
                except OSError as error:
                    raise ValueError(f"{file} cannot be opened ({error}); fetch it again") from error
                read = partial(_read_range, file, handle.fileno())
                stored += [Stored(entry, partial(read, entry.offset)) for entry in group]
        yield stored


def some(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    texts = list(items)
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _read_range(file: Path, descriptor: int, offset: int, begin: int, out: Bytes) -> None:
    """Read a file's bytes from offset + begin on; the threads that do so at once share one descriptor."""
    done = 0
    while done < out.nbytes:
        try:
            count = os.preadv(descriptor, [out[done:].data], offset + begin + done)
        except OSError as error:
            raise ValueError(
                f"{file} cannot be read ({error}); look at the disk, or fetch it again"
            ) from error
        if count == 0:
            end = offset + begin + done
            raise ValueError(f"{file} is not a whole safetensors file (ends at byte {end}); fetch it again")
        done += count


def _read_map(stored: Bytes, begin: int, out: Bytes) -> None:
    # NOTE numpy copies in the calling thread and without the GIL; torch would start threads for each reader
    np.copyto(out, stored[begin : begin + out.nbytes])


def _bytes_of(tensor: Tensor) -> Bytes:
    flat: Bytes = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return flat


def _weight_map(index: Path) -> dict[str, str]:
    """Key -> shard's file name, as the index lists them."""
    try:
        listed = json.loads(index.read_text("utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error}); fetch it again") from error
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise ValueError(f"{index}: weight_map must map keys to file names; fetch it again")
    return listed


def _header(file: Path) -> list[Entry]:
    """The tensors of one file; raises ValueError for what is not a whole file of floating point tensors."""
    rows: list[tuple[str, tuple[int, ...], torch.dtype | str, int]]
    if file.suffix == ".pth":
        state = _open_pth(file).items()
        rows = [(key, tuple(t.shape), t.dtype, number) for number, (key, t) in enumerate(state)]
    else:
        start, header = _safetensors_header(file)
        rows = [
            (
                key,
                tuple(said["shape"]),
                _DTYPES.get(said["dtype"], said["dtype"]),
                start + said["data_offsets"][0],
            )
            for key, said in header.items()
            if key != "__metadata__"
        ]
    entries = []
    for key, shape, dtype, offset in rows:
        if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES.values():
            raise ValueError(
                f"{file}: tensor {key} is {dtype}; give a checkpoint in float32, float16 or bfloat16"
            )
        entries.append(Entry(file, key, shape, dtype, offset))
    return entries


def _safetensors_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what the header says of each; safetensors checks that it is sound."""
    try:
        with safe_open(file, framework="pt", device="cpu"), file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            return 8 + length, json.loads(handle.read(length))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error


def _open_pth(file: Path) -> dict[str, Tensor]:
    """A mapped state dict; weights_only admits tensors and containers, so that no code of the file runs."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # NOTE torch's own text recommends weights_only=False, which would run the file's code
        raise ValueError(
            f"{file} holds more than tensors and was not opened; get it from its source"
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"{file} is not a whole file of torch.save's zip format ({why}); fetch it again"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds a {type(state).__name__}, not a dict of tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{file}: entry {key!r} is a {type(value).__name__}; expected names and tensors only"
            )
    return state
