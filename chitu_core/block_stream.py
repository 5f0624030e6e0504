"""Blocks streamed from host memory: two buffers of the device, one in use while the other one is filled.

The copy of a block waits for the block that used its buffer before, and the block for its copy, by events:
the host waits for nothing. After the last block follows the first, of the next pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chitu_core.arena import Cargo, Copy, Lane, Mark, copy_bytes
from chitu_core.slab import Layout, Parcel, Slab

_SLOTS = 2


class BlockStream:
    """Parcels of equal rank in the order in which they are used, of which at most two are on the device.

    One that is asked for out of order is brought at once; so is any after a copy or a block that raised. If
    `is_cyclic`, the first is brought while the last is in use; else the buffers are let go of after the last.
    `poison`, for tests on a CPU, overwrites what has been used; `copy` brings bytes.
    """

    def __init__(
        self,
        module: nn.Module,
        slab: Slab,
        parcels: Sequence[Parcel],
        lane: Lane,
        *,
        is_cyclic: bool = True,
        poison: bool = False,
        copy: Copy = copy_bytes,
    ) -> None:
        self._cargo = [Cargo(module, slab, parcel) for parcel in parcels]
        self._lane = lane
        self._is_cyclic = is_cyclic
        self._poison = poison
        self._copy = copy
        self._slots: list[_Slot] = []
        self._packed: Tensor | None = None  # where packed parcels arrive before they are unpacked
        self._slot_bytes = max((parcel.arrived.num_bytes for parcel in parcels), default=0)
        packed = (parcel.stored.num_bytes for parcel in parcels if parcel.selection.packed)
        self._packed_bytes = max(packed, default=0)
        self.num_bytes = min(_SLOTS, len(parcels)) * self._slot_bytes + self._packed_bytes

    @property
    def device_bytes(self) -> int:
        """What is held on the device now."""
        return self.num_bytes if self._slots else 0

    def fetch(self) -> None:
        """Nothing: blocks are brought when they are used."""

    def bring(self) -> None:
        """Nothing: see `fetch`."""

    @contextmanager
    def holding(self, index: int) -> Iterator[None]:
        """The module's tensors of parcel `index` are on the device inside; the next one is on its way.

        Raises torch.OutOfMemoryError where the device has no room, and what a copy raises.
        """
        if not self._slots:
            self._take_slots()
        slot, cargo = self._fetched(index, None), self._cargo[index]
        following = index + 1
        if self._is_cyclic:
            following %= len(self._cargo)
        if following < len(self._cargo) and following != index:
            self._fetched(following, slot)
        self._lane.wait(slot.ready)
        try:
            cargo.point(slot.views[cargo.parcel.arrived])
            yield
        finally:
            cargo.point_home()
            if self._poison:
                slot.holds = None
                slot.buffer.fill_(255)  # NaN in every format
            slot.last_use = self._lane.mark()
        if following == len(self._cargo):
            self.release()

    def release(self) -> None:
        """Let go of the buffers; the next use takes new ones."""
        self._lane.wait(self._lane.arrival())  # a block may be on its way that nobody asked for
        self._slots, self._packed = [], None

    def _take_slots(self) -> None:
        layouts = {cargo.parcel.arrived for cargo in self._cargo}
        count = min(_SLOTS, len(self._cargo))
        slots = [_Slot(self._lane.buffer(self._slot_bytes), layouts) for _ in range(count)]
        if self._packed_bytes:
            self._packed = self._lane.buffer(self._packed_bytes)
        for slot in slots:
            slot.last_use = self._lane.mark()  # the memory may have been another tensor's until now
        self._slots = slots

    def _fetched(self, index: int, in_use: "_Slot | None") -> "_Slot":
        """The slot that holds a parcel, or that its copy has been queued for; another one than `in_use`."""
        for slot in self._slots:
            if slot.holds == index:
                return slot
        slot = next(slot for slot in self._slots if slot is not in_use)
        self._slots.append(self._slots.pop(self._slots.index(slot)))  # the other one is taken next
        slot.holds = None
        parcel, stored = self._cargo[index].parcel, self._cargo[index].stored
        with self._lane.after(slot.last_use):
            if self._packed is None or not parcel.selection.packed:
                self._copy(slot.buffer[: stored.nbytes], stored)
            else:
                self._copy(self._packed[: stored.nbytes], stored)
                parcel.unpack(self._packed, slot.buffer)
        slot.ready, slot.holds = self._lane.arrival(), index
        return slot


class _Slot:
    """A buffer of the device that holds one parcel after another."""

    def __init__(self, buffer: Tensor, layouts: set[Layout]) -> None:
        self.buffer = buffer
        with torch.inference_mode(False):
            self.views = {layout: layout.views(buffer) for layout in layouts}
        self.holds: int | None = None
        self.ready: Mark = None
        self.last_use: Mark = None


class Streamed:
    """Calls a module while its weights are on the device: stands in a network for the plain call.

    `modules` in the order of the stream's parcels; another module is called as it is.
    """

    def __init__(self, stream: BlockStream, modules: Sequence[nn.Module], call: Any) -> None:
        self._stream = stream
        self._index = {module: index for index, module in enumerate(modules)}
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the plain call returns; the first argument is the module."""
        index = self._index.get(args[0])
        if index is None:
            return self._call(*args, **kwargs)
        with self._stream.holding(index):
            return self._call(*args, **kwargs)
