"""What ranks tell each other at a step survives the way through JSON."""

import dataclasses
import json

import pytest
from engines import configured

from chitu_core.memory import MemoryPeak
from chitu_diffusion.encoders.tokenizer import clean
from chitu_diffusion.orders import Orders, Report, Run
from chitu_diffusion.params import MAX_SEED, DiffusionUserParams, FlexCacheParams
from chitu_diffusion.resolve import resolve
from chitu_diffusion.result import TaskResult
from chitu_diffusion.task import DiffusionTask

RESULT = TaskResult(
    filename="a.mp4",
    prompt="a red \udcff circle",
    seed=MAX_SEED,
    step=2,
    task_id="0123abcd",
    video_path="/videos/a.mp4",
    model="demo",
    negative_prompt="",
    role="user",
    width=32,
    height=48,
    num_frames=5,
    fps=23.976,
    sample_solver="unipc",
    sample_shift=3.0,
    guidance_scale=(3.0, 4.0),
    latent_shape=(16, 2, 6, 4),
    seq_len=12,
    experts=("high_noise", "low_noise"),
    attention="sdpa",
    cross_attention="sdpa",
    dtype="float32",
    device="cpu",
    flexcache=None,
    quant=None,
    parallel={"dp": 1, "cfg": 2, "ring": 1, "ulysses": 2},
    approximations=(),
    warnings=("a remark",),
    seconds={"Denoise": 0.1234, "total": 0.2},
    peak_memory=MemoryPeak(0.5, None),
    memory_plan=None,
    versions={"torch": "2.13.0"},
)


@pytest.fixture(scope="module")
def model():
    return configured().models


def admitted(model, **params):
    """A task whose request is complete."""
    task = DiffusionTask.from_user_request(DiffusionUserParams(**params))
    task.params = resolve(task.req.params, model)
    return task


def sent(run):
    """A run as another rank gets it."""
    [received] = Orders.decode(Orders((run,)).encode()).runs
    return received


REQUESTS = [
    {},
    {"prompt": "a red circle", "negative_prompt": "", "seed": MAX_SEED, "role": "me", "priority": -3},
    {"size": (48, 32), "frame_num": 9, "fps": 23.976, "guidance_scale": (2.5,), "sample_solver": "euler"},
    {"width": 48, "num_frames": 9, "guidance_scale": 1, "save_dir": "a \udcff folder"},
    {"flexcache_params": FlexCacheParams("teacache", warmup=1, cooldown=2), "save_path": "clips/a.mp4"},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: ", ".join(one) or "nothing")
def test_the_first_step_of_a_task_brings_its_request_and_the_seed_that_was_drawn(model, request_):
    task = admitted(model, **request_)
    request = sent(Run.of(task)).request()
    assert request.request_id == task.task_id
    assert request.params == dataclasses.replace(task.req.params, seed=task.params.seed)
    assert resolve(request.params, model) == task.params


def test_later_steps_bring_the_name_alone(model):
    task = admitted(model)
    task.replica = 0
    assert sent(Run.of(task)) == Run(task.task_id)
    assert Run.of(task).request() is None


@pytest.mark.parametrize("text", ["\udcff", "a\udce9b \U0001f408", "\ud83d lone", "\x00\u2028"])
def test_broken_unicode_in_a_prompt_arrives_as_it_was(model, text):
    task = admitted(model, prompt=text, negative_prompt=text)
    params = sent(Run.of(task)).request().params
    assert (params.prompt, params.negative_prompt) == (text, text)


def test_two_halves_of_a_character_may_arrive_joined_but_mean_the_same_to_the_tokenizer(model):
    text = "\ud83d" + "\udc08"  # of a cat
    assert clean(sent(Run.of(admitted(model, prompt=text))).request().params.prompt) == clean(text)


def test_orders_arrive_as_they_were(model):
    orders = Orders(
        runs=(None, Run.of(admitted(model, prompt="a")), Run("known")),
        cancelled=("first", "second"),
        refused={"third": "ValueError: save_dir: cannot write into /x \udcff"},
        run_dir="/runs/\udcff",
    )
    received = Orders.decode(orders.encode())
    assert received == orders
    assert isinstance(received.runs, tuple)
    assert isinstance(received.cancelled, tuple)
    assert orders.encode().isascii()


def test_orders_are_idle_only_if_nothing_is_to_be_done():
    assert Orders().is_idle
    assert Orders(runs=(None, None), run_dir="/runs").is_idle
    for orders in (
        Orders(runs=(None, Run("a"))),
        Orders(cancelled=("a",)),
        Orders(refused={"a": "b"}),
        Orders(is_last=True),
    ):
        assert not orders.is_idle


def test_a_report_arrives_as_it_was():
    report = Report(
        failure="OSError: \udcff", stage="Denoise", current_step=3, save_path="a.mp4", wishes=("a", "b")
    )
    assert Report.decode(report.encode()) == report
    assert Report.decode(Report().encode()) == Report()


def test_a_result_comes_out_of_a_report_equal_to_the_one_that_went_in():
    report = Report(is_complete=True, result=dataclasses.asdict(RESULT))
    received = Report.decode(report.encode())
    assert TaskResult.from_record(received.result) == RESULT


def test_the_result_of_another_rank_writes_the_same_record(model):
    record = json.loads(json.dumps(dataclasses.asdict(RESULT)))
    assert json.dumps(dataclasses.asdict(TaskResult.from_record(record))) == json.dumps(record)
