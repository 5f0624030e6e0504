"""What every cache strategy is: an object of one task that may answer for a part of a computation.

A model routes its sites to it (`around=`), the generator the guided prediction (`velocity`). A strategy
decides from what is equal on all ranks, and keeps this rank's tokens alone. The first `warmup` and the last
`cooldown` steps are computed, so is the first one of an expert, and so is whatever nothing is kept for.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from chitu_core.attention import Attention
from chitu_diffusion.flex_cache._calibration import Calibration
from chitu_diffusion.flex_cache._kept import Kept
from chitu_diffusion.flex_cache._picture import Picture, timeline
from chitu_diffusion.flex_cache._tally import Tally
from chitu_diffusion.guidance import Prediction
from chitu_diffusion.seam import Branch, Compute, Site

Agree = Callable[[Tensor], Tensor]  # the mean over ranks that share a sequence, of the conditional branch
TimeSignal = Callable[[str, Sequence[int]], Tensor]  # expert, timesteps [N] -> modulation [N, 6, d] fp32

FORCED, COMPUTED, REUSED = 0, 1, 2  # codes of a decision picture
GREY, ORANGE, BLUE = (160, 160, 160), (255, 180, 40), (40, 140, 255)


@dataclass(frozen=True)
class Model:
    """What a strategy may know of a model and its ranks when a request comes in."""

    name: str
    num_layers: int
    experts: tuple[str, ...]
    calibration: Calibration
    ring: int = 1
    ulysses: int = 1
    has_attention_schedule: bool = False  # some steps or blocks hold another attention than `Services` has


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a strategy may keep on one rank."""

    feature: int  # a value a token [tokens, d] in the dtype of matrix products
    stream: int  # the same in fp32
    latent: int  # a latent in fp32
    num_layers: int
    branches: int  # that the rank computes
    heads: int  # of self-attention
    tokens: int  # of this rank, with padding


@dataclass(frozen=True)
class Step:
    """One denoising step, known before the run begins."""

    index: int
    timestep: int
    sigma: float
    sigma_next: float
    expert: str


@dataclass(frozen=True)
class Course:
    """A run before its first step."""

    model: Model
    steps: tuple[Step, ...]
    warmup: int
    cooldown: int
    shift: float  # of the noise levels, as the sampler takes it
    tokens: int  # of this rank, without padding
    dtype: torch.dtype  # in which features are kept

    def is_forced(self, index: int) -> bool:
        """Whether a step must be computed whatever a strategy thinks."""
        starts_expert = index == 0 or self.steps[index].expert != self.steps[index - 1].expert
        return starts_expert or index < self.warmup or index >= len(self.steps) - self.cooldown


@dataclass(frozen=True)
class Services:
    """What a strategy may ask of the networks and of other ranks, inside a step."""

    agree: Agree
    time_signal: TimeSignal
    attention: Attention  # of the blocks, with what shares a sequence around its kernel
    span: Callable[[str], AbstractContextManager[object]] = nullcontext  # what is done inside is timed


class FlexCache(ABC):
    """Reuse in one task. A subclass says which `sites` it wants and what is reused when.

    The generator calls `enter_step`, then `velocity`, inside which a model calls `around` for each branch
    after `enter_branch`, then `leave_step`.
    """

    name: ClassVar[str]  # of the strategy: its module's
    knobs_type: ClassVar[Any]  # frozen dataclass of expert settings; None where the ratio decides
    sites: frozenset[str] = frozenset()
    palette: tuple[tuple[int, int, int], ...] = (GREY, ORANGE, BLUE)  # of the picture, by code

    def __init_subclass__(cls) -> None:
        cls.name = cls.__module__.rpartition(".")[2]

    def __init__(self, course: Course, knobs: Any, services: Services) -> None:
        self.course = course
        self.knobs = knobs
        self.services = services
        self.kept = Kept()
        self.tally = Tally()
        self.step = course.steps[0]
        self.branch: Branch = "guided"
        self.fresh: tuple[bool, ...] = ()  # by step, of a strategy whose schedule is known before

    @classmethod
    @abstractmethod
    def complete(cls, asked: Any, ratio: float, model: Model) -> Any:
        """`asked` with nothing left open, from `ratio` in (0, 1] and the model.

        Raises ValueError where the strategy cannot serve the model, with the remedy.
        """

    @classmethod
    def idle(cls, model: Model) -> str | None:  # noqa: ARG003
        """Why the strategy has nothing to reuse on these ranks, so that none is built; None where it has."""
        return None

    @classmethod
    @abstractmethod
    def footprint(cls, knobs: Any, sizes: Sizes) -> int:
        """Bytes that a task keeps at most on one rank."""

    def picture(self) -> Picture | None:
        """The decisions of the run by step; None where there is nothing to see."""
        return timeline(f"{self.name}_policy_timestep_pos", self.tally.codes, self.palette)

    def remarks(self) -> list[str]:
        """What the user should know of how the strategy is applied to this run."""
        return []

    @abstractmethod
    def prepare(self) -> None:
        """Once, inside the first step: make the schedule."""

    def enter_step(self, index: int) -> None:
        """Begin a step. What another expert left is forgotten."""
        step = self.course.steps[index]
        if index == 0:
            self.prepare()
        elif step.expert != self.step.expert:
            self.forget()
        self.step, self.branch = step, "guided"

    def enter_branch(self, branch: Branch) -> None:
        """The model is about to be called for a branch of the step."""
        self.branch = branch

    def leave_step(self, before: Tensor, after: Tensor, velocity: Tensor) -> None:  # noqa: B027
        """The sampler went from one latent to the next with a velocity, all [C, T, h, w] fp32."""

    def forget(self) -> None:
        """Drop what is kept."""
        self.kept.clear()

    def velocity(self, compute: Callable[[], Prediction], latent: Tensor) -> Tensor:  # noqa: ARG002
        """The guided velocity at `latent` [C, T, h, w]: `compute().guided`, or what stands for it."""
        return compute().guided

    def around(self, site: Site, compute: Compute, x: Any, signal: Tensor) -> Tensor:  # noqa: ARG002
        """`compute(x)`, or what stands for it; see `seam.Around`."""
        reused = self.restore(site, x) if not self.is_forced and self.wants_reuse(site) else None
        self.note(site.kind, is_reused=reused is not None)
        if reused is not None:
            return reused
        out = compute(x)
        self.keep(site, x, out)
        return out

    def wants_reuse(self, site: Site) -> bool:  # noqa: ARG002
        """Whether `site` is to be reused in this step, which is not forced; by default as `fresh` says."""
        return not self.fresh[self.step.index]

    def restore(self, site: Site, x: Tensor) -> Tensor | None:
        """What stands for the site at input x [B, S, d]: x and the change that is kept; None without one."""
        change = self.kept.get((self.branch, site))
        return None if change is None else x + change

    def keep(self, site: Site, x: Tensor, out: Tensor) -> None:
        """Remember what a later step may reuse; by default the change, if the next step is a reused one."""
        following = self.step.index + 1
        if following < len(self.fresh) and not self.fresh[following]:
            self.kept.put((self.branch, site), (out - x).to(self.course.dtype))

    def note(self, kind: str, *, is_reused: bool, code: int = REUSED) -> None:
        """Count a decision and colour its step; the picture shows the conditional branch."""
        self.tally.count(self.step.index, kind, is_reused=is_reused)
        if self.branch != "uncond":
            computed = FORCED if self.is_forced else COMPUTED
            self.tally.mark(self.step.index, code if is_reused else computed)

    @property
    def is_forced(self) -> bool:
        """Whether the present step must be computed."""
        return self.course.is_forced(self.step.index)
