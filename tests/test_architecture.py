"""The rules of docs/architecture.md, read off the source: what is no test lasts a month."""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for package in ("chitu_core", "chitu_diffusion") for path in (ROOT / package).rglob("*.py")
)

LEAVES = (
    "torch.distributed",
    "chitu_core.config",
    "chitu_core.environment",
    *(
        f"chitu_diffusion.{name}"
        for name in ("engine", "backend", "generator", "prepare", "survey", "task", "checkpoint")
    ),
)
FORBIDDEN_IMPORTS = {  # folder or file: what it must not know
    "chitu_core": ("chitu_diffusion", "hydra"),
    "chitu_diffusion/models": (
        *LEAVES,
        "chitu_diffusion.samplers",
        "chitu_diffusion.encoders",
        "chitu_diffusion.vaes",
    ),
    "chitu_diffusion/encoders": (*LEAVES, "chitu_diffusion.models", "chitu_diffusion.vaes"),
    "chitu_diffusion/vaes": (*LEAVES, "chitu_diffusion.models", "chitu_diffusion.encoders"),
    "chitu_diffusion/samplers": (*LEAVES, "chitu_diffusion.models", "chitu_diffusion.guidance"),
    "chitu_diffusion/flex_cache": LEAVES,
    "chitu_diffusion/eval": (
        "torch.distributed",
        "chitu_core.environment",
        *(
            f"chitu_diffusion.{name}"
            for name in ("engine", "backend", "generator", "prepare", "survey", "task")
        ),
    ),
    "chitu_diffusion/seam.py": (*LEAVES, "chitu_diffusion.models"),
    "chitu_diffusion/guidance.py": LEAVES,
    "chitu_diffusion/checkpoint": (
        "chitu_diffusion.engine",
        "chitu_diffusion.generator",
        "chitu_diffusion.task",
    ),
    "chitu_diffusion/task.py": (
        "chitu_diffusion.engine",
        "chitu_diffusion.generator",
        "chitu_diffusion.scheduler",
    ),
    "chitu_diffusion/scheduler.py": ("torch", "chitu_diffusion.engine", "chitu_diffusion.generator"),
    "chitu_diffusion/generator.py": (
        "chitu_diffusion.engine",
        "chitu_diffusion.backend",
        "chitu_diffusion.scheduler",
    ),
    "chitu_diffusion/engine.py": ("chitu_diffusion.backend", "chitu_diffusion.cli"),
}
FACADES = {"DiffusionBackend", "DiffusionTaskPool"}
FACADE_FILES = {"__init__.py", "chitu_diffusion_main.py", "backend.py", "task.py"}
CATCHES_ALL = {"chitu_diffusion/engine.py", "chitu_diffusion/eval/manager.py"}
READS_ENVIRON = {"chitu_core/environment.py", "chitu_core/launch.py", "chitu_core/slurm_rank.py"}
READS_ENVIRON |= {"chitu_core/distributed/mesh.py"}
READS_ENVIRON |= {"chitu_core/attention/flash_attn.py"}  # the package's own switch, by setdefault
READS_ENVIRON |= {"chitu_core/memory.py"}  # torch's own switch of its allocator
MODULE_LINES, FUNCTION_LINES, POSITIONAL = 300, 40, 5


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def nodes(path: Path, kind: type | tuple[type, ...]) -> Iterator:
    return (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kind))


def imports(path: Path) -> set[str]:
    found = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    for node in nodes(path, ast.ImportFrom):
        found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    for place, forbidden in FORBIDDEN_IMPORTS.items():
        if name_of(path) == place or name_of(path).startswith(f"{place}/"):
            bad = {
                name
                for name in imports(path)
                for rule in forbidden
                if name == rule or name.startswith(f"{rule}.")
            }
            assert not bad, f"{place} must not import {', '.join(sorted(bad))}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_behaviour_is_patched_and_no_state_is_global(path):
    assert not [node.lineno for node in nodes(path, ast.Global)], "no `global`"
    for node in nodes(path, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        patched = [
            target for target in targets if isinstance(target, ast.Attribute) and target.attr == "forward"
        ]
        assert not patched, f"line {node.lineno}: a forward is assigned; change behaviour by a value"
    assert not [name for name in imports(path) if name.endswith(".*")], "no import *"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_value_is_guessed_and_no_error_swallowed(path):
    for node in nodes(path, ast.Call):
        is_guess = isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 3
        assert not is_guess, f"line {node.lineno}: getattr with a default; declare the field"
    for handler in nodes(path, ast.ExceptHandler):
        caught = ast.unparse(handler.type) if handler.type else "everything"
        if caught in ("everything", "Exception", "BaseException"):
            assert name_of(path) in CATCHES_ALL, f"line {handler.lineno}: catches {caught}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_facades_and_environment_are_touched_in_few_places(path):
    named = {node.id for node in nodes(path, ast.Name)} | {node.name for node in nodes(path, ast.ClassDef)}
    if path.parent.name != "chitu_diffusion" or path.name not in FACADE_FILES:
        assert not named & FACADES, "take the engine or the pool as an argument"
    reads = [node.lineno for node in nodes(path, ast.Attribute) if ast.unparse(node) == "os.environ"]
    assert not reads or name_of(path) in READS_ENVIRON, f"os.environ is read in line {reads}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes_stay_within_a_readers_patience(path):
    """A budget, so it warns; numerics may take more."""
    lines = len(path.read_text("utf-8").splitlines())
    if lines > MODULE_LINES:
        warnings.warn(f"{name_of(path)} has {lines} lines, the budget is {MODULE_LINES}", stacklevel=1)
    for node in nodes(path, (ast.FunctionDef, ast.AsyncFunctionDef)):
        length, positional = (node.end_lineno or 0) - node.lineno + 1, len(node.args.args) - 1
        if length > FUNCTION_LINES:
            warnings.warn(
                f"{name_of(path)}: {node.name} has {length} lines, the budget is {FUNCTION_LINES}",
                stacklevel=1,
            )
        if positional > POSITIONAL and node.name != "__init__":
            warnings.warn(
                f"{name_of(path)}: {node.name} takes {positional} positional parameters", stacklevel=1
            )


def test_the_top_level_holds_what_the_plan_says():
    expected = {"chitu_diffusion", "chitu_core", "config", "third_party", "tests", "docs"}
    expected |= {"pyproject.toml", "run.sh", "system_config.yaml", "README.md", "LICENSE"}
    ignored = {"build", "dist", "outputs", "output", "eval_out", "vbench_out"}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert {name for name in found - ignored if not name.endswith(".egg-info")} == expected
