"""The ways to start ranks: plain Python, torchrun, srun. Each can check, and give arguments and environment.

Nothing is started here, and no value meets a shell. Source: mission.md 2.4."""

import getpass
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from chitu_core.launch_settings import Settings, overridden, rank_count

# What a rank is told. The launcher may itself be run from a rank's shell, and that job is not this one.
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "TORCHELASTIC_USE_AGENT_STORE",  # set by torchrun: rank 0 shall not open the store
)
NVIDIA_SMI_TIMEOUT_S = 60  # its first call after a boot loads the driver
SRUN_VARIABLES = {
    "SRUN_PARTITION": "launch.srun.partition",
    "SRUN_CPUS_PER_GPU": "launch.srun.cpus_per_gpu",
    "SRUN_MEM_PER_GPU": "launch.srun.mem_per_gpu",
    "SRUN_JOB_NAME": "launch.srun.job_name",
}


class Backend(NamedTuple):
    """One way to start ranks."""

    check: Callable[[Settings, str], None]  # of settings and Python: raises ValueError where it cannot work
    command: Callable[[Settings, str, list[str]], list[str]]  # of settings, Python, script with arguments
    exports: Callable[[Settings, Mapping[str, str]], dict[str, str]]  # of settings and inherited environment


def pick(settings: Settings) -> str:
    """The name in BACKENDS that launch.backend means on this machine."""
    named: str = settings["launch.backend"]
    if named != "auto":
        return named
    if shutil.which("srun") is not None:
        return "srun"
    return "torchrun" if rank_count(settings) > 1 else "local"


def _check_local(settings: Settings, _python: str) -> None:
    if (total := rank_count(settings)) > 1:
        remedy = "take launch.backend torchrun (one node) or srun, or set both to 1"
        raise ValueError(
            f"launch.backend local starts one rank, num_nodes x gpus_per_node is {total}; {remedy}"
        )


def _local_command(_settings: Settings, python: str, program: list[str]) -> list[str]:
    return [python, *program]


def _local_exports(_settings: Settings, _inherited: Mapping[str, str]) -> dict[str, str]:
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def _check_torchrun(settings: Settings, python: str) -> None:
    nodes, per_node = settings["launch.num_nodes"], settings["launch.gpus_per_node"]
    if nodes > 1:
        remedy = "several need Slurm: put srun on PATH (launch.backend srun), or set launch.num_nodes to 1"
        raise ValueError(f"launch.num_nodes is {nodes}, torchrun starts one node; {remedy}")
    probe = "import importlib.util as util, sys; sys.exit(util.find_spec('torch') is None)"
    if subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode:
        remedy = "install torch there, or set CHITU_PYTHON_BIN to a Python that has it"
        raise ValueError(f"launch.backend torchrun: {python} has no torch; {remedy}")
    if overridden(settings, "infer.op_impl") == "cpu":
        return
    if 0 < (there := _gpu_count()) < per_node:
        remedy = f"set it to {there} or less"
        raise ValueError(f"launch.gpus_per_node is {per_node}, this machine has {there} GPU(s); {remedy}")


def _gpu_count() -> int:
    """The GPUs that nvidia-smi lists; 0 where it cannot be run, as on a machine for CPU ranks."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())  # parts of one are indented


def _torchrun_command(settings: Settings, python: str, program: list[str]) -> list[str]:
    per_node = str(settings["launch.gpus_per_node"])
    flags = ["--standalone", "--nproc-per-node", per_node]
    # NOTE without `--` torchrun would try its own options on arguments of the script that begin with a dash.
    return [python, "-m", "torch.distributed.run", *flags, "--", *program]


def _torchrun_exports(settings: Settings, inherited: Mapping[str, str]) -> dict[str, str]:
    """An equal share of the cores for each rank; torchrun itself would take 1, and warn."""
    if "OMP_NUM_THREADS" in inherited or settings["launch.gpus_per_node"] == 1:
        return {}
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // settings["launch.gpus_per_node"]))}


def _check_srun(_settings: Settings, _python: str) -> None:
    if shutil.which("srun") is None:
        remedy = "install Slurm's client, or take launch.backend torchrun (one node) or local (one rank)"
        raise ValueError(f"launch.backend srun: there is no srun on PATH; {remedy}")


def _srun_command(settings: Settings, python: str, program: list[str]) -> list[str]:
    flags = [
        f"--nodes={settings['launch.num_nodes']}",
        f"--ntasks={rank_count(settings)}",
        f"--ntasks-per-node={settings['launch.gpus_per_node']}",
        f"--job-name={_user()}.{settings['launch.srun.job_name']}",
        f"--partition={settings['launch.srun.partition']}",
        *_resources(settings),
        "--kill-on-bad-exit=1",
        "--export=ALL",
        "--quit-on-interrupt",  # else the first Ctrl-C only asks for the state of the job
    ]
    rank = [python, "-m", "chitu_core.slurm_rank", *program]
    return ["srun", *flags, *settings["launch.srun.extra"], *rank]


def _resources(settings: Settings) -> list[str]:
    gres, cpus = settings["launch.srun.gres"], settings["launch.srun.cpus_per_gpu"]
    if gres == "none":
        return [f"--cpus-per-task={cpus}"]
    gres = gres or f"gpu:{settings['launch.gpus_per_node']}"
    return [
        f"--gres={gres}",
        f"--cpus-per-gpu={cpus}",
        f"--mem-per-gpu={settings['launch.srun.mem_per_gpu']}M",
    ]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return str(os.getuid())


def _srun_exports(settings: Settings, inherited: Mapping[str, str]) -> dict[str, str]:
    exports = {name: str(settings[path]) for name, path in SRUN_VARIABLES.items()}
    exports |= {"NCCL_GRAPH_MIXING_SUPPORT": "0", "NCCL_GRAPH_REGISTER": "0"}
    exports["LOCAL_WORLD_SIZE"] = str(settings["launch.gpus_per_node"])
    exports["MASTER_PORT"] = str(random.randint(50000, 59999))  # jobs may share a node
    if "RANK" not in inherited and inherited.get("MASTER_ADDR"):  # an operator's, not that of another job
        exports["MASTER_ADDR"] = inherited["MASTER_ADDR"]
    return exports


BACKENDS = {
    "local": Backend(_check_local, _local_command, _local_exports),
    "torchrun": Backend(_check_torchrun, _torchrun_command, _torchrun_exports),
    "srun": Backend(_check_srun, _srun_command, _srun_exports),
}
