"""The part of a token sequence that one rank holds. On one device that is all of it."""

from typing import Protocol

from torch import Tensor


class SequenceShard(Protocol):
    """Splits tokens [B, S, ...] along S before the blocks and joins them after the head."""

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of x along `dim`."""

    def join(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole of x along `dim`, on every rank."""


class _NoShard:
    def split(self, x: Tensor, dim: int = 1) -> Tensor:  # noqa: ARG002
        return x

    def join(self, x: Tensor, dim: int = 1) -> Tensor:  # noqa: ARG002
        return x


NO_SHARD: SequenceShard = _NoShard()
