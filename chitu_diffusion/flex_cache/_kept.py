"""What a strategy keeps between steps, and how much memory that takes."""

from collections.abc import Hashable

from torch import Tensor


class Kept:
    """Tensors by key; `peak_bytes` is the most that they took together."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, Tensor] = {}
        self.bytes = 0
        self.peak_bytes = 0

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor in place of the one under the same key."""
        self.drop(key)
        self._tensors[key] = tensor
        self.bytes += tensor.nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor of a key."""
        return self._tensors.get(key)

    def drop(self, key: Hashable) -> None:
        """Let go of a key, if it is there."""
        tensor = self._tensors.pop(key, None)
        self.bytes -= 0 if tensor is None else tensor.nbytes

    def clear(self) -> None:
        """Let go of everything."""
        self._tensors.clear()
        self.bytes = 0
