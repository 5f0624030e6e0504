"""Text embeddings of earlier prompts, kept on the host, so that a prompt is encoded once.

Bounded by bytes; what was used longest ago goes first. A cache belongs to one encoder.
"""

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor


class PromptCache:
    """At most `limit_bytes` of embeddings [n, dim] on the host; 0 keeps none."""

    def __init__(self, limit_bytes: int) -> None:
        """Raises ValueError for a limit below 0."""
        if limit_bytes < 0:
            raise ValueError(f"infer.prompt_cache_mb: {limit_bytes} bytes; must be 0 or more")
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()  # the one used last is last

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Tensor | None:
        """Embeddings [n, dim] on the host, not to be written to; None if they are not kept."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return found

    def put(self, key: Hashable, embeddings: Tensor) -> None:
        """Keep a copy of embeddings [n, dim] from any device, in place of what was used longest ago.

        What is larger than the limit by itself is not kept, and drops nothing.
        """
        if embeddings.nbytes > self.limit_bytes:
            return
        self._drop(key)
        while self.num_bytes + embeddings.nbytes > self.limit_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = embeddings.detach().to("cpu", copy=True)
        self.num_bytes += embeddings.nbytes

    def clear(self) -> None:
        """Keep nothing."""
        self._entries.clear()
        self.num_bytes = 0

    def _drop(self, key: Hashable) -> None:
        dropped = self._entries.pop(key, None)
        self.num_bytes -= 0 if dropped is None else dropped.nbytes
