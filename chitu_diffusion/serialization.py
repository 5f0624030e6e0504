"""A task as bytes: 8 bytes with the header's length (little-endian), a JSON header, raw tensors. No pickle.

Not carried: sampler, generator, text caches, times, warnings and result. The engine that gets the task
rebuilds the first three, so one caught amid denoising starts again from its seed: the same video in the end.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chitu_diffusion.params import DiffusionUserParams

if TYPE_CHECKING:
    from chitu_diffusion.task import DiffusionTask

_LENGTH_BYTES = 8
_BUFFER_TENSORS = ("text_embeddings", "negative_embeddings", "latents", "timesteps")
_INIT_IMAGE = "init_image"
_FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_FLOATS, *_INTEGERS)}


@dataclass(frozen=True)
class _TensorHeader:
    """One tensor of a message, in the order in which their bytes follow."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * _dtype(self.dtype).itemsize


@dataclass(frozen=True)
class _Header:
    """All of a task that is no tensor; `request_id` is None for a task without a request."""

    task_id: str
    task_type: str
    status: str
    error_message: str | None
    signal_data: dict[str, Any] | None
    request_id: str | None
    params: DiffusionUserParams | None
    has_init_image: bool
    seq_len: int | None
    current_step: int
    expert: str | None
    save_path: str | None
    tensors: tuple[_TensorHeader, ...]


def serialize(task: "DiffusionTask", device: torch.device | str = "cpu") -> Tensor:
    """`task` as a 1-D uint8 tensor on `device`. A seed that was drawn travels as if the user had given it.

    Raises ValueError when `signal_data` holds what JSON cannot.
    """
    tensors = {name: getattr(task.buffer, name) for name in _BUFFER_TENSORS}
    tensors[_INIT_IMAGE] = task.req.init_image if task.req else None
    present = {
        name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None
    }
    try:
        header = json.dumps(
            asdict(_header(task, present))
        ).encode()  # ASCII: a broken character in a prompt is \udcXX
    except TypeError as error:
        raise ValueError(
            f"signal_data={task.signal_data!r}: {error}; keep to numbers, text, lists and dicts"
        ) from error
    length = len(header).to_bytes(_LENGTH_BYTES, "little")
    parts = [torch.frombuffer(bytearray(length + header), dtype=torch.uint8)]
    parts += [tensor.reshape(-1).view(torch.uint8) for tensor in present.values()]
    return torch.cat(parts).to(device)


def deserialize(message: Tensor) -> "DiffusionTask":
    """The task in a message of `serialize`, its tensors on the message's device.

    Raises ValueError for a tensor that is not such a message.
    """
    from chitu_diffusion.task import (
        DiffusionTask,
        DiffusionTaskBuffer,
        DiffusionTaskStatus,
        DiffusionTaskType,
        DiffusionUserRequest,
    )

    header, start = _read_header(message)
    tensors: dict[str, Tensor] = {}
    for part in header.tensors:
        end = start + part.num_bytes()
        aligned = message[start:end].clone()  # a view as another dtype must begin at a multiple of its size
        tensors[part.name] = aligned.view(_dtype(part.dtype)).reshape(part.shape)
        start = end
    request = None
    if header.request_id is not None:
        request = DiffusionUserRequest(header.request_id, header.params, tensors.pop(_INIT_IMAGE, None))
    buffer = DiffusionTaskBuffer(
        seq_len=header.seq_len,
        current_step=header.current_step,
        expert=header.expert,
        save_path=header.save_path,
    )
    for name, tensor in tensors.items():
        setattr(buffer, name, tensor)
    try:
        task_type, status = DiffusionTaskType[header.task_type], DiffusionTaskStatus[header.status]
    except KeyError as error:
        raise _refusal(f"no stage or status is called {error}") from error
    task = DiffusionTask(header.task_id, task_type, request, buffer, header.signal_data)
    task.status = status
    task.error_message = header.error_message
    return task


def empty(size: int, device: torch.device | str = "cpu") -> Tensor:
    """`size` zero bytes on `device`, to receive a message into."""
    return torch.zeros(size, dtype=torch.uint8, device=device)


def _header(task: "DiffusionTask", tensors: dict[str, Tensor]) -> _Header:
    params = task.user_params
    if params is not None and task.params is not None:
        params = replace(params, seed=task.params.seed)
    rows = [
        _TensorHeader(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    return _Header(
        task_id=task.task_id,
        task_type=task.task_type.name,
        status=task.status.name,
        error_message=task.error_message,
        signal_data=task.signal_data,
        request_id=task.req.request_id if task.req else None,
        params=params,
        has_init_image=_INIT_IMAGE in tensors,
        seq_len=task.buffer.seq_len,
        current_step=task.buffer.current_step,
        expert=task.buffer.expert,
        save_path=task.buffer.save_path,
        tensors=tuple(rows),
    )


def _read_header(message: Tensor) -> tuple[_Header, int]:
    """The checked header, and where the tensors begin."""
    if message.dtype != torch.uint8 or message.ndim != 1:
        raise _refusal(f"it is {message.dtype} with {message.ndim} dimension(s), not 1-D uint8")
    start = _LENGTH_BYTES + int.from_bytes(bytes(message[:_LENGTH_BYTES].tolist()), "little")
    if not _LENGTH_BYTES < start <= message.numel():
        raise _refusal(f"its header would end at byte {start} of {message.numel()}")
    try:
        fields = json.loads(bytes(message[_LENGTH_BYTES:start].tolist()))
        rows = [_TensorHeader(row["name"], row["dtype"], tuple(row["shape"])) for row in fields["tensors"]]
        params = None if fields["params"] is None else DiffusionUserParams(**fields["params"])
        header = _Header(**{**fields, "params": params, "tensors": tuple(rows)})
    except (ValueError, TypeError, KeyError) as error:
        raise _refusal(f"its header cannot be read ({error})") from error
    _check_tensors(header, message.numel() - start)
    return header, start


def _check_tensors(header: _Header, num_bytes: int) -> None:
    names = [part.name for part in header.tensors]
    legal = [*_BUFFER_TENSORS, _INIT_IMAGE] if header.has_init_image else list(_BUFFER_TENSORS)
    if len(set(names)) != len(names) or not set(names) <= set(legal):
        raise _refusal(f"its tensors are called {names}, of {legal}")
    if header.has_init_image and (header.request_id is None or _INIT_IMAGE not in names):
        raise _refusal("it speaks of an init image that it does not hold")
    if not all(isinstance(side, int) and side >= 0 for part in header.tensors for side in part.shape):
        raise _refusal("a tensor has a shape that is not whole numbers")
    needed = sum(part.num_bytes() for part in header.tensors)
    if needed != num_bytes:
        raise _refusal(f"its tensors need {needed} bytes, it has {num_bytes}")


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise _refusal(f"it holds a tensor of dtype {name!r}")
    return _DTYPES[name]


def _refusal(why: str) -> ValueError:
    return ValueError(
        f"this tensor is no message of DiffusionTask.serialize: {why}; pass on all of its bytes"
    )
