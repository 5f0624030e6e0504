"""What DiTango keeps of one layer in one branch, and what it measures there.

A *local vector* is the mean over the head dimension of a rank's attention over its own keys, [1, S, H] fp32
without padding. How it changed since a state was computed stands for how that state would have changed.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from chitu_diffusion.flex_cache._ditango_exchange import State
from chitu_diffusion.flex_cache._kept import Kept

_LEAST_SIZE = 1e-8  # of an anchor's local vector
_LEAST_SPREAD = 1e-6  # of scores


class LayerStates:
    """States by group, their weights, and the local vectors with which they and the anchor are compared.

    A vector is kept once for all that refer to its step. Tensors lie in `kept`, under `name`.
    """

    def __init__(self, kept: Kept, name: Hashable, groups: range) -> None:
        """`groups` are those with keys."""
        self._kept, self._name = kept, name
        self._since: dict[int, int] = dict.fromkeys(groups, -1)  # the step of each group's reference
        self._anchor = -1

    def get(self, group: int) -> State | None:
        """The state of a group; None for one without keys."""
        out, lse = (self._kept.get((self._name, part, group)) for part in State._fields)
        assert out is not None, "only what an anchor kept is reused"
        assert lse is not None
        return State(out, lse) if out.numel() else None

    def put(self, group: int, state: State | None, dtype: torch.dtype) -> None:
        """Keep a state, its output in `dtype`; one without keys takes no memory."""
        out, lse = (torch.empty(0), torch.empty(0)) if state is None else state
        self._kept.put((self._name, "out", group), out.to(dtype))
        self._kept.put((self._name, "lse", group), lse)

    def weigh(self, local: State | None, real: int) -> None:
        """Weigh the states at an anchor by what the first `real` queries see of them.

        A softmax over the norms of LSEs, scaled by their spread. The rank's own keys take part, but their
        weight is left out; a state without keys has none.
        """
        states = [self.get(group) for group in self._since]
        present = [state for state in (local, *states) if state is not None]
        scores = torch.stack([state.lse[..., :real].norm() for state in present])
        spread = scores.std(correction=0).clamp_min(_LEAST_SPREAD)
        shares = iter(((scores - scores.max()) / spread).softmax(0).unbind())
        if local is not None:
            next(shares)
        nothing = scores.new_zeros(())
        found = torch.stack([nothing if state is None else next(shares) for state in states])
        self._kept.put((self._name, "weights"), found)

    def errors(self, vector: Tensor) -> Tensor:
        """The expected error of each state, fp32: its weight times the distance of its reference from the
        local vector; 0 where there is no reference."""
        weights = self._kept.get((self._name, "weights"))
        assert weights is not None, "the first step that asks is an anchor"
        distance = {step: self._distance(vector, step) for step in set(self._since.values())}
        return weights * torch.stack([distance[step] for step in self._since.values()])

    def change(self, vector: Tensor) -> Tensor:
        """How far the local vector is from the anchor's, relative to that, fp32; 0 without an anchor."""
        anchor = self._vector(self._anchor)
        if anchor is None:
            return vector.new_zeros(())
        return self._distance(vector, self._anchor) / (anchor.norm() + _LEAST_SIZE)

    def refer(self, step: int, vector: Tensor, groups: Sequence[int], *, is_anchor: bool) -> None:
        """Compare `groups` with the local vector of this step from now on, and what follows an anchor too."""
        former = {self._anchor, *self._since.values()}
        self._since.update(dict.fromkeys(groups, step))
        self._anchor = step if is_anchor else self._anchor
        present = {self._anchor, *self._since.values()}
        for old in former - present:
            self._kept.drop((self._name, "vector", old))
        if step in present:
            self._kept.put((self._name, "vector", step), vector)

    def _distance(self, vector: Tensor, step: int) -> Tensor:
        reference = self._vector(step)
        return vector.new_zeros(()) if reference is None else (vector - reference).norm()

    def _vector(self, step: int) -> Tensor | None:
        return self._kept.get((self._name, "vector", step))
