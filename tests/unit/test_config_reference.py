"""The generated page docs/configuration.md: up to date, complete, and never at odds with schema and YAML."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from chitu_core.config import Config, ModelConfig, reference
from chitu_core.environment import Environment

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "chitu_core" / "config"


def schema_keys(record: type, prefix: str = "") -> set[str]:
    keys = set()
    for part in fields(record):
        if part.type is ModelConfig:
            continue  # a file of its own
        path = prefix + part.name
        keys |= schema_keys(part.type, f"{path}.") if is_dataclass(part.type) else {path}
    return keys


def yaml_keys(node: dict, prefix: str = "") -> set[str]:
    keys = set()
    for name, value in node.items():
        keys |= yaml_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return keys


def read(file: Path) -> dict:
    return OmegaConf.to_container(OmegaConf.load(file))


def test_the_committed_page_is_what_the_module_prints():
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert page == reference.page(), "run: python -m chitu_core.config.reference > docs/configuration.md"


def test_serve_config_and_schema_have_the_same_keys():
    assert yaml_keys(read(FOLDER / "serve_config.yaml")) - {"defaults"} == schema_keys(Config)


@pytest.mark.parametrize("file", reference.model_files(), ids=lambda file: file.stem)
def test_a_model_file_and_the_schema_have_the_same_keys(file):
    assert yaml_keys(read(file)) == schema_keys(ModelConfig)


def test_every_key_stands_in_the_page_once():
    page = reference.page()
    for key in schema_keys(Config) | {f"models.{key}" for key in schema_keys(ModelConfig)}:
        assert page.count(f"\n| `{key}` |") == 1 + (key in launcher_keys()), key


def launcher_keys() -> set[str]:
    return {key.path for key in reference.launch_settings.KEYS}


def test_every_key_of_the_launcher_stands_in_the_page():
    table = reference.page().partition("## system_config.yaml")[2]
    assert all(f"| `{key}` |" in table for key in launcher_keys())


def test_notes_on_legal_values_are_about_keys_that_exist():
    assert set(reference.LEGAL) <= schema_keys(Config) | {f"models.{key}" for key in schema_keys(ModelConfig)}


class Recorder(dict):
    """An empty environment that notes which variables are asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def get(self, name, default=None):
        self.asked.add(name)
        return default


def test_every_environment_variable_that_is_read_is_documented():
    recorder = Recorder()
    Environment.read(recorder)
    assert recorder.asked == {variable.name for variable in reference.VARIABLES}
    assert {variable.field for variable in reference.VARIABLES} == {part.name for part in fields(Environment)}
