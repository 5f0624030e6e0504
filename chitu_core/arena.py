"""Bringing weights from host memory to a device and letting go of them, beside the device's work.

Parameters stay the same objects; only where their data lies changes, so a compiled block needs no retrace.
Host memory is never written after loading, so nothing is copied back. Leaves out which weights, and when.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from chitu_core.slab import Parcel, Slab

Mark = torch.cuda.Event | None  # a point in a device's work; None on a CPU, which works when it is asked
Copy = Callable[[Tensor, Tensor], object]  # (target, source), bytes of the same number


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copy without waiting; from page-locked memory it runs beside what the device computes."""
    target.copy_(source, non_blocking=True)


class Lane:
    """The stream of a device that copies, beside the one that computes: each waits for marks of the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> Mark:
        """The end of what the computing stream has been given so far."""
        return None if self._stream is None else _record(torch.cuda.current_stream(self.device))

    @contextmanager
    def after(self, mark: Mark) -> Iterator[None]:
        """What is queued inside is copied, once `mark` is passed."""
        if self._stream is None:
            yield
            return
        if mark is not None:
            self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            yield

    def arrival(self) -> Mark:
        """The end of the copies queued so far."""
        return None if self._stream is None else _record(self._stream)

    def wait(self, mark: Mark) -> None:
        """Let the computing stream, not the host, wait for a mark."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def buffer(self, num_bytes: int) -> Tensor:
        """Memory of the device, uint8 [num_bytes].

        NOTE not an inference tensor, whatever the mode: its views take the place of parameters' data.
        """
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)


class Cargo:
    """The tensors of a loaded module that one parcel brings."""

    def __init__(self, module: nn.Module, slab: Slab, parcel: Parcel) -> None:
        self.parcel = parcel
        self.stored = slab.bytes_of(parcel)
        self._slab = slab  # its memory is page-locked for as long as it lives
        owner = module.get_submodule(parcel.selection.owner)
        tensors = {**dict(owner.named_parameters()), **dict(owner.named_buffers())}
        self._tensors = {name: tensors[name] for name in parcel.selection.names}
        self._at_home = slab.views(parcel) | parcel.absent()

    def point(self, views: dict[str, Tensor]) -> None:
        """Let the module's tensors read what has arrived: views by name."""
        for name, tensor in self._tensors.items():
            tensor.data = views[name]

    def point_home(self) -> None:
        """Let the module's tensors read host memory again."""
        self.point(self._at_home)


class Guest(Protocol):
    """Weights that live in host memory and are brought to the device for as long as they are used."""

    num_bytes: int  # on the device, while they are there

    def fetch(self) -> None:
        """Begin to bring them, beside what the device computes; nothing if they are there."""

    def bring(self) -> None:
        """See that what is computed from now on finds them on the device."""

    def release(self) -> None:
        """Let go of them on the device."""

    @property
    def device_bytes(self) -> int:
        """What they hold there now."""


class Arena:
    """Weights that are brought as a whole: one buffer of the device, filled by one copy.

    `poison`, for tests on a CPU, overwrites what is released, so that reading it shows.
    """

    def __init__(
        self, module: nn.Module, slab: Slab, parcel: Parcel, lane: Lane, *, poison: bool = False
    ) -> None:
        assert not parcel.selection.packed, "an arena brings bytes as they are"
        self._cargo = Cargo(module, slab, parcel)
        self._lane = lane
        self._poison = poison
        self._buffer: Tensor | None = None
        self._ready: Mark = None
        self.num_bytes = parcel.arrived.num_bytes

    @property
    def device_bytes(self) -> int:
        """See `Guest`."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def fetch(self) -> None:
        """See `Guest`. Raises torch.OutOfMemoryError where the device has no room; nothing is held then."""
        if self._buffer is not None:
            return
        buffer = self._lane.buffer(self.num_bytes)
        with self._lane.after(self._lane.mark()):  # the memory may have been another tensor's until now
            copy_bytes(buffer, self._cargo.stored)
        self._ready = self._lane.arrival()
        self._buffer = buffer
        with torch.inference_mode(False):
            self._cargo.point(self._cargo.parcel.arrived.views(buffer))

    def bring(self) -> None:
        """See `Guest`. Raises torch.OutOfMemoryError as `fetch` does."""
        self.fetch()
        self._lane.wait(self._ready)

    def release(self) -> None:
        """See `Guest`."""
        if self._buffer is None:
            return
        self._lane.wait(self._ready)  # memory goes back to the computing stream, so no copy may be under way
        self._cargo.point_home()
        if self._poison:
            self._buffer.fill_(255)  # NaN in every format
        self._buffer = None


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event
