"""Attention over a sequence that several ranks share: values around a kernel, `Ulysses(Ring(kernel))`.

The sequence is padded at its end so that all parts are equal (`TokenShard`). No mask is needed: after the
all-to-all the padding is a tail, and a ring knows where each chunk of keys begins, so keys are cut.
"""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from chitu_core.attention._base import Attention, LseAttention, Place
from chitu_core.attention._select import GIVES_LSE
from chitu_core.distributed.collectives import Line, TokenShard, gather_heads, scatter_heads
from chitu_core.distributed.mesh import ParallelMesh
from chitu_core.timing import Timer


class _Around(Attention):
    """An attention that hands its work to another one, under that one's name."""

    def __init__(self, inner: Attention) -> None:
        super().__init__(inner.name)
        self.inner = inner
        self.is_exact = inner.is_exact  # type: ignore[misc]  # a fact of the kernel, so of this value

    @classmethod
    def unavailable(cls, variant: str, place: Place) -> str | None:
        """Made for a kernel that is there."""
        return None


class Timed(_Around):
    """An attention whose calls a timer counts under a name."""

    def __init__(self, inner: Attention, timer: Timer, name: str) -> None:
        super().__init__(inner)
        self._timer, self._span = timer, name

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`."""
        with self._timer.span(self._span):
            return self.inner(q, k, v)


class DropPadding(_Around):
    """Full attention without the padding at the end of the sequence."""

    def __init__(self, inner: Attention, tokens: TokenShard) -> None:
        super().__init__(inner)
        self._tokens = tokens

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`; what padded queries get is never read."""
        total = self._tokens.total
        return self.inner(q, k[:, :total], v[:, :total])


class Ulysses(_Around):
    """Every rank attends over all tokens with a part of the heads (DeepSpeed-Ulysses, arXiv:2309.14509)."""

    def __init__(self, inner: Attention, group: dist.ProcessGroup) -> None:
        super().__init__(inner)
        self.group = group  # read by a strategy that exchanges keys in its own way, as are those of `Ring`

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`; q, k, v are this rank's tokens with all heads."""
        return gather_heads(self.inner(*scatter_heads((q, k, v), self.group)), self.group)


class Ring(_Around):
    """Keys and values travel round a ring of ranks while each attends to what it holds (arXiv:2310.01889)."""

    def __init__(self, kernel: Attention, group: dist.ProcessGroup, tokens: TokenShard) -> None:
        """Raises ValueError for a kernel that gives no log-sum-exp."""
        check_ring(kernel, group.size())
        assert isinstance(kernel, LseAttention)
        super().__init__(kernel)
        self.kernel: LseAttention = kernel
        self.line = Line(group)
        self.tokens = tokens

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`; q, k, v are one chunk of the sequence."""
        index, size = self.line.index, self.line.size
        held, spare = torch.stack((k, v)), k.new_empty(2, *k.shape)
        out, lse = None, None
        for step in range(size):
            works = []
            if step < size - 1:
                works = self.line.start([((index - 1) % size, held)], [((index + 1) % size, spare)])
            valid = self.tokens.total - (index + step) % size * k.shape[1]
            if valid > 0:
                part = self.kernel.with_lse(q, *held[:, :, :valid])
                out, lse = part if out is None or lse is None else merge(out, lse, *part)
            for work in works:
                work.wait()
            held, spare = spare, held  # what was sent may be overwritten from here on
        assert out is not None
        return out.to(q.dtype)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: outputs [B, S, H, D], LSE [B, H, S].

    Computed in fp32 whatever comes in; logarithms are natural. Source: arXiv:2310.01889, section 3.
    """
    weight = torch.sigmoid(other_lse - lse).transpose(1, 2).unsqueeze(-1)  # of the other, [B, S, H, 1]
    merged = torch.lerp(out.float(), other.float(), weight)
    return merged, lse - F.logsigmoid(lse - other_lse)


def check_ring(kernel: Attention, size: int) -> None:
    """Raises ValueError if `kernel` cannot serve a ring of `size` ranks."""
    if size > 1 and not isinstance(kernel, LseAttention):
        able = ", ".join(sorted(GIVES_LSE))
        raise ValueError(
            f"infer.attn_type={kernel.name} gives no log-sum-exp, which a ring of {size} ranks needs; "
            f"choose one of {able}, or a cp_size that Ulysses alone can serve (infer.diffusion.up_limit)"
        )


def spread(kernel: Attention, mesh: ParallelMesh, tokens: TokenShard | None) -> Attention:
    """`kernel` as it must be called when the sequence is split as `tokens` says."""
    if tokens is None:
        return kernel
    inner = DropPadding(kernel, tokens) if mesh.ring is None else Ring(kernel, mesh.ring, tokens)
    return inner if mesh.ulysses is None else Ulysses(inner, mesh.ulysses)
