"""DiTango: attention to far keys changes slowly, so old states of it are merged with fresh near ones.

Ranks that share a sequence are cut into groups of neighbours. Attention over one group's keys is a state, an
output and its log-sum-exp, and states of disjoint keys merge exactly (arXiv:2310.01889, section 3). At an
anchor step all states are computed and kept; later, those whose expected error is large. For the others
nothing travels and nothing is computed. The expected error is the weight of a group, frozen at the anchor,
times the change of the rank's attention over its own keys, which are always computed.

Expected errors are averaged over the branches of guidance where a rank computes both. Where two ranks share
the branches, those of the conditional one decide for both.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chitu_core.attention import Ring, Ulysses
from chitu_core.distributed.collectives import gather_heads, scatter_heads
from chitu_diffusion.flex_cache._base import FlexCache, Model, Sizes
from chitu_diffusion.flex_cache._checks import check_number, check_whole
from chitu_diffusion.flex_cache._ditango_exchange import Rotation, State, join
from chitu_diffusion.flex_cache._ditango_picture import ANCHOR, COMPUTED, FORCED, REUSED, Cells
from chitu_diffusion.flex_cache._ditango_plan import Planner
from chitu_diffusion.flex_cache._ditango_states import LayerStates
from chitu_diffusion.flex_cache._picture import Picture
from chitu_diffusion.guidance import Prediction
from chitu_diffusion.seam import Branch, Compute, Site

logger = logging.getLogger(__name__)

_GATE = 0.6  # of the ratio


@dataclass(frozen=True)
class Knobs:
    """`group_size` ranks are one group (None: 2 if they fit, else as few as do); a mean relative change of
    `gate` makes the next step an anchor; the `quantile` of expected errors is the threshold; a state older
    than `tau_max` steps is computed."""

    group_size: int | None = None
    gate: float | None = None
    quantile: float | None = None
    tau_max: int = 8

    def __post_init__(self) -> None:
        if self.group_size is not None:
            check_whole("group_size", self.group_size, 1)
        check_number("gate", self.gate, 0)
        check_number("quantile", self.quantile, 0, 1)
        check_whole("tau_max", self.tau_max, 1)


@dataclass(frozen=True)
class Settings:
    """Knobs on the ranks that there are."""

    group_size: int
    gate: float
    quantile: float
    tau_max: int
    groups: int
    members: int  # ring positions in a group

    @property
    def first(self) -> int:
        """The first group that has keys: a rank's own ones are no part of group 0."""
        return 0 if self.members > 1 else 1


class Strategy(FlexCache):
    """Reuses attention states of groups of ranks. At least one step at either end is computed."""

    knobs_type = Knobs
    sites = frozenset({"attention"})

    @classmethod
    def idle(cls, model: Model) -> str | None:
        if model.ring * model.ulysses > 1:
            return None
        return "it reuses attention to the keys of other ranks, and none share a sequence here"

    @classmethod
    def complete(cls, asked: Knobs, ratio: float, model: Model) -> Settings:
        size = group_size(asked.group_size, model.ring, model.ulysses)
        if model.has_attention_schedule:
            remedy = "leave the schedule at 0, or choose another strategy"
            raise ValueError(
                f"flexcache=ditango: it takes one attention, and infer.attn_schedule two; {remedy}"
            )
        return Settings(
            group_size=size,
            gate=_GATE * ratio if asked.gate is None else asked.gate,
            quantile=ratio if asked.quantile is None else asked.quantile,
            tau_max=asked.tau_max,
            groups=model.ring * model.ulysses // size,
            members=size // model.ulysses,
        )

    @classmethod
    def footprint(cls, knobs: Settings, sizes: Sizes) -> int:
        """States and weights of all groups; local vectors of the anchor and of every state's step.

        Ulysses does not matter: a rank holds more tokens of as many fewer heads.
        """
        decided, number = knobs.groups - knobs.first, torch.float32.itemsize
        vector = sizes.tokens * sizes.heads * number  # a number a token and head, as an LSE has
        layer = decided * (sizes.feature + vector + number) + (decided + 1) * vector
        return sizes.branches * sizes.num_layers * layer

    def prepare(self) -> None:
        attention, settings = self.services.attention, self.knobs
        self._ulysses = attention if isinstance(attention, Ulysses) else None
        ring = attention if self._ulysses is None else self._ulysses.inner
        assert isinstance(ring, Ring), "a layout without a ring was refused"
        self._layers = self.course.model.num_layers
        self._decided = range(settings.first, settings.groups)
        self._rotation = Rotation(ring, settings.members)
        limits = {"gate": settings.gate, "quantile": settings.quantile, "tau_max": settings.tau_max}
        self._planner = Planner(self._layers, settings.groups, first=settings.first, **limits)
        self._cells = Cells(self._layers, settings.groups)
        self._states: dict[tuple[Branch, int], LayerStates] = {}
        self._measured: list[Tensor] = []  # in the present step, by branch and layer: errors, then a change

    def enter_step(self, index: int) -> None:
        super().enter_step(index)
        self._computed: list[list[bool]] = self._planner.computed.tolist()
        self._measured.clear()

    def forget(self) -> None:
        super().forget()
        self._states.clear()
        self._planner.reset()

    @property
    def is_forced(self) -> bool:
        """Whether the present step must be computed; at least the first and the last one must."""
        return self._forces(self.step.index)

    @property
    def is_anchor(self) -> bool:
        """Whether the present step is an anchor; to be asked until its velocity is there."""
        return self._planner.is_anchor and not self.is_forced

    def _forces(self, index: int) -> bool:
        return index >= len(self.course.steps) - 1 or self.course.is_forced(index)

    def velocity(self, compute: Callable[[], Prediction], latent: Tensor) -> Tensor:
        guided = super().velocity(compute, latent)
        if not self.is_forced:
            self._plan()
        return guided

    def around(self, site: Site, compute: Compute, x: Any, signal: Tensor) -> Tensor:  # noqa: ARG002
        assert site.layer is not None
        self._record(site.layer)
        if self.is_forced and self._forces(self.step.index + 1):
            return compute(x)
        with self.services.span(self._span_of(site.layer)):
            if self._ulysses is None:
                return self._attend(site.layer, *x)
            q, k, v = scatter_heads(x, self._ulysses.group)
            return gather_heads(self._attend(site.layer, q, k, v), self._ulysses.group)

    def _span_of(self, layer: int) -> str:
        """The name that a layer's attention is timed by; `n` groups are computed in `sele_attn_n`."""
        if self.is_forced or self.is_anchor:
            return "anchor_attn"
        return f"sele_attn_{sum(self._computed[layer])}"

    def picture(self) -> Picture | None:
        return self._cells.picture("ditango_policy_step_layer_group")

    def _record(self, layer: int) -> None:
        for group, is_computed in enumerate(self._computed[layer]):
            code = COMPUTED if is_computed else REUSED
            if self.is_forced:
                code = FORCED
            elif self.is_anchor:
                code = ANCHOR
            self._cells.mark(self.step.index, layer, group, code)
            if group in self._decided:
                self.tally.count(self.step.index, "attention", is_reused=code == REUSED)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention by parts of q, k, v [1, S, H, D] as a ring takes them; what it showed is measured.

        The step before the first anchor comes here too, so that the anchor has something to compare with.
        """
        kept, real = self._kept_of(layer), self._rotation.real_tokens(q.shape[1])
        states = self._rotation.attend(q, k, v, self._computed[layer])
        local = total = next(states)
        for group, is_computed in enumerate(self._computed[layer]):
            state = next(states) if is_computed else kept.get(group)
            total = join(total, state)
            if is_computed and group in self._decided and not self.is_forced:
                kept.put(group, state, q.dtype)
        vector = (q if local is None else local.out)[:, :real].mean(-1, dtype=torch.float32)  # [1, S, H]
        self._measure(layer, local, vector)
        assert total is not None, "some rank has a token"
        return total.out.to(q.dtype)

    def _measure(self, layer: int, local: State | None, vector: Tensor) -> None:
        """Errors of the states as they were before this step, and the change since the anchor."""
        kept = self._kept_of(layer)
        groups = [group for group in self._decided if self._computed[layer][group]]
        if not self.is_forced:
            if self.is_anchor:
                kept.weigh(local, vector.shape[1])
            change = vector.new_zeros(()) if self.is_anchor else kept.change(vector)
            self._measured.append(torch.cat((kept.errors(vector), change[None])))
            self._is_real = vector.shape[1] > 0
        kept.refer(self.step.index, vector, groups, is_anchor=self.is_anchor)

    def _kept_of(self, layer: int) -> LayerStates:
        key = (self.branch, layer)
        if key not in self._states:
            self._states[key] = LayerStates(self.kept, key, self._decided)
        return self._states[key]

    def _plan(self) -> None:
        """Agree with the other ranks on what was measured, and plan the next step. The one host read of a
        step. Ranks that hold padding alone take no part in a mean."""
        measured = torch.stack(self._measured).unflatten(0, (-1, self._layers)).mean(0)  # of the branches
        counts = measured.new_full((1,), float(self._is_real))
        with self.services.span("ditango_plan_sync"):
            *values, share = self.services.agree(torch.cat((measured.flatten() * counts, counts))).tolist()
        table = torch.tensor(values, dtype=torch.float64).view(self._layers, -1) / share
        errors = table.new_zeros(self._layers, self.knobs.groups)
        errors[:, self.knobs.first :] = table[:, :-1]
        mode = "anchor" if self.is_anchor else "selective"
        self._planner.advance(self.step.index, errors, float(table[:, -1].mean()))
        self._log(mode, errors, table[:, -1])

    def _log(self, mode: str, errors: Tensor, changes: Tensor) -> None:
        planner = self._planner
        logger.debug(
            "ditango step=%d %s, last branch %s: epsilon=%.4g next=%s changes=%s errors=%s computed=%s",
            self.step.index,
            mode,
            self.branch,
            planner.epsilon,
            "anchor" if planner.is_anchor else "selective",
            [round(value, 4) for value in changes.tolist()],
            [round(value, 4) for value in errors.mean(0).tolist()],
            [round(value, 2) for value in planner.computed.double().mean(0).tolist()],
        )


def group_size(asked: int | None, ring: int, ulysses: int) -> int:
    """Ranks in a group, of which there must be two or more, with Ulysses inside: 2, or the fewest that fit.

    Raises ValueError where `asked`, or any size, does not fit, with the remedy.
    """
    ranks = ring * ulysses
    legal = [size for size in range(1, ranks) if ranks % size == 0]
    fitting = [size for size in legal if size % ulysses == 0]
    if asked is None and fitting:
        return 2 if 2 in fitting else fitting[0]
    if asked in fitting:
        return asked
    size = asked or max(size for size in legal if size <= 2)
    if fitting:
        remedy = f"set group_size to one of {', '.join(map(str, fitting))}"
    elif size in legal:
        remedy = f"set infer.diffusion.up_limit={size}"
    else:
        remedy = f"set infer.diffusion.up_limit=1 and group_size to one of {', '.join(map(str, legal))}"
    rule = f"Ulysses must divide it, and it the {ranks} ranks that share a sequence, at least twice"
    layout = f"ring {ring} x ulysses {ulysses}"
    raise ValueError(f"flexcache=ditango: group_size={size} does not fit {layout}: {rule}; {remedy}")
