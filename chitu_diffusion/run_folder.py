"""The directory of one run: made when the first request needs it, with log, configuration and requests."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from chitu_core.config import Config
from chitu_core.environment import Environment
from chitu_core.logging import RunLog
from chitu_core.timing import Timer
from chitu_diffusion.media import VideoWriter
from chitu_diffusion.outputs import (
    RequestRecord,
    check_writable,
    drop_hydra,
    relocate_hydra,
    run_directory,
    video_stem,
    write_run_files,
)
from chitu_diffusion.resolve import ResolvedParams


class RunFolder:
    """Where videos go: to a place of their own, or into the run directory."""

    def __init__(self, config: Config, environment: Environment) -> None:
        self._config = config
        self._environment = environment
        self._requests: list[RequestRecord] = []
        self._created_at = datetime.now()
        self._log = RunLog() if config.output.enable_run_log and environment.rank == 0 else None
        self.path: Path | None = None

    def open(self, prompt: str) -> Path:
        """The run directory, made and named after `prompt` on first use.

        Raises ValueError naming the setting if it cannot be made or written into.
        """
        if self.path is not None:
            return self.path
        output, given = self._config.output, self._environment.current_output_dir
        if given is not None:
            check_writable(given, "CHITU_CURRENT_OUTPUT_DIR")
            self.path = given
        else:
            check_writable(Path(output.root_dir), "output.root_dir")
            tag, name = self._environment.run_tag, self._config.models.name
            self.path = run_directory(Path(output.root_dir), tag, prompt, name, self._created_at)
        if self._environment.world_size > 1:
            self.path = self.path.absolute()  # the same for ranks that were started elsewhere
        if self._log is not None:
            self._log.open(self.path / "run.log")
        return self.path

    def adopt(self, path: Path) -> None:
        """Take the directory that rank 0 made."""
        self.path = path

    def check(self, params: ResolvedParams) -> None:
        """See that a request's video can be written. Raises ValueError naming the setting where it cannot."""
        if params.save_path is not None:
            check_writable(Path(params.save_path), "save_path")
        else:
            key = "output.root_dir" if params.save_dir is None else "save_dir"
            check_writable(self._video_directory(params), key)

    def open_video(self, params: ResolvedParams) -> VideoWriter:
        """A request's file: exactly `save_path`, or a free name in `save_dir` or the run directory."""
        size = (params.width, params.height)
        if params.save_path is not None:
            return VideoWriter(Path(params.save_path), params.fps, size)
        stem = video_stem(params.prompt, params.seed, params.num_inference_steps)
        path = self._video_directory(params) / f"{stem}.mp4"
        return VideoWriter(path, params.fps, size, keeps_existing=True)

    def _video_directory(self, params: ResolvedParams) -> Path:
        if params.save_dir is not None:
            return Path(params.save_dir)
        assert self.path is not None, "opened by the engine before the first step"
        return self.path

    def add_request(self, request: RequestRecord) -> None:
        """Note a request in the run directory, which must be open."""
        assert self.path is not None
        self._requests.append(request)
        write_run_files(
            self.path,
            self._requests,
            model_name=self._config.models.name,
            created_at=self._created_at,
            config_yaml=OmegaConf.to_yaml(asdict(self._config)),
        )

    def close(self, timer: Timer) -> None:
        """Write what is known at the end: timers if asked for, Hydra's folder as configured; end the log.

        Rank 0 does this before the others, which then only remove Hydra's folders of their own.
        """
        try:
            if self._environment.rank == 0:
                self._write_last(timer)
            elif self.path is not None and HydraConfig.initialized():
                drop_hydra(self._config.output.hydra_dump_mode, Path(HydraConfig.get().runtime.output_dir))
        finally:
            self.end_log()

    def end_log(self) -> None:
        """Stop writing to the run's log."""
        if self._log is not None:
            self._log.close()

    def _write_last(self, timer: Timer) -> None:
        if timer.is_enabled() and timer.statistics():
            timer.print_statistics()
            timer.save_statistics(self.open("prompt") / "time_stats.csv")
        if self.path is not None and HydraConfig.initialized():
            hydra_dir = Path(HydraConfig.get().runtime.output_dir)
            relocate_hydra(self._config.output.hydra_dump_mode, hydra_dir, self.path)
