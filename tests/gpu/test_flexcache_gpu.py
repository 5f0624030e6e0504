"""Cache strategies on a GPU: off they change no bit; a step waits only for what its strategy must know."""

import pytest
import torch
from engines import configured

from chitu_core.environment import Environment
from chitu_diffusion import DiffusionTask, DiffusionTaskType, DiffusionUserParams
from chitu_diffusion.engine import Engine
from chitu_diffusion.task import TaskPool

pytestmark = pytest.mark.gpu

STEPS = 12
NEVER = {
    "blockdance": {"group": 1},
    "dbcache": {"threshold": 0.0},
    "easycache": {"threshold": 0.0},
    "fbcache": {"threshold": 0.0},
    "magcache": {"max_reuses": 0},
    "pab": {"self_range": 1, "cross_range": 1},
    "taylorseer": {"interval": 1},
    "teacache": {"threshold": 0.0},
}
OFTEN = {
    "blockdance": {"group": 2},
    "dbcache": {"threshold": 9.0},
    "easycache": {"threshold": 9.0},
    "fbcache": {"threshold": 9.0},
    "magcache": {"threshold": 9.0},
    "meancache": {"fresh_steps": 17},
    "pab": {"self_range": 2, "cross_range": 3},
    "taylorseer": {"interval": 3},
    "teacache": {"threshold": 9.0},
}
READS_ONCE_A_STEP = {"dbcache", "easycache", "fbcache"}  # a decision that depends on the data


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    overrides = ["infer.diffusion.enable_flexcache=true", "infer.use_cuda_graph=off"]
    overrides.append(f"output.root_dir={tmp_path_factory.mktemp('outputs')}")
    engine = Engine(configured(*overrides), TaskPool(), Environment())
    yield engine
    engine.close()


def begin(engine, name, extra):
    reuse = {"strategy": name, "warmup": 2, "cooldown": 1, "cache_ratio": 1.0, "extra": extra or None}
    params = DiffusionUserParams(
        prompt="a red circle moves right on a blue background",
        seed=5,
        num_inference_steps=STEPS,
        flexcache_params=reuse if name else None,
    )
    task = DiffusionTask.from_user_request(params)
    engine.pool.add(task)
    engine.step()
    return task


def end(engine, task):
    """The last latents, and what was reused."""
    while task.task_type != DiffusionTaskType.VAEDecode:
        engine.step()
    latents, cache = task.buffer.latents, task.buffer.flexcache
    engine.pool.cancel(task.task_id)
    engine.step()
    return latents, {} if cache is None else dict(cache.tally.reused)


@pytest.mark.parametrize("name", NEVER)
def test_a_strategy_that_never_reuses_changes_no_bit(engine, name):
    expected, _ = end(engine, begin(engine, None, {}))
    actual, reused = end(engine, begin(engine, name, NEVER[name]))
    assert torch.equal(actual, expected)
    assert not reused


@pytest.mark.parametrize("name", OFTEN)
def test_a_step_waits_for_the_gpu_only_where_its_decision_depends_on_data(engine, name):
    """A scheduled strategy never waits; another one reads once a step, and CUDA's check sees it."""
    task = begin(engine, name, OFTEN[name])
    for _ in range(3):  # the schedule is read in the first step, and kernels are compiled
        engine.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if name in READS_ONCE_A_STEP:
            generator = engine.generator
            with pytest.raises(RuntimeError, match="synchronizing"):
                generator.denoise_step(task, engine.log)
        else:
            for _ in range(5):
                engine.step()
            assert task.current_step == 8
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if name in READS_ONCE_A_STEP:
        engine.pool.cancel(task.task_id)
        engine.step()
        return
    latents, reused = end(engine, task)
    assert torch.isfinite(latents).all()
    assert sum(reused.values()) > 0
