"""A task survives the way through bytes, and no other bytes pass for a task."""

import json

import pytest
import torch

from chitu_diffusion.task import (
    DiffusionTask,
    DiffusionTaskBuffer,
    DiffusionTaskStatus,
    DiffusionTaskType,
    DiffusionUserParams,
    DiffusionUserRequest,
    FlexCacheParams,
)


def full_task():
    """A task amid denoising, every carried field set; odd sizes, so that no tensor begins at a round byte."""
    generator = torch.Generator().manual_seed(0)
    params = DiffusionUserParams(
        prompt="a \u732b\udcff cat",
        size=(64, 32),
        num_frames=5,
        guidance_scale=(3.0, 4.0),
        flexcache_params=FlexCacheParams("pab", 0.3, 1, 0),
        seed=2**63 - 1,
        fps=23.976,
        priority=2,
    )
    image = torch.randint(0, 256, (3, 5, 7), generator=generator, dtype=torch.uint8)
    buffer = DiffusionTaskBuffer(
        text_embeddings=torch.randn(3, 5, generator=generator).bfloat16(),
        negative_embeddings=torch.randn(1, 5, generator=generator).half(),
        latents=torch.randn(3, 2, 4, 4, generator=generator).transpose(0, 1),
        timesteps=torch.tensor([999, 500]),
        seq_len=32,
        current_step=1,
        expert="high_noise",
        save_path="out/a.mp4",
    )
    request = DiffusionUserRequest("request-1", params, image)
    task = DiffusionTask(
        "task-1", DiffusionTaskType.Denoise, request, buffer, {"reason": "x", "n": [1, None]}
    )
    task.status = DiffusionTaskStatus.Running
    task.error_message = "none yet"
    return task


def with_header(message, **changes):
    """The message with fields of its header replaced."""
    length = int.from_bytes(bytes(message[:8].tolist()), "little")
    header = json.loads(bytes(message[8 : 8 + length].tolist())) | changes
    text = json.dumps(header).encode()
    start = torch.tensor(list(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    return torch.cat([start, message[8 + length :]])


def test_a_task_comes_back_equal_in_all_that_is_carried():
    task = full_task()
    message = task.serialize()
    assert (message.dtype, message.ndim, message.device.type) == (torch.uint8, 1, "cpu")
    back = DiffusionTask.deserialize(message)
    for name in ("task_id", "task_type", "status", "error_message", "signal_data", "user_params"):
        assert getattr(back, name) == getattr(task, name), name
    assert back.req.request_id == "request-1"
    for name in ("seq_len", "current_step", "expert", "save_path"):
        assert getattr(back.buffer, name) == getattr(task.buffer, name), name


@pytest.mark.parametrize("name", ["text_embeddings", "negative_embeddings", "latents", "timesteps"])
def test_tensors_come_back_bit_for_bit(name):
    task = full_task()
    expected, actual = (
        getattr(task.buffer, name),
        getattr(DiffusionTask.deserialize(task.serialize()).buffer, name),
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)  # copied, not computed: no tolerance
    assert actual.dtype == expected.dtype


def test_the_init_image_is_carried():
    task = full_task()
    assert torch.equal(DiffusionTask.deserialize(task.serialize()).req.init_image, task.req.init_image)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.float8_e4m3fn),
    ],
    ids=["scalar", "empty", "bool", "float8"],
)
def test_any_shape_and_dtype_is_carried(tensor):
    task = full_task()
    task.buffer.latents = tensor
    actual = DiffusionTask.deserialize(task.serialize()).buffer.latents
    assert (actual.dtype, actual.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(actual.float(), tensor.float())


def test_what_comes_back_shares_no_memory_with_the_message():
    message = full_task().serialize()
    back = DiffusionTask.deserialize(message)
    kept = back.buffer.latents.clone()
    message.zero_()
    assert torch.equal(back.buffer.latents, kept)


def test_sampler_generator_and_caches_are_left_behind():
    task = full_task()
    task.buffer.seed_g = torch.Generator()
    task.buffer.text_caches["cond"] = object()
    buffer = DiffusionTask.deserialize(task.serialize()).buffer
    assert (buffer.sampler, buffer.seed_g, buffer.text_caches, buffer.spans) == (None, None, {}, [])


def test_a_fresh_task_and_a_signal_come_back():
    task = DiffusionTask.from_user_request(DiffusionUserParams(prompt="a"))
    assert DiffusionTask.deserialize(task.serialize()).user_params == task.user_params
    signal = DiffusionTask.deserialize(DiffusionTask.create_terminate_signal("0x").serialize())
    assert signal.is_terminate_signal()
    assert (signal.task_id, signal.req, signal.signal_data["reason"]) == ("0x", None, "Normal shutdown")


def test_the_layout_is_a_length_a_json_header_and_raw_bytes():
    task = full_task()
    raw = bytes(task.serialize().tolist())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header["has_init_image"] is True
    assert header["tensors"][0] == {"name": "text_embeddings", "dtype": "bfloat16", "shape": [3, 5]}
    first = task.buffer.text_embeddings.view(torch.uint8).flatten()
    assert raw[8 + length : 8 + length + 30] == bytes(first.tolist())


def test_room_for_a_message_is_zero_bytes():
    room = DiffusionTask.create_empty_serialization(5, "cpu")
    assert (room.tolist(), room.dtype) == ([0] * 5, torch.uint8)


def test_a_message_copied_into_its_room_is_read():
    message = full_task().serialize()
    room = DiffusionTask.create_empty_serialization(message.numel(), "cpu")
    room.copy_(message)
    assert DiffusionTask.deserialize(room).task_id == "task-1"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda message: message.float(),
        lambda message: message[None],
        lambda message: message[:0],
        lambda message: message[:5],
        lambda message: message[:100],
        lambda message: message[:-1],
        lambda message: torch.cat([message, message[:1]]),
        torch.zeros_like,
        lambda message: torch.full_like(message, 255),
        lambda message: message.roll(1),
        lambda message: torch.cat([message[:8], message[8:].flip(0)]),
        lambda message: with_header(message, task_type="Dance"),
        lambda message: with_header(message, status="Lost"),
        lambda message: with_header(message, params={"height": 7}),
        lambda message: with_header(message, params={"colour": "red"}),
        lambda message: with_header(message, surplus=1),
        lambda message: with_header(message, tensors=[{"name": "latents", "dtype": "float99", "shape": [1]}]),
        lambda message: with_header(message, tensors=[{"name": "pool", "dtype": "uint8", "shape": [1]}]),
        lambda message: with_header(
            message, tensors=[{"name": "latents", "dtype": "uint8", "shape": [-1, -1]}]
        ),
        lambda message: with_header(message, tensors=[{"name": "latents", "dtype": "uint8", "shape": ["a"]}]),
        lambda message: with_header(message, tensors=[]),
        lambda message: with_header(message, tensors=None),
        lambda message: with_header(message, has_init_image=False),
        lambda message: with_header(message, request_id=None),
    ],
)
def test_any_other_tensor_is_refused(break_it):
    with pytest.raises(
        ValueError, match=r"no message of DiffusionTask\.serialize: .*; pass on all of its bytes"
    ):
        DiffusionTask.deserialize(break_it(full_task().serialize()))


def test_signal_data_that_json_cannot_hold_is_refused():
    task = DiffusionTask("t", signal_data={"when": torch.ones(1)})
    with pytest.raises(ValueError, match=r"signal_data=.*keep to numbers, text, lists and dicts"):
        task.serialize()
