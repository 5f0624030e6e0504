"""What ranks say to each other besides tensors: short texts (JSON), over a gloo group on the host."""

import torch
from torch import Tensor
from torch import distributed as dist

_LENGTH_BYTES = 8
_USUAL_BYTES = 1024  # of a message; a longer one takes a second exchange


class RankChannel:
    """Texts between all ranks; with one rank, and no group, it returns what it is given."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    def agree(self, text: str) -> str:
        """What rank 0 says, on every rank; the others' text is not read."""
        if self._group is None:
            return text
        is_speaker = self._group.rank() == 0
        head, rest = _pack(text) if is_speaker else (torch.zeros(_USUAL_BYTES, dtype=torch.uint8), None)
        dist.broadcast(head, group_src=0, group=self._group)
        missing = _missing(head)
        if missing and rest is None:
            rest = torch.zeros(missing, dtype=torch.uint8)
        if missing and rest is not None:
            dist.broadcast(rest, group_src=0, group=self._group)
        return _unpack(head, rest)

    def gather(self, text: str) -> list[str]:
        """What every rank says, by rank, on every rank."""
        if self._group is None:
            return [text]
        head, rest = _pack(text)
        heads = self._all(head)
        longest = max(map(_missing, heads))
        if longest == 0:
            return [_unpack(one, None) for one in heads]
        padded = torch.zeros(longest, dtype=torch.uint8)
        if rest is not None:
            padded[: len(rest)] = rest
        return [_unpack(one, more) for one, more in zip(heads, self._all(padded), strict=True)]

    def _all(self, x: Tensor) -> list[Tensor]:
        assert self._group is not None
        gathered = [torch.empty_like(x) for _ in range(self._group.size())]
        dist.all_gather(gathered, x, group=self._group)
        return gathered


def _pack(text: str) -> tuple[Tensor, Tensor | None]:
    """Length and beginning of a message in a fixed size, and the rest of it, if any."""
    content = text.encode("utf-8", errors="surrogatepass")
    message = torch.frombuffer(
        bytearray(len(content).to_bytes(_LENGTH_BYTES, "little") + content), dtype=torch.uint8
    )
    if len(message) > _USUAL_BYTES:
        return message[:_USUAL_BYTES].clone(), message[_USUAL_BYTES:].clone()
    head = torch.zeros(_USUAL_BYTES, dtype=torch.uint8)
    head[: len(message)] = message
    return head, None


def _length(head: Tensor) -> int:
    return int.from_bytes(bytes(head[:_LENGTH_BYTES].numpy()), "little")


def _missing(head: Tensor) -> int:
    """Bytes of a message that its head does not hold."""
    return max(0, _LENGTH_BYTES + _length(head) - _USUAL_BYTES)


def _unpack(head: Tensor, rest: Tensor | None) -> str:
    content = bytes(head[_LENGTH_BYTES:].numpy()) + (b"" if rest is None else bytes(rest.numpy()))
    return content[: _length(head)].decode("utf-8", errors="surrogatepass")
