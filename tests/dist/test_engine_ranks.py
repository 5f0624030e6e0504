"""Several ranks of one engine, as real processes under gloo: all of them agree, or all of them end.

Starting costs seconds, so one set of processes goes through many scenarios (engine_ranks_script.py) and each
test reads what its ranks saw. A scenario that hangs costs its own tests alone: the others get new processes.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from oracles import relative_error

pytestmark = pytest.mark.dist

SCRIPT = Path(__file__).with_name("engine_ranks_script.py")
START_S, STALL_S = 90, 30  # without news, until an engine is made and from then on; usual: 5 and 2
END_S = 60  # from a fault that ends the job to the end of its last rank
BROKEN = "broken on purpose"

POINTS = {  # where one rank fails between collectives: which rank of two, and what it says
    "encode": (1, f"RuntimeError: {BROKEN}"),
    "sampler": (1, f"RuntimeError: {BROKEN}"),
    "open": (0, "PermissionError: [Errno 13] Permission denied"),
    "put": (0, "OSError: [Errno 28] No space left on device; the video was not written: "),
    "close": (0, "OSError: [Errno 28] No space left on device; the video was not written: "),
    "record": (0, "OSError: [Errno 28] No space left on device"),
    "start": (1, f"RuntimeError: {BROKEN}"),
    "expert": (1, f"RuntimeError: {BROKEN}"),
    "nan": (1, "FloatingPointError: denoising in torch.float32 gave values that are not finite"),
    "codec": (0, "ValueError: no codec"),
}
AGREEING = ["readme", "cancel-0", "cancel-last", "orphan", "rank_0_alone"]
OF_ONE = ["video@auto", "video-plain@auto"]
OF_TWO = [
    *[f"{name}@auto" for name in (*AGREEING, "video", "video-plain", "orphan_in_a_loop")],
    *[f"{name}@dp" for name in (*AGREEING, "replicas", "equal_requests", "replica_fault")],
    *["video@ulysses", "video@ring", "signal@ring"],
    *[f"fault-{point}@auto" for point in POINTS],
    "moved@auto",
]
OF_FOUR = [f"{name}@auto" for name in (*AGREEING, "video", "fault-encode", "fault-sampler", "fault-put")]
LAYOUTS = [(2, "auto"), (2, "dp"), (4, "auto")]  # cfg 2; two replicas; cfg 2 x ulysses 2


class Job:
    """Ranks of one engine, started together."""

    def __init__(self, world: int, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.ended: dict[int, float] = {}  # when, by rank
        self._earlier = self._news()
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        common |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        common |= {"CHITU_LOGGING_LEVEL": "ERROR"}
        self.ranks = []
        for rank in range(world):
            env = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(SCRIPT), str(folder), *arguments]
            with self._error_file(rank).open("wb") as errors:
                process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors)
            self.ranks.append(process)

    def errors(self) -> list[str]:
        """What each rank wrote to standard error."""
        return [self._error_file(rank).read_text("utf-8", "replace") for rank in range(len(self.ranks))]

    def wait(self) -> None:
        """Until all ranks have ended; those of which nothing more is heard are killed."""
        news, news_at = self._earlier, time.time()
        while len(self.ended) < len(self.ranks):
            time.sleep(0.02)
            for rank, process in enumerate(self.ranks):
                if rank not in self.ended and process.poll() is not None:
                    self.ended[rank] = time.time()
            if self._news() != news:
                news, news_at = self._news(), time.time()
            if time.time() - news_at > (START_S if news == self._earlier else STALL_S):
                break
        self.kill()

    def kill(self) -> None:
        """End what is left, and have it say first where it is."""
        left = [process for process in self.ranks if process.poll() is None]
        for process in left:
            process.send_signal(signal.SIGUSR1)
        time.sleep(0.5 if left else 0)
        for process in left:
            process.kill()
            process.wait()

    def _news(self) -> int:
        return len(list(self.folder.glob("*.json")))

    def _error_file(self, rank: int) -> Path:
        return self.folder / f"stderr.{rank}"


def free_port() -> int:
    """Below those that the kernel hands out, so that no connection of a rank takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


@dataclass
class Findings:
    """What each rank saw of each scenario."""

    world: int
    folder: Path
    lost: dict[str, list[str]] = field(default_factory=dict)  # what ranks wrote where one did not end

    def of(self, name: str) -> list[dict]:
        """By rank; fails where a rank did not come to the end of the scenario."""
        if name in self.lost:
            pytest.fail(
                f"{name} hung or broke off\n" + "\n--\n".join(text[-4000:] for text in self.lost[name])
            )
        return [json.loads(path.read_text("utf-8")) for path in self.paths(name)]

    def paths(self, name: str) -> list[Path]:
        return [self.folder / f"{name}.{rank}.json" for rank in range(self.world)]


def survivors(world: int, folder: Path, names: list[str]) -> Findings:
    """Run scenarios one after the other; after one that hangs or breaks off, go on in new processes."""
    findings, left = Findings(world, folder), list(names)
    while left:
        job = Job(world, folder, *left)
        try:
            job.wait()
        finally:
            job.kill()
        is_done = [all(path.exists() for path in findings.paths(name)) for name in left]
        if all(is_done):
            break
        first = is_done.index(False)
        findings.lost[left[first]] = job.errors()
        left = left[first + 1 :]
    return findings


@pytest.fixture(scope="module")
def ranks_1(tmp_path_factory):
    return survivors(1, tmp_path_factory.mktemp("alone"), OF_ONE)


@pytest.fixture(scope="module")
def ranks_2(tmp_path_factory):
    return survivors(2, tmp_path_factory.mktemp("two"), OF_TWO)


@pytest.fixture(scope="module")
def ranks_4(tmp_path_factory):
    return survivors(4, tmp_path_factory.mktemp("four"), OF_FOUR)


@pytest.fixture
def look(request):
    """`look(world, scenario)`: what each of `world` ranks saw of it."""
    return lambda world, name: request.getfixturevalue(f"ranks_{world}").of(name)


def alike(values: list) -> dict:
    """What all ranks say."""
    for rank, value in enumerate(values):
        assert value == values[0], f"rank {rank} differs from rank 0"
    return values[0]


def names_of(task: dict) -> list[str]:
    """The files of a task."""
    stem = Path(task["path"]).stem
    return [f"{stem}.json", f"{stem}.mp4"]


# --- the job lives on


@pytest.mark.parametrize(("world", "setting"), LAYOUTS)
def test_the_loop_of_the_readme_ends_alike_on_every_rank(look, world, setting):
    found = look(world, f"readme@{setting}")
    calls = alike([one["calls"] for one in found])
    tasks = alike([one["tasks"] for one in found])
    assert calls == (5 if setting == "dp" else 4 + 5)  # an encoding, 2 or 3 steps, a decoding
    for task in tasks:
        assert (task["status"], task["error"]) == ("Completed", None)
        assert task["result"]["video_path"] == task["path"]
        assert task["result"]["seed"] == task["seed"]
        assert Path(task["path"]).is_file()
    assert tasks[0]["seed"] != tasks[1]["seed"]


@pytest.mark.parametrize(("world", "setting"), LAYOUTS)
def test_tasks_that_rank_0_alone_adds_are_known_to_all_and_its_end_ends_all(look, world, setting):
    tasks = alike([one["tasks"] for one in look(world, f"rank_0_alone@{setting}")])
    assert [task["status"] for task in tasks] == ["Completed"] * 2
    assert tasks[1]["seed"] == 3
    assert all(Path(task["path"]).is_file() for task in tasks)


FAULTS = [(2, point) for point in POINTS] + [(4, point) for point in ("encode", "sampler", "put")]


@pytest.mark.parametrize(("world", "point"), FAULTS)
def test_a_failure_on_one_rank_fails_the_task_on_all_and_the_next_one_completes(look, world, point):
    found = look(world, f"fault-{point}@auto")
    culprit, message = POINTS[point]
    culprit = world - 1 if culprit else 0
    for key, said in (("status", "Failed"), ("error", f"rank {culprit}: {message}"), ("result", None)):
        value = alike([one["bad"][key] for one in found])
        assert value.startswith(said) if key == "error" else value == said
    good = alike([one["good"] for one in found])
    assert [one["calls"] for one in found] == found[culprit]["struck"][:1] * world  # in the step that broke
    assert (good["status"], good["error"]) == ("Completed", None)
    left = set(alike([one["files"] for one in found])) - set(names_of(good))
    # a video whose record cannot be written is whole, and stays
    assert [Path(name).suffix for name in left] == ([".mp4"] if point == "record" else [])


@pytest.mark.parametrize("point", ["sampler", "record"])
def test_a_failed_task_has_come_as_far_on_every_rank(look, point):
    bad = [one["bad"] for one in look(2, f"fault-{point}@auto")]
    alike([(one["steps"], one["path"]) for one in bad])


@pytest.mark.parametrize("by", ["0", "last"])
@pytest.mark.parametrize(("world", "setting"), LAYOUTS)
def test_what_one_rank_cancels_is_cancelled_on_all_by_the_step_after_next(look, world, setting, by):
    found = look(world, f"cancel-{by}@{setting}")
    assert alike([one["calls"] for one in found]) == (1 if by == "0" else 2)
    task, following = alike([one["task"] for one in found]), alike([one["following"] for one in found])
    assert (task["status"], task["error"]) == ("Cancelled", "cancelled")
    assert 0 < found[0]["step"] <= task["steps"] < 8
    assert following["status"] == "Completed"


def test_an_engine_follows_another_in_the_same_processes(look):
    first, second = look(2, "readme@auto"), look(2, "readme@dp")
    assert [one["pid"] for one in first] == [one["pid"] for one in second]
    assert first[0]["tasks"][0]["result"]["parallel"] == {"dp": 1, "cfg": 2, "ring": 1, "ulysses": 1}
    assert second[0]["tasks"][0]["result"]["parallel"] == {"dp": 2, "cfg": 1, "ring": 1, "ulysses": 1}


@pytest.mark.parametrize(("world", "setting"), LAYOUTS)
def test_a_task_that_only_a_worker_adds_fails_there_and_hangs_nobody(look, world, setting):
    found = look(world, f"orphan@{setting}")
    task = found[-1]["task"]
    assert (task["status"], task["error"]) == (
        "Failed",
        "rank 0 does not know this task; add it on rank 0, or on every rank alike",
    )
    assert alike([one["following"] for one in found])["status"] == "Completed"


def test_a_task_that_only_a_worker_adds_ends_with_the_engine_where_rank_0_takes_no_step(look):
    assert look(2, "orphan_in_a_loop@auto")[-1]["task"]["status"] in ("Failed", "Cancelled")


def test_a_task_that_was_serialized_amid_its_run_and_that_rank_0_alone_adds_hangs_nobody(look):
    task = alike([one["task"] for one in look(2, "moved@auto")])
    assert task["status"] in ("Completed", "Failed")


def test_a_terminate_signal_of_rank_0_ends_all_ranks_amid_a_task(look):
    found = look(2, "signal@ring")
    assert alike([one["calls"] for one in found]) == 1
    task = alike([one["task"] for one in found])
    assert (task["status"], task["error"], task["steps"]) == ("Cancelled", "terminated", 2)


# --- replicas


def test_two_tasks_run_at_once_and_a_third_goes_to_the_replica_that_is_free(look):
    found = look(2, "replicas@dp")
    assert alike([one["ended"] for one in found]) == [3, 4, 1]  # calls: 1 + 2, then 2 + 2, then 6 + 2 in all
    tasks = alike([one["tasks"] for one in found])
    assert [(task["status"], task["replica"]) for task in tasks] == [
        ("Completed", 0),
        ("Completed", 1),
        ("Completed", 1),
    ]


def test_equal_requests_on_two_replicas_get_two_names_in_one_directory(look):
    found = look(2, "equal_requests@dp")
    assert alike([one["calls"] for one in found]) == 4
    paths = [Path(task["path"]) for task in alike([one["tasks"] for one in found])]
    stem = "a_red_circle_seed11_step2"
    assert {path.name for path in paths} == {f"{stem}.mp4", f"{stem}_2.mp4"}
    assert paths[0].parent == paths[1].parent
    for path in paths:
        assert path.is_file()
        assert json.loads(path.with_suffix(".json").read_text("utf-8"))["filename"] == path.name


def test_a_replica_of_one_rank_that_runs_out_of_memory_fails_its_own_task_alone(look):
    found = look(2, "replica_fault@dp")
    good, bad = alike([one["tasks"] for one in found])
    assert (good["status"], good["replica"]) == ("Completed", 0)
    assert (bad["status"], bad["replica"]) == ("Failed", 1)
    assert bad["error"].startswith("out of memory; ask for a smaller size")
    assert alike([one["following"] for one in found])["status"] == "Completed"


# --- the videos


def tensors_of(found: list[dict]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The latents of every rank, and the leader's pixels [F, H, W, 3] uint8."""
    saved = [torch.load(one["tensors"]) for one in found]
    assert [one["pixels"] is None for one in saved] == [False] + [True] * (len(saved) - 1)
    return [one["latents"] for one in saved], saved[0]["pixels"]


VIDEOS = [
    pytest.param(2, "auto", (2, 1, 1), id="cfg 2"),
    pytest.param(2, "ulysses", (1, 1, 2), id="ulysses 2"),
    pytest.param(2, "ring", (1, 2, 1), id="ring 2"),
    pytest.param(4, "auto", (2, 1, 2), id="cfg 2 x ulysses 2"),
]


@pytest.mark.parametrize(("world", "setting", "degrees"), VIDEOS)
def test_the_video_of_several_ranks_is_that_of_one(look, world, setting, degrees):
    found = look(world, f"video@{setting}")
    parallel = alike([one["task"] for one in found])["result"]["parallel"]
    assert tuple(parallel[axis] for axis in ("cfg", "ring", "ulysses")) == degrees
    ([expected], pictures), (latents, pixels) = tensors_of(look(1, "video@auto")), tensors_of(found)
    for actual in latents:  # fp32; sums in another order, which three guided steps amplify
        assert relative_error(actual, expected) <= 1e-4
    assert pixels.shape == (9, 48, 48, 3)
    # a value beside the border of two levels may be cut to either
    assert (pixels.int() - pictures.int()).abs().max() <= 1


def test_without_guidance_both_halves_do_the_same_and_the_result_says_so(look):
    found, alone = look(2, "video-plain@auto"), look(1, "video-plain@auto")
    result = alike([one["task"] for one in found])["result"]
    warning = alike([one["warnings"] for one in found])[-1]
    assert warning.startswith("guidance_scale=(1.0,) has steps without an unconditional branch")
    assert "use cfg_size=1" in warning
    assert result["warnings"][-1] == warning
    assert not any("guidance_scale" in text for text in alone[0]["task"]["result"]["warnings"])
    ([expected], pictures), (latents, pixels) = tensors_of(alone), tensors_of(found)
    for actual in latents:  # the same operations on every rank
        assert relative_error(actual, expected) <= 1e-5
    # strips of an image sum in another order than the whole; a value beside a border may be cut to either
    assert (pixels.int() - pictures.int()).abs().max() <= 1


# --- the job ends

LOST = "has not been heard|[Cc]onnection (was likely )?(closed|reset)|store is gone"
ENDS = [  # what breaks, on which rank of how many, what the others say
    pytest.param("forward", 1, (2, "auto"), BROKEN, id="forward on rank 1"),
    pytest.param("forward", 0, (2, "auto"), BROKEN, id="forward on rank 0"),
    pytest.param("forward", 3, (4, "dp"), BROKEN, id="forward in one of two replicas"),
    pytest.param("memory", 1, (2, "auto"), BROKEN, id="out of memory"),
    pytest.param("decode", 1, (2, "auto"), BROKEN, id="decode"),
    pytest.param("kill", 1, (2, "auto"), LOST, id="kill rank 1"),
    pytest.param("kill", 0, (2, "auto"), LOST, id="kill rank 0"),
    pytest.param("leave", 1, (2, "auto"), LOST, id="a rank that leaves"),
]


@pytest.mark.parametrize(("kind", "culprit", "layout", "said"), ENDS)
def test_what_breaks_a_rank_where_others_wait_ends_all_with_its_message(
    tmp_path, kind, culprit, layout, said
):
    world, setting = layout
    job = Job(world, tmp_path, "--break", kind, "--culprit", str(culprit), "--setting", setting)
    try:
        job.wait()
    finally:
        job.kill()
    broken_at = (tmp_path / "broken").stat().st_mtime
    for rank, (process, text) in enumerate(zip(job.ranks, job.errors(), strict=True)):
        if rank == culprit and kind in ("kill", "leave"):
            assert process.returncode == (-signal.SIGKILL if kind == "kill" else 0)
            continue
        assert rank in job.ended, f"rank {rank} hangs:\n{text[-6000:]}"
        assert job.ended[rank] - broken_at <= END_S
        assert process.returncode != 0
        assert re.search(said, text), f"rank {rank} does not say why it ends:\n{text[-6000:]}"


# --- the shell


def test_the_shell_refuses_degrees_that_do_not_fit_with_one_line(tmp_path):
    program = "import sys; from chitu_diffusion.cli import main; sys.exit(main())"
    words = ["a red circle", "infer.op_impl=cpu", "infer.diffusion.cp_size=3"]
    env = os.environ | {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, "generate", *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    [error] = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert error.startswith("Error: infer.diffusion.cp_size=3: ")
    assert "Traceback" not in done.stderr
