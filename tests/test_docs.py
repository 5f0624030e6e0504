"""Runs the examples of the documentation, each in a process and a folder of its own, and checks its links.

A fenced block of python or bash is run. The info string `no-test` after the language marks one that needs a
GPU, a network or a real checkpoint. The folder holds config/wan.yaml, as a user's project does.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import chitu_diffusion
from chitu_diffusion import DiffusionUserParams, FlexCacheParams
from chitu_diffusion.result import TaskResult

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
ALL_PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
NO_FEATURES = ("index", "architecture", "configuration")  # pages with nothing of their own to run
TIMEOUT_S = 120  # a block takes seconds; other work may share the machine
REACHES_OUT = re.compile(
    r"\b(pip3? install|uv (pip|sync|add)|git (clone|pull)|apt(-get)? |hf download|curl |wget |srun )"
)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, its info string in words, its text."""

    page: Path
    line: int
    info: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    lines = page.read_text("utf-8").splitlines()
    found, start = [], None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
        else:
            text = "\n".join(lines[start + 1 : number]) + "\n"
            found.append(Block(page, start + 1, tuple(lines[start][3:].split()), text))
            start = None
    assert start is None, f"{page.name}:{start}: a block that does not end"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
# the README's script is run by test_readme.py
RUNNABLE = [b for b in BLOCKS if b.info in (("python",), ("bash",)) and b.page.name != "README.md"]


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "config").mkdir()
    shutil.copy(ROOT / "config" / "wan.yaml", tmp_path / "config")
    return tmp_path


def environment() -> dict[str, str]:
    """One thread: two that wait for each other on a busy machine take thirty times as long."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CHITU_", "CONFIG_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_an_example_runs(block, project):
    reaches_out = REACHES_OUT.search(block.text)
    assert reaches_out is None, f"{block}: not run because of {reaches_out}; mark the block no-test"
    script = project / f"example.{block.info[0]}"
    script.write_text(block.text, encoding="utf-8")
    command = [sys.executable] if block.info[0] == "python" else ["bash", "-euo", "pipefail"]
    finished = subprocess.run(
        [*command, script.name],
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert finished.returncode == 0, f"{block}\n{finished.stdout}\n{finished.stderr}"


def test_a_block_of_python_or_bash_is_run_or_says_no_test():
    for block in BLOCKS:
        if block.info[:1] in (("python",), ("bash",)):
            assert block.info[1:] in ((), ("no-test",)), f"{block}: {' '.join(block.info)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_about_a_feature_has_an_example_that_runs(page):
    assert page.stem in (*NO_FEATURES, "README") or any(block.page == page for block in RUNNABLE)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and GitLab make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors_of(file), f"{target}: no such heading"


def test_every_page_is_linked_from_the_index():
    index = (DOCS / "index.md").read_text("utf-8")
    assert [
        page.name for page in DOCS.glob("*.md") if page.name != "index.md" and page.name not in index
    ] == []


def names_to_document() -> list[str]:
    records = (DiffusionUserParams, FlexCacheParams)
    return [*chitu_diffusion.__all__, *(part.name for record in records for part in fields(record))]


@pytest.mark.parametrize("name", names_to_document())
def test_a_public_name_is_in_the_python_api(name):
    assert re.search(rf"`{name}\b", (DOCS / "python_api.md").read_text("utf-8"))


def test_every_field_of_a_result_is_on_the_page_about_outputs():
    page = (DOCS / "outputs.md").read_text("utf-8")
    assert [part.name for part in fields(TaskResult) if f"`{part.name}`" not in page] == []
