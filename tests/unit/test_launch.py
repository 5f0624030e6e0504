"""The launcher on one rank: what it refuses, what it passes on, and that values arrive as written."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from chitu_core import launch
from chitu_core import launch_settings as settings
from chitu_core.environment import Environment

PROJECT = Path(launch.__file__).parents[1]
ODD = "/a b/${c}/it's, {d}=[e] \\"  # all that one of the two grammars could take for its own
ECHO = """
import json, os, sys
names = ("CHITU_PYTHON_BIN", "CHITU_RUN_TAG", "CHITU_DEBUG", "CUDA_LAUNCH_BLOCKING")
names += ("HYDRA_FULL_ERROR", "SRUN_PARTITION")
names += ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
with open("seen.json", "w") as file:
    json.dump({"argv": sys.argv[1:], "env": {name: os.environ.get(name) for name in names}}, file)
print("out of the script")
sys.stderr.write("error of the script\\n")
sys.exit(int(os.environ.get("ECHO_STATUS", "0")))
"""


@pytest.fixture
def folder(tmp_path, tmp_path_factory, monkeypatch):
    """A working directory with a script that records what it was given, on a machine without srun."""
    (tmp_path / "my script.py").write_text(ECHO)
    monkeypatch.chdir(tmp_path)
    programs = tmp_path_factory.mktemp("bin")
    for name in ("bash", "dirname"):
        (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(programs))
    for name in ("CHITU_PYTHON_BIN", "CHITU_RUN_TAG", "CHITU_DEBUG", "CUDA_LAUNCH_BLOCKING"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write_config(folder, **sections):
    content = {"model": {"name": "demo"}, **sections}
    content["launch"] = {"python_script": "my script.py", **content.get("launch", {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def start(folder, *options, **sections):
    write_config(folder, **sections)
    return launch.main(["config.yaml", *options])


def seen(folder):
    return json.loads((folder / "seen.json").read_text())


def values_in(overrides):
    """What Hydra's own parser reads, put through OmegaConf as Hydra does."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    container = OmegaConf.create({str(index): override.value() for index, override in enumerate(parsed)})
    values = OmegaConf.to_container(container, resolve=True)
    return {override.key_or_group: values[str(index)] for index, override in enumerate(parsed)}


def test_every_key_of_the_table_reaches_its_hydra_key(folder):
    (folder / "a b=c,{d}").mkdir()
    status = start(
        folder,
        model={"name": "Wan2.1-T2V-1.3B", "ckpt_dir": "a b=c,{d}"},
        parallel={"cfp": 1},
        infer={"up_limit": 81, "attn_type": "auto", "low_mem_level": 0, "enable_flexcache": True},
        eval={
            "eval_type": ["psnr", "ssim"],
            "reference_path": "/x/it's",
            "pairing": "ignore_steps",
            "weights_dir": "~/nets",
            "vbench_python": "/x/bin/python",
        },
        output={
            "root_dir": "my outputs",
            "enable_run_log": False,
            "enable_timer_dump": True,
            "hydra_dump_mode": "off",
        },
        overrides=["infer.seed=7", "+x='a b'"],
    )
    assert status == 0
    argv = seen(folder)["argv"]
    assert argv[-2:] == ["infer.seed=7", "+x='a b'"]
    assert values_in(argv[:-2]) == {
        "models": "Wan2.1-T2V-1.3B",
        "models.ckpt_dir": "a b=c,{d}",
        "infer.diffusion.cfg_size": 1,
        "infer.diffusion.cp_size": 1,
        "infer.diffusion.up_limit": 81,
        "infer.attn_type": "auto",
        "infer.diffusion.low_mem_level": 0,
        "infer.diffusion.enable_flexcache": True,
        "eval.eval_type": ["psnr", "ssim"],
        "eval.reference_path": "/x/it's",
        "eval.pairing": "ignore_steps",
        "eval.weights_dir": str(Path("~/nets").expanduser()),
        "eval.vbench_python": "/x/bin/python",
        "output.root_dir": "my outputs",
        "output.enable_run_log": False,
        "output.enable_timer_dump": True,
        "output.hydra_dump_mode": "off",
    }


@pytest.mark.parametrize("level", [4, "auto"])
def test_a_memory_level_is_passed_on(folder, level):
    assert start(folder, infer={"low_mem_level": level}) == 0
    assert values_in(seen(folder)["argv"])["infer.diffusion.low_mem_level"] == level


def test_what_the_file_leaves_out_is_left_to_hydra(folder):
    start(folder, parallel={"cfp": "auto"}, eval={"reference_path": None}, infer=None)
    assert seen(folder)["argv"] == ["models=demo", "output.root_dir=outputs"]


def test_the_shipped_file_names_every_key_and_composes_with_the_packaged_configuration(folder):
    content = yaml.safe_load((PROJECT / "system_config.yaml").read_text())
    assert set(settings._flatten(content, "")) == {key.path for key in settings.KEYS}
    defaults = settings.read_settings(PROJECT / "system_config.yaml", {})
    assert {key.path: defaults[key.path] for key in settings.KEYS if key.path.startswith("launch.")} == {
        key.path: key.default for key in settings.KEYS if key.path.startswith("launch.")
    }
    content["launch"]["python_script"] = "my script.py"
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    assert launch.main(["config.yaml"]) == 0
    with initialize_config_dir(str(PROJECT / "chitu_core" / "config"), version_base=None):
        config = compose(
            "serve_config", overrides=[*seen(folder)["argv"], f"models.ckpt_dir={settings.quote(ODD)}"]
        )
    assert (config.models.name, config.infer.attn_type, config.infer.diffusion.cfg_size) == (
        "demo",
        "auto",
        "auto",
    )
    assert config.models.ckpt_dir == ODD


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "/data/Wan2.1-T2V-14B",
        "two words",
        " spaces ",
        "it's",
        'say "hi"',
        "a=b,c:d",
        "[x]{y}(z)",
        "back\\slash",
        "ends in \\",
        "ends in \\\\",
        "\\'",
        "\\\\'quoted'\\",
        "${not.an.interpolation}",
        "\\${x}'",
        "$HOME",
        "~",
        "",
        "null",
        "True",
        "nan",
        "inf",
        "1e5",
        "0x10",
        "1_000",
        "007",
        "-1",
        "ünï 猫",
        "a#b%c",
        "tab\there",
        "a;rm -rf *",
        "*",
        "@x",
        "a|b",
    ],
)
def test_a_text_is_read_back_by_hydra_as_it_was(text):
    assert values_in([f"key={settings.quote(text)}"]) == {"key": text}
    assert values_in([f"key={settings.quote([text, text])}"]) == {"key": [text, text]}


@pytest.mark.parametrize("value", [True, False, 0, 12, []])
def test_a_plain_value_is_read_back_with_its_type(value):
    read = values_in([f"key={settings.quote(value)}"])["key"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("none", []),
        ("", []),
        ("psnr", ["psnr"]),
        ("psnr, ssim", ["psnr", "ssim"]),
        (["fid"], ["fid"]),
        ([], []),
    ],
)
def test_eval_types_may_be_written_in_every_documented_way(folder, given, expected):
    start(folder, eval={"eval_type": given})
    assert values_in(seen(folder)["argv"])["eval.eval_type"] == expected


def test_a_bare_off_in_yaml_is_the_mode_off(folder):
    start(folder, output={"hydra_dump_mode": False})
    assert "output.hydra_dump_mode=off" in seen(folder)["argv"]


def test_the_script_gets_the_documented_variables(folder):
    start(folder, launch={"tag": "night run"}, runtime={"chitu_debug": False, "cuda_launch_blocking": True})
    assert seen(folder)["env"] == {
        "CHITU_PYTHON_BIN": sys.executable,
        "CHITU_RUN_TAG": "night run",
        "CHITU_DEBUG": "0",
        "CUDA_LAUNCH_BLOCKING": "1",
        "HYDRA_FULL_ERROR": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": None,
        "MASTER_ADDR": None,
        "SRUN_PARTITION": None,
    }


def test_a_rank_of_another_job_may_start_a_launch_of_its_own(folder, monkeypatch):
    for name, value in (
        ("RANK", "3"),
        ("LOCAL_RANK", "3"),
        ("LOCAL_WORLD_SIZE", "8"),
        ("MASTER_ADDR", "there"),
    ):
        monkeypatch.setenv(name, value)  # and no WORLD_SIZE: as a whole it is refused on a rank
    assert start(folder) == 0
    inner = seen(folder)["env"]
    assert [inner[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")] == [
        "0",
        "1",
        None,
        None,
    ]


def test_the_exit_status_of_the_script_is_passed_on(folder, monkeypatch):
    monkeypatch.setenv("ECHO_STATUS", "7")
    assert start(folder) == 7


def test_a_script_killed_by_a_signal_gives_the_status_of_a_shell(folder):
    (folder / "my script.py").write_text("import os\nos.kill(os.getpid(), 15)")
    assert start(folder) == 128 + 15


def test_the_summary_and_the_command_are_shown_before_the_script_runs(folder, capfd):
    start(folder, launch={"tag": "t"})
    shown = capfd.readouterr().out
    for line in (
        "Launch Summary",
        "config_file: config.yaml",
        "backend: local (auto)",
        "num_nodes: 1",
        "gpus_per_node: 1",
        "total_gpus: 1",
        "cfp(cfg-parallel): auto",
        "cp(context-parallel): auto",
        "model: demo",
        "ckpt_dir: packaged",
        "python_script: my script.py",
        f"runtime_python: {sys.executable}",
        "run_tag: t",
        "log_file: disabled (launch.enable_launch_log=false)",
    ):
        assert line in shown
    command = shown.split("Command: ")[1].splitlines()[0]
    assert shlex.split(command) == [sys.executable, "my script.py", "models=demo", "output.root_dir=outputs"]
    assert not (folder / "outputs").exists()


def test_the_launch_log_holds_the_summary_and_the_output_of_the_script(folder, capfd):
    start(folder, launch={"enable_launch_log": True}, output={"root_dir": "a b"})
    (log,) = (folder / "a b").glob("launch_????????_??????.log")
    text = log.read_text()
    for line in (
        "Launch Summary",
        f"log_file: {Path('a b') / log.name}",
        "out of the script",
        "error of the script",
    ):
        assert line in text
    assert capfd.readouterr().out == text


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"launch": {"num_nodes": 0}}, "launch.num_nodes must be an integer of 1 or more, got 0"),
        (
            {"launch": {"gpus_per_node": True}},
            "launch.gpus_per_node must be an integer of 1 or more, got True",
        ),
        (
            {"launch": {"gpus_per_node": 3}, "parallel": {"cfp": 2}},
            "total GPUs (3) must be divisible by parallel.cfp (2); legal: 1 or auto",
        ),
        ({"parallel": {"cfp": 2}}, "total GPUs (1) must be divisible by parallel.cfp (2); legal: 1 or auto"),
        (
            {"launch": {"gpus_per_node": 6}, "parallel": {"cfp": 2}, "overrides": ["infer.dp_size=2"]},
            "total GPUs (6) must be divisible by parallel.cfp (2) x infer.dp_size (2); legal: 1 or auto",
        ),
        (
            {"launch": {"gpus_per_node": 6}, "parallel": {"cfp": 1}, "overrides": ["infer.dp_size=4"]},
            "parallel.cfp (1) x infer.dp_size (4); legal: infer.dp_size one of 1, 2, 3, 6",
        ),
        ({"overrides": ["infer.dp_size=x"]}, "infer.dp_size must be an integer of 1 or more, got 'x'"),
        ({"overrides": ["infer.dp_size=0"]}, "infer.dp_size must be an integer of 1 or more, got '0'"),
        ({"parallel": {"cfp": 3}}, "parallel.cfp must be 1, 2 or auto, got 3"),
        ({"parallel": {"cfp": True}}, "parallel.cfp must be 1, 2 or auto, got True"),
        (
            {"launch": {"backend": "mpirun"}},
            "launch.backend must be auto, srun, torchrun or local, got 'mpirun'",
        ),
        ({"launch": {"tag": "a\0b"}}, "launch.tag must be a text"),
        ({"launch": {"srun": {"extra": "--account=a"}}}, "launch.srun.extra must be a list of texts"),
        ({"launch": {"srun": {"gres": 2}}}, "launch.srun.gres must be a text"),
        ({"launch": {"python_script": "absent.py"}}, "launch.python_script absent.py is no file"),
        ({"launch": {"num_node": 1}}, "unknown key launch.num_node; did you mean launch.num_nodes?"),
        ({"zzz": 1}, "unknown key zzz; remove it"),
        ({"infer": 3}, "infer must hold"),
        ({"runtime": {"chitu_debug": "yes!"}}, "runtime.chitu_debug must be true or false, got 'yes!'"),
        ({"model": {"name": 3}}, "model.name must be a text"),
        ({"infer": {"low_mem_level": 5}}, "low_mem_level must be an integer from 0 to 4, or auto, got 5"),
        ({"infer": {"low_mem_level": "most"}}, "infer.low_mem_level must be an integer from 0 to 4, or auto"),
        ({"eval": {"eval_type": 3}}, "eval.eval_type must be a list of texts, got 3"),
        ({"overrides": "a=1"}, "overrides must be a list of texts, got 'a=1'"),
        ({"model": {"name": "Wan2.1-T2V-1.3B"}}, "model.ckpt_dir must be set for Wan2.1-T2V-1.3B"),
        (
            {"model": {"name": "demo", "ckpt_dir": "/absent/x"}},
            "model.ckpt_dir '/absent/x' is not a directory",
        ),
        ({"model": {"name": "x", "ckpt_dir": ""}}, "model.ckpt_dir must be set for x"),
        (
            {"launch": {"enable_launch_log": True}, "output": {"root_dir": "my script.py"}},
            "output.root_dir: ",
        ),
    ],
)
def test_a_bad_file_is_one_error_line_and_exit_status_1(folder, capfd, sections, message):
    assert start(folder, **sections) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (folder / "seen.json").exists()


@pytest.mark.parametrize(
    "text", ["a: [", "a: 1\na: 2", "- a", "launch: {tag: '${oc.env:NO_SUCH_NAME}'}", "\x00"]
)
def test_a_file_that_cannot_be_read_is_one_error_line(folder, capfd, text):
    (folder / "config.yaml").write_text(text)
    assert launch.main(["config.yaml"]) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_a_missing_file_and_a_bad_python_are_named(folder, capfd, monkeypatch):
    assert launch.main(["absent.yaml"]) == 1
    assert "Error: config file absent.yaml does not exist" in capfd.readouterr().err
    monkeypatch.setenv("CHITU_PYTHON_BIN", "/no/python")
    assert start(folder) == 1
    assert "Error: CHITU_PYTHON_BIN /no/python is not a program" in capfd.readouterr().err


def test_a_repository_of_the_hub_is_a_checkpoint(folder):
    start(folder, model={"name": "Wan2.1-T2V-1.3B", "ckpt_dir": "Wan-AI/Wan2.1-T2V-1.3B"})
    assert "models.ckpt_dir=Wan-AI/Wan2.1-T2V-1.3B" in seen(folder)["argv"]


@pytest.mark.parametrize(
    "argv", [["--nodes", "1"], ["a.yaml", "b.yaml"], ["--num-nodes"], ["--num-nodes", "x"], ["--cfp", "x"]]
)
def test_a_command_line_that_cannot_be_read_is_exit_status_2(capfd, argv):
    with pytest.raises(SystemExit) as caught:
        launch.main(argv)
    assert caught.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


def test_the_command_line_wins_over_the_file(folder, capfd):
    assert start(folder, "--gpus-per-node", "1", "--cfp", "1", launch={"gpus_per_node": 8}) == 0
    assert "infer.diffusion.cfg_size=1" in seen(folder)["argv"]
    assert start(folder, "--cfp", "auto", parallel={"cfp": 1}) == 0
    assert "infer.diffusion.cfg_size=1" not in seen(folder)["argv"]
    assert start(folder, "--cfp", "3") == 1
    assert "parallel.cfp must be 1, 2 or auto, got 3" in capfd.readouterr().err


def run_sh(*options, cwd, **variables):
    command = ["bash", str(PROJECT / "run.sh"), *options]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_run_sh_starts_the_script_from_any_directory_with_the_chosen_python(folder):
    write_config(folder, launch={"python_script": "my script.py"}, output={"root_dir": "a 'b' c"})
    done = run_sh("config.yaml", cwd=folder, CHITU_PYTHON_BIN=sys.executable)
    assert (done.returncode, done.stderr) == (0, "error of the script\n")
    assert values_in(seen(folder)["argv"])["output.root_dir"] == "a 'b' c"
    assert seen(folder)["env"]["CHITU_PYTHON_BIN"] == sys.executable


def test_run_sh_says_that_a_chosen_python_is_missing(folder):
    done = run_sh(cwd=folder, CHITU_PYTHON_BIN="/no/python")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: no Python among: /no/python")
    assert len((PROJECT / "run.sh").read_text().splitlines()) <= 20


def test_run_sh_has_help(folder):
    done = run_sh("-h", cwd=folder, CHITU_PYTHON_BIN=sys.executable)
    assert done.returncode == 0
    assert "--gpus-per-node" in done.stdout
    assert "1|2|auto" in done.stdout


def test_an_empty_environment_is_one_process_with_the_documented_defaults():
    environment = Environment.read({"CHITU_DEBUG": "", "RANK": ""})
    assert environment == Environment()
    assert (environment.rank, environment.world_size, environment.progress_interval) == (0, 1, 5)
    assert (environment.logging_level, environment.log_rank0_only, environment.enable_stage_color) == (
        "INFO",
        True,
        True,
    )


def test_every_documented_variable_is_read():
    assert Environment.read(
        {
            "CHITU_DEBUG": "On",
            "CHITU_RUN_TAG": "t",
            "CHITU_PYTHON_BIN": "py",
            "CHITU_CURRENT_OUTPUT_DIR": "/out",
            "CHITU_PROGRESS_INTERVAL": "2",
            "CHITU_LOGGING_LEVEL": "warning",
            "CHITU_LOG_RANK0_ONLY": "0",
            "CHITU_ENABLE_STAGE_COLOR": "false",
            "CONFIG_PATH": "/c",
            "CONFIG_NAME": "n",
            "RANK": "3",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "host",
            "MASTER_PORT": "50000",
        }
    ) == Environment(
        debug=True,
        run_tag="t",
        python_bin="py",
        current_output_dir=Path("/out"),
        progress_interval=2,
        logging_level="WARNING",
        log_rank0_only=False,
        enable_stage_color=False,
        config_path="/c",
        config_name="n",
        rank=3,
        local_rank=1,
        world_size=4,
        local_world_size=2,
        master_addr="host",
        master_port=50000,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CHITU_DEBUG", "maybe"),
        ("CHITU_PROGRESS_INTERVAL", "0"),
        ("CHITU_PROGRESS_INTERVAL", "2.5"),
        ("CHITU_LOGGING_LEVEL", "LOUD"),
        ("RANK", "1"),
        ("LOCAL_RANK", "-1"),
        ("WORLD_SIZE", "many"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_PORT", "70000"),
    ],
)
def test_a_bad_variable_is_named_with_its_value(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*got '{value}'"):
        Environment.read({name: value})


def test_without_a_local_world_size_all_ranks_are_on_this_machine():
    assert Environment.read({"WORLD_SIZE": "4", "LOCAL_RANK": "3"}).local_world_size == 4


def test_a_local_rank_is_below_the_local_world_size():
    with pytest.raises(ValueError, match=r"^LOCAL_RANK must be an integer, from 0 to 1, got '2'"):
        Environment.read({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "2"})
