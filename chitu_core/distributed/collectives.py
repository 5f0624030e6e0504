"""The exchanges that models need, each over one process group. Tensors in, tensors out.

All of them are enqueued on the current stream and wait for nothing on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist


def scatter_heads(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """This rank's tokens, all heads [B, s, H, D], to all tokens, this rank's heads [B, U s, H / U, D].

    All tensors (q, k, v) travel in one all-to-all; at B = 1 what comes back are views of one buffer, with D
    contiguous. Source: DeepSpeed-Ulysses (arXiv:2309.14509).
    """
    size, dtype = group.size(), tensors[0].dtype
    words = [_words(tensor.contiguous()) for tensor in tensors]
    batch, tokens, heads, dim = words[0].shape
    packed = words[0].new_empty(size, batch, tokens, len(words), heads // size, dim)
    for index, tensor in enumerate(words):
        parts = tensor.view(batch, tokens, size, heads // size, dim)
        packed[:, :, :, index].copy_(parts.permute(2, 0, 1, 3, 4))
    received = torch.empty_like(packed)
    dist.all_to_all_single(received, packed, group=group)
    whole = received.view(dtype).transpose(0, 1).flatten(1, 2)  # [B, U s, n, H / U, D]; a view at B = 1
    return [whole[:, :, index] for index in range(len(tensors))]


def gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back: all tokens with this rank's heads [B, U s, H / U, D] to [B, s, H, D]."""
    size = group.size()
    parts = x.unflatten(1, (size, -1)).transpose(0, 1).contiguous()  # [U, B, s, H / U, D]
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return _words(received).permute(1, 2, 0, 3, 4).flatten(2, 3).view(x.dtype)


def _words(x: Tensor) -> Tensor:
    """Contiguous x in words of 8 bytes, where they fit: a copy that changes the layout moves these faster."""
    return x.view(torch.int64) if x.shape[-1] * x.element_size() % 8 == 0 else x


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x of every rank, [ranks, *x.shape]."""
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(gathered.unbind()), x.contiguous(), group=group)
    return gathered


class Line:
    """The ranks of a group as a line whose members send to each other point to point."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.index = group.rank()
        self.size = group.size()

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        """Send tensors to, and fill tensors from, members by index, in one batch; tensors are contiguous."""
        for work in self.start(sends, receives):
            work.wait()

    def start(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> list[dist.Work]:
        """The same without waiting: what is computed until `wait` runs beside it."""
        batch = [dist.P2POp(dist.isend, x, group=self._group, group_peer=peer) for peer, x in sends]
        batch += [dist.P2POp(dist.irecv, x, group=self._group, group_peer=peer) for peer, x in receives]
        return dist.batch_isend_irecv(batch) if batch else []


class Pair:
    """Two ranks that each compute one of two things and need both."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.index = group.rank()

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x of the first rank, and x of the second."""
        first, second = all_gather(x, self._group)
        return first, second


class Agreement:
    """One value for all ranks of a replica: the mean over those that share a sequence, of a pair the first's.

    On one rank it is the value itself.
    """

    def __init__(self, cp: dist.ProcessGroup | None, pair: Pair | None) -> None:
        self._cp = cp
        self._pair = pair

    def __call__(self, x: Tensor) -> Tensor:
        """The agreed x, a new tensor where ranks took part."""
        if self._cp is not None:
            x = x.clone()
            dist.all_reduce(x, group=self._cp)
            x /= self._cp.size()
        return x if self._pair is None else self._pair.both(x)[0]


class TokenShard:
    """The part of a token sequence that one rank of a context-parallel group holds.

    Parts are equal: the sequence is padded at its end, and `total` says how many tokens are real, so that
    attention leaves the rest out without a mask.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.total = 0  # tokens of the sequence last split

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of x along `dim`, padded with zeros to the length of every other part; a copy."""
        self.total = x.shape[dim]
        length = -(-self.total // self._group.size())
        start = min(self._group.rank() * length, self.total)
        part = x.narrow(dim, start, min(length, self.total - start))
        missing = length - part.shape[dim]
        if missing == 0:
            return part.clone()  # a view would keep the whole alive through all blocks
        padding = list(part.shape)
        padding[dim] = missing
        return torch.cat((part, part.new_zeros(padding)), dim)

    def join(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole of x along `dim`, without padding, on every rank."""
        whole = torch.cat(all_gather(x, self._group).unbind(), dim)
        return whole.narrow(dim, 0, self.total)
