"""The README's promises: its script runs as it stands, and its two commands are there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_script_of_the_readme_runs_from_any_directory_with_config_wan_yaml(tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "config").mkdir()
    shutil.copy(ROOT / "config" / "wan.yaml", tmp_path / "config")
    (tmp_path / "example.py").write_text(script)
    finished = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert Path(tmp_path, finished.stdout.splitlines()[-1]).is_file()


def test_one_command_makes_a_video_and_one_passes_the_tests():
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    assert "chitu generate" in commands[0]
    assert "pytest" in commands[1]
