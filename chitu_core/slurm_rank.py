"""One rank under srun: takes its place from Slurm's variables, then becomes the user's script.

The launcher starts it as `python -m chitu_core.slurm_rank SCRIPT ARGUMENTS...`. Nothing heavy is imported: a
rank that cannot know its place ends at once. Source: mission.md 2.4."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

FROM_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def main(argv: Sequence[str]) -> NoReturn:
    """Run `argv`, a script and its arguments, in this process. Raises SystemExit with an `Error:` line."""
    try:
        variables = rank_variables(os.environ)
    except ValueError as error:
        sys.exit(f"Error: {error}")
    os.execve(sys.executable, [sys.executable, *argv], os.environ | variables)


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed reads, from what Slurm sets. Raises ValueError naming the missing variable."""
    missing = [name for name in FROM_SLURM.values() if not environment.get(name)]
    if missing:
        raise ValueError(f"{missing[0]} is not set; start this by srun: bash run.sh with launch.backend srun")
    variables = {name: environment[source] for name, source in FROM_SLURM.items()}
    return variables | {"MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment)}


def _first_host(environment: Mapping[str, str]) -> str:
    """The node of rank 0; a step may use fewer nodes than its job has."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if nodes and shutil.which("scontrol") is not None:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False
        )
        if listed.returncode == 0 and listed.stdout.strip():
            return listed.stdout.split()[0]
    remedy = "put scontrol on PATH, or export MASTER_ADDR as the host of rank 0"
    raise ValueError(f"MASTER_ADDR is not set, and scontrol names no host of SLURM_JOB_NODELIST; {remedy}")


if __name__ == "__main__":
    main(sys.argv[1:])
