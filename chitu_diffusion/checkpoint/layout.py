"""Where a Wan checkpoint keeps its parts: official layout and Diffusers layout, told apart by their files.

`locate` turns `models.ckpt_dir` into components ready for `weights.load`; it reads headers, no tensors.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chitu_core import weights
from chitu_core.config import ModelConfig
from chitu_core.weights import TensorSource
from chitu_diffusion.checkpoint.names import DIT, OFFICIAL, NameMap, umt5_names, vae_names

ONE_EXPERT = ("dit",)
TWO_EXPERTS = ("high_noise", "low_noise")

Names = Callable[[Collection[str]], NameMap]  # the keys of a source -> their map

_STEM = "diffusion_pytorch_model"
_MODELS_THAT_FIT = {1: "models=Wan2.1-T2V-1.3B or models=Wan2.1-T2V-14B", 2: "models=Wan2.2-T2V-A14B"}
_NOT_READ = ("assets/*", "examples/*", "*.md", "*.txt", "*.png", "*.jpg", "*.gif", "*.mp4")
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its files and names for `weights.load`, config and shapes."""

    source: TensorSource
    names: NameMap
    config: Mapping[str, object]  # config.json; empty where the layout has none
    shapes: Mapping[str, tuple[int, ...]]  # under official names

    @property
    def rename(self) -> Callable[[str], str | None]:
        """Checkpoint key -> official name, or None for a key that is not needed."""
        return self.names.rename

    @property
    def spell(self) -> Callable[[str], str]:
        """Official name -> checkpoint key, for messages."""
        return self.names.spell

    @property
    def place(self) -> Path:
        """The folder, or the single .pth file, to name in messages."""
        first = self.source.files[0]
        return first if first.suffix == ".pth" else first.parent


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. Experts are ("dit",) or ("high_noise", "low_noise"), in this order."""

    root: Path
    layout: Literal["official", "diffusers"]
    experts: tuple[tuple[str, Component], ...]
    text_encoder: Component
    vae: Component
    tokenizer_dir: Path


def locate(model: ModelConfig) -> Checkpoint:
    """Find every part of the checkpoint that `models.ckpt_dir` names.

    An existing directory wins; otherwise `owner/name` is fetched from Hugging Face (or found in its cache).
    Null means the packaged checkpoint.
    Raises ValueError naming models.ckpt_dir, the path, what is missing and the remedy.
    """
    root = _resolve(model)
    try:
        checkpoint = _diffusers(root) if _is_diffusers(root) else _official(root, model)
    except ValueError as error:
        raise ValueError(f"models.ckpt_dir={root}: {error}") from error
    _check_experts(checkpoint, model)
    return checkpoint


def _resolve(model: ModelConfig) -> Path:
    """The checkpoint's directory; raises ValueError unless it is one with something in it."""
    if model.ckpt_dir is None:
        if model.packaged_dir is None:
            remedy = f"add models.ckpt_dir=DIRECTORY; source: {model.source}"
            raise ValueError(f"models.ckpt_dir is missing; {remedy}")
        root = Path(__file__).parent.parent / model.packaged_dir
    else:
        root = Path(model.ckpt_dir).expanduser()
        if not root.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model.ckpt_dir):
            return _fetch(model.ckpt_dir)
    if not root.is_dir():
        problem = "is a file; name the directory of the checkpoint" if root.exists() else "no such directory"
        raise ValueError(f"models.ckpt_dir={root}: {problem}; checkpoint source: {model.source}")
    if not any(root.iterdir()):
        raise ValueError(f"models.ckpt_dir={root}: the directory is empty; fetch {model.source} into it")
    return root


def _fetch(repo_id: str) -> Path:
    """Download a repository, or find it in the local cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, ignore_patterns=list(_NOT_READ)))
    except (OSError, ValueError) as error:  # connection, access, not found and cache are OSErrors there
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = "name an existing directory, or check repo id, network and `hf auth login`"
        problem = "no such directory, and no such repository could be fetched from Hugging Face"
        raise ValueError(f"models.ckpt_dir={repo_id}: {problem} ({why}); {remedy}") from error


def _is_diffusers(root: Path) -> bool:
    return (root / "model_index.json").is_file() or (root / "transformer").is_dir()


def _diffusers(root: Path) -> Checkpoint:
    """The parts of a "-Diffusers" repository."""
    index = _json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    listed = index.get("transformer_2")
    is_listed = isinstance(listed, list) and any(listed)  # [null, null] where there is none
    has_second = is_listed or (root / "transformer_2").is_dir()
    # NOTE transformer is the high-noise expert, transformer_2 the low-noise one
    names = TWO_EXPERTS if has_second else ONE_EXPERT
    folders = zip(names, ("transformer", "transformer_2"), strict=False)
    experts = tuple((name, _folder(root / folder, _STEM, lambda _: DIT)) for name, folder in folders)
    text_encoder = _folder(root / "text_encoder", "model", umt5_names)
    vae = _folder(root / "vae", _STEM, vae_names)
    return Checkpoint(root, "diffusers", experts, text_encoder, vae, _tokenizer(root / "tokenizer"))


def _official(root: Path, model: ModelConfig) -> Checkpoint:
    """The parts of an official repository."""
    high = model.high_noise_checkpoint or "high_noise_model"
    low = model.low_noise_checkpoint or "low_noise_model"
    if (root / high).is_dir() or (root / low).is_dir():
        folders = dict(zip(TWO_EXPERTS, (root / high, root / low), strict=True))
    elif (root / "config.json").is_file() or any(root.glob("*.pth")):
        folders = dict.fromkeys(ONE_EXPERT, root)
    else:
        official = f"config.json, {high}/, {low}/ or *.pth (official layout)"
        looked_for = f"looked for {official} and for model_index.json or transformer/ (Diffusers layout)"
        raise ValueError(f"not a Wan checkpoint; {looked_for}; fetch {model.source}")
    experts = tuple((name, _folder(folder, _STEM, lambda _: OFFICIAL)) for name, folder in folders.items())
    text_encoder = _file(root / model.encoder.t5_checkpoint)
    vae = _file(root / model.vae.checkpoint)
    return Checkpoint(
        root, "official", experts, text_encoder, vae, _tokenizer(root / model.encoder.t5_tokenizer)
    )


def _folder(folder: Path, stem: str, names: Names) -> Component:
    """A component that is a folder with config.json and safetensors."""
    config = _json(folder / "config.json")
    return _component(weights.find(folder, stem), config, names)


def _file(file: Path) -> Component:
    """A component that is one .pth file, or the same tensors as safetensors in its place."""
    for candidate in (file, file.with_suffix(".safetensors")):
        if candidate.is_file():
            return _component(TensorSource((candidate,)), {}, lambda _: OFFICIAL)
    raise ValueError(f"{file} is missing (looked for .safetensors too); fetch the checkpoint again")


def _component(source: TensorSource, config: Mapping[str, object], names: Names) -> Component:
    shapes = weights.shapes(source)
    name_map = names(shapes)
    official = {name: shape for key, shape in shapes.items() if (name := name_map.rename(key)) is not None}
    return Component(source, name_map, config, official)


def _tokenizer(folder: Path) -> Path:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        wanted = " or ".join(_TOKENIZER_FILES)
        raise ValueError(f"the tokenizer {folder} is missing: no {wanted} there; fetch the checkpoint again")
    return folder


def _json(file: Path) -> Mapping[str, object]:
    if not file.is_file():
        raise ValueError(f"{file} is missing; fetch the checkpoint again")
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object; fetch it again")
    return content


def _check_experts(checkpoint: Checkpoint, model: ModelConfig) -> None:
    found, wanted = len(checkpoint.experts), len(model.sampler.boundary) + 1
    if found != wanted:
        fits = f"choose {_MODELS_THAT_FIT[found]} for this checkpoint, or name another directory"
        needs = f"models={model.name} needs {wanted} expert(s) (models.sampler.boundary)"
        raise ValueError(f"models.ckpt_dir={checkpoint.root}: holds {found} expert(s), but {needs}; {fits}")
