"""What a strategy did: how often each kind of site was computed and reused, and what to paint for a step."""

from collections import Counter


class Tally:
    """Counts by kind, over all blocks and branches of this rank, and one code a step for the picture."""

    def __init__(self) -> None:
        self.computed: Counter[str] = Counter()
        self.reused: Counter[str] = Counter()
        self.codes: dict[int, int] = {}
        self._steps: set[int] = set()

    @property
    def reused_steps(self) -> int:
        """In how many steps anything was reused."""
        return len(self._steps)

    def count(self, step: int, kind: str, *, is_reused: bool) -> None:
        """One decision."""
        (self.reused if is_reused else self.computed)[kind] += 1
        if is_reused:
            self._steps.add(step)

    def mark(self, step: int, code: int) -> None:
        """Colour a step; of several codes the largest stays."""
        self.codes[step] = max(code, self.codes.get(step, 0))
