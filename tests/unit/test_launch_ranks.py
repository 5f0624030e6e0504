"""The launcher with several ranks: what srun is asked for and what torchrun really starts.

srun and scontrol are stand-ins, which record what they get; dist/test_slurm.py has the real ones.
"""

import getpass
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from chitu_core import launch
from chitu_core.launch_backends import BACKENDS

PROJECT = Path(launch.__file__).parents[1]
check_torchrun = BACKENDS["torchrun"].check
TIMEOUT_S = 60  # torchrun imports torch; other work may share the machine
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ODD = ["+a='two words'", '+b=it\\\'s "quoted"', "--n=3", "-x", "--", "+c=$HOME;*", ""]
RECORD = """
import json, os, sys
seen = {"argv": sys.argv, "env": dict(os.environ), "name": __name__}
with open(f"rank{os.environ['RANK']}.json", "w") as file:
    json.dump(seen, file)
sys.exit(int(os.environ.get("FAIL_" + os.environ["RANK"], "0")))
"""
WAIT = """
import os, signal, sys, time
from pathlib import Path
def end(number, frame):
    Path("ended" + os.environ["RANK"]).write_text(str(number))
    sys.exit(3)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
Path("started" + os.environ["RANK"]).touch()
time.sleep(60)
"""
SRUN = """
import json, os, subprocess, sys
argv, start = sys.argv[1:], sys.argv.index("-m") - 2
flags = dict(flag.split("=", 1) for flag in argv[:start] if "=" in flag)
with open("srun.json", "w") as file:
    json.dump({"flags": argv[:start], "program": argv[start:], "env": dict(os.environ)}, file)
ranks, each = int(flags["--ntasks"]), int(flags["--ntasks-per-node"])
slurm = {"SLURM_NTASKS": str(ranks), "SLURM_JOB_NODELIST": "node[7-8]"}
started = []
for rank in range(ranks):
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % each)}
    started.append(subprocess.Popen(argv[start:], env=os.environ | slurm | place))
sys.exit(max(one.wait() for one in started))
"""
SCONTROL = """
import sys
assert sys.argv[1:] == ["show", "hostnames", "node[7-8]"], sys.argv
print("node7\\nnode8")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a script that records what it was given. PATH is the empty folder `bin`."""
    (tmp_path / "my script.py").write_text(RECORD)
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))  # as run.sh does
    for name in (*PLACE, "CHITU_PYTHON_BIN", "CHITU_RUN_TAG", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def slurm(folder):
    """The same, with a stand-in srun and scontrol on PATH."""
    add_program(folder, "srun", SRUN)
    add_program(folder, "scontrol", SCONTROL)
    return folder


def add_program(folder, name, source):
    script = folder / "bin" / f"{name}.py"
    script.write_text(source)
    program = folder / "bin" / name
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
    program.chmod(0o755)


def start(folder, launch_section, *options, **sections):
    section = {"python_script": "my script.py", **launch_section}
    content = {"model": {"name": "demo"}, "launch": section, **sections}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return launch.main(["config.yaml", *options])


def recorded(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def places(folder, ranks):
    environments = [recorded(folder, f"rank{rank}")["env"] for rank in range(ranks)]
    return [[environment.get(name) for name in PLACE[:5]] for environment in environments]


def refused(folder, capfd, launch_section, **sections):
    """The one line of an error; nothing may have been started or shown."""
    assert start(folder, launch_section, **sections) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("Error: ")
    assert not list(folder.glob("rank*.json"))
    return err


def test_srun_is_asked_for_the_documented_layout(slurm):
    assert start(slurm, {"num_nodes": 2, "gpus_per_node": 2}) == 0
    assert recorded(slurm, "srun")["flags"] == [
        "--nodes=2",
        "--ntasks=4",
        "--ntasks-per-node=2",
        f"--job-name={getpass.getuser()}.chitu",
        "--partition=debug",
        "--gres=gpu:2",
        "--cpus-per-gpu=24",
        "--mem-per-gpu=242144M",
        "--kill-on-bad-exit=1",
        "--export=ALL",
        "--quit-on-interrupt",
    ]


def test_every_key_of_the_srun_section_reaches_srun(slurm):
    section = {
        "partition": "gpu",
        "cpus_per_gpu": 3,
        "mem_per_gpu": 5,
        "job_name": "a b",
        "gres": "gpu:h200:1",
    }
    start(slurm, {"srun": {**section, "extra": ["--account", "my team", "--qos=high"]}})
    flags, environment = recorded(slurm, "srun")["flags"], recorded(slurm, "srun")["env"]
    resources = ["--partition=gpu", "--gres=gpu:h200:1", "--cpus-per-gpu=3", "--mem-per-gpu=5M"]
    assert flags[3:8] == [f"--job-name={getpass.getuser()}.a b", *resources]
    assert flags[-3:] == ["--account", "my team", "--qos=high"]
    names = ("SRUN_PARTITION", "SRUN_CPUS_PER_GPU", "SRUN_MEM_PER_GPU", "SRUN_JOB_NAME")
    assert [environment[name] for name in names] == ["gpu", "3", "5", "a b"]


def test_gres_none_asks_for_cpus_in_place_of_gpus(slurm):
    start(slurm, {"srun": {"gres": "none", "cpus_per_gpu": 2}})
    flags = recorded(slurm, "srun")["flags"]
    assert "--cpus-per-task=2" in flags
    assert not [flag for flag in flags if "gres" in flag or "gpu" in flag]


def test_srun_starts_every_rank_with_its_place(slurm):
    assert start(slurm, {"num_nodes": 2, "gpus_per_node": 2}) == 0
    assert places(slurm, 4) == [[str(rank), str(rank % 2), "4", "2", "node7"] for rank in range(4)]


def test_srun_gives_all_ranks_one_random_port_and_the_nccl_settings(slurm):
    ports = set()
    for _ in range(3):
        start(slurm, {"gpus_per_node": 2})
        environments = [recorded(slurm, f"rank{rank}")["env"] for rank in range(2)]
        assert environments[0]["MASTER_PORT"] == environments[1]["MASTER_PORT"]
        ports.add(int(environments[0]["MASTER_PORT"]))
        assert {environments[1][name] for name in ("NCCL_GRAPH_MIXING_SUPPORT", "NCCL_GRAPH_REGISTER")} == {
            "0"
        }
    assert len(ports) > 1  # three times the same of 10,000: once in 10^8 runs
    assert all(50000 <= port <= 59999 for port in ports)


def test_values_reach_the_ranks_of_srun_as_they_are(slurm):
    assert start(slurm, {}, output={"root_dir": "a 'b' c"}, overrides=ODD) == 0
    seen = recorded(slurm, "rank0")
    assert seen["argv"] == ["my script.py", "models=demo", r"output.root_dir='a \'b\' c'", *ODD]
    assert seen["name"] == "__main__"


def test_the_status_of_a_failed_rank_is_that_of_srun(slurm, monkeypatch):
    monkeypatch.setenv("FAIL_1", "5")
    assert start(slurm, {"gpus_per_node": 2}) == 5


def test_an_operators_master_address_is_kept(slurm, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    start(slurm, {})
    assert recorded(slurm, "rank0")["env"]["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.parametrize("backend", ["srun", "torchrun", "local"])
def test_the_job_that_the_shell_is_part_of_does_not_leak_in(slurm, monkeypatch, backend):
    for name in PLACE[:4]:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "inherited")
    assert start(slurm, {"backend": backend}) == 0
    environment = recorded(slurm, "rank0")["env"]
    assert [environment[name] for name in PLACE[:3]] == ["0", "0", "1"]
    assert environment.get("LOCAL_WORLD_SIZE") == {"local": None}.get(backend, "1")
    assert environment.get("MASTER_ADDR") != "elsewhere"
    assert environment.get("MASTER_PORT") != "1"
    assert environment.get("TORCHELASTIC_USE_AGENT_STORE") != "inherited"


@pytest.mark.parametrize(
    ("programs", "section", "shown"),
    [
        (["srun"], {}, "srun (auto)"),
        (["srun"], {"gpus_per_node": 2}, "srun (auto)"),
        ([], {"gpus_per_node": 2}, "torchrun (auto)"),
        ([], {}, "local (auto)"),
        (["srun"], {"backend": "local"}, "local"),
    ],
)
def test_auto_takes_srun_then_torchrun_then_plain_python(folder, capfd, programs, section, shown):
    for name in programs:
        add_program(folder, name, "")
    (folder / "my script.py").write_text("")
    assert start(folder, section) == 0
    assert f"  backend: {shown}\n" in capfd.readouterr().out


def test_torchrun_starts_ranks_with_their_places_and_their_values(folder, capfd):
    assert start(folder, {"gpus_per_node": 2}, output={"root_dir": "a 'b' c"}, overrides=ODD) == 0
    assert [place[:4] for place in places(folder, 2)] == [["0", "0", "2", "2"], ["1", "1", "2", "2"]]
    for rank in range(2):
        seen = recorded(folder, f"rank{rank}")
        assert seen["argv"] == ["my script.py", "models=demo", r"output.root_dir='a \'b\' c'", *ODD]
        assert seen["env"]["CHITU_DEBUG"] == "1"
        assert int(seen["env"]["OMP_NUM_THREADS"]) >= 1
    assert "OMP_NUM_THREADS" not in capfd.readouterr().err  # torchrun's warning


def test_a_users_number_of_threads_is_kept(folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    start(folder, {"gpus_per_node": 2})
    assert recorded(folder, "rank1")["env"]["OMP_NUM_THREADS"] == "3"


def test_a_failed_rank_fails_torchrun(folder, monkeypatch):
    monkeypatch.setenv("FAIL_1", "5")
    assert start(folder, {"gpus_per_node": 2}) == 1


@pytest.mark.parametrize(("ranks", "backend"), [(1, "local"), (2, "torchrun")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_reach_the_ranks(folder, ranks, backend, number):
    (folder / "wait.py").write_text(WAIT)
    section = {"backend": backend, "gpus_per_node": ranks, "python_script": "wait.py"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"launch": section}))
    command = [sys.executable, "-m", "chitu_core.launch", "config.yaml"]
    with subprocess.Popen(command, start_new_session=True) as process:  # a session, as a terminal has
        wait_for(folder, [f"started{rank}" for rank in range(ranks)])
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal signals the whole group
        else:
            process.send_signal(number)
        assert process.wait(TIMEOUT_S) == {"local": 3, "torchrun": 1}[backend]
    assert [(folder / f"ended{rank}").read_text() for rank in range(ranks)] == [str(int(number))] * ranks


def wait_for(folder, names):
    end = time.monotonic() + TIMEOUT_S
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < end, f"no {names} in {TIMEOUT_S} s"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("cfp", "overrides", "degrees"),
    [
        (1, [], (1, 4)),
        (2, [], (2, 2)),
        (2, ["infer.dp_size=2"], (2, 1)),
        (1, ["++infer.dp_size = 4", "infer.dp_size=2"], (1, 2)),
    ],
)
def test_a_fixed_cfp_fixes_both_degrees(slurm, cfp, overrides, degrees):
    start(slurm, {"gpus_per_node": 4}, parallel={"cfp": cfp}, overrides=overrides)
    argv = recorded(slurm, "rank0")["argv"]
    sizes = [f"infer.diffusion.cfg_size={degrees[0]}", f"infer.diffusion.cp_size={degrees[1]}"]
    assert [word for word in argv if "_size=" in word and "dp" not in word] == sizes


def test_an_automatic_cfp_leaves_both_degrees_to_the_engine(slurm):
    start(slurm, {"gpus_per_node": 4}, overrides=["infer.dp_size=2"])
    assert recorded(slurm, "rank0")["argv"][1:] == [
        "models=demo",
        "output.root_dir=outputs",
        "infer.dp_size=2",
    ]


def test_the_summary_shows_all_ranks_and_degrees(slurm, capfd):
    section = {"num_nodes": 2, "gpus_per_node": 4}
    start(slurm, section, parallel={"cfp": 2}, overrides=["infer.dp_size=2"])
    shown = capfd.readouterr().out.splitlines()
    lines = ["num_nodes: 2", "gpus_per_node: 4", "total_gpus: 8"]
    lines += ["dp(data-parallel): 2", "cfp(cfg-parallel): 2", "cp(context-parallel): 2"]
    assert shown[3:9] == [f"  {line}" for line in lines]
    (command,) = [line for line in shown if line.startswith("Command: ")]
    assert shlex.split(command)[1:3] == ["srun", "--nodes=2"]


def test_more_ranks_than_local_can_start_are_refused(folder, capfd):
    line = refused(folder, capfd, {"backend": "local", "gpus_per_node": 4})
    assert "launch.backend local starts one rank, num_nodes x gpus_per_node is 4; take" in line


def test_a_missing_srun_is_named(folder, capfd):
    line = refused(folder, capfd, {"backend": "srun"})
    assert "launch.backend srun: there is no srun on PATH; install Slurm's client, or take" in line


@pytest.mark.parametrize("backend", ["torchrun", "auto"])
def test_several_nodes_without_srun_are_refused(folder, capfd, backend):
    line = refused(folder, capfd, {"backend": backend, "num_nodes": 2})
    assert "launch.num_nodes is 2, torchrun starts one node; several need Slurm: put srun on PATH" in line


def test_a_python_without_torch_is_refused_for_torchrun(folder, capfd, monkeypatch):
    add_program(folder, "bare", "raise SystemExit(1)")
    monkeypatch.setenv("CHITU_PYTHON_BIN", str(folder / "bin" / "bare"))
    line = refused(folder, capfd, {"gpus_per_node": 2})
    assert f"launch.backend torchrun: {folder / 'bin' / 'bare'} has no torch; install" in line


def test_more_ranks_than_gpus_are_refused_where_there_are_gpus(folder, capfd):
    listed = "GPU 0: NVIDIA H200 (UUID: a)\\n  MIG 1g.18gb Device 0: (UUID: b)\\nGPU 1: NVIDIA H200 (UUID: c)"
    add_program(folder, "nvidia-smi", f"import sys; assert sys.argv[1:] == ['-L']; print('{listed}')")
    line = refused(folder, capfd, {"gpus_per_node": 3})
    assert "launch.gpus_per_node is 3, this machine has 2 GPU(s); set it to 2 or less" in line
    settings = {"launch.num_nodes": 1, "launch.gpus_per_node": 2, "overrides": []}
    check_torchrun(settings, sys.executable)
    on_cpu = {"launch.gpus_per_node": 4, "overrides": ["infer.op_impl=torch", "+infer.op_impl=cpu"]}
    check_torchrun(settings | on_cpu, sys.executable)


def test_a_machine_where_nvidia_smi_lists_nothing_may_run_cpu_ranks(folder):
    add_program(folder, "nvidia-smi", "print('NVIDIA-SMI has failed'); raise SystemExit(9)")
    check_torchrun({"launch.num_nodes": 1, "launch.gpus_per_node": 2, "overrides": []}, sys.executable)


def run_rank(folder, **variables):
    """slurm_rank as srun would start it, with nothing but `variables`."""
    command = [sys.executable, "-m", "chitu_core.slurm_rank", "my script.py", "a b"]
    environment = {"PYTHONPATH": str(PROJECT), "PATH": os.environ["PATH"], **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"])
def test_a_rank_without_its_place_says_which_variable_is_missing(folder, missing):
    place = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "MASTER_ADDR": "here"}
    done = run_rank(folder, **{name: value for name, value in place.items() if name != missing})
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"Error: {missing} is not set; start this by srun: bash run.sh with launch.backend srun\n"
    )


@pytest.mark.parametrize("scontrol", [None, "raise SystemExit(1)", "print()"])
def test_a_rank_that_cannot_find_the_first_host_says_what_to_set(folder, scontrol):
    if scontrol is not None:
        add_program(folder, "scontrol", scontrol)
    place = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "node7"}
    done = run_rank(folder, **place)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: MASTER_ADDR is not set")
    assert done.stderr.endswith("put scontrol on PATH, or export MASTER_ADDR as the host of rank 0\n")
    assert done.stderr.count("\n") == 1
    assert not (folder / "rank0.json").exists()


def test_the_first_host_is_that_of_the_step_not_of_the_whole_job(slurm):
    place = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    done = run_rank(slurm, **place, SLURM_JOB_NODELIST="node[1-9]", SLURM_STEP_NODELIST="node[7-8]")
    assert (done.returncode, done.stderr) == (0, "")
    assert recorded(slurm, "rank1")["env"]["MASTER_ADDR"] == "node7"


def test_a_rank_imports_no_torch_before_the_script():
    probe = "import sys, chitu_core.slurm_rank; print('torch' in sys.modules, 'omegaconf' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False False\n"
