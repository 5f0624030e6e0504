"""What a user may say about one video. Every value is checked here, once, before any heavy work."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from chitu_core import plugins
from chitu_diffusion.flex_cache._base import FlexCache

STRATEGY_PACKAGE = "chitu_diffusion.flex_cache.strategy"
_NO_STRATEGY = frozenset({"", "none", "off", "disable", "disabled"})
SOLVERS = {"unipc": "unipc", "dpm++": "dpmpp", "euler": "euler"}  # documented name: module in samplers/
MAX_SEED = 2**63 - 1
PIXEL_MULTIPLE = 16  # 8 of the VAE times 2 of the patch
FPS_RANGE = (0.001, 1000)  # what the video writer takes


def _require_legal(holds: bool, key: str, value: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value!r}: {remedy}")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # not isfinite, which fails on an int beyond the range of float


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class FlexCacheParams:
    """A request to reuse features across denoising steps.

    `cache_ratio` goes from 0 (every step computed, no strategy built) over 0.5 (what the strategy's authors
    recommend) to 1 (speed first); the first `warmup` and the last `cooldown` steps are always computed.
    `extra` holds expert settings, which win over the ratio: the strategy's `Knobs`, or a dict of them.
    Raises ValueError for an unknown strategy, an unknown setting or a value out of range.
    """

    strategy: str | None = None
    cache_ratio: float = 0.5
    warmup: int = 5
    cooldown: int = 5
    extra: Any = None  # Knobs of the strategy

    def __post_init__(self) -> None:
        _require_legal(
            self.strategy is None or isinstance(self.strategy, str), "strategy", self.strategy, "must be text"
        )
        name = (self.strategy or "").strip().lower()
        object.__setattr__(self, "strategy", None if name in _NO_STRATEGY else name)
        strategies = plugins.names(STRATEGY_PACKAGE)
        known = self.strategy is None or self.strategy in strategies
        _require_legal(known, "strategy", self.strategy, f"choose one of {', '.join(strategies)}")
        in_range = _is_number(self.cache_ratio) and 0 <= self.cache_ratio <= 1
        _require_legal(in_range, "cache_ratio", self.cache_ratio, "must lie in [0, 1]")
        for key in ("warmup", "cooldown"):
            value = getattr(self, key)
            _require_legal(_is_int(value) and value >= 0, key, value, "must be a whole number, 0 or more")
        self._check_extra()

    def check_steps(self, steps: int) -> None:
        """Raises ValueError where the steps that are always computed leave none of `steps`."""
        forced = self.warmup + self.cooldown
        if forced >= steps:
            remedy = f"must be below num_inference_steps={steps}; lower them or take more steps"
            raise ValueError(f"warmup + cooldown = {forced} {remedy}")

    def _check_extra(self) -> None:
        if self.extra is None:
            return
        _require_legal(self.strategy is not None, "extra", self.extra, "has no strategy that it is for")
        _require_legal(self.cache_ratio > 0, "extra", self.extra, "has no effect at cache_ratio=0; raise it")
        knobs = strategy_class(self.strategy or "").knobs_type
        extra = self.extra
        if isinstance(extra, Mapping):
            legal = [part.name for part in fields(knobs)]
            unknown = sorted(str(key) for key in extra if key not in legal)
            _require_legal(not unknown, "extra", unknown, f"{self.strategy} knows {', '.join(legal)}")
            extra = knobs(**extra)
        remedy = f"must be Knobs of {self.strategy}, or a dict of their fields"
        _require_legal(isinstance(extra, knobs), "extra", extra, remedy)
        object.__setattr__(self, "extra", extra)


def strategy_class(name: str) -> type[FlexCache]:
    """The strategy of a name. Raises ValueError listing all names for an unknown one."""
    found: type[FlexCache] = plugins.load(STRATEGY_PACKAGE, name, "Strategy", "strategy")
    return found


@dataclass(frozen=True, init=False)
class DiffusionUserParams:
    """One request. A field left at None takes the model's default, filled in when the task enters the pool.

    Args:
        role: a label for logs and for round-robin scheduling.
        prompt: what to show; None and "" both mean no text.
        height, width: pixels, positive multiples of 16.
        num_frames: 4n + 1.
        fps: of the written file; None is the rate that the model was trained at.
        num_inference_steps: denoising steps.
        guidance_scale: one number, or (low noise, high noise) for two experts. At 0 or less and at
            exactly 1, only the conditional branch runs.
        negative_prompt: None is the model's default text; "" stays empty.
        seed: 0 .. 2**63 - 1; None draws one, and the result records it.
        sample_solver: `unipc`, `dpm++` or `euler`.
        save_dir: directory for the video; None is the run directory.
        save_path: path of the video; wins over `save_dir` and overwrites.
        flexcache: name of a reuse strategy. `flexcache_params` (or a dict of its fields) wins over it.
        priority: larger runs first under `infer.schedule_policy=priority`.
        size, frame_num: other names of (width, height) and of num_frames.

    Raises ValueError naming field, value and remedy.
    """

    role: str
    prompt: str | None
    height: int | None
    width: int | None
    num_frames: int | None
    fps: float | None
    num_inference_steps: int | None
    guidance_scale: float | tuple[float, ...] | None
    negative_prompt: str | None
    seed: int | None
    sample_solver: str
    save_dir: str | None
    save_path: str | None
    flexcache: str | None
    flexcache_params: FlexCacheParams | Mapping[str, Any] | None
    priority: int

    def __init__(
        self,
        role: str = "user",
        prompt: str | None = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | tuple[float, ...] | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        sample_solver: str = "unipc",
        save_dir: str | None = None,
        save_path: str | None = None,
        flexcache: str | None = None,
        flexcache_params: FlexCacheParams | Mapping[str, Any] | None = None,
        priority: int = 0,
        size: tuple[int, int] | None = None,
        frame_num: int | None = None,
    ) -> None:
        # by hand, as the aliases are no fields: `dataclasses.replace` would hand them on beside a change
        given = locals()
        for part in fields(self):
            self._set(part.name, given[part.name])
        self._join_aliases(size, frame_num)
        self._check_text()
        self._check_shape()
        self._check_sampling()
        self._check_flexcache()

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height); None unless both are said."""
        return None if self.width is None or self.height is None else (self.width, self.height)

    @property
    def frame_num(self) -> int | None:
        """`num_frames`."""
        return self.num_frames

    def _check_flexcache(self) -> None:
        if isinstance(self.flexcache_params, Mapping):
            legal = {part.name for part in fields(FlexCacheParams)}
            unknown = sorted(str(key) for key in set(self.flexcache_params) - legal)
            _require_legal(
                not unknown, "flexcache_params", unknown, f"legal keys: {', '.join(sorted(legal))}"
            )
            self._set("flexcache_params", FlexCacheParams(**self.flexcache_params))
        asked = self.flexcache_params
        is_known = asked is None or isinstance(asked, FlexCacheParams)
        _require_legal(is_known, "flexcache_params", asked, "must be FlexCacheParams or a dict of its fields")
        flexcache = self.resolve_flexcache_params()  # an unknown name or a value out of range fails here
        if flexcache is not None and self.num_inference_steps is not None:
            flexcache.check_steps(self.num_inference_steps)

    def resolve_flexcache_params(self) -> FlexCacheParams | None:
        """The reuse that is asked for, or None. `flexcache_params` wins over the name in `flexcache`."""
        asked = (
            self.flexcache_params if self.flexcache_params is not None else FlexCacheParams(self.flexcache)
        )
        assert isinstance(asked, FlexCacheParams)
        return asked if asked.strategy else None

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _join_aliases(self, size: object, frame_num: object) -> None:
        if size is not None:
            is_pair = isinstance(size, Sequence) and len(size) == 2
            _require_legal(is_pair, "size", size, "must be (width, height)")
            assert isinstance(size, Sequence)
            for name, value in zip(("width", "height"), size, strict=True):
                self._join(name, value, "size", size)
        if frame_num is not None:
            self._join("num_frames", frame_num, "frame_num", frame_num)

    def _join(self, name: str, value: object, alias: str, said: object) -> None:
        given = getattr(self, name)
        _require_legal(given in (None, value), alias, said, f"contradicts {name}={given}; give one of them")
        self._set(name, value)

    def _check_text(self) -> None:
        self._set("prompt", "" if self.prompt is None else self.prompt)
        for key in ("role", "prompt"):
            _require_legal(isinstance(getattr(self, key), str), key, getattr(self, key), "must be text")
        for key in ("negative_prompt", "save_dir", "save_path", "flexcache"):
            value = getattr(self, key)
            _require_legal(value is None or isinstance(value, str), key, value, "must be text")
        for key in ("save_dir", "save_path"):
            path = getattr(self, key)
            _require_legal(path != "", key, "", "is empty; leave it out or name a path")
            _require_legal("\0" not in (path or ""), key, path, "holds a zero byte, which no path can")
        is_video = self.save_path is None or self.save_path.lower().endswith(".mp4")
        _require_legal(is_video, "save_path", self.save_path, "must end in .mp4; for a folder use save_dir")

    def _check_shape(self) -> None:
        for key in ("height", "width"):
            value = getattr(self, key)
            legal = value is None or (_is_int(value) and value > 0 and value % PIXEL_MULTIPLE == 0)
            _require_legal(
                legal, key, value, f"must be a positive multiple of {PIXEL_MULTIPLE}{_nearest(value, 16, 0)}"
            )
        frames = self.num_frames
        legal = frames is None or (_is_int(frames) and frames > 0 and frames % 4 == 1)
        _require_legal(legal, "num_frames", frames, f"must be 4n + 1, at least 1{_nearest(frames, 4, 1)}")
        lowest, highest = FPS_RANGE
        legal = self.fps is None or (_is_number(self.fps) and lowest <= self.fps <= highest)
        _require_legal(
            legal, "fps", self.fps, f"must be a number from {lowest} to {highest}; Wan plays at 16"
        )

    def _check_sampling(self) -> None:
        steps = self.num_inference_steps
        legal = steps is None or (_is_int(steps) and steps >= 1)
        _require_legal(legal, "num_inference_steps", steps, "must be a whole number, at least 1")
        if self.guidance_scale is not None:
            single = not isinstance(self.guidance_scale, Sequence)
            scales = (self.guidance_scale,) if single else tuple(self.guidance_scale)  # type: ignore[arg-type]
            finite = len(scales) > 0 and all(_is_number(scale) for scale in scales)
            _require_legal(
                finite, "guidance_scale", self.guidance_scale, "must be a finite number, or one per expert"
            )
            self._set("guidance_scale", scales[0] if single else scales)
        legal = self.seed is None or (_is_int(self.seed) and 0 <= self.seed <= MAX_SEED)
        _require_legal(
            legal, "seed", self.seed, f"must be a whole number from 0 to {MAX_SEED}, or None to draw one"
        )
        name = (
            self.sample_solver.strip().lower() if isinstance(self.sample_solver, str) else self.sample_solver
        )
        _require_legal(
            name in SOLVERS, "sample_solver", self.sample_solver, f"choose one of {', '.join(SOLVERS)}"
        )
        self._set("sample_solver", name)
        _require_legal(_is_int(self.priority), "priority", self.priority, "must be a whole number")


def _nearest(value: object, step: int, offset: int) -> str:
    """The legal values around one that is not, for the message."""
    if not _is_number(value):
        return ""
    assert isinstance(value, int | float)
    below = int((value - offset) // step) * step + offset
    above = below + step
    legal = [candidate for candidate in (below, above) if candidate > 0]
    return "; nearest: " + " or ".join(str(candidate) for candidate in legal or [offset or step])
