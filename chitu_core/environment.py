"""The documented environment variables, read once into one frozen record and passed on from there.

Only this file and the launcher read os.environ. Source: mission.md 2.5 (no CHITU_ROUTER_PROCESS)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off")
LOGGING_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True)
class Environment:
    """What the process was started with; an unset or empty variable takes the default here."""

    debug: bool = False  # CHITU_DEBUG
    run_tag: str = ""  # CHITU_RUN_TAG: prefix of the run directory's name
    python_bin: str | None = None  # CHITU_PYTHON_BIN: Python that the launcher starts
    current_output_dir: Path | None = (
        None  # CHITU_CURRENT_OUTPUT_DIR: the run directory, for evaluation and pictures
    )
    progress_interval: int = 5  # CHITU_PROGRESS_INTERVAL: denoising steps from one progress line to the next
    logging_level: str = "INFO"  # CHITU_LOGGING_LEVEL, upper-case
    log_rank0_only: bool = True  # CHITU_LOG_RANK0_ONLY
    enable_stage_color: bool = True  # CHITU_ENABLE_STAGE_COLOR
    config_path: str | None = (
        None  # CONFIG_PATH, CONFIG_NAME: Hydra config to use in place of the packaged one
    )
    config_name: str | None = None
    rank: int = 0  # RANK and below: one process when torchrun or srun did not set them
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # LOCAL_WORLD_SIZE: ranks on this machine; unset: all of WORLD_SIZE
    master_addr: str | None = None
    master_port: int | None = None

    @classmethod
    def read(cls, env: Mapping[str, str] | None = None) -> "Environment":
        """Read `env`, by default the process's environment. Raises ValueError naming a bad variable."""
        env = os.environ if env is None else env
        world_size = _integer(env, "WORLD_SIZE", 1, lowest=1)
        local_world_size = _integer(env, "LOCAL_WORLD_SIZE", world_size, lowest=1, highest=world_size)
        output_dir = env.get("CHITU_CURRENT_OUTPUT_DIR")
        port = _integer(env, "MASTER_PORT", 0, lowest=1, highest=65535)
        return cls(
            debug=_flag(env, "CHITU_DEBUG", False),
            run_tag=env.get("CHITU_RUN_TAG", ""),
            python_bin=env.get("CHITU_PYTHON_BIN") or None,
            current_output_dir=Path(output_dir) if output_dir else None,
            progress_interval=_integer(env, "CHITU_PROGRESS_INTERVAL", 5, lowest=1),
            logging_level=_level(env, "CHITU_LOGGING_LEVEL"),
            log_rank0_only=_flag(env, "CHITU_LOG_RANK0_ONLY", True),
            enable_stage_color=_flag(env, "CHITU_ENABLE_STAGE_COLOR", True),
            config_path=env.get("CONFIG_PATH") or None,
            config_name=env.get("CONFIG_NAME") or None,
            rank=_integer(env, "RANK", 0, lowest=0, highest=world_size - 1),
            local_rank=_integer(env, "LOCAL_RANK", 0, lowest=0, highest=local_world_size - 1),
            world_size=world_size,
            local_world_size=local_world_size,
            master_addr=env.get("MASTER_ADDR") or None,
            master_port=port or None,
        )


def _flag(env: Mapping[str, str], name: str, default: bool) -> bool:
    word = env.get(name, "").strip().lower()
    if not word:
        return default
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError(f"{name} must be one of {', '.join(TRUE_WORDS + FALSE_WORDS)}, got {env[name]!r}")
    return word in TRUE_WORDS


def _integer(
    env: Mapping[str, str], name: str, default: int, *, lowest: int, highest: int | None = None
) -> int:
    text = env.get(name, "").strip()
    if not text:
        return default
    value = int(text) if text.removeprefix("-").isdecimal() else None
    if value is None or value < lowest or (highest is not None and value > highest):
        limits = f"{lowest} or more" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"{name} must be an integer, {limits}, got {env[name]!r}")
    return value


def _level(env: Mapping[str, str], name: str) -> str:
    level = env.get(name, "").strip().upper() or "INFO"
    if level not in LOGGING_LEVELS:
        raise ValueError(f"{name} must be one of {', '.join(LOGGING_LEVELS)}, got {env[name]!r}")
    return level
