"""`chitu bench compare`: ours and diffusers in one process, in turn, at the same sizes.

Rounds go A B C A B C, so that a drift of the machine meets all sides. The peer's weights are random. Ours may
come in variants of the configuration, whose results are held against the first one's.
"""

import argparse
import re
import shlex
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from chitu_diffusion.bench import _diffusers as peer
from chitu_diffusion.bench._rounds import Side, SideResult, run_rounds
from chitu_diffusion.bench._setup import (
    Report,
    Subject,
    Video,
    add_common,
    build_engine,
    check_counts,
    config_of,
    heading,
    make_folder,
    say,
    video_of,
    write_report,
)
from chitu_diffusion.bench._work import (
    dit_forward,
    free,
    held_gib,
    open_work,
    relative_error,
    vae_decode,
)
from chitu_diffusion.bench.e2e import WARM_UP_STEPS, add_request, generate, request_of
from chitu_diffusion.engine import Engine
from chitu_diffusion.spec import ModelSpec, experts_of
from chitu_diffusion.survey import dtype_name, pick_device, pick_dtype, survey

_WORKS = {"dit": dit_forward, "vae": vae_decode}
_PARTS = (*_WORKS, "e2e")
_PEERS = ("diffusers", "none")


@dataclass(frozen=True)
class Variant:
    """One configuration of ours: what it is called, and what is overridden."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One computation and all its sides, ours first."""

    what: str  # dit, vae or e2e
    sides: tuple[SideResult, ...]


@dataclass(frozen=True, kw_only=True)
class CompareReport(Report):
    """The JSON file."""

    peer: str | None  # with its version
    peer_dtype: str | None
    rounds: int
    forwards: int  # calls of a round, for dit and vae; a round of e2e is one request
    steps: int
    guidance: float
    error_against: str | None
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Plan:
    """What is compared, read from the options once."""

    options: argparse.Namespace
    parts: tuple[str, ...]
    modes: tuple[str, ...]  # of the peer; none without one
    variants: tuple[Variant, ...]
    subject: Subject
    video: Video
    sizes: peer.Sizes
    steps: int
    guidance: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `chitu bench compare`."""
    add_common(parser)
    parser.add_argument("--peer", metavar="NAME", default="diffusers", help="diffusers, or none")
    parser.add_argument("--what", metavar="A,B", default="dit", help=f"of {', '.join(_PARTS)}; dit")
    parser.add_argument(
        "--peer-mode", metavar="A,B", default="eager", help=f"of {', '.join(peer.MODES)}; eager"
    )
    parser.add_argument("--rounds", type=int, metavar="N", default=2, help="2")
    parser.add_argument("--forwards", type=int, metavar="N", default=3, help="calls of dit, vae a round; 3")
    parser.add_argument("--vae-fp32", action="store_true", help="the peer's VAE alone decodes in fp32")
    parser.add_argument("--variants", metavar="LIST", help='of ours: "name: key=value key=value; name2: ..."')
    parser.add_argument(
        "--error-against", metavar="OVERRIDES", help="measure the error of ours against these, in quotes"
    )
    add_request(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, print and write the file. Raises ValueError naming option, value and remedy, and RuntimeError
    where the peer is not installed."""
    plan = _plan(options)
    make_folder(options)
    where = f"{dtype_name(plan.subject.dtype)}, {plan.subject.device.type}"
    say(f"{plan.subject.config.models.name} {plan.video.name}, {where}, {options.rounds} rounds in turn")
    parts = tuple(_compare(plan, what) for what in plan.parts)
    has_peer = bool(plan.modes)
    report = CompareReport(
        **heading(options, "compare", add_arguments, plan.video.name, plan.subject),
        peer=f"diffusers {peer.version()}" if has_peer else None,
        peer_dtype=dtype_name(peer.peer_dtype(plan.subject.device)) if has_peer else None,
        rounds=options.rounds,
        forwards=options.forwards,
        steps=plan.steps,
        guidance=plan.guidance,
        error_against=options.error_against,
        parts=parts,
    )
    for part in parts:
        _print(part)
    write_report(report, "compare", options.out)
    return 0


def variants_of(text: str | None) -> tuple[Variant, ...]:
    """Variants of `name: key=value key=value; name2: ...`; for None one, `ours`, with nothing overridden.

    Raises ValueError for text of another form and for a name that comes twice.
    """
    if text is None:
        return (Variant("ours", ()),)
    found = []
    for part in filter(str.strip, text.split(";")):
        name, colon, overrides = part.partition(":")
        if not colon or not re.fullmatch(r"[^=]+", name.strip()):
            raise ValueError(f"--variants={text!r}: {part.strip()!r} is not 'name: key=value key=value'")
        found.append(Variant(name.strip(), tuple(shlex.split(overrides))))
    names = [variant.name for variant in found]
    if len(set(names)) < max(len(names), 1):
        raise ValueError(f"--variants={text!r}: name one or more, each once")
    return tuple(found)


def _plan(options: argparse.Namespace) -> _Plan:
    check_counts(options, ("rounds", "forwards", "steps"))
    parts = _chosen("--what", options.what, _PARTS)
    modes = _chosen("--peer-mode", options.peer_mode, peer.MODES)
    [name] = _chosen("--peer", options.peer, _PEERS, most=1)
    variants = variants_of(options.variants)
    for variant in variants:
        config_of(options, variant.overrides)  # what cannot be is said before the minutes of measuring
    if name != "none":
        peer.version()
    config = config_of(options)
    device = pick_device(config.infer.op_impl)
    dtype = pick_dtype(config.dtype, device)
    video, sampler = video_of(options, config.models), config.models.sampler
    found = survey(config, device, dtype).sizes
    spec = ModelSpec(
        experts_of(sampler), found.vae.stride, found.dit.patch_size, found.vae.z_dim, found.dit.text_len
    )
    shape = spec.latent_shape(video.num_frames, video.height, video.width)
    if "e2e" in parts and name != "none" and len(found.experts) > 1:
        remedy = "compare --what dit,vae, or leave the peer out with --peer none"
        raise ValueError(f"--what={options.what}: two pipelines of two experts each do not fit; {remedy}")
    return _Plan(
        options=options,
        parts=parts,
        modes=() if name == "none" else modes,
        variants=variants,
        subject=Subject(config, device, dtype),
        video=video,
        sizes=peer.Sizes(found.encoder, found.vae, found.dit, shape, sampler.sample_shift),
        steps=options.steps or sampler.sample_steps,
        guidance=sampler.guidance_scale[0] if options.guidance is None else options.guidance,
    )


def _chosen(option: str, text: str, legal: tuple[str, ...], most: int | None = None) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not words or not set(words) <= set(legal) or len(words) > (most or len(legal)):
        raise ValueError(f"{option}={text}: choose {'one' if most == 1 else 'from'} of {', '.join(legal)}")
    return words


def _compare(plan: _Plan, what: str) -> Part:
    device, options = plan.subject.device, plan.options
    with ExitStack() as stack:
        sides = [*_requests(plan, stack)] if what == "e2e" else [*_works(plan, what)]
        calls = 1 if what == "e2e" else options.forwards
        results = run_rounds(sides, device, options.rounds, calls, by_host=what == "e2e")
    del sides
    free(device)
    for result in results:
        rounds = ", ".join(f"{ms:,.2f}" for ms in result.round_medians_ms)
        say(f"{what:<4} {result.name}: {rounds} ms")
    return Part(what, results)


def _works(plan: _Plan, what: str) -> Iterable[Side]:
    """The sides of one network: our variants, then the peer."""
    options, device, make = plan.options, plan.subject.device, _WORKS[what]
    against: Tensor | None = None
    if options.error_against is not None:
        against = open_work(options, make, shlex.split(options.error_against)).made.sample()
        free(device)
    first: Tensor | None = None
    for variant in plan.variants:
        before = held_gib(device)
        work = open_work(options, make, variant.overrides).made
        held = _more(before, device)
        begin = time.perf_counter()
        sample = work.sample()  # a result on the host, so the first call ends here
        first_s = time.perf_counter() - begin
        first = sample if first is None else first
        yield Side(
            variant.name,
            variant.overrides,
            first_s,
            work.run,
            held,
            relative_error(sample, first),
            None if against is None else relative_error(sample, against),
        )
    if plan.modes:
        yield from _peer_works(plan, what)


def _peer_works(plan: _Plan, what: str) -> Iterable[Side]:
    device = plan.subject.device
    before = held_gib(device)
    if what == "vae":
        dtype = torch.float32 if plan.options.vae_fp32 else peer.peer_dtype(device)
        calls: dict[str, Callable[[], object]] = {dtype_name(dtype): peer.decode(plan.sizes, device, dtype)}
    else:
        calls = peer.forwards(plan.sizes, device, plan.modes)
    held = _more(before, device)
    for mode, call in calls.items():
        yield Side(f"diffusers {mode}", None, call, call, held)


def _requests(plan: _Plan, stack: ExitStack) -> Iterable[Side]:
    """The sides of whole requests; the first call of each has two steps."""
    options, device, video = plan.options, plan.subject.device, plan.video
    file = options.out / f"compare_{plan.subject.config.models.name}_{video.name}_video.mp4"

    def generation(engine: Engine, steps: int) -> Callable[[], object]:
        return lambda: generate(engine, request_of(video, file, steps, options.guidance))

    for variant in plan.variants:
        before = held_gib(device)
        engine = build_engine(config_of(options, variant.overrides))
        stack.callback(engine.close)
        first, call = generation(engine, WARM_UP_STEPS), generation(engine, plan.steps)
        yield Side(variant.name, variant.overrides, first, call, _more(before, device))
    if plan.modes:
        yield from _peer_requests(plan)


def _peer_requests(plan: _Plan) -> Iterable[Side]:
    device = plan.subject.device
    before = held_gib(device)
    found = peer.requests(plan.sizes, device, plan.modes, plan.video, plan.guidance)
    held = _more(before, device)

    def of(request: Callable[[int], object], steps: int) -> Callable[[], object]:
        return lambda: request(steps)

    for mode, request in found.items():
        yield Side(f"diffusers {mode}", None, of(request, WARM_UP_STEPS), of(request, plan.steps), held)


def _more(before: float | None, device: torch.device) -> float | None:
    after = held_gib(device)
    return None if before is None or after is None else round(after - before, 3)


def _print(part: Part) -> None:
    say(f"\n{part.what:<20}{'ms':>12}{'ratio':>8}{'first s':>10}{'GiB':>8}{'error':>10}{'against':>10}")
    for side in part.sides:
        peak = "" if side.peak_gib is None else f"{side.peak_gib:.2f}"
        errors = ("" if error is None else f"{error:.2g}" for error in (side.error, side.error_against))
        numbers = f"{side.median_ms:>12,.2f}{side.ratio:>8.3f}{side.first_s:>10.2f}{peak:>8}"
        say(f"{side.name:<20}{numbers}" + "".join(f"{error:>10}" for error in errors))
