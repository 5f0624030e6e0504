"""One mesh of ranks, data x cfg x ring x ulysses, and a process group for every axis that is longer than one.

A mesh of one rank has no group and needs no `torch.distributed`.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported in fact

from chitu_core.distributed.channel import RankChannel
from chitu_core.distributed.collectives import Agreement, Line, Pair, TokenShard
from chitu_core.distributed.degrees import Degrees, Place
from chitu_core.distributed.watchdog import Watchdog
from chitu_core.environment import Environment

logger = logging.getLogger(__name__)

START_TIMEOUT = timedelta(minutes=10)  # for all ranks to appear
DEVICE_TIMEOUT = timedelta(minutes=30)  # of one collective; a rank may be compiling
CONTROL_TIMEOUT = timedelta(
    days=30
)  # a rank waits for orders as long as rank 0 has none; the watchdog sees death


@dataclass(frozen=True)
class ParallelMesh:
    """This rank's place among the others. A group of size one is None."""

    degrees: Degrees = field(default_factory=Degrees)
    rank: int = 0
    ulysses: dist.ProcessGroup | None = None
    ring: dist.ProcessGroup | None = None
    cp: dist.ProcessGroup | None = None  # ring x ulysses: ranks that share a sequence
    cfg: dist.ProcessGroup | None = None
    replica: dist.ProcessGroup | None = None  # cfg x cp: ranks that work on one task
    control: dist.ProcessGroup | None = None  # all ranks, on the host
    watchdog: Watchdog | None = None

    @property
    def place(self) -> Place:
        """Where this rank stands on each axis."""
        return self.degrees.place(self.rank)

    @property
    def is_leader(self) -> bool:
        """Whether this rank writes the files of its replica."""
        return self.rank % self.degrees.replica == 0

    @property
    def device_groups(self) -> list[dist.ProcessGroup]:
        """Every group that tensors travel in, once: axes with the same ranks share one."""
        groups = (self.ulysses, self.ring, self.cp, self.cfg, self.replica)
        return list(dict.fromkeys(group for group in groups if group is not None))

    def replica_ranks(self, dp: int) -> range:
        """The ranks of one replica."""
        return range(dp * self.degrees.replica, (dp + 1) * self.degrees.replica)

    def channel(self) -> RankChannel:
        """Messages between all ranks."""
        return RankChannel(self.control)

    def tokens(self) -> TokenShard | None:
        """How sequences are split; None where one rank holds all."""
        return None if self.cp is None else TokenShard(self.cp)

    def branches(self) -> Pair | None:
        """The two ranks that share the branches of guidance; None where one rank computes both."""
        return None if self.cfg is None else Pair(self.cfg)

    def agreement(self) -> Agreement:
        """What makes a number the same on all ranks of this replica."""
        return Agreement(self.cp, self.branches())

    @property
    def cp_index(self) -> int:
        """Which part of a sequence this rank holds."""
        return self.place.ring * self.degrees.ulysses + self.place.ulysses

    def line(self) -> Line | None:
        """All ranks of this replica; None where there is one."""
        return None if self.replica is None else Line(self.replica)

    def guard(self, doing: str, *, everybody: bool = False) -> AbstractContextManager[None]:
        """Around work in which the ranks of a replica, or all, wait for each other; see `Watchdog.guard`."""
        is_alone = self.replica is None and not everybody
        return nullcontext() if self.watchdog is None or is_alone else self.watchdog.guard(doing)

    def abandon(self, why: str) -> None:
        """Leave without the others, who end when they hear of it."""
        if self.watchdog is not None and not self.watchdog.has_reported:
            self.watchdog.report(why)

    def close(self) -> None:
        """Wait for all ranks, then let go of the groups. The default group stays, as a process has one."""
        if self.control is None:
            return
        dist.barrier(group=self.control)
        if self.watchdog is not None:
            self.watchdog.stop()
        dist.barrier(group=self.control)  # nobody's store goes while somebody still reads it
        for group in (*self.device_groups, self.control):
            dist.destroy_process_group(group)


def open_mesh(degrees: Degrees, environment: Environment, device: torch.device) -> ParallelMesh:
    """Join the other ranks and make every group; NCCL on a GPU, gloo on a CPU.

    Raises ValueError, before any group exists, for a world that `degrees` does not fill, for a missing
    MASTER_ADDR or MASTER_PORT.
    """
    if degrees.world != environment.world_size:
        raise ValueError(f"WORLD_SIZE={environment.world_size}: the mesh {degrees} has {degrees.world} ranks")
    if degrees.world == 1:
        return ParallelMesh()
    address, port = _join(environment)
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT, group_desc="control")
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=START_TIMEOUT)
    watchdog = Watchdog(store, environment.rank, degrees.world)
    dist.barrier(group=control)
    watchdog.start()
    mesh = ParallelMesh(degrees, environment.rank, control=control, watchdog=watchdog)
    mesh = _with_groups(mesh, "nccl" if device.type == "cuda" else "gloo")
    _warm_up(mesh, device)
    logger.info("%d ranks: %s", degrees.world, degrees)
    return mesh


@contextmanager
def open_channel(environment: Environment) -> Iterator[RankChannel]:
    """Messages between all ranks where there is no mesh, such as after an engine; all must open it.

    Raises ValueError for a missing MASTER_ADDR or MASTER_PORT.
    """
    if environment.world_size == 1:
        yield RankChannel(None)
        return
    _join(environment)
    group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT, group_desc="channel")
    yield RankChannel(group)
    dist.barrier(group=group)  # nobody leaves while somebody still listens
    dist.destroy_process_group(group)


def _join(environment: Environment) -> tuple[str, int]:
    """Join the process's default group, if it has none; address and port of rank 0."""
    address, port = environment.master_addr, environment.master_port
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if value is None:
            remedy = "start ranks by run.sh, torchrun or srun"
            raise ValueError(f"{name} is not set, but WORLD_SIZE={environment.world_size}; {remedy}")
    assert address is not None
    assert port is not None
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo", rank=environment.rank, world_size=environment.world_size, timeout=START_TIMEOUT
        )
    return address, port


def _with_groups(mesh: ParallelMesh, backend: str) -> ParallelMesh:
    """Make the groups of every axis; all ranks make all of them, in one order, as `new_group` wants it."""
    degrees, world = mesh.degrees, range(mesh.degrees.world)
    own: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def group_along(name: str, axes: Sequence[str]) -> dist.ProcessGroup | None:
        fixed = [axis for axis in ("dp", "cfg", "ring", "ulysses") if axis not in axes]
        sets: dict[tuple[int, ...], list[int]] = {}
        for rank in world:
            place = degrees.place(rank).__dict__
            sets.setdefault(tuple(place[axis] for axis in fixed), []).append(rank)
        mine = None
        for ranks in sets.values():
            members = tuple(ranks)
            if len(members) == 1:
                continue
            if members not in own:
                own[members] = dist.new_group(ranks, DEVICE_TIMEOUT, backend, group_desc=name)
            mine = own[members] if mesh.rank in members else mine
        return mine

    return replace(
        mesh,
        ulysses=group_along("ulysses", ["ulysses"]),
        ring=group_along("ring", ["ring"]),
        cp=group_along("cp", ["ring", "ulysses"]),
        cfg=group_along("cfg", ["cfg"]),
        replica=group_along("replica", ["cfg", "ring", "ulysses"]),
    )


def _warm_up(mesh: ParallelMesh, device: torch.device) -> None:
    """Open every connection now: the first use of a group takes up to a second, and all must take part."""
    number = torch.zeros(1, device=device)
    for group in mesh.device_groups:
        dist.all_reduce(number, group=group)
