"""Both layouts of a checkpoint: names, parts, sizes, and an error for every way a directory can be wrong."""

import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoints import (
    DATA,
    DIT_KEYS,
    T5_FILE,
    T5_TOKENIZER,
    UMT5_KEYS,
    VAE_FILE,
    VAE_KEYS,
    TinyWeights,
    edit_json,
    random_weights,
    read_keys,
    write_diffusers,
    write_official,
    write_shards,
)
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import chitu_core.config
from chitu_core import weights
from chitu_core.config import ModelConfig
from chitu_diffusion.checkpoint.layout import Component, locate
from chitu_diffusion.checkpoint.names import DIT, OFFICIAL, NameMap, umt5_names, vae_names
from chitu_diffusion.checkpoint.sizes import dit_config, umt5_config, vae_config
from chitu_diffusion.encoders.umt5 import UMT5Config, UMT5Encoder
from chitu_diffusion.models.wan import WanConfig, WanDiT
from chitu_diffusion.vaes.wan import WAN21_LATENTS_MEAN, WAN21_LATENTS_STD, WanVAE, WanVAEConfig

TINY = random_weights()
TINY_TWO = random_weights(experts=2)
DEMO = Path(chitu_core.config.__file__).parent.parent.parent / "chitu_diffusion" / "demo"
LAYOUTS = pytest.mark.parametrize("write", [write_official, write_diffusers])


def model(ckpt_dir: Path | str | None, name: str = "Wan2.1-T2V-1.3B") -> ModelConfig:
    folder = Path(chitu_core.config.__file__).parent
    composed = OmegaConf.load(folder / "serve_config.yaml")
    composed.pop("defaults")
    composed.pop("hydra", None)
    composed.models = OmegaConf.load(folder / "models" / f"{name}.yaml")
    composed.debug.skip_model_load = True  # so that a null ckpt_dir gets as far as locate
    return replace(
        chitu_core.config.load(composed).models, ckpt_dir=None if ckpt_dir is None else str(ckpt_dir)
    )


def load_component(module: nn.Module, component: Component, dtype: torch.dtype) -> dict[str, Tensor]:
    """Load it; returns the tensors under official names, packed ones apart again."""
    device, spell = torch.device("cpu"), component.spell
    parts_of = module.parts_of if isinstance(module, WanDiT) else weights.whole
    weights.load(
        module,
        component.source,
        component.rename,
        device=device,
        dtype_of=lambda _: dtype,
        label="part",
        spell=spell,
        parts_of=parts_of,
    )
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        parts = parts_of(name)
        state |= zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,), strict=True)
    return state


def on_meta(make, config) -> nn.Module:
    with torch.device("meta"):
        return make(config)


def assert_same(loaded: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor, atol=0, rtol=0)  # copies are exact


def name_map(file: Path) -> NameMap:
    theirs = {key.diffusers for key in read_keys(file)}
    return DIT if file.name.startswith("dit") else (umt5_names if "t5" in file.name else vae_names)(theirs)


@pytest.mark.parametrize("file", sorted(DATA.glob("*.tsv")), ids=lambda file: file.stem)
def test_every_key_of_the_released_models_maps_both_ways(file):
    names = name_map(file)
    for key in read_keys(file):
        assert names.rename(key.diffusers) == key.official
        assert names.spell(key.official) == key.diffusers
        assert OFFICIAL.rename(key.official) == key.official == names.rename(key.official)
        assert OFFICIAL.spell(key.official) == key.official


def test_a_repackaged_prefix_is_stripped_and_a_left_over_norm_ignored():
    assert OFFICIAL.rename("model.diffusion_model.blocks.3.self_attn.q.bias") == "blocks.3.self_attn.q.bias"
    assert DIT.rename("blocks.3.attn2.norm_added_q.weight") is None


@pytest.mark.parametrize(
    "stored", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")]
)
def test_the_text_embedding_is_read_once_under_either_name(stored):
    names = umt5_names([f"{name}.weight" for name in stored])
    renamed = [names.rename(f"{name}.weight") for name in stored]
    assert renamed == ["token_embedding.weight", None][: len(stored)]


@LAYOUTS
@pytest.mark.parametrize(("shards", "with_index"), [(1, False), (2, True), (2, False)])
def test_a_checkpoint_loads_exactly_into_the_models_that_its_sizes_describe(
    tmp_path, write, shards, with_index
):
    found = locate(model(write(tmp_path, TINY, shards=shards, with_index=with_index)))
    assert [name for name, _ in found.experts] == ["dit"]
    dit, text, vae = found.experts[0][1], found.text_encoder, found.vae
    wan = WanConfig(64, 160, 4, 3, 32, 64, 512, 16, 16, (1, 2, 2), 1e-6)
    statistics = (WAN21_LATENTS_MEAN, WAN21_LATENTS_STD)
    assert dit_config(dit) == wan
    assert umt5_config(text) == UMT5Config(384, 64, 64, 4, 160, 3)
    assert vae_config(vae) == WanVAEConfig(16, 16, (1, 2, 4, 4), 2, (False, True, True), *statistics)
    assert_same(load_component(on_meta(WanDiT, dit_config(dit)), dit, torch.float32), TINY.dits[0])
    encoder = on_meta(UMT5Encoder, umt5_config(text))
    assert_same(load_component(encoder, text, torch.float32), TINY.text_encoder)
    assert_same(load_component(on_meta(WanVAE, vae_config(vae)), vae, torch.float32), TINY.vae)
    assert (found.tokenizer_dir / "tokenizer.json").is_file()


@LAYOUTS
def test_high_noise_is_the_first_expert_in_both_layouts(tmp_path, write):
    found = locate(model(write(tmp_path, TINY_TWO), "Wan2.2-T2V-A14B"))
    assert [name for name, _ in found.experts] == ["high_noise", "low_noise"]
    for (_, expert), state in zip(found.experts, TINY_TWO.dits, strict=True):
        assert_same(load_component(on_meta(WanDiT, dit_config(expert)), expert, torch.float32), state)


def test_the_packaged_demo_checkpoint_loads():
    found = locate(model(None, "demo"))
    assert (found.root.resolve(), found.layout) == (DEMO.resolve(), "diffusers")
    dit, text, vae = found.experts[0][1], found.text_encoder, found.vae
    assert dit_config(dit) == WanConfig(256, 1024, 4, 8, 256, 192, 512, 16, 16, (1, 2, 2), 1e-6)
    assert umt5_config(text) == UMT5Config(384, 192, 192, 6, 384, 3)
    assert vae_config(vae).latents_mean[0] == -0.087991
    stored = load_file(DEMO / "vae" / "diffusion_pytorch_model.safetensors")
    loaded = load_component(on_meta(WanVAE, vae_config(vae)), vae, torch.bfloat16)
    assert torch.equal(loaded["decoder.head.2.weight"], stored["decoder.conv_out.weight"])
    load_component(on_meta(WanDiT, dit_config(dit)), dit, torch.bfloat16)
    load_component(on_meta(UMT5Encoder, umt5_config(text)), text, torch.bfloat16)


@pytest.mark.parametrize("file", [T5_FILE, VAE_FILE])
def test_official_pth_files_may_be_safetensors(tmp_path, file):
    write_official(tmp_path, TINY)
    state = TINY.text_encoder if file == T5_FILE else TINY.vae
    (tmp_path / file).unlink()
    save_file(state, (tmp_path / file).with_suffix(".safetensors"))
    found = locate(model(tmp_path))
    component = found.text_encoder if file == T5_FILE else found.vae
    assert component.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_missing_tensors_have_the_names_of_the_diffusers_layout(tmp_path):
    write_diffusers(tmp_path, TINY)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("blocks.2.attn1.to_out.0.weight")
    save_file(state, file)
    dit = locate(model(tmp_path)).experts[0][1]
    with pytest.raises(
        ValueError, match=r"missing: blocks\.2\.attn1\.to_out\.0\.weight in .*model\.safetensors"
    ):
        load_component(on_meta(WanDiT, dit_config(dit)), dit, torch.float32)


@pytest.mark.parametrize(
    ("write", "part", "match"),
    [
        (write_official, "config.json", r"config\.json is missing"),
        (write_official, "diffusion_pytorch_model.safetensors", r"holds no diffusion_pytorch_model"),
        (write_official, T5_FILE, r"umt5-xxl-enc-bf16\.pth is missing \(looked for \.safetensors too\)"),
        (write_official, VAE_FILE, r"Wan2\.1_VAE\.pth is missing"),
        (write_official, T5_TOKENIZER, r"tokenizer .*umt5-xxl is missing"),
        (write_diffusers, "transformer", r"transformer.config\.json is missing"),
        (
            write_diffusers,
            "transformer/diffusion_pytorch_model.safetensors",
            r"transformer holds no diffusion",
        ),
        (write_diffusers, "text_encoder", r"text_encoder.config\.json is missing"),
        (write_diffusers, "text_encoder/model.safetensors", r"text_encoder holds no model\*"),
        (write_diffusers, "vae", r"vae.config\.json is missing"),
        (write_diffusers, "tokenizer", r"tokenizer .*tokenizer is missing"),
    ],
)
def test_a_missing_part_is_named_with_the_key_and_the_remedy(tmp_path, write, part, match):
    path = write(tmp_path, TINY) / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=rf"models\.ckpt_dir=.*{match}.*fetch the checkpoint again"):
        locate(model(tmp_path))


@pytest.mark.parametrize(
    ("write", "folder"), [(write_official, "low_noise_model"), (write_diffusers, "transformer_2")]
)
def test_a_missing_second_expert_is_named(tmp_path, write, folder):
    shutil.rmtree(write(tmp_path, TINY_TWO) / folder)
    with pytest.raises(ValueError, match=rf"models\.ckpt_dir=.*{folder}.config\.json is missing"):
        locate(model(tmp_path, "Wan2.2-T2V-A14B"))


@LAYOUTS
@pytest.mark.parametrize(
    ("tiny", "name", "match"),
    [
        (TINY, "Wan2.2-T2V-A14B", r"holds 1 expert\(s\), .* needs 2 .*choose models=Wan2\.1-T2V-1\.3B"),
        (TINY_TWO, "Wan2.1-T2V-14B", r"holds 2 expert\(s\), .* needs 1 .*choose models=Wan2\.2-T2V-A14B"),
    ],
    ids=["one", "two"],
)
def test_the_wrong_number_of_experts_says_which_model_fits(tmp_path, write, tiny: TinyWeights, name, match):
    with pytest.raises(ValueError, match=rf"models\.ckpt_dir=.*{match}"):
        locate(model(write(tmp_path, tiny), name))


def test_a_directory_that_is_no_checkpoint_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("no weights here")
    with pytest.raises(
        ValueError, match=r"models\.ckpt_dir=.*not a Wan checkpoint.*config\.json.*model_index\.json"
    ):
        locate(model(tmp_path))


def test_an_empty_directory_a_file_and_a_wrong_path_are_told_apart(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, match in [("empty", "is empty"), ("file", "is a file"), ("absent", "no such directory")]:
        with pytest.raises(
            ValueError, match=rf"models\.ckpt_dir=.*{name}: .*{match}.*Wan-AI/Wan2\.1-T2V-1\.3B"
        ):
            locate(model(tmp_path / name))


def test_a_null_directory_without_a_packaged_one_names_key_and_source():
    with pytest.raises(
        ValueError, match=r"models\.ckpt_dir is missing; add models\.ckpt_dir=DIRECTORY; source: http"
    ):
        locate(model(None))


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_an_unreadable_config_is_named(tmp_path, content):
    (write_official(tmp_path, TINY) / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"models\.ckpt_dir=.*config\.json"):
        locate(model(tmp_path))


def test_a_truncated_file_is_found_by_locate(tmp_path):
    file = write_official(tmp_path, TINY) / VAE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"models\.ckpt_dir=.*Wan2\.1_VAE\.pth is not a whole file"):
        locate(model(tmp_path))


def test_a_repository_id_is_fetched_without_what_is_not_read(tmp_path, monkeypatch):
    write_official(tmp_path, TINY)
    calls = []

    def snapshot_download(repo_id: str, ignore_patterns: list[str]) -> str:
        calls.append((repo_id, ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate(model("Wan-AI/Wan2.1-T2V-1.3B")).root == tmp_path
    [(repo_id, ignored)] = calls
    assert repo_id == "Wan-AI/Wan2.1-T2V-1.3B"
    assert {"assets/*", "examples/*", "*.md"} <= set(ignored)


def test_an_existing_directory_wins_over_a_repository_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    write_diffusers(Path("owner/name"), TINY)
    assert locate(model("owner/name")).layout == "diffusers"


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), FileNotFoundError("not cached"), ValueError("bad id")]
)
def test_a_repository_that_cannot_be_fetched_names_cause_and_remedy(monkeypatch, error):
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=rf"models\.ckpt_dir=owner/name: .*{error}.*existing directory"):
        locate(model("owner/name"))


@pytest.mark.parametrize(
    ("write", "config", "values", "match"),
    [
        (
            write_official,
            "config.json",
            {"dim": 128},
            r"config\.json says dim=128, but the tensors have dim=64",
        ),
        (
            write_official,
            "config.json",
            {"num_layers": 4},
            r"num_layers=4, but the tensors have num_layers=3",
        ),
        (write_official, "config.json", {"num_heads": 5}, r"5 heads, but the tensors have dim=64"),
        (write_official, "config.json", {"num_heads": "4"}, r"num_heads=4, expected a number"),
        (write_official, "config.json", {"model_type": "i2v"}, r"model_type=i2v.*only text-to-video"),
        (write_diffusers, "transformer/config.json", {"attention_head_dim": 8}, r"attention_head_dim=8.*=16"),
        (write_diffusers, "transformer/config.json", {"in_channels": 36}, r"in_channels=36.*in_channels=16"),
        (
            write_diffusers,
            "transformer/config.json",
            {"num_attention_heads": None},
            r"num_attention_heads=None",
        ),
        (write_diffusers, "text_encoder/config.json", {"d_kv": 64}, r"d_kv=64.*d_kv=16"),
        (write_diffusers, "text_encoder/config.json", {"vocab_size": 9}, r"vocab_size=9.*vocab_size=384"),
        (
            write_diffusers,
            "vae/config.json",
            {"dim_mult": [1, 2, 4]},
            r"dim_mult=\[1, 2, 4\].*\[1, 2, 4, 4\]",
        ),
        (
            write_diffusers,
            "vae/config.json",
            {"temperal_downsample": [True] * 3},
            r"temperal_downsample=.*False",
        ),
        (write_diffusers, "vae/config.json", {"latents_mean": [0.0]}, r"latents_mean must be 16 numbers"),
        (write_diffusers, "vae/config.json", {"is_residual": True}, r"only the Wan2\.1 VAE"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused_with_both(tmp_path, write, config, values, match):
    edit_json(write(tmp_path, TINY) / config, **values)
    found = locate(model(tmp_path))
    with pytest.raises(ValueError, match=match):
        (dit_config(found.experts[0][1]), umt5_config(found.text_encoder), vae_config(found.vae))


@pytest.mark.parametrize("tensors", ["36 input channels", "image embedding"])
def test_an_image_to_video_transformer_is_refused_by_its_tensors(tmp_path, tensors):
    state = dict(TINY.dits[0])
    if tensors == "image embedding":
        state["img_emb.proj.0.weight"] = torch.ones(8)
    else:
        state["patch_embedding.weight"] = torch.ones(64, 36, 1, 2, 2)
    write_shards(write_official(tmp_path, TINY), "diffusion_pytorch_model", state)
    with pytest.raises(ValueError, match="only text-to-video is supported; give a T2V checkpoint"):
        dit_config(locate(model(tmp_path)).experts[0][1])


def test_a_network_in_the_wrong_place_is_named_by_the_tensor_it_lacks(tmp_path):
    write_official(tmp_path, TINY)
    shutil.copy(tmp_path / VAE_FILE, tmp_path / T5_FILE)
    with pytest.raises(ValueError, match=r"umt5-xxl-enc-bf16\.pth lacks the tensor token_embedding\.weight"):
        umt5_config(locate(model(tmp_path)).text_encoder)


@pytest.mark.parametrize(
    ("file", "sizes"), [(DIT_KEYS, (5120, 40, 16)), (UMT5_KEYS, (4096, 24, 64)), (VAE_KEYS, (96,))]
)
def test_sizes_of_the_released_models_follow_from_their_key_tables(file, sizes):
    shapes = {key.official: key.shape for key in read_keys(file)}
    heads = {"num_heads": 40} if file == DIT_KEYS else {}
    component = Component(weights.TensorSource((Path("x.pth"),)), OFFICIAL, heads, shapes)
    if file == DIT_KEYS:
        config = dit_config(component)
        assert (config.dim, config.num_layers, config.out_dim) == sizes
    elif file == UMT5_KEYS:
        text = umt5_config(component)
        assert (text.dim, text.num_layers, text.num_heads) == sizes
    else:
        vae = vae_config(component)
        assert (vae.base_dim,) == sizes
        assert (vae.dim_mult, vae.num_res_blocks, vae.stride) == ((1, 2, 4, 4), 2, (4, 8, 8))
