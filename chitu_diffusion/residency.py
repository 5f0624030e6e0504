"""What is on the device at which stage, of the weights that live on the host."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from chitu_core.arena import Guest


class Residency:
    """The text encoder is on the device while it encodes, one expert while it denoises, neither afterwards.

    A network without a guest is there always. While an expert takes its last step its successor is brought
    beside it, where there is room; else it takes the other's place.
    """

    def __init__(self, text: Guest | None, experts: Mapping[str, Guest], device: torch.device) -> None:
        self._text = text
        self._experts = dict(experts)
        self.device = device
        self._entered: str | None = None

    @property
    def device_bytes(self) -> int:
        """What is on the device now of weights that live on the host."""
        guests = [*self._experts.values(), *([] if self._text is None else [self._text])]
        return sum(guest.device_bytes for guest in guests)

    @contextmanager
    def text(self) -> Iterator[None]:
        """The text encoder is on the device inside, and no expert that lives on the host.

        Raises torch.OutOfMemoryError where it does not fit.
        """
        self.leave()
        if self._text is None:
            yield
            return
        try:
            self._text.bring()
            yield
        finally:
            self._text.release()
            self._give_back()

    def enter(self, expert: str, following: str | None = None, spare_bytes: int = 0) -> None:
        """`expert` is on the device from now on; `following`, if it is known, takes the step after the next.

        It comes now if it takes at most `spare_bytes`. Raises torch.OutOfMemoryError where `expert` does not
        fit.
        """
        if expert == self._entered and following is None:
            return
        self._entered = None  # until all of it has succeeded
        wanted = [
            name
            for name in dict.fromkeys((expert, following))
            if name in self._experts and (name == expert or self._experts[name].num_bytes <= spare_bytes)
        ]
        for name, guest in self._experts.items():
            if name not in wanted:
                guest.release()
        for name in wanted:
            self._experts[name].fetch()
        if expert in self._experts:
            self._experts[expert].bring()
        self._entered = expert

    def leave(self) -> None:
        """No expert that lives on the host is on the device from now on."""
        self._entered = None
        if any(guest.device_bytes for guest in self._experts.values()):
            for guest in self._experts.values():
                guest.release()
            self._give_back()

    def _give_back(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # a cached buffer of such a size could be split, and not be whole again
