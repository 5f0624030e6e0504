"""Strict, streaming weights: fill a meta-device module from safetensors shards or one .pth file.

Whatever headers can tell (missing, unexpected, misshaped, duplicated, unreadable) is an error before any
tensor is read, in the checkpoint's own spelling. Leaves out packing and quantisation, and knows no model.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

Rename = Callable[[str], str | None]  # checkpoint key -> module name; None: known and not needed
DtypeOf = Callable[[str], torch.dtype]  # module name -> dtype to keep it in

_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_PTH_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SHOWN = 5  # keys of one kind in a message; the rest is counted


@dataclass(frozen=True)
class TensorSource:
    """The files with one module's tensors: safetensors shards, with an index or without, or one .pth file."""

    files: tuple[Path, ...]
    index: Path | None = None


@dataclass(frozen=True)
class _Entry:
    file: Path
    key: str
    shape: tuple[int, ...]
    num_bytes: int


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
    return {entry.key: entry.shape for entry in _entries(source)}


def load(
    module: nn.Module,
    source: TensorSource,
    rename: Rename,
    *,
    device: torch.device,
    dtype_of: DtypeOf,
    label: str,
    spell: Callable[[str], str] = str,
    progress: bool = True,
) -> None:
    """Fill every parameter and persistent buffer of a module (made on the meta device) from a checkpoint.

    A tensor is cast to `dtype_of(module name)`, copied to `device` and released before the next one is read,
    so host memory above the model stays below one shard. `spell` turns a module name into the checkpoint's
    key, for messages about missing tensors. `progress` shows a bar on a terminal; False on ranks above 0.
    Raises ValueError naming file and key when the checkpoint does not fit the module exactly.
    """
    entries = _entries(source)
    plan = _match(module, source, entries, rename, spell)
    total = sum(entry.num_bytes for entry in entries if entry.key in plan)
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None if progress else True) as bar:
        for file in source.files:
            keys = {entry.key for entry in entries if entry.file == file and entry.key in plan}
            for key, tensor in _read(file, keys):
                name = plan[key]
                # NOTE copy=True: an alias would tie the parameter to the mapped file
                ours = tensor.to(
                    device=device, dtype=dtype_of(name), copy=True, memory_format=torch.contiguous_format
                )
                _place(module, name, ours)
                bar.update(tensor.nbytes)
    _assert_no_meta(module)


def randomise(module: nn.Module, *, device: torch.device, dtype_of: DtypeOf, seed: int) -> None:
    """Materialise a meta-device module with random weights, made on `device` in their final dtype.

    Matrices and kernels ~ N(0, 1 / fan_in), norm weights and gammas 1, modulation tables 0.02 N, the rest 0.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, target in module.state_dict(keep_vars=True).items():
        tensor = torch.empty(target.shape, device=device, dtype=dtype_of(name))
        owner, _, leaf = name.rpartition(".")
        if leaf == "gamma" or (leaf == "weight" and "norm" in owner.rpartition(".")[2]):
            tensor.fill_(1.0)
        elif leaf == "modulation":
            tensor.normal_(0.0, 0.02, generator=generator)
        elif leaf == "weight" and tensor.ndim >= 2:
            tensor.normal_(0.0, tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.zero_()
        _place(module, name, tensor)
    _assert_no_meta(module)


def _weight_map(index: Path) -> dict[str, str]:
    """Key -> shard's file name, as the index lists them."""
    try:
        listed = json.loads(index.read_text("utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error}); fetch it again") from error
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise ValueError(f"{index}: weight_map must map keys to file names; fetch it again")
    return listed


def _entries(source: TensorSource) -> list[_Entry]:
    """Every tensor of the source, from headers; raises ValueError for unreadable or inconsistent files."""
    listed = _weight_map(source.index) if source.index else {}
    for file in source.files:
        if not file.is_file():
            keys = [key for key, shard in listed.items() if shard == file.name]
            why = f"; {source.index} lists it for {_some(keys)}" if source.index else ""
            raise ValueError(f"{file} does not exist{why}; fetch the checkpoint again")
    entries: list[_Entry] = []
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
            f"{source.index} lists tensors that are not there: {_some(lacking)}; fetch the checkpoint again"
        )
    return entries


def _header(file: Path) -> list[_Entry]:
    """The tensors of one file; raises ValueError for what is not a whole file of floating point tensors."""
    if file.suffix == ".pth":
        state = _open_pth(file)
        rows = [(key, tuple(t.shape), _PTH_DTYPES.get(t.dtype, str(t.dtype))) for key, t in state.items()]
    else:
        with _open_safetensors(file) as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
            rows = [(key, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()]
    for key, _, dtype in rows:
        if dtype not in _BYTES:
            raise ValueError(
                f"{file}: tensor {key} is {dtype}; give a checkpoint in float32, float16 or bfloat16"
            )
    return [_Entry(file, key, shape, torch.Size(shape).numel() * _BYTES[dtype]) for key, shape, dtype in rows]


def _open_safetensors(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
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


def _match(
    module: nn.Module,
    source: TensorSource,
    entries: list[_Entry],
    rename: Rename,
    spell: Callable[[str], str],
) -> dict[str, str]:
    """Checkpoint key -> module name, one to one and onto; raises ValueError listing all that does not fit."""
    targets = module.state_dict(keep_vars=True)
    plan: dict[str, str] = {}
    taken: dict[str, str] = {}
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshaped": [], "duplicated": []}
    for entry in entries:
        name = rename(entry.key)
        if name is None:
            continue
        if name not in targets:
            problems["unexpected"].append(f"{entry.key} in {entry.file}")
        elif name in taken:
            problems["duplicated"].append(f"{entry.key} in {entry.file} means the same as {taken[name]}")
        elif entry.shape != tuple(targets[name].shape):
            wanted = list(targets[name].shape)
            problems["misshaped"].append(
                f"{entry.key} in {entry.file} is {list(entry.shape)}, the model has {wanted}"
            )
        taken.setdefault(name, entry.key)
        plan[entry.key] = name
    place = source.index or source.files[0]
    problems["missing"] = [f"{spell(name)} in {place}" for name in targets if name not in taken]
    found = [f"{kind}: {_some(items)}" for kind, items in problems.items() if items]
    if found:
        raise ValueError(
            f"the checkpoint does not fit the model; {'; '.join(found)}; give the checkpoint of this model"
        )
    return plan


def _read(file: Path, keys: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of one file as views of the mapped file, in the order in which they lie on disk."""
    if file.suffix == ".pth":
        state = _open_pth(file)
        for key in list(state):
            tensor = state.pop(key)
            if key in keys:
                yield key, tensor
        return
    with _open_safetensors(file) as handle:
        for key in handle.offset_keys():
            if key in keys:
                yield key, handle.get_tensor(key)


def _place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or of a buffer."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    is_parameter = leaf in dict(owner.named_parameters(recurse=False))
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _assert_no_meta(module: nn.Module) -> None:
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers that no checkpoint holds must not be made on the meta device: {left}"


def _some(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    texts = list(items)
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
