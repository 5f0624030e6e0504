"""Strict, streaming weights: fill a meta-device module from safetensors shards or one .pth file.

Whatever headers can tell (missing, unexpected, misshaped, duplicated, unreadable) is an error before any
tensor is read, in the checkpoint's own spelling. A parameter may be several of the checkpoint's tensors, one
after another. Leaves out what a quantised layer makes of its tensor, and knows no model.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from chitu_core._staging import STAGING, Piece, Staging, carry, ring
from chitu_core._weight_files import Entry, TensorSource, entries_of, find, open_stored, shapes, some

__all__ = [
    "Home",
    "OnDevice",
    "Receiver",
    "Staging",
    "TensorSource",
    "find",
    "load",
    "pack",
    "randomise",
    "shapes",
    "whole",
]

logger = logging.getLogger(__name__)

Rename = Callable[[str], str | None]  # checkpoint key -> official name; None: known and not needed
DtypeOf = Callable[[str], torch.dtype]  # module name -> dtype to keep it in
PartsOf = Callable[[str], tuple[str, ...]]  # module name -> official names of the tensors that make it up


class Receiver(ABC):
    """A module that takes whole tensors itself, as one does that keeps them in another form.

    For matching, its `state_dict` lists what the checkpoint has, on the meta device. What it makes of them is
    in non-persistent buffers, or in parameters of a dtype that it declares.
    """

    @abstractmethod
    def receive(self, leaf: str, tensor: Tensor) -> None:
        """Take the tensor that `state_dict` lists as `leaf`, on the device and in the dtype of `load`."""


class Home(Protocol):
    """Where the tensors of a module are kept."""

    def allocate(self, name: str) -> Tensor | None:
        """What the tensor of this name can be read into; None: it is made on the device, then kept."""

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """What takes this name in the module: the tensor itself if it is in place, else a copy of it."""


class OnDevice:
    """Every tensor stays where it was made."""

    def allocate(self, name: str) -> None:
        """Nowhere in particular."""

    def keep(self, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG002
        """The tensor itself."""
        return tensor


ON_DEVICE = OnDevice()


@dataclass(frozen=True)
class _Slot:
    """Where a checkpoint's tensor goes: rows of a parameter, the `part`-th of `parts` equal runs."""

    name: str
    part: int
    parts: int
    shape: tuple[int, ...]  # of this part


def whole(name: str) -> tuple[str, ...]:
    """The parts of a parameter that is one tensor of the same name."""
    return (name,)


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
    parts_of: PartsOf = whole,
    home: Home = ON_DEVICE,
    staging: Staging = STAGING,
) -> None:
    """Fill every parameter and persistent buffer of a module (made on the meta device) from a checkpoint.

    `rename` turns a checkpoint's key into an official name, and `spell` back, for messages. `parts_of` gives,
    for a parameter of the module, the official tensors of equal shape whose rows (dim 0) make it up.
    Tensors travel as they are stored, in pieces, and are cast to `dtype_of(module name)` where they arrive:
    on `device`, or where `home` has them. Above the model, the host holds the buffers of `staging`.
    `progress` shows a bar on a terminal; False on ranks above 0.
    Raises ValueError naming file and key when the checkpoint does not fit the module exactly.
    """
    begin = time.perf_counter()
    entries = entries_of(source)
    plan = _match(module, source, entries, rename, spell, parts_of)
    wanted = [entry for entry in entries if entry.key in plan]
    total = sum(entry.num_bytes for entry in wanted)
    filling = _Filling(module, plan, device, dtype_of, home)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None if progress else True)
    with bar, open_stored(wanted) as tensors:

        def deliver(piece: Piece, staged: Tensor) -> None:
            filling.add(piece, staged)
            bar.update(piece.num_bytes)

        carry(tensors, ring(staging, total, device), staging, deliver)
    _assert_no_meta(module)
    seconds = time.perf_counter() - begin
    logger.info("%s: %.3g GB in %.3g s (%.3g GB/s)", label, total / 1e9, seconds, total / 1e9 / seconds)


def randomise(
    module: nn.Module, *, device: torch.device, dtype_of: DtypeOf, seed: int, home: Home = ON_DEVICE
) -> None:
    """Materialise a meta-device module with random weights, made on `device` in their final dtype for `home`.

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
        _place(module, name, tensor, home)
    _assert_no_meta(module)


def pack(state: Mapping[str, Tensor], names: Iterable[str], parts_of: PartsOf) -> dict[str, Tensor]:
    """The tensors of a module, by its own names, from an official state dict; KeyError for a missing part.

    A parameter of one part is that tensor itself, without a copy.
    """
    packed: dict[str, Tensor] = {}
    for name in names:
        parts = [state[part] for part in parts_of(name)]
        packed[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return packed


class _Filling:
    """The parameters of a module while their pieces come in; each is placed when it is complete."""

    def __init__(
        self,
        module: nn.Module,
        plan: Mapping[str, _Slot],
        device: torch.device,
        dtype_of: DtypeOf,
        home: Home,
    ) -> None:
        self._module = module
        self._plan = plan
        self._device = device
        self._dtype_of = dtype_of
        self._home = home
        self._open: dict[str, Tensor] = {}
        self._num_missing: dict[str, int] = {}  # parts of an open parameter that are not complete

    def add(self, piece: Piece, staged: Tensor) -> None:
        """Copy the bytes of a piece to where they belong; on a GPU this only queues the copy."""
        entry = piece.stored.entry
        slot = self._plan[entry.key]
        if slot.name not in self._open:
            self._open[slot.name] = self._allocate(slot)
            self._num_missing[slot.name] = slot.parts
        target = self._open[slot.name]
        begin = (slot.part * entry.num_bytes + piece.begin) // entry.dtype.itemsize
        elements = staged.view(entry.dtype)
        if entry.dtype != target.dtype:  # cast where it arrives: the host is the slower one
            elements = elements.to(target.device, non_blocking=True)
        target.view(-1)[begin : begin + elements.numel()].copy_(elements, non_blocking=True)
        if piece.is_last:
            self._num_missing[slot.name] -= 1
            if self._num_missing[slot.name] == 0:
                _place(self._module, slot.name, self._open.pop(slot.name), self._home)

    def _allocate(self, slot: _Slot) -> Tensor:
        owner = self._module.get_submodule(slot.name.rpartition(".")[0])
        given = None if isinstance(owner, Receiver) else self._home.allocate(slot.name)
        if given is not None:
            return given
        shape = slot.shape if slot.parts == 1 else (slot.shape[0] * slot.parts, *slot.shape[1:])
        return torch.empty(shape, device=self._device, dtype=self._dtype_of(slot.name))


def _slots(module: nn.Module, parts_of: PartsOf) -> dict[str, _Slot]:
    """Official name -> where its tensor goes, for every parameter and persistent buffer."""
    slots: dict[str, _Slot] = {}
    for name, target in module.state_dict(keep_vars=True).items():
        parts, shape = parts_of(name), tuple(target.shape)
        if len(parts) > 1:
            is_divisible = bool(shape) and shape[0] % len(parts) == 0
            assert is_divisible, f"{name} {list(shape)} is not made of {len(parts)} equal parts"
            shape = (shape[0] // len(parts), *shape[1:])
        for number, part in enumerate(parts):
            assert part not in slots, f"{part} is a part of both {slots[part].name} and {name}"
            slots[part] = _Slot(name, number, len(parts), shape)
    return slots


def _match(
    module: nn.Module,
    source: TensorSource,
    entries: list[Entry],
    rename: Rename,
    spell: Callable[[str], str],
    parts_of: PartsOf,
) -> dict[str, _Slot]:
    """Checkpoint key -> its slot, one to one and onto; raises ValueError listing all that does not fit."""
    slots = _slots(module, parts_of)
    plan: dict[str, _Slot] = {}
    taken: dict[str, str] = {}
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshaped": [], "duplicated": []}
    for entry in entries:
        name = rename(entry.key)
        if name is None:
            continue
        if name not in slots:
            problems["unexpected"].append(f"{entry.key} in {entry.file}")
            continue
        if name in taken:
            problems["duplicated"].append(f"{entry.key} in {entry.file} means the same as {taken[name]}")
        elif entry.shape != slots[name].shape:
            wanted = list(slots[name].shape)
            problems["misshaped"].append(
                f"{entry.key} in {entry.file} is {list(entry.shape)}, the model has {wanted}"
            )
        taken.setdefault(name, entry.key)
        plan[entry.key] = slots[name]
    place = source.index or source.files[0]
    problems["missing"] = [f"{spell(name)} in {place}" for name in slots if name not in taken]
    found = [f"{kind}: {some(items)}" for kind, items in problems.items() if items]
    if found:
        raise ValueError(
            f"the checkpoint does not fit the model; {'; '.join(found)}; give the checkpoint of this model"
        )
    return plan


def _place(module: nn.Module, name: str, tensor: Tensor, home: Home) -> None:
    """Put a tensor, or what a module that receives it makes of it, in the place of a parameter or buffer."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    parameters = dict(owner.named_parameters(recurse=False))
    made = {leaf: tensor}
    if isinstance(owner, Receiver):
        owner.receive(leaf, tensor)
        own = (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
        made = {leaf: value for leaf, value in own if not value.is_meta}
    for leaf, value in made.items():
        kept = home.keep(f"{owner_name}.{leaf}".lstrip("."), value)
        if kept is not value or value is tensor:
            setattr(owner, leaf, nn.Parameter(kept, requires_grad=False) if leaf in parameters else kept)


def _assert_no_meta(module: nn.Module) -> None:
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers that no checkpoint holds must not be made on the meta device: {left}"
