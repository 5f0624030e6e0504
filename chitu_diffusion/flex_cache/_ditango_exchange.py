"""How ranks on a ring visit each other's keys when some groups of them are left out.

The ring is cut into chunks of `members` neighbours. A rank counts groups from its own chunk: group j is the
chunk j further along. Keys always move towards lower indices: one member at a time inside a chunk, and from
chunk to chunk past all groups that are left out, at once. Every rank takes the same route, so nobody waits.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from chitu_core.attention import Ring, merge


class State(NamedTuple):
    """Attention over some keys: output [B, S, H, D], and LSE [B, H, S] fp32."""

    out: Tensor
    lse: Tensor


class Visit(NamedTuple):
    """Keys that a rank attends to: of which group, and of which member, counted from the rank's own."""

    group: int
    turn: int


def join(state: State | None, other: State | None) -> State | None:
    """Attention over the keys of both, in fp32 where both have some; None has no keys."""
    if state is None or other is None:
        return other if state is None else state
    return State(*merge(*state, *other))


def route(computed: Sequence[bool], members: int) -> tuple[Visit, ...]:
    """The visits of a rank, its own keys first, where `computed` says which groups are wanted."""
    visits, turn = [Visit(0, 0)], 0
    for group, is_computed in enumerate(computed):
        for step in range(members if is_computed else 0):
            if group == 0 and step == 0:
                continue  # its own keys
            turn = (turn + (step > 0)) % members
            visits.append(Visit(group, turn))
    return tuple(visits)


class Rotation:
    """One rank's attention over the groups of a ring."""

    def __init__(self, ring: Ring, members: int) -> None:
        """`members` must divide the ring."""
        self._ring = ring
        self._members = members

    def real_tokens(self, length: int) -> int:
        """How many of this rank's tokens, `length` with padding, are real."""
        return self._valid(self._ring.line.index, length)

    def source(self, visit: Visit) -> int:
        """The position whose keys this rank holds at a visit."""
        chunk, member = divmod(self._ring.line.index, self._members)
        start = (chunk + visit.group) * self._members
        return (start + (member + visit.turn) % self._members) % self._ring.line.size

    def peers(self, here: Visit, there: Visit) -> tuple[int, int]:
        """To whom this rank sends what it holds, and from whom it gets what it holds next."""
        index, size = self._ring.line.index, self._ring.line.size
        hop = (there.group - here.group) * self._members
        if hop:
            return (index - hop) % size, (index + hop) % size
        start, member = index - index % self._members, index % self._members
        return start + (member - 1) % self._members, start + (member + 1) % self._members

    def attend(self, q: Tensor, k: Tensor, v: Tensor, computed: Sequence[bool]) -> Iterator[State | None]:
        """The state of this rank's own keys, then of each computed group; None where all keys are padding.

        q, k, v are this rank's [1, S, H, D]. Group 0 leaves the own keys out, so it is empty where a chunk
        has one member. What a visit needs travels while the one before is computed, and what the caller does
        with a state runs beside it too.
        """
        parts = self._visits(q, k, v, route(computed, self._members))
        yield next(parts)
        for group, is_computed in enumerate(computed):
            if is_computed:
                state = None
                for _ in range(self._members - (group == 0)):
                    state = join(state, next(parts))
                yield state

    def _visits(self, q: Tensor, k: Tensor, v: Tensor, visits: Sequence[Visit]) -> Iterator[State | None]:
        if len(visits) == 1:  # nothing travels
            yield self._part(q, k, v, visits[0])
            return
        held, spare = torch.stack((k, v)), k.new_empty(2, *k.shape)
        for here, there in zip_longest(visits, visits[1:]):
            works = []
            if there is not None:
                target, giver = self.peers(here, there)
                works = self._ring.line.start([(target, held)], [(giver, spare)])
            yield self._part(q, held[0], held[1], here)
            for work in works:
                work.wait()
            held, spare = spare, held  # what was sent may be overwritten from here on

    def _part(self, q: Tensor, k: Tensor, v: Tensor, visit: Visit) -> State | None:
        valid = self._valid(self.source(visit), k.shape[1])
        return State(*self._ring.kernel.with_lse(q, k[:, :valid], v[:, :valid])) if valid else None

    def _valid(self, position: int, length: int) -> int:
        return min(max(self._ring.tokens.total - position * length, 0), length)
