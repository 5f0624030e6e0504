"""Loading of tensors: exact values, streaming, and an error with file and key for each wrong checkpoint."""

import json
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import write_json, write_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from chitu_core import weights
from chitu_core.weights import TensorSource

CPU = torch.device("cpu")


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
        patch.setattr(weights, "_read", None)
        assert weights.shapes(source) == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_one_tensor_of_the_checkpoint_is_alive_at_a_time(tmp_path):
    sources: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is Tensor.to:
                sources.append(weakref.ref(args[0]))
                alive.append(sum(ref() is not None for ref in sources))
            return func(*args, **(kwargs or {}))

    source = write(tmp_path, make_state(), shards=2)
    with Watch():
        load(make_net(), source)
    assert len(alive) == len(make_state())
    assert max(alive) == 1


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
