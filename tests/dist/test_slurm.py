"""The launcher under a real Slurm: one controller and one node, on loopback, in a temporary folder.

Needs root and Debian's slurm-wlm and munge. The GPUs that the node claims are two plain device files: Slurm
counts and hands them out, and nothing opens them.
"""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "scontrol", "sinfo")
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin"])
ODD = ["+a='two words'", '+b="it\'s"', "--n=3", "--", "+c=$HOME;*", ""]  # as values may be
START_S, RUN_S = 60, 300  # other work may share the machine
MISSING = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.dist,
    pytest.mark.skipif(
        bool(MISSING), reason=f"NO SLURM: install slurm-wlm and munge for {', '.join(MISSING)}"
    ),
    pytest.mark.skipif(not IS_ROOT, reason="NO SLURM: its daemons are started by root alone"),
]

MUNGE_FILES = {
    "key-file": "key",
    "socket": "socket",
    "pid-file": "pid",
    "log-file": "own.log",
    "seed-file": "seed",
}
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
RECORD = """
import json, os, sys
import torch
from torch import distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(total)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
names += ("SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "CUDA_VISIBLE_DEVICES", "NCCL_GRAPH_REGISTER")
seen = {name: os.environ.get(name) for name in names} | {"total": total.item(), "argv": sys.argv[3:]}
with open(f"rank{dist.get_rank()}.json", "w") as file:
    json.dump(seen, file)
dist.barrier()
dist.destroy_process_group()
"""
WAIT = """
import os, sys, time
from pathlib import Path
started = Path("started" + os.environ["RANK"])
started.with_suffix(".new").write_text(str(os.getpid()))
started.with_suffix(".new").rename(started)
if os.environ["RANK"] == os.environ.get("FAILS"):
    sys.exit(5)
time.sleep(120)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The variables with which srun finds a Slurm of two CPUs and two GPUs that are none."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=free_ports(2)))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    foreign = ("SLURM_", "SRUN_", "CUDA_VISIBLE", "CHITU_", "CONFIG_", "MASTER_")  # of what runs the tests
    variables = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    variables |= {"PATH": SYSTEM_PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}={folder / ('munge.' + file)}" for name, file in MUNGE_FILES.items()]
    with ExitStack() as stack:
        for command in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            log = stack.enter_context((folder / f"{command[0]}.log").open("wb"))
            daemon = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
            stack.callback(stop, daemon)
        wait_until(lambda: state_of_node(variables) == "idle", lambda: logs_in(folder))
        yield variables


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def stop(daemon):
    daemon.terminate()
    try:
        daemon.wait(30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def wait_until(holds, tell):
    """Wait for `holds()`; with `tell()` as the reason of a failure after START_S."""
    end = time.monotonic() + START_S
    while not holds():
        if time.monotonic() > end:
            pytest.fail(f"not so after {START_S} s: {tell()}")
        time.sleep(0.1)


def state_of_node(variables):
    asked = subprocess.run(
        ["sinfo", "-h", "-o", "%T"], env=variables, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()


def logs_in(folder):
    return "\n".join(log.read_text(errors="replace")[-2000:] for log in folder.glob("*.log"))


@pytest.fixture
def job(slurm, tmp_path):
    """A function that starts run.sh in the test's folder on two ranks, and gives the process."""
    resources = {"cpus_per_gpu": 1, "mem_per_gpu": 100, "gres": "none"}

    def start(script, srun=None, variables=None, **sections):
        launch = {"gpus_per_node": 2, "python_script": script, "srun": {**resources, **(srun or {})}}
        content = {"model": {"name": "demo"}, "launch": launch, **sections}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        chosen = {"CHITU_PYTHON_BIN": sys.executable, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            ["bash", str(PROJECT / "run.sh"), "config.yaml"],
            cwd=tmp_path,
            env={**slurm, **chosen, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as in a terminal, whose signals reach the whole group
        )

    return start


def finish(process):
    """Status and output of a run that ends by itself."""
    try:
        out, err = process.communicate(timeout=RUN_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=RUN_S)
        pytest.fail(f"not done in {RUN_S} s\n{out}\n{err}")
    return process.returncode, out, err


@pytest.mark.parametrize(("gres", "devices"), [("none", None), (None, "0,1")])
def test_two_ranks_know_their_places_and_add_up(job, tmp_path, gres, devices):
    (tmp_path / "record.py").write_text(RECORD)
    status, out, err = finish(job("record.py", {"gres": gres, "job_name": "adds up"}, overrides=ODD))
    assert status == 0, err
    assert "  backend: srun (auto)\n" in out
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    ports = {rank.pop("MASTER_PORT") for rank in seen}
    assert len(ports) == 1
    assert 50000 <= int(ports.pop()) <= 59999
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "total": 3.0,
        "argv": ODD,
    }
    common |= {"SLURM_JOB_NAME": f"{getpass.getuser()}.adds up", "SLURM_JOB_PARTITION": "debug"}
    common |= {"CUDA_VISIBLE_DEVICES": devices, "NCCL_GRAPH_REGISTER": "0"}
    assert seen == [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(2)]


def test_a_failed_rank_ends_the_others(job, tmp_path):
    (tmp_path / "wait.py").write_text(WAIT)
    began = time.monotonic()
    status, _, err = finish(job("wait.py", variables={"FAILS": "1"}))
    assert status >= 5, err  # srun gives the highest of all, 143 for a rank that it ended
    assert time.monotonic() - began < 100  # the other rank would sleep for 120


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_ctrl_c_or_sigterm_ends_all_ranks(job, tmp_path, number):
    (tmp_path / "wait.py").write_text(WAIT)
    process = job("wait.py")
    started = [tmp_path / f"started{rank}" for rank in range(2)]
    wait_until(lambda: all(file.exists() for file in started), lambda: f"{process.poll()}")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal signals the whole group
    else:
        process.send_signal(number)
    status, _, err = finish(process)
    assert status != 0, err
    pids = [int(file.read_text()) for file in started]
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), lambda: err)


def test_the_demo_model_makes_its_videos_on_two_ranks(job, tmp_path):
    overrides = ["models.sampler.sample_steps=2", "models.video.num_frames=5"]
    script = str(PROJECT / "tests" / "test_generate.py")
    status, out, err = finish(job(script, output={"root_dir": "results"}, overrides=overrides))
    assert status == 0, f"{out}\n{err}"
    (run_dir,) = (tmp_path / "results").iterdir()
    assert sorted(path.name for path in run_dir.glob("*.mp4")) == [
        "a_green_ring_stays_still_on_a_white_background_seed43_step2.mp4",
        "a_red_circle_moves_right_on_a_blue_background_seed42_step2.mp4",
    ]
    for video in run_dir.glob("*.mp4"):
        assert out.count(video.name) == 1  # rank 0 alone prints it
