"""Several ranks: who does what, their process groups, and what they tell each other."""

from chitu_core.distributed.channel import RankChannel
from chitu_core.distributed.degrees import Degrees, plan_degrees
from chitu_core.distributed.mesh import ParallelMesh, open_channel, open_mesh
from chitu_core.distributed.watchdog import RankFailure

__all__ = [
    "Degrees",
    "ParallelMesh",
    "RankChannel",
    "RankFailure",
    "open_channel",
    "open_mesh",
    "plan_degrees",
]
