"""Slabs: weights in host memory, read straight into one buffer, and stored in fp8 where that is asked for."""

import pytest
import torch
from checkpoints import write_shards
from torch import nn
from torch.overrides import TorchFunctionMode

from chitu_core import weights
from chitu_core.ops.fp8 import Fp8Linear
from chitu_core.slab import ALIGNMENT, Layout, Selection, Slab, loaded_bytes, tensor_names
from chitu_core.weights import Staging

CPU = torch.device("cpu")
SMALL = Staging(readers=3, buffers=3, buffer_bytes=256)


class Net(nn.Module):
    """A block of three kinds of layers, and a layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict(
            {"qkv": nn.Linear(16, 48), "fp8": Fp8Linear(16, 32), "norm": nn.LayerNorm(16)}
        )
        self.head = nn.Linear(16, 5)


def make_net() -> Net:
    with torch.device("meta"):
        return Net()


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if "norm" in name or "head" in name else torch.bfloat16


def parts_of(name: str) -> tuple[str, ...]:
    return tuple(name.replace("qkv", part) for part in "qkv") if "qkv" in name else (name,)


def new_slab(net, packed=()):
    selection = Selection("block", tensor_names(net.block), frozenset(packed))
    return Slab(net, [selection], dtype_of, CPU)


def source(folder):
    draw, state = torch.Generator().manual_seed(2), {}
    for name, target in make_net().state_dict().items():
        for part in parts_of(name):
            rows = target.shape[0] // len(parts_of(name))
            state[part] = torch.randn(rows, *target.shape[1:], generator=draw)
    write_shards(folder, "model", state, shards=2)
    return weights.find(folder, "model")


def loaded(stored, home=weights.ON_DEVICE, net=None):
    net = net or make_net()
    weights.load(
        net, stored, str, device=CPU, dtype_of=dtype_of, label="net", parts_of=parts_of, home=home,
        staging=SMALL,
    )  # fmt: skip
    return net


def tensors_of(net):
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def lies_in(slab, tensor):
    whole = slab.bytes_of(slab.parcels[0])
    return 0 <= tensor.data_ptr() - whole.data_ptr() < whole.nbytes


def test_tensors_of_a_layout_are_aligned_and_do_not_overlap():
    kinds = {"a": ((3, 5), torch.bfloat16), "b": ((), torch.float32), "c": ((0, 4), torch.float32)}
    layout = Layout.of(kinds | {"d": ((257,), torch.uint8)})
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = layout.views(buffer)
    for number, view in enumerate(views.values(), start=1):
        assert view.storage_offset() * view.itemsize % ALIGNMENT == 0
        view.fill_(number)
    assert [view.unique().tolist() for view in views.values()] == [[1], [2], [], [4]]
    assert layout.num_bytes == 4 * ALIGNMENT  # a, b, nothing, and two for d


def test_a_slab_holds_what_the_device_would(tmp_path):
    stored, net = source(tmp_path), make_net()
    slab, expected = new_slab(net), tensors_of(loaded(stored))
    loaded(stored, slab, net)
    for name, tensor in tensors_of(net).items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.float(), expected[name].float()), name
        assert lies_in(slab, tensor) == name.startswith("block."), name


def test_a_checkpoint_is_read_into_the_slab_without_another_copy(tmp_path):
    made = []

    class Watch(TorchFunctionMode):
        """Sees every tensor that is made while loading, but for the buffers of bytes on the way."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            tensor = func(*args, **(kwargs or {}))
            if func in (torch.empty, torch.Tensor.clone, torch.cat):
                made.append(tuple(tensor.shape))
            return tensor

    stored, net = source(tmp_path), make_net()
    slab = new_slab(net)
    with Watch():
        loaded(stored, slab, net)
    made = [shape for shape in made if shape != (SMALL.buffer_bytes,)]
    # the layer that takes whole tensors is given them one by one, and the head lies outside the slab
    assert sorted(made) == sorted([(32, 16), (32,), (5, 16), (5,)])


def test_random_weights_do_not_depend_on_where_they_live():
    plain, net = make_net(), make_net()
    slab = new_slab(net)
    weights.randomise(plain, device=CPU, dtype_of=dtype_of, seed=3)
    weights.randomise(net, device=CPU, dtype_of=dtype_of, seed=3, home=slab)
    expected = tensors_of(plain)
    assert all(
        torch.equal(tensor.float(), expected[name].float()) for name, tensor in tensors_of(net).items()
    )


@pytest.mark.parametrize("matrix", ["normal", "tiny and large"])
def test_a_packed_weight_is_off_by_half_a_step_of_its_row_at_most(tmp_path, matrix):
    net = make_net()
    slab = new_slab(net, ["qkv.weight"])
    weight = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    if matrix != "normal":
        weight *= torch.logspace(-6, 2, 16)
    weight = weight.bfloat16()
    absent = slab.keep("block.qkv.weight", weight)
    assert slab.allocate("block.qkv.weight") is None
    assert absent.isnan().all()
    (parcel,) = slab.parcels
    arrived = torch.empty(parcel.arrived.num_bytes, dtype=torch.uint8)
    parcel.unpack(slab.bytes_of(parcel), arrived)
    read = parcel.arrived.views(arrived)["qkv.weight"]
    assert read.dtype == torch.bfloat16
    # e4m3: 3 bits after the first, steps of 2^-9 below 2^-6; the largest of a row is 448; bf16 rounds again
    step = weight.float().abs().amax(-1, keepdim=True) / 448
    limit = (2**-4 + 2**-8) * weight.float().abs() + 2**-10 * step
    assert ((read.float() - weight.float()).abs() <= limit).all()
    assert not torch.equal(read, weight)


def test_packing_halves_what_bf16_weights_take():
    net = make_net()
    plain, packed = new_slab(net), new_slab(net, ["qkv.weight"])
    saved = plain.num_bytes - packed.num_bytes
    assert saved == 48 * 16 - ALIGNMENT  # one byte an element, less the scales
    assert packed.parcels[0].arrived == plain.parcels[0].stored


def test_the_bytes_of_a_submodule_are_known_before_it_is_loaded(tmp_path):
    net = make_net()
    expected = loaded_bytes(net, "block", dtype_of)
    loaded(source(tmp_path), net=net)
    assert expected == sum(tensor.nbytes for tensor in tensors_of(net.block).values())


def test_a_slab_is_made_before_its_module_has_tensors():
    net = Net()
    with pytest.raises(AssertionError, match="before its module"):
        new_slab(net)


def test_a_vector_cannot_be_packed():
    with pytest.raises(AssertionError, match=r"qkv\.bias \[48\] has no rows"):
        new_slab(make_net(), ["qkv.bias"])
