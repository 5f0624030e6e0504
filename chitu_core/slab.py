"""Tensors of a module in one buffer of host memory, in parcels: a parcel is what one copy brings to a device.

A slab is the home that `weights.load` reads into, so the weights are in host memory once. Leaves out when a
parcel travels: arena.py and block_stream.py say that.
"""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from chitu_core.ops.rows import FP8, quantise_rows
from chitu_core.weights import DtypeOf

ALIGNMENT = 256  # bytes, of a tensor in its buffer: what CUDA's own allocator gives at least
_PAGE = 4096
_SCALES = " scales"  # of a packed weight, after its name


class Entry(NamedTuple):
    """One tensor of a buffer; `offset` in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


@dataclass(frozen=True)
class Layout:
    """Where tensors lie in a buffer of bytes."""

    entries: tuple[Entry, ...]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> "Layout":
        """One tensor after another, each at a multiple of `ALIGNMENT`."""
        entries, offset = [], 0
        for name, (shape, dtype) in tensors.items():
            entries.append(Entry(name, shape, dtype, offset))
            offset += _aligned(torch.Size(shape).numel() * dtype.itemsize)
        return cls(tuple(entries), offset)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors in a buffer [>= num_bytes] uint8, without a copy."""
        return {
            name: buffer[offset : offset + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
            for name, shape, dtype, offset in self.entries
        }


@dataclass(frozen=True)
class Selection:
    """Tensors of a submodule that travel together; `packed` of them are matrices to be stored in fp8."""

    owner: str
    names: tuple[str, ...]
    packed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Parcel:
    """A selection in its slab: how it lies there from byte `begin` on, and how on the device."""

    selection: Selection
    stored: Layout
    arrived: Layout  # the same as `stored` where nothing is packed
    begin: int

    def unpack(self, stored: Tensor, arrived: Tensor) -> None:
        """Bytes as they are stored, on the device, to bytes as they are used there: value * scale, rounded
        once."""
        given = self.stored.views(stored)
        for name, target in self.arrived.views(arrived).items():
            target.copy_(given[name])
            if name in self.selection.packed:
                target.mul_(given[name + _SCALES])

    def absent(self) -> dict[str, Tensor]:
        """What stands for packed weights while they are not on the device: NaN, without memory."""
        return {
            name: torch.full((), torch.nan, dtype=dtype).expand(shape)
            for name, shape, dtype, _ in self.arrived.entries
            if name in self.selection.packed
        }


class Slab:
    """The home, in host memory, of selected tensors of a module on the meta device; others go to the device.

    Page-locked if `device` is a GPU, so that copies run beside its work. A packed weight [N, K] is stored as
    float8_e4m3fn with one scale a row, and reads as NaN in the module until it has been brought.
    """

    def __init__(
        self, module: nn.Module, selections: Iterable[Selection], dtype_of: DtypeOf, device: torch.device
    ) -> None:
        kinds, parcels, begin = _kinds(module, dtype_of), [], 0
        for selection in selections:
            parcels.append(_parcel(selection, kinds, begin))
            begin += parcels[-1].stored.num_bytes
        self.parcels = tuple(parcels)
        self.num_bytes = begin
        self._buffer = _pages(begin)
        if device.type == "cuda" and begin > 0:
            _pin(self, self._buffer, device)
        self._places: dict[str, Tensor] = {}  # by the module's own names
        self._absent: dict[str, Tensor] = {}
        for parcel in parcels:
            owner = parcel.selection.owner
            self._places |= {_join(owner, name): view for name, view in self.views(parcel).items()}
            self._absent |= {_join(owner, name): nan for name, nan in parcel.absent().items()}

    def bytes_of(self, parcel: Parcel) -> Tensor:
        """A parcel as it is stored, uint8 [num_bytes]."""
        return self._buffer[parcel.begin : parcel.begin + parcel.stored.num_bytes]

    def views(self, parcel: Parcel) -> dict[str, Tensor]:
        """New views of what is stored, by name within the parcel's owner."""
        return parcel.stored.views(self.bytes_of(parcel))

    def allocate(self, name: str) -> Tensor | None:
        """See `weights.Home`."""
        return None if name in self._absent else self._places.get(name)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """See `weights.Home`."""
        place = self._places.get(name)
        if place is None or (tensor.device == place.device and tensor.data_ptr() == place.data_ptr()):
            return tensor
        if name not in self._absent:
            return place.copy_(
                tensor
            ).detach()  # an object of the module's own, whose data is exchanged later
        values, scales = quantise_rows(tensor)
        place.copy_(values)
        self._places[name + _SCALES].copy_(scales)
        return self._absent[name]


def loaded_bytes(module: nn.Module, owner: str, dtype_of: DtypeOf) -> int:
    """What the tensors of a submodule will take, of a module on the meta device."""
    kinds = _kinds(module, dtype_of).items()
    return sum(
        torch.Size(shape).numel() * dtype.itemsize
        for name, (shape, dtype) in kinds
        if name.startswith(f"{owner}.")
    )


def tensor_names(module: nn.Module) -> tuple[str, ...]:
    """Parameters and buffers of a module and of what is below it."""
    return (*dict(module.named_parameters()), *dict(module.named_buffers()))


def _kinds(module: nn.Module, dtype_of: DtypeOf) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and final dtype of every tensor; what a layer declares as fp8, or keeps for itself, stays so."""
    loaded = module.state_dict(keep_vars=True)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert all(tensor.is_meta for tensor in tensors.values()), "a slab is made before its module has tensors"
    return {
        name: (
            tuple(tensor.shape),
            dtype_of(name) if name in loaded and tensor.dtype != FP8 else tensor.dtype,
        )
        for name, tensor in tensors.items()
    }


def _parcel(
    selection: Selection, kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]], begin: int
) -> Parcel:
    arrived = {name: kinds[_join(selection.owner, name)] for name in selection.names}
    stored = dict(arrived)
    for name in selection.packed:
        shape, _ = arrived[name]
        assert len(shape) == 2, f"{name} {list(shape)} has no rows to scale"
        stored |= {name: (shape, FP8), name + _SCALES: ((shape[0], 1), torch.float32)}
    return Parcel(selection, Layout.of(stored), Layout.of(arrived), begin)


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _aligned(num_bytes: int, to: int = ALIGNMENT) -> int:
    return -(-num_bytes // to) * to


def _pages(num_bytes: int) -> Tensor:
    """Host memory in whole pages that nothing else shares."""
    length = _aligned(num_bytes, _PAGE)
    raw = torch.empty(length + _PAGE, dtype=torch.uint8)
    begin = -raw.data_ptr() % _PAGE
    return raw[begin : begin + length]


def _pin(owner: object, pages: Tensor, device: torch.device) -> None:
    """Lock pages for as long as `owner` lives. Raises RuntimeError where the system refuses.

    NOTE torch's own pinned memory is rounded up to a power of two: 17 GB for a text encoder of 11.
    """
    cuda = torch.cuda.cudart()
    torch.cuda.check_error(cuda.cudaHostRegister(pages.data_ptr(), pages.nbytes, 0))

    def unpin(pointer: int) -> None:
        torch.cuda.synchronize(device)  # a copy may still be under way
        cuda.cudaHostUnregister(pointer)

    weakref.finalize(owner, unpin, pages.data_ptr()).atexit = False
