"""How many ranks do what: data, guidance branches, ring, Ulysses. Arithmetic alone, before any process group.

Source: USP (arXiv:2405.07719) for Ulysses inside ring; the order of axes puts the chattiest on nearest ranks.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where one rank stands on each axis."""

    dp: int
    cfg: int
    ring: int
    ulysses: int


@dataclass(frozen=True)
class Degrees:
    """Sizes of the mesh, outermost axis first: rank = ulysses + U * (ring + R * (cfg + C * dp))."""

    dp: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def cp(self) -> int:
        """Ranks that share one sequence."""
        return self.ring * self.ulysses

    @property
    def replica(self) -> int:
        """Ranks that work on one task."""
        return self.cfg * self.cp

    @property
    def world(self) -> int:
        """All ranks."""
        return self.dp * self.replica

    def place(self, rank: int) -> Place:
        """Where `rank` stands."""
        rest, ulysses = divmod(rank, self.ulysses)
        rest, ring = divmod(rest, self.ring)
        dp, cfg = divmod(rest, self.cfg)
        return Place(dp, cfg, ring, ulysses)

    def rank(self, place: Place) -> int:
        """The rank that stands at `place`."""
        return place.ulysses + self.ulysses * (place.ring + self.ring * (place.cfg + self.cfg * place.dp))

    def __str__(self) -> str:
        return f"dp {self.dp} x cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses}"


def plan_degrees(
    world: int,
    heads: int,
    up_limit: int,
    needs_cfg: bool,
    *,
    dp: int = 1,
    cfg: int | str = "auto",
    cp: int | str = "auto",
    ranks_per_node: int | None = None,
) -> Degrees:
    """Share out `world` ranks: CFG 2 where guidance needs it, then Ulysses as large as is legal, then ring.

    Ulysses divides the context-parallel size and `heads`, is at most `up_limit`, and stays inside a node of
    `ranks_per_node` consecutive ranks. What is not `auto` is kept, or refused with the legal values.

    Raises ValueError naming key and value.
    """
    replica = _divide(world, dp)
    halves = [size for size in (1, 2) if replica % size == 0]
    if cfg != "auto" and cfg not in halves:
        _refuse("cfg_size", cfg, f"{replica} rank(s) work on a task", halves)
    if cp == "auto":
        chosen = (2 if needs_cfg and 2 in halves else 1) if cfg == "auto" else int(cfg)
    else:
        legal = [replica // size for size in (halves if cfg == "auto" else [int(cfg)])]
        if cp not in legal:
            shares = "cfg_size x cp_size x infer.dp_size"
            _refuse("cp_size", cp, f"{shares} must be the {world} rank(s) there are", legal)
        chosen = replica // int(cp)
    context = replica // chosen
    node = world if ranks_per_node is None else ranks_per_node
    ulysses = max(
        size
        for size in range(1, min(context, up_limit) + 1)
        if not (context % size or heads % size or node % size)
    )
    return Degrees(dp, chosen, context // ulysses, ulysses)


def _divide(world: int, dp: int) -> int:
    if world % dp:
        legal = [size for size in range(1, world + 1) if world % size == 0]
        raise ValueError(f"infer.dp_size={dp}: must divide the {world} rank(s); legal: {_listed(legal)}")
    return world // dp


def _refuse(name: str, value: int | str, why: str, legal: list[int]) -> None:
    raise ValueError(f"infer.diffusion.{name}={value}: {why}; legal: {_listed(legal)} or auto")


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, sorted(values)))
