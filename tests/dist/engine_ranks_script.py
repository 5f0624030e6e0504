"""What every rank does in test_engine_ranks.py: scenarios in turn; what this rank saw of each is JSON.

    python engine_ranks_script.py FOLDER SCENARIO@SETTING ...
    python engine_ranks_script.py FOLDER --break KIND --culprit RANK [--setting SETTING]

Scenarios that follow each other under one setting share an engine; any other one ends it and makes a new one.
"""

import argparse
import errno
import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
from hydra import compose, initialize_config_module

from chitu_core.distributed import RankFailure
from chitu_core.environment import Environment
from chitu_diffusion import (
    DiffusionBackend,
    DiffusionTask,
    DiffusionTaskPool,
    DiffusionTaskType,
    DiffusionUserParams,
    chitu_generate,
    chitu_init,
    chitu_is_terminated,
    chitu_start,
    chitu_terminate,
    generator,
    media,
    run_folder,
)
from chitu_diffusion.samplers._flow import FlowSampler
from chitu_diffusion.vaes._strips import Strips

SETTINGS = {
    "auto": [],
    "dp": ["infer.dp_size=2"],
    "ulysses": ["infer.diffusion.cfg_size=1"],
    "ring": ["infer.diffusion.cfg_size=1", "infer.diffusion.up_limit=1"],
}
SMALL = {"prompt": "a red circle", "size": (32, 32), "num_frames": 5, "num_inference_steps": 2}
ODD = {"size": (48, 48), "num_frames": 9, "num_inference_steps": 3, "seed": 7}  # 27 tokens, 6 latent rows
BROKEN = "broken on purpose"


class Rank:
    """This process among the others, and the folder that all of them share."""

    def __init__(self, folder: Path) -> None:
        environment = Environment.read()
        self.index, self.size = environment.rank, environment.world_size
        self.is_last = self.index == self.size - 1
        self.folder = folder

    def begin(self, setting: str) -> None:
        """Make a new engine; the one before ends."""
        chitu_terminate()
        DiffusionTaskPool.reset()
        with initialize_config_module("chitu_core.config", version_base=None):
            args = compose("serve_config", overrides=["infer.op_impl=cpu", *SETTINGS[setting]])
        args.output.root_dir = str(self.folder / f"runs-{setting}")
        chitu_init(args)
        chitu_start()

    def note(self, name: str, found: object) -> None:
        """Keep what was found, for the test."""
        path = self.folder / f"{name}.{self.index}.json"
        path.with_suffix(".part").write_text(json.dumps(found), "utf-8")
        path.with_suffix(".part").rename(path)


def make(**changes: Any) -> DiffusionTask:
    return DiffusionTask.from_user_request(DiffusionUserParams(**(SMALL | changes)))


def add(**changes: Any) -> DiffusionTask:
    task = make(**changes)
    assert DiffusionTaskPool.add(task)
    return task


def step_until(is_done: Callable[[], bool]) -> int:
    """How many steps it took."""
    for count in range(100):
        if is_done():
            return count
        chitu_generate()
    raise AssertionError("not done within 100 steps")


def finish() -> int:
    return step_until(DiffusionTaskPool.all_finished)


def facts(task: DiffusionTask) -> dict[str, Any]:
    """All that ranks must agree on."""
    return {
        "id": task.task_id,
        "status": task.status.name,
        "error": task.error_message,
        "seed": task.params and task.params.seed,
        "steps": task.current_step,
        "path": task.buffer.save_path,
        "replica": task.replica,
        "result": task.result and asdict(task.result),
    }


# --- scenarios that the job survives


def readme(rank: Rank) -> dict[str, Any]:
    """The loop of the README on every rank; nobody names a seed."""
    tasks = [add(), add(prompt="a blue ring", negative_prompt="text", num_inference_steps=3)]
    calls = finish()
    chitu_terminate()
    return {"calls": calls, "tasks": [facts(task) for task in tasks], "pid": os.getpid()}


def rank_0_alone(rank: Rank) -> dict[str, Any]:
    """Rank 0 adds and ends; the others only go on until that."""
    known = len(DiffusionTaskPool.id_list)
    if rank.index == 0:
        add()
        add(prompt="a blue ring", seed=3)
        finish()
        chitu_terminate()
    else:
        step_until(chitu_is_terminated)
        for _ in range(2):
            make()  # so that what every rank makes later has equal ids
    return {"tasks": [facts(DiffusionTaskPool.pool[name]) for name in DiffusionTaskPool.id_list[known:]]}


def signal_amid(rank: Rank) -> dict[str, Any]:
    """Rank 0 adds a terminate signal amid a task."""
    task = add(num_inference_steps=8)
    for _ in range(3):
        chitu_generate()
    if rank.index == 0:
        DiffusionTaskPool.add(DiffusionTask.create_terminate_signal())
    return {"calls": step_until(chitu_is_terminated), "task": facts(task)}


def breakage(point: str, struck: Callable[[], None]) -> AbstractContextManager:
    """What breaks one rank between two collectives, and calls `struck` then."""

    def raising(error: Exception) -> Callable[..., None]:
        def fail(*_: Any, **__: Any) -> None:
            struck()
            raise error

        return fail

    def spoil(sampler: FlowSampler, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        latents = step(sampler, velocity, sample)
        if sampler._index < len(sampler.timesteps):
            return latents
        struck()
        return latents * torch.nan

    engine, step = DiffusionBackend.current(), FlowSampler.step
    broken = raising(RuntimeError(BROKEN))
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    refused = raising(PermissionError(errno.EACCES, "Permission denied"))
    points = {
        "encode": (engine.pipeline.prompt_encoder, "tokenize", broken),  # embeddings are kept
        "start": (engine.generator, "_start_denoise", broken),
        "expert": (engine.generator, "_enter_expert", broken),
        "sampler": (FlowSampler, "step", broken),
        "nan": (FlowSampler, "step", spoil),
        "open": (run_folder, "VideoWriter", refused),
        "codec": (run_folder, "VideoWriter", raising(ValueError("no codec"))),
        "put": (media.VideoWriter, "_encode", full),
        "close": (media.os, "fsync", full),
        "record": (generator, "write_json", full),
    }
    return patch.object(*points[point])


LEADERS = ("open", "codec", "put", "close", "record")  # points at which the rank that writes breaks


def fault(rank: Rank, point: str) -> dict[str, Any]:
    """One rank alone fails between two collectives; the next task has nothing of it."""
    save_dir, calls, struck = rank.folder / point, 0, []
    bad, good = add(save_dir=str(save_dir)), add(save_dir=str(save_dir))
    with ExitStack() as stack:
        if (rank.index == 0) if point in LEADERS else rank.is_last:
            stack.enter_context(breakage(point, lambda: struck.append(calls)))
        while not bad.is_finished():
            calls += 1
            chitu_generate()
    finish()
    files = sorted(path.name for path in save_dir.iterdir())
    return {"bad": facts(bad), "calls": calls, "struck": struck, "good": facts(good), "files": files}


def cancel(rank: Rank, by_last: bool) -> dict[str, Any]:
    """One rank alone cancels a task that all of them denoise."""
    task, following = add(num_inference_steps=8), add()
    for _ in range(3):
        chitu_generate()
    step = task.current_step
    if rank.is_last if by_last else rank.index == 0:
        assert DiffusionTaskPool.cancel(task.task_id)
    calls = step_until(task.is_finished)
    finish()
    return {"step": step, "calls": calls, "task": facts(task), "following": facts(following)}


def orphan(rank: Rank) -> dict[str, Any]:
    """The last rank adds a task that no other knows, and all ranks take a step; then all add another one."""
    task = make()
    if rank.is_last:
        assert DiffusionTaskPool.add(task)
    chitu_generate()
    following = add()
    finish()
    return {"task": facts(task), "following": facts(following)}


def orphan_in_a_loop(rank: Rank) -> dict[str, Any]:
    """The same under the loop of the README, which the others leave at once."""
    task = make()
    if rank.is_last:
        assert DiffusionTaskPool.add(task)
    finish()
    chitu_terminate()
    return {"task": facts(task)}


def video(rank: Rank, **changes: Any) -> dict[str, Any]:
    """A video before it is written: latents on every rank, pixels on the leader."""
    pictures, put = [], media.VideoWriter.put
    task = add(**(ODD | changes))

    def keep(writer: media.VideoWriter, pixels: torch.Tensor) -> None:
        pictures.append(pixels.clone())
        put(writer, pixels)

    with patch.object(media.VideoWriter, "put", keep):
        step_until(lambda: task.task_type == DiffusionTaskType.VAEDecode)
        latents = task.buffer.latents.clone()
        finish()
    path = rank.folder / f"{task.task_id}.{rank.index}.pt"
    torch.save({"latents": latents, "pixels": torch.cat(pictures) if pictures else None}, path)
    return {"task": facts(task), "tensors": str(path), "warnings": task.warnings}


def replicas(rank: Rank) -> dict[str, Any]:
    """Three tasks for two replicas; the second one is the first to end."""
    tasks = [add(num_inference_steps=steps, seed=seed) for seed, steps in enumerate((6, 1, 2))]
    ended = [step_until(tasks[index].is_finished) for index in (1, 2, 0)]
    return {"ended": ended, "tasks": [facts(task) for task in tasks]}


def equal_requests(rank: Rank) -> dict[str, Any]:
    """Two replicas finish videos of one name at the same step."""
    tasks = [add(seed=11), add(seed=11)]
    return {"calls": finish(), "tasks": [facts(task) for task in tasks]}


def replica_fault(rank: Rank) -> dict[str, Any]:
    """One replica's forward fails; a replica of one rank has nobody who waits for it."""
    tasks = [add(), add()]
    with ExitStack() as stack:
        if rank.is_last:
            predict = Mock(side_effect=torch.OutOfMemoryError(BROKEN))
            stack.enter_context(patch.object(DiffusionBackend.current().generator, "_predict", predict))
        calls = finish()
    following = add()
    finish()
    return {"calls": calls, "tasks": [facts(task) for task in tasks], "following": facts(following)}


def moved(rank: Rank) -> dict[str, Any]:
    """Rank 0 alone takes in a task that was serialized before its decoding."""
    task = add()
    step_until(lambda: task.task_type == DiffusionTaskType.VAEDecode)
    copy = DiffusionTask.deserialize(task.serialize())
    if rank.index == 0:
        DiffusionTaskPool.cancel(task.task_id)
    step_until(task.is_finished)
    DiffusionTaskPool.remove(task.task_id)
    if rank.index == 0:
        DiffusionTaskPool.add(copy)
        finish()
        chitu_terminate()
    else:
        step_until(chitu_is_terminated)
    return {"task": facts(DiffusionTaskPool.pool[copy.task_id])}


SCENARIOS: dict[str, Callable[[Rank], dict[str, Any]]] = {
    "readme": readme,
    "rank_0_alone": rank_0_alone,
    "cancel-0": partial(cancel, by_last=False),
    "cancel-last": partial(cancel, by_last=True),
    "orphan": orphan,
    "orphan_in_a_loop": orphan_in_a_loop,
    "video": video,
    "video-plain": partial(video, guidance_scale=1),
    "replicas": replicas,
    "equal_requests": equal_requests,
    "replica_fault": replica_fault,
    "moved": moved,
    "signal": signal_amid,
    **{
        f"fault-{point}": partial(fault, point=point)
        for point in ("encode", "start", "expert", "sampler", "nan", *LEADERS)
    },
}


def survive(rank: Rank, names: list[str]) -> None:
    """Run scenarios in turn."""
    before = None
    for name in names:
        scenario, _, setting = name.partition("@")
        if setting != before or chitu_is_terminated():
            rank.begin(setting)
            rank.note(f"begun-{os.getpid()}", None)  # a sign of life for the test
        before = setting
        rank.note(name, SCENARIOS[scenario](rank))
    chitu_terminate()


# --- faults that end the job


def end(rank: Rank, kind: str, culprit: int, setting: str) -> None:
    """Tasks of several steps, amid which the culprit breaks; no rank of the job returns from here."""
    rank.begin(setting)
    for _ in range(2):  # one for each replica, if there are two
        add(num_inference_steps=2 if kind == "decode" else 50)
    if rank.index == culprit:
        arm(rank, kind)
    for call in range(100):
        if kind == "leave" and rank.index == culprit and call == 3:
            (rank.folder / "broken").touch()
            sys.exit(0)
        try:
            chitu_generate()
        except RankFailure:
            traceback.print_exc()
            os._exit(1)  # as fast as a process can: what the others are to hear must have left by now
    raise AssertionError("nobody ended this rank")


def arm(rank: Rank, kind: str) -> None:
    """Let this rank break in a forward or in the decode."""
    calls = iter(range(100))
    errors = {"forward": RuntimeError(BROKEN), "memory": torch.OutOfMemoryError(BROKEN)}

    def strike(*_: Any) -> None:
        if next(calls) < 2:
            return
        (rank.folder / "broken").touch()
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise errors.get(kind, RuntimeError(BROKEN))

    if kind == "decode":
        next(calls), next(calls)
        Strips.collect = strike
    elif kind != "leave":
        [dit] = DiffusionBackend.current().pipeline.experts.values()
        dit.block_list()[3].ffn.register_forward_pre_hook(strike)


def main() -> None:
    """Read the command line and go."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--break", dest="kind", choices=["forward", "memory", "decode", "kill", "leave"])
    parser.add_argument("--culprit", type=int)
    parser.add_argument("--setting", choices=SETTINGS, default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the ranks share few cores
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # so that the test can ask where a rank hangs
    rank = Rank(options.folder)
    if options.kind is not None:
        end(rank, options.kind, options.culprit, options.setting)
    survive(rank, options.names)


if __name__ == "__main__":
    main()
