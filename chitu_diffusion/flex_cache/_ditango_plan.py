"""Which layer computes which group of keys in the next step: arithmetic on measured errors, no communication.

Every table is [layers, groups] on the host. An *anchor* step computes all and is what later ones are compared
with; a *selective* one computes what its plan says. The numbers must be equal on all ranks, so the plans are.
"""

import torch
from torch import Tensor

SMALL = 0.5  # below this quantile the step after an anchor computes too, so that a small ratio computes all
MISSING = -1


class Planner:
    """The state of one run between its steps."""

    def __init__(
        self, layers: int, groups: int, *, first: int, gate: float, quantile: float, tau_max: int
    ) -> None:
        """Groups before `first` are empty: always computed, and part of no decision.

        gate: mean relative change of the layers since the anchor from which on the next step is one.
        quantile: of the errors, whose value is the threshold `epsilon`; tau_max: oldest age in steps of a
        state that is reused.
        """
        self._shape, self._first = (layers, groups), first
        self._gate, self._quantile, self._tau_max = gate, quantile, tau_max
        self.reset()

    def reset(self) -> None:
        """Nothing is kept: the next step that is not forced is an anchor."""
        self.epsilon: float | None = None
        self.is_anchor = True
        self.computed = torch.ones(self._shape, dtype=torch.bool)  # in the next step
        self._since = torch.full(self._shape, MISSING)  # at which step a state was computed
        self._follows_anchor = False

    def advance(self, step: int, errors: Tensor, change: float) -> None:
        """Plan what follows `step`, which was not forced.

        errors [layers, groups] >= 0 are of the states as they were before the step (at a run's first anchor,
        against the step before), change is the mean relative change of the layers since the anchor.
        """
        ages = torch.where(self._since == MISSING, 1, step - self._since)
        drift = errors / ages  # what one step does
        left = torch.where(self.computed, 0, errors)  # of the states as they are now
        self._since[self.computed] = step
        if self.is_anchor:
            present = self._threshold(drift)
            self.epsilon = present if self.epsilon is None else self.epsilon
            # of this step too, or a drift that lessens would leave a ratio near 0 short of all
            wanted = (drift >= min(self.epsilon, present)) & (self._quantile < SMALL)
        else:
            if self._follows_anchor or self.epsilon is None:
                self.epsilon = self._threshold(errors)  # all of one age: a fair sample
            wanted = left >= self.epsilon
        self._follows_anchor, self.is_anchor = self.is_anchor, change >= self._gate
        self.computed = wanted | (step + 1 - self._since > self._tau_max) | self.is_anchor
        self.computed[:, : self._first] = True

    def _threshold(self, errors: Tensor) -> float:
        """The quantile of all entries that are decided on: entry min(n - 1, int(n r)) of n in order."""
        ordered = errors[:, self._first :].flatten().sort().values
        return float(ordered[min(len(ordered) - 1, int(len(ordered) * self._quantile))])
