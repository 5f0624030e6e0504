"""One clip on several ranks: each computes a strip of the image, and the result is that of one rank.

The longer side of the latent is cut. Norms and kernels of size 1 need nothing of other strips, a convolution
of spatial size 3 needs the one line beside the strip at either end, attention the keys and values of all
strips. The past of a causal convolution is kept with those lines, so only those of new frames travel.

A decode of a latent [z, T, L, M], cut along L into A strips, sends over all ranks together

    (A - 1) M (2 H + 2 L T C) elements of the VAE's dtype

with C the channels in attention and H the sum, over the convolutions of spatial size 3, of input frames x
scale x input channels, where scale is the lines per latent line. For Wan2.1 C is 384; the first latent frame
adds 21,904 to H, any other 66,064. A chunk takes 33 exchanges of lines and one of keys and values. What
`collect` and `spread` send comes on top: each part once to each receiver but its owner.
Left out: cutting both sides, and computing while lines travel.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_core.ops.conv import convolve
from chitu_diffusion.vaes.wan import RMSNorm, Stream, write


class Line(Protocol):
    """Ranks in a row, numbered from 0, that pass tensors to each other."""

    @property
    def index(self) -> int:
        """The number of this rank."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        """Send tensors to and fill tensors from ranks of the line, all in one batch; every tensor contiguous.

        Work queued after the return may read what was filled and write all of it. `Strips` passes at least
        one tensor, and at most one per sender and receiver; ranks without a tensor do not call.
        """


class Strips:
    """How the latent of one clip, of `rows` x `columns` positions, is shared out over a line of ranks.

    `axis` of [T, H, W, C] is cut: 1 for rows, also those of a square, or 2 for columns. `counts` has the
    lines of each rank, uneven by at most one and larger first; the first `active` ranks have one at least.
    """

    def __init__(self, line: Line, rows: int, columns: int) -> None:
        assert rows > 0, rows
        assert columns > 0, columns
        self.line = line
        self.sides = rows, columns
        self.axis = 1 if rows >= columns else 2
        lines = max(rows, columns)
        self.counts = tuple(lines // line.size + (rank < lines % line.size) for rank in range(line.size))
        self.active = min(lines, line.size)
        self.is_idle = line.index >= self.active

    def stream(self) -> Stream:
        """A new pass over this rank's strip; for a strip that is the whole it is that of one rank."""
        return StripStream(self) if self.active > 1 else Stream()

    def cut(self, x: Tensor, scale: int = 1) -> Tensor:
        """This rank's part, a view, of [T, H, W, C] whose sides are `scale` times those of the latent."""
        expected = tuple(side * scale for side in self.sides)
        assert x.shape[1:3] == expected, f"{tuple(x.shape)} is not [T, {expected[0]}, {expected[1]}, C]"
        index = self.line.index
        return x.narrow(self.axis, sum(self.counts[:index]) * scale, self.counts[index] * scale)

    def collect(self, x: Tensor, scale: int = 1) -> Tensor | None:
        """Join the parts [T, H, W, C], of any dtype, on rank 0; None elsewhere. Any rank may call it."""
        return self._join(x, scale, receivers=1)

    def gather(self, x: Tensor) -> Tensor:
        """Join the parts [T, h, w, C] on every rank with a line, which all must call it."""
        whole = self._join(x, 1, receivers=self.active)
        assert whole is not None, "an idle rank has no use for the whole"
        return whole

    def spread(self, x: Tensor, scale: int = 1) -> Tensor:
        """Join the parts [T, H, W, C] on every rank, idle ones too; all must call it."""
        whole = self._join(x, scale, receivers=self.line.size)
        assert whole is not None
        return whole

    def _join(self, x: Tensor, scale: int, receivers: int) -> Tensor | None:
        """All parts in order on the first `receivers` ranks."""
        axis, index, x = self.axis, self.line.index, x.contiguous()
        assert x.shape[axis] == self.counts[index] * scale, (tuple(x.shape), self.counts, index, scale)
        sends = [] if self.is_idle else [(rank, x) for rank in range(receivers) if rank != index]
        parts = []
        if index < receivers:
            shapes = [
                (*x.shape[:axis], count * scale, *x.shape[axis + 1 :]) for count in self.counts[: self.active]
            ]
            parts = [x if rank == index else x.new_empty(shape) for rank, shape in enumerate(shapes)]
        receives = [(rank, part) for rank, part in enumerate(parts) if rank != index]
        if sends or receives:
            self.line.exchange(sends, receives)
        return torch.cat(parts, dim=axis) if parts else None


class StripStream(Stream):
    """One pass over the strip of a rank, which has neighbours: what looks beyond the strip asks them.

    All ranks with a line must feed chunks of the same frames.
    """

    def __init__(self, strips: Strips) -> None:
        super().__init__()
        self._strips = strips
        self._padding = (0, 1) if strips.axis == 1 else (1, 0)  # across the cut, lines stand for the padding

    def conv3d(
        self, conv: nn.Conv3d, x: Tensor, norm: RMSNorm | None = None, add: Tensor | None = None
    ) -> Tensor:
        """Convolve the strip [T, H, W, C] causally, with the lines beside it."""
        if conv.kernel_size[1] == 1:
            return super().conv3d(conv, x, norm, add)
        axis, is_shifted = self._strips.axis, self.is_shifted(conv, x, norm)
        clip, new = self.open(conv, x, 2 * (axis == 1 or is_shifted), 2 * (axis == 2 or is_shifted))
        along = new.narrow(3 - axis, 1, x.shape[3 - axis]) if is_shifted else new
        before, inside, after = along.split((1, x.shape[axis], 1), dim=axis)
        write(x, norm, new if is_shifted else inside)
        for line, values in zip((before, after), self._lines_beside(inside, (-1, 1)), strict=True):
            line.copy_(values)
        self.remember(conv, clip)
        if is_shifted:
            return self.convolve_shifted(conv, clip, add)
        return convolve(conv, clip, (0, *self._padding), add)

    def conv2d(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Convolve each frame of the strip [T, H, W, C] with the lines beside it, for stride 2 the next."""
        axis = self._strips.axis
        if conv.stride[0] == 2:
            _, height, width, _ = x.shape
            (after,) = self._lines_beside(x, (1,))
            x, padding = F.pad(x, (0, 0, 0, 1, 0, 1)), (0, 0)
            x.narrow(axis, x.shape[axis] - 1, 1)[:, :height, :width] = after
        else:
            before, after = self._lines_beside(x, (-1, 1))
            x, padding = torch.cat((before, x, after), dim=axis), self._padding
        y = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride, padding)
        return y.permute(0, 2, 3, 1)

    def double_conv2d(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Repeat each row and column of the strip [T, H, W, C], then convolve with the lines beside it."""
        frames, height, width, dim = x.shape
        doubled = x[:, :, None, :, None].expand(frames, height, 2, width, 2, dim)
        return self.conv2d(conv, doubled.reshape(frames, 2 * height, 2 * width, dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from the positions of the strip [T, h, w, C] to those of all strips, frame by frame."""
        keys, values = self._strips.gather(torch.cat((k, v), dim=-1)).chunk(2, dim=-1)
        queries, keys, values = (t.flatten(1, 2)[:, None] for t in (q, keys, values))  # [T, 1, h w, C]
        return F.scaled_dot_product_attention(queries, keys, values).view(q.shape)

    def _lines_beside(self, x: Tensor, offsets: Sequence[int]) -> list[Tensor]:
        """The line next to the strip on the ranks at `offsets`, -1 or 1; zeros beyond the image."""
        strips, lines, sends, receives = self._strips, [], [], []
        index, ranks = strips.line.index, range(strips.active)
        for offset in offsets:
            # The rank that finds this one at `offset` needs the line of this strip that is nearest to it.
            own = x.narrow(strips.axis, x.shape[strips.axis] - 1 if offset < 0 else 0, 1)
            is_inside = index + offset in ranks
            lines.append(x.new_empty(own.shape) if is_inside else x.new_zeros(own.shape))
            if is_inside:
                receives.append((index + offset, lines[-1]))
            if index - offset in ranks:
                sends.append((index - offset, own.contiguous()))
        strips.line.exchange(sends, receives)
        return lines
