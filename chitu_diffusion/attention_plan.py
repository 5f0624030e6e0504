"""Which attention a model's blocks hold, and when: one backend, or a lossy one that yields to the exact one.

Attention is a value of a block, so a schedule is an exchange of values between two steps; nothing is patched.
"""

from dataclasses import dataclass, replace

from chitu_core import attention
from chitu_core.attention import Attention, Place, Timed, check_ring, spread
from chitu_core.config import AttentionScheduleConfig, InferConfig
from chitu_core.distributed import ParallelMesh
from chitu_core.distributed.collectives import TokenShard
from chitu_core.timing import Timer
from chitu_diffusion.models.wan import WanDiT


@dataclass(frozen=True)
class AttentionPlan:
    """The chosen self-attention, the exact one that may stand in for it, and the cross-attention."""

    chosen: Attention
    exact: Attention
    cross: Attention
    schedule: AttentionScheduleConfig
    timer: Timer | None = None  # of ranks that share a sequence: it counts calls of self-attention
    ranks: int = 1

    @property
    def name(self) -> str:
        """The self-attention backend."""
        return self.chosen.name

    @property
    def cross_name(self) -> str:
        """The cross-attention backend."""
        return self.cross.name

    def spread(
        self, mesh: ParallelMesh, tokens: TokenShard | None, timer: Timer | None = None
    ) -> "AttentionPlan":
        """The same for a rank that holds a part of each sequence; cross-attention needs no other rank."""
        if tokens is None:
            return self
        chosen = spread(self.chosen, mesh, tokens)
        exact = chosen if self.exact is self.chosen else spread(self.exact, mesh, tokens)
        return replace(self, chosen=chosen, exact=exact, timer=timer, ranks=mesh.degrees.cp)

    def install(self, dit: WanDiT) -> None:
        """Give every block its attention."""
        for layer, block in enumerate(dit.block_list()):
            is_exact = layer in self.schedule.exact_layers
            block.self_attn.attention = self._timed(self.exact if is_exact else self.chosen)
            block.cross_attn.attention = self.cross

    def enter_step(self, dit: WanDiT, step: int, total: int) -> None:
        """Exchange the blocks' attention as the schedule says; `step` counts in the request's own run."""
        if not self._has_exact_steps:
            return
        wanted = self._timed(self.exact if self._is_exact_step(step, total) else self.chosen)
        for layer, block in enumerate(dit.block_list()):
            if layer not in self.schedule.exact_layers:
                block.self_attn.attention = wanted

    def approximations(self, total: int) -> tuple[str, ...]:
        """What a run of `total` steps approximated, in words for its record."""
        lossy_steps = sum(not self._is_exact_step(step, total) for step in range(total))
        if self.chosen.is_exact or not lossy_steps:
            return ()
        layers = ", ".join(map(str, self.schedule.exact_layers))
        exact_layers = f", blocks {layers} excepted" if layers else ""
        return (f"self-attention: {self.name} in {lossy_steps} of {total} steps{exact_layers}",)

    def _timed(self, attention: Attention) -> Attention:
        return attention if self.timer is None else Timed(attention, self.timer, f"cp{self.ranks}_attn")

    @property
    def _has_exact_steps(self) -> bool:
        return bool(self.schedule.exact_first_steps or self.schedule.exact_last_steps)

    def _is_exact_step(self, step: int, total: int) -> bool:
        return step < self.schedule.exact_first_steps or step >= total - self.schedule.exact_last_steps


def plan_attention(infer: InferConfig, place: Place, num_layers: int, ring: int = 1) -> AttentionPlan:
    """Choose and make the backends that the configuration names, for `place` and a ring of `ring` ranks.

    Raises ValueError for an unknown name, a backend that a ring cannot use or a schedule that cannot apply,
    RuntimeError for a backend that cannot run.
    """
    options = {"sparsity_ratio": infer.attn_config.sparsity_ratio}
    name = attention.choose(infer.attn_type, place, key="infer.attn_type")
    cross_name = attention.choose(infer.cross_attn_type, place, key="infer.cross_attn_type", cross=True)
    chosen, cross = (attention.create(one, place, **options) for one in (name, cross_name))
    exact, schedule = chosen, infer.attn_schedule
    if schedule.is_set:
        beyond = [layer for layer in schedule.exact_layers if layer >= num_layers]
        if beyond:
            raise ValueError(
                f"infer.attn_schedule.exact_layers={beyond}: the model has blocks 0 to {num_layers - 1}"
            )
        if chosen.is_exact:
            remedy = "choose a lossy attn_type, or leave infer.attn_schedule at 0"
            raise ValueError(
                f"infer.attn_schedule is set, but infer.attn_type={infer.attn_type} is exact; {remedy}"
            )
    if not chosen.is_exact:
        exact = attention.create(attention.choose("auto", place, key="infer.attn_schedule"), place)
    for kernel in (chosen, exact):
        check_ring(kernel, ring)
    return AttentionPlan(chosen, exact, cross, schedule)
