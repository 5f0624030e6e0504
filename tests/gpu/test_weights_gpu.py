"""Weights on a GPU: pinned buffers used again and again, casts there, whatever stream is current."""

from pathlib import Path

import pytest
import torch
from checkpoints import write_shards
from torch import nn

from chitu_core import weights
from chitu_core.weights import Staging, TensorSource

pytestmark = pytest.mark.gpu


class Layers(nn.Module):
    """Matrices of 4 MiB and vectors, packed by three."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1024, 3 * 341) for _ in range(24)])


def parts_of(name: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for part in "qkv")


def write(folder: Path, state: dict[str, torch.Tensor], suffix: str) -> TensorSource:
    if suffix == ".pth":
        torch.save(state, folder / "model.pth")
        return TensorSource((folder / "model.pth",))
    write_shards(folder, "model", state, shards=3)
    return weights.find(folder, "model")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("staging", [Staging(), Staging(8, 3, 2**18), Staging(1, 1, 2**16)])
@pytest.mark.parametrize("own_stream", [False, True])
def test_pinned_buffers_are_not_overwritten_before_they_were_copied(
    tmp_path, suffix, kept, staging, own_stream
):
    with torch.device("meta"):
        net = Layers()
    state = {
        part: torch.randn(target.shape[0] // 3, *target.shape[1:])
        for name, target in net.state_dict().items()
        for part in parts_of(name)
    }
    device = torch.device("cuda", torch.cuda.current_device())
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # so that copies wait and buffers come back late
        weights.load(
            net, write(tmp_path, state, suffix), str, device=device, dtype_of=lambda _: kept, label="net",
            parts_of=parts_of, staging=staging,
        )  # fmt: skip
        loaded = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
    for name, tensor in weights.pack(state, loaded, parts_of).items():
        assert torch.equal(loaded[name], tensor.to(kept))  # a copy or one rounding: exact
