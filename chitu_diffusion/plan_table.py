"""What a video would take at every `infer.diffusion.low_mem_level`: `chitu doctor --plan`.

For this machine's GPU, or an H100 where it has none, at the sizes of the model YAML; no checkpoint is needed.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from chitu_core.attention import Place
from chitu_core.config import Config, VideoSize
from chitu_core.distributed.degrees import Degrees, plan_degrees
from chitu_core.memory import GIB, free_device_bytes, free_host_bytes
from chitu_diffusion.memory_choice import Limits, Need, choose_level
from chitu_diffusion.memory_plan import Plan
from chitu_diffusion.memory_setting import LEVELS, STREAMED, Setting
from chitu_diffusion.survey import dtype_name, pick_dtype, yaml_sizes

_HEAD = ("level", "text", "denoise", "decode", "peak", "host", "slowdown")
_STAND_IN = (9, 0)  # compute capability of the GPU where this machine has none: an H100
_NOTE = (
    f"GiB on the device by stage, and on the host; level {STREAMED} without resident blocks. The "
    "driver's own memory is not in it."
)


@dataclass(frozen=True)
class PlanTable:
    """Plans of all levels; `auto` says what would be chosen on this machine's GPU, where there is one."""

    model: str
    video: str
    formats: str
    plans: tuple[Plan, ...]
    auto: str | None

    def __str__(self) -> str:
        rows = [_HEAD, *map(_row, self.plans)]
        lines = ["".join(f"{cell:>10}" for cell in row)[5:] for row in rows]
        tail = [] if self.auto is None else [f"infer.diffusion.low_mem_level=auto here: {self.auto}"]
        return "\n".join([f"{self.model}, {self.video}, {self.formats}", *lines, _NOTE, *tail])

    def record(self) -> dict[str, Any]:
        """The same for JSON, in bytes, with the parts of each plan."""
        peaks = ("text_bytes", "denoise_bytes", "decode_bytes", "device_peak", "slowdown")
        plans = [asdict(plan) | {name: getattr(plan, name) for name in peaks} for plan in self.plans]
        return asdict(self) | {"plans": plans}


def plan_table(config: Config, video: VideoSize) -> PlanTable:
    """The plans of a configuration for one video. Raises ValueError for degrees that cannot be."""
    place = _place(config)
    degrees = _degrees(config)
    need = Need(Setting.of(config, yaml_sizes(config.models), place, degrees, degrees.world), video)
    quant = "" if config.quant is None else f", quant={config.quant}"
    ranks = "" if degrees.world == 1 else f", a rank of {degrees}"
    formats = f"{dtype_name(place.dtype)}{quant}, VAE in {config.infer.vae_dtype}{ranks}"
    plans = tuple(need.plan(level) for level in LEVELS)
    return PlanTable(config.models.name, str(video), formats, plans, _choice(need))


def _row(plan: Plan) -> tuple[str, ...]:
    peaks = (plan.text_bytes, plan.denoise_bytes, plan.decode_bytes, plan.device_peak, plan.host_bytes)
    return (str(plan.level), *(f"{peak / GIB:.1f}" for peak in peaks), f"{plan.slowdown:.3f}")


def _place(config: Config) -> Place:
    dtype, dit = pick_dtype(config.infer.dtype, torch.device("cuda")), config.models.transformer
    capability = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else _STAND_IN
    return Place("cuda", capability, dtype, dit.dim // dit.num_heads)


def _degrees(config: Config) -> Degrees:
    """Those that the configuration names; one rank for what is left to the launch."""
    diffusion = config.infer.diffusion
    cfg, cp = (size if isinstance(size, int) else 1 for size in (diffusion.cfg_size, diffusion.cp_size))
    heads = config.models.transformer.num_heads
    return plan_degrees(cfg * cp, heads, diffusion.up_limit, cfg > 1, cfg=cfg, cp=cp)


def _choice(need: Need) -> str | None:
    if not torch.cuda.is_available():
        return None
    limits = Limits(free_device_bytes(torch.device("cuda", 0)), free_host_bytes())
    try:
        plan = choose_level(need, limits)
    except ValueError as error:
        return str(error)
    blocks = "" if plan.resident_blocks is None else f", {plan.resident_blocks} blocks resident"
    return f"level {plan.level}{blocks}, {plan.device_peak / GIB:.1f} GiB"
