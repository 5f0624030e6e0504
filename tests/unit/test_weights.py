"""Loading of tensors: exact values, packing, streaming, and an error with file and key for each wrong
checkpoint.
"""

import json
import logging
import pickle
import threading
import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import write_json, write_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from chitu_core import weights
from chitu_core.weights import Receiver, Staging, TensorSource

CPU = torch.device("cpu")
SMALL = Staging(readers=3, buffers=3, buffer_bytes=64)  # less than the states here


class Net(nn.Module):
    """Parameters in sub-modules and on the module itself, and a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 3)])
        self.norm = nn.LayerNorm(3)
        self.modulation = nn.Parameter(torch.zeros(1, 6, 3))
        self.register_buffer("table", torch.zeros(5))


def make_net() -> Net:
    with torch.device("meta"):
        return Net()


def make_state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(t.shape, generator=generator).to(dtype)
        for name, t in make_net().state_dict().items()
    }


def load(net: nn.Module, source: TensorSource, rename=str, dtype=torch.float32, **options) -> None:
    weights.load(net, source, rename, device=CPU, dtype_of=lambda _: dtype, label="net", **options)


def write(folder: Path, state: dict[str, Tensor], **options) -> TensorSource:
    write_shards(folder, "model", state, **options)
    return weights.find(folder, "model")


def assert_equal(net: nn.Module, state: dict[str, Tensor]) -> None:
    loaded = net.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor, atol=0, rtol=0)  # a copy or one rounding: exact


@pytest.mark.parametrize(("shards", "with_index"), [(1, False), (3, True), (3, False)])
def test_every_set_of_safetensors_loads_exactly(tmp_path, shards, with_index):
    state, net = make_state(), make_net()
    load(net, write(tmp_path, state, shards=shards, with_index=with_index))
    assert_equal(net, state)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_a_pth_file_loads_exactly(tmp_path):
    state, net = make_state(), make_net()
    torch.save(state, tmp_path / "model.pth")
    load(net, TensorSource((tmp_path / "model.pth",)))
    assert_equal(net, state)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_each_tensor_is_cast_to_the_dtype_asked_for_its_name(tmp_path, stored):
    state, net = make_state(stored), make_net()
    dtypes = {name: torch.float32 if name.startswith("norm") else torch.bfloat16 for name in state}
    source = write(tmp_path, state)
    weights.load(net, source, str, device=CPU, dtype_of=dtypes.__getitem__, label="net")
    assert_equal(net, {name: tensor.to(dtypes[name]) for name, tensor in state.items()})


def test_loaded_tensors_outlive_the_file(tmp_path):
    state, net = make_state(), make_net()
    source = write(tmp_path, state)
    load(net, source)
    with source.files[0].open("r+b") as file:
        file.write(b"\xff" * source.files[0].stat().st_size)
    assert_equal(net, state)


def test_an_ignored_key_is_neither_loaded_nor_unexpected(tmp_path):
    state, net = make_state(), make_net()
    source = write(tmp_path, state | {"extra": torch.ones(2)})
    load(net, source, rename=lambda key: None if key == "extra" else key)
    assert_equal(net, state)


def test_shapes_come_from_headers_alone(tmp_path):
    state = make_state()
    with pytest.MonkeyPatch.context() as patch:
        source = write(tmp_path, state, shards=2)
        patch.setattr(weights, "open_stored", None)
        assert weights.shapes(source) == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_host_holds_the_staging_buffers_and_nothing_else_of_the_checkpoint(tmp_path, suffix):
    buffers: list[weakref.ref[Tensor]] = []
    copied: list[int] = []

    class Watch(TorchFunctionMode):
        """Sees every tensor that is made, and where copies come from."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            assert func not in (Tensor.clone, torch.clone, torch.cat, torch.stack)
            if func is torch.empty and made.dtype == torch.uint8:
                buffers.append(weakref.ref(made))
            if func is Tensor.copy_:
                copied.append(args[1].nbytes)
                alive = [buffer() for buffer in buffers if buffer() is not None]
                inside = [b for b in alive if 0 <= args[1].data_ptr() - b.data_ptr() < b.nbytes]
                assert len(inside) == 1  # every copy is out of a buffer
                assert sum(buffer.nbytes for buffer in alive) <= SMALL.buffers * SMALL.buffer_bytes
            return made

    state, net = make_state(), make_net()
    if suffix == ".pth":
        torch.save(state, tmp_path / "model.pth")
    source = TensorSource((tmp_path / "model.pth",)) if suffix == ".pth" else write(tmp_path, state, shards=2)
    with Watch():
        load(net, source, dtype=torch.bfloat16, staging=SMALL)
    assert sum(copied) == sum(tensor.nbytes for tensor in state.values())
    assert max(copied) <= SMALL.buffer_bytes
    assert len(buffers) == SMALL.buffers
    assert not any(buffer() is not None for buffer in buffers)
    assert_equal(net, {name: tensor.bfloat16() for name, tensor in state.items()})


def test_the_progress_bar_stays_away_from_pipes_and_other_ranks(tmp_path, capfd):
    source = write(tmp_path, make_state())
    load(make_net(), source)
    load(make_net(), source, progress=False)
    assert capfd.readouterr() == ("", "")


def test_missing_tensors_are_named_as_the_checkpoint_spells_them(tmp_path):
    state = {f"their.{name}": tensor for name, tensor in make_state().items() if name != "norm.bias"}
    source = write(tmp_path, state)
    with pytest.raises(ValueError, match=r"missing: their\.norm\.bias in .*model\.safetensors"):
        load(make_net(), source, lambda key: key.removeprefix("their."), spell=lambda name: f"their.{name}")


def test_unexpected_tensors_are_named_and_counted(tmp_path):
    extra = {f"extra.{i}": torch.ones(1) for i in range(9)}
    source = write(tmp_path, make_state() | extra)
    with pytest.raises(ValueError, match=r"unexpected: extra\.0 in .*model\.safetensors, .* and 4 more;"):
        load(make_net(), source)


def test_misshaped_tensors_are_named_with_both_shapes(tmp_path):
    source = write(tmp_path, make_state() | {"layers.0.weight": torch.ones(4, 6)})
    with pytest.raises(ValueError, match=r"layers\.0\.weight in .* is \[4, 6\], the model has \[6, 4\]"):
        load(make_net(), source)


def test_two_keys_of_one_meaning_are_refused(tmp_path):
    source = write(tmp_path, make_state() | {"alias.bias": torch.ones(3)})
    with pytest.raises(ValueError, match=r"norm\.bias in .* means the same as alias\.bias"):
        load(make_net(), source, lambda key: key.replace("alias", "norm"))


def test_one_key_in_two_shards_is_refused(tmp_path):
    write_shards(tmp_path, "model", make_state())
    save_file({"norm.bias": torch.ones(3)}, tmp_path / "model-bf16.safetensors")
    match = r"norm\.bias is both in .*model-bf16\.safetensors and in .*model\.safetensors"
    with pytest.raises(ValueError, match=match):
        load(make_net(), weights.find(tmp_path, "model"))


def test_nothing_is_loaded_when_one_tensor_does_not_fit(tmp_path):
    net, state = make_net(), make_state()
    state.pop("norm.bias")
    source = write(tmp_path, state)
    with pytest.raises(ValueError, match=r"norm\.bias"):
        load(net, source)
    assert all(tensor.is_meta for tensor in net.state_dict().values())


@pytest.mark.parametrize("damage", ["truncated", "header cut", "empty", "other content"])
def test_a_damaged_shard_is_named_before_anything_is_read(tmp_path, damage):
    net, source = make_net(), write(tmp_path, make_state(), shards=2)
    shard = source.files[1]
    whole = shard.read_bytes()
    pieces = {
        "truncated": whole[:-3],
        "header cut": whole[:20],
        "empty": b"",
        "other content": b"<html>" * 50,
    }
    shard.write_bytes(pieces[damage])
    with pytest.raises(
        ValueError, match=r"model-00002-of-00002\.safetensors is not a whole safetensors file"
    ):
        load(net, source)
    assert all(tensor.is_meta for tensor in net.state_dict().values())


def test_a_shard_of_the_index_that_is_absent_is_named_with_its_keys(tmp_path):
    source = write(tmp_path, make_state(), shards=4)
    source.files[1].unlink()
    match = r"model-00002-of-00004\.safetensors does not exist; .*index\.json lists it for layers\.0\.weight"
    with pytest.raises(ValueError, match=match):
        load(make_net(), source)


def test_a_key_of_the_index_that_its_shard_lacks_is_named(tmp_path):
    source = write(tmp_path, make_state(), shards=2)
    index = json.loads(source.index.read_text())
    index["weight_map"]["ghost"] = source.files[0].name
    write_json(source.index, index)
    with pytest.raises(ValueError, match=r"not there: ghost in model-00001-of-00002\.safetensors"):
        load(make_net(), source)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_unreadable_index_is_named(tmp_path, content):
    write_shards(tmp_path, "model", make_state(), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        weights.find(tmp_path, "model")


def test_a_folder_without_tensors_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model\*\.safetensors"):
        weights.find(tmp_path, "model")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_tensor_is_refused_by_name(tmp_path, dtype):
    source = write(tmp_path, make_state() | {"norm.bias": torch.ones(3).to(dtype)})
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor norm\.bias is"):
        load(make_net(), source)


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    file, touched = tmp_path / "model.pth", tmp_path / "touched"
    torch.save(make_state() | {"code": Touch(touched)}, file)
    with pytest.raises(ValueError, match=r"model\.pth holds more than tensors") as caught:
        load(make_net(), TensorSource((file,)))
    assert not touched.exists()
    assert "weights_only" not in str(caught.value)


def test_pth_files_that_are_no_state_dict_are_named(tmp_path):
    file = tmp_path / "model.pth"
    for content, match in [
        ([1, 2], "holds a list"),
        ({"state_dict": make_state()}, "'state_dict' is a dict"),
    ]:
        torch.save(content, file)
        with pytest.raises(ValueError, match=rf"model\.pth.* {match}"):
            load(make_net(), TensorSource((file,)))


@pytest.mark.parametrize("damage", ["truncated", "empty", "bare pickle", "old format"])
def test_a_damaged_pth_file_is_named(tmp_path, damage):
    file = tmp_path / "model.pth"
    torch.save(make_state(), file, _use_new_zipfile_serialization=damage != "old format")
    pieces = {"truncated": file.read_bytes()[:-40], "empty": b"", "bare pickle": pickle.dumps({"a": 1})}
    file.write_bytes(pieces.get(damage, file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.pth is not a whole file"):
        load(make_net(), TensorSource((file,)))


def test_random_weights_have_the_scale_dtype_and_seed_asked_for():
    def randomised(seed: int) -> nn.Module:
        with torch.device("meta"):
            net = nn.ModuleDict({"linear": nn.Linear(256, 128), "norm": nn.LayerNorm(8), "net": Net()})
        weights.randomise(net, device=CPU, dtype_of=lambda _: torch.bfloat16, seed=seed)
        return net

    state, same, other = (randomised(seed).state_dict() for seed in (1, 1, 2))
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
    assert abs(state["linear.weight"].float().std() * 16 - 1) < 0.03  # 32768 samples: 1 +- 0.004, and bf16
    assert state["norm.weight"].eq(1).all()
    assert state["norm.bias"].eq(0).all()
    assert 0 < state["net.modulation"].float().std() < 0.05
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert not torch.equal(state["linear.weight"], other["linear.weight"])


class Odd(nn.Module):
    """What the pieces of a stream can stumble over: no elements, no axes, more bytes than a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.long = nn.Parameter(torch.zeros(257, 3))
        self.register_buffer("nothing", torch.zeros(0))
        self.many = nn.ParameterList([nn.Parameter(torch.zeros(i, 3)) for i in range(20)])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("staging", [SMALL, Staging(1, 1, 64), Staging(8, 2, 4096), Staging()])
def test_tensors_of_every_shape_and_dtype_pass_through_buffers_of_every_size(tmp_path, suffix, staging):
    with torch.device("meta"):
        net = Odd()
    generator = torch.Generator().manual_seed(1)
    stored = (torch.float32, torch.float16, torch.bfloat16)
    state = {
        name: torch.randn(tensor.shape, generator=generator).to(stored[i % 3])
        for i, (name, tensor) in enumerate(net.state_dict().items())
    }
    kept = {name: stored[i % 2] for i, name in enumerate(sorted(state))}
    if suffix == ".pth":
        torch.save(state, tmp_path / "model.pth")
    source = TensorSource((tmp_path / "model.pth",)) if suffix == ".pth" else write(tmp_path, state, shards=3)
    weights.load(net, source, str, device=CPU, dtype_of=kept.__getitem__, label="odd", staging=staging)
    assert_equal(net, {name: tensor.to(kept[name]) for name, tensor in state.items()})


def test_a_strided_tensor_of_a_pth_file_loads_exactly(tmp_path):
    state, net = make_state(), make_net()
    torch.save(state | {"layers.0.weight": state["layers.0.weight"].T.contiguous().T}, tmp_path / "model.pth")
    load(net, TensorSource((tmp_path / "model.pth",)))
    assert_equal(net, state)
    assert net.layers[0].weight.is_contiguous()


class Packed(nn.Module):
    """q, k and v in one matrix product, beside a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(10, 21)
        self.norm = nn.LayerNorm(4)


def parts_of(name: str) -> tuple[str, ...]:
    return tuple(name.replace("qkv", part) for part in "qkv") if name.startswith("qkv") else (name,)


def packed_net() -> Packed:
    with torch.device("meta"):
        return Packed()


def packed_state() -> dict[str, Tensor]:
    shapes = {f"{part}.weight": (7, 10) for part in "qkv"} | {f"{part}.bias": (7,) for part in "qkv"}
    shapes |= {"norm.weight": (4,), "norm.bias": (4,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("staging", [SMALL, Staging()])
def test_the_parts_of_a_packed_parameter_become_its_rows(tmp_path, shards, staging):
    state, net = packed_state(), packed_net()
    asked: list[str] = []

    def dtype_of(name: str) -> torch.dtype:
        asked.append(name)
        return torch.bfloat16 if name == "qkv.weight" else torch.float32

    source = write(tmp_path, state, shards=shards)
    options = {"parts_of": parts_of, "staging": staging}
    weights.load(net, source, str, device=CPU, dtype_of=dtype_of, label="net", **options)
    rows = {
        f"qkv.{leaf}": torch.cat([state[f"{part}.{leaf}"] for part in "qkv"]) for leaf in ("weight", "bias")
    }
    rows["qkv.weight"] = rows["qkv.weight"].bfloat16()
    assert_equal(net, rows | {name: state[name] for name in ("norm.weight", "norm.bias")})
    assert sorted(asked) == sorted(net.state_dict())  # by its own names, once each


def test_pack_makes_what_load_makes(tmp_path):
    state, net = packed_state(), packed_net()
    load(net, write(tmp_path, state), parts_of=parts_of)
    assert_equal(net, weights.pack(state, net.state_dict(), parts_of))
    with pytest.raises(KeyError, match=r"norm\.bias"):
        weights.pack({}, ["norm.bias"], parts_of)


def test_errors_about_packed_parameters_speak_of_their_parts(tmp_path):
    state = {f"their.{name}": tensor for name, tensor in packed_state().items()}
    del state["their.k.weight"]
    state |= {"their.v.bias": torch.ones(21), "their.qkv.weight": torch.ones(21, 10)}
    state["alias.q.bias"] = torch.ones(7)
    source = write(tmp_path, state)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load(
            packed_net(),
            source,
            lambda key: key.partition(".")[2],
            spell=lambda name: f"their.{name}",
            parts_of=parts_of,
        )
    said = str(caught.value)
    assert f"missing: their.k.weight in {source.files[0]};" in said
    assert f"unexpected: their.qkv.weight in {source.files[0]};" in said
    assert f"misshaped: their.v.bias in {source.files[0]} is [21], the model has [7];" in said
    assert f"duplicated: their.q.bias in {source.files[0]} means the same as alias.q.bias;" in said


class Halves(nn.Module, Receiver):
    """A linear layer that keeps something else than the weight it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(21, 10))
        self.bias = nn.Parameter(torch.empty(21))
        self.register_buffer("kept", torch.empty(21, 10, dtype=torch.float16), persistent=False)
        self.received: dict[str, Tensor] = {}

    def receive(self, leaf: str, tensor: Tensor) -> None:
        assert leaf not in self.received
        self.received[leaf] = tensor
        if leaf == "weight":
            self.kept = tensor.half()


def halves() -> Packed:
    with torch.device("meta"):
        net = Packed()
        net.qkv = Halves()
    return net


def test_a_receiver_is_given_whole_tensors_and_its_parameters_stay_unset(tmp_path):
    state, net = packed_state(), halves()
    load(net, write(tmp_path, state), parts_of=parts_of, dtype=torch.bfloat16, staging=SMALL)
    expected = weights.pack(state, ("qkv.weight", "qkv.bias"), parts_of)
    assert net.qkv.received.keys() == {"weight", "bias"}
    for leaf, tensor in net.qkv.received.items():
        torch.testing.assert_close(tensor, expected[f"qkv.{leaf}"].bfloat16(), atol=0, rtol=0)
    assert net.qkv.weight.is_meta
    assert not net.norm.weight.is_meta


def test_a_receiver_is_given_random_weights_too():
    net = halves()
    weights.randomise(net, device=CPU, dtype_of=lambda _: torch.bfloat16, seed=0)
    assert net.qkv.received["weight"].dtype == torch.bfloat16
    assert net.qkv.kept.ne(0).any()


def test_a_buffer_that_a_receiver_left_unfilled_is_named(tmp_path):
    class Idle(Halves):
        def receive(self, leaf: str, tensor: Tensor) -> None:
            pass

    net = halves()
    with torch.device("meta"):
        net.qkv = Idle()
    with pytest.raises(AssertionError, match=r"qkv\.kept"):
        load(net, write(tmp_path, packed_state()), parts_of=parts_of)


@pytest.mark.parametrize("staging", [SMALL, Staging()])
def test_a_file_that_shrinks_while_it_is_read_is_named_and_no_thread_stays(tmp_path, monkeypatch, staging):
    source = write(tmp_path, make_state(), shards=2)
    whole, entries_of = source.files[1].read_bytes(), weights.entries_of

    def then_cut(source: TensorSource):
        entries = entries_of(source)
        source.files[1].write_bytes(whole[:-30])
        return entries

    monkeypatch.setattr(weights, "entries_of", then_cut)
    before = threading.active_count()
    with pytest.raises(ValueError, match=r"00002-of-00002\.safetensors is not a whole .*ends at byte \d+"):
        load(make_net(), source, staging=staging)
    assert threading.active_count() == before


def test_the_log_says_how_much_was_loaded_and_how_fast(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "chitu_core.weights"):
        load(make_net(), write(tmp_path, make_state()))
    (record,) = caplog.records
    assert record.getMessage().startswith("net: 3.2e-07 GB in ")  # 80 numbers
    assert record.getMessage().endswith(" GB/s)")
