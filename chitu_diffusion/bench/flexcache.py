"""`chitu bench flexcache`: what each cache strategy saves and what it costs, against the same run without.

Real requests of one engine, the same seeds for all. `--calibrate` measures instead what TeaCache and MagCache
must know of a model.
"""

import argparse
import re
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from chitu_core import plugins
from chitu_core.config import Config
from chitu_diffusion.bench._cache_fit import calibrate, yaml_of
from chitu_diffusion.bench._cache_merge import merge
from chitu_diffusion.bench._cache_report import FlexCacheReport, show, summarised, write
from chitu_diffusion.bench._cache_runs import Runs, Variant, exact_forwards, make
from chitu_diffusion.bench._cache_scores import Judge, Similarity, load_judge
from chitu_diffusion.bench._cache_trace import course_of, model_of, observe
from chitu_diffusion.bench._setup import (
    Video,
    add_common,
    build_engine,
    check_counts,
    config_of,
    heading,
    make_folder,
    say,
    subject_of,
    video_of,
)
from chitu_diffusion.bench.e2e import WARM_UP_STEPS, add_request
from chitu_diffusion.params import STRATEGY_PACKAGE
from chitu_diffusion.resolve import resolve
from chitu_diffusion.survey import dtype_name
from chitu_diffusion.task import DiffusionUserParams, FlexCacheParams

LEFT_OUT = frozenset({"ditango"})  # of the strategies, when none is named: it is for several ranks
CAPTIONS = (  # of what the demo model was trained on
    "a red circle moves right on a blue background",
    "a large yellow square moves up and left quickly on a black background",
    "a small green triangle moves down slowly on a white background",
    "a purple ring moves left quickly on an orange background",
)
PROMPTS = (  # of large motion: a still picture flatters every cache
    "A motorcyclist races along a coastal road, the camera follows at speed, waves break on the rocks.",
    "Two boxers trade quick punches in a lit ring, the crowd moves in the background.",
    "A flock of starlings turns and folds over a field at dusk.",
    "A dancer in a red dress spins across a wooden stage under a moving spotlight.",
)
_SWITCH = "infer.diffusion.enable_flexcache"
_NOT_CALIBRATED = {"strategies", "ratios", "judge", "keep_videos", "time_only", "shard"}


@dataclass(frozen=True)
class _Plan:
    """What is run, read from the options once."""

    options: argparse.Namespace
    config: Config
    video: Video
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    places: tuple[int, ...]  # of the prompts that this process makes
    request: DiffusionUserParams  # all but prompt and seed
    steps: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `chitu bench flexcache`."""
    add_common(parser)
    parser.set_defaults(model="demo")
    add_request(parser)
    parser.add_argument("--strategies", metavar="A,B", help="all that one process can run")
    parser.add_argument("--ratios", metavar="R,R", default="0.5,1", help="cache_ratio, above 0; 0.5,1")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one a line; four of our own")
    parser.add_argument("--seeds", "--seed", metavar="N,N", default="1", help="of every prompt; 1")
    parser.add_argument("--warmup", type=int, metavar="N", default=5, help="first steps, computed; 5")
    parser.add_argument("--cooldown", type=int, metavar="N", default=5, help="last steps, computed; 5")
    parser.add_argument("--judge", type=Path, metavar="FILE", help="Python with parse, judge and compare")
    parser.add_argument("--keep-videos", action="store_true", help="in the folder videos of --out")
    parser.add_argument("--time-only", action="store_true", help="compare nothing")
    parser.add_argument("--shard", metavar="I/N", help="the prompts whose place modulo N is I")
    parser.add_argument("--merge", type=Path, metavar="DIR", help="join the shards there; runs nothing")
    parser.add_argument("--calibrate", action="store_true", help="write MODEL.yaml for teacache, magcache")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write the files; 0 when at least one strategy was measured, else 1.

    Raises ValueError naming option, value and remedy, and RuntimeError where a run without a cache fails.
    """
    given = _given(options)
    if options.merge is not None:
        _refuse(given - {"merge", "out"}, f"--merge={options.merge} runs nothing")
        report = merge(options.merge)
        make_folder(options)
        return _tell(report, options.out)
    if options.calibrate:
        _refuse(given & _NOT_CALIBRATED, "--calibrate runs without a cache")
    plan = _plan(options)
    if options.calibrate:
        if plan.config.debug.skip_model_load:
            raise ValueError("--calibrate measures weights, and these are random; add models.ckpt_dir=DIR")
        return _calibrate(plan)
    variants = _variants(options)
    chosen = [plan.prompts[place] for place in plan.places]
    judge = None if options.judge is None else load_judge(options.judge, chosen)
    make_folder(options)
    return _tell(_measure(plan, variants, judge), options.out)


def _given(options: argparse.Namespace) -> set[str]:
    """The options that are not at their defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return {name for name, value in vars(parser.parse_args([])).items() if vars(options)[name] != value}


def _refuse(names: set[str], why: str) -> None:
    if names:
        words = ("key=value" if name == "words" else f"--{name.replace('_', '-')}" for name in sorted(names))
        raise ValueError(f"{why}; leave out {', '.join(words)}")


def _plan(options: argparse.Namespace) -> _Plan:
    check_counts(options, ("steps", "frames"))
    if any(word.lstrip("+").startswith(f"{_SWITCH}=") for word in options.words):
        raise ValueError(f"{_SWITCH}: this verb sets it to true; leave it out")
    config = config_of(options, [f"{_SWITCH}=true"])
    video, steps = video_of(options, config.models), options.steps or config.models.sampler.sample_steps
    for name in ("warmup", "cooldown"):
        if vars(options)[name] < 0:
            raise ValueError(f"--{name}={vars(options)[name]}: must be 0 or more")
    if options.warmup + options.cooldown >= steps:
        forced = f"--warmup={options.warmup} and --cooldown={options.cooldown}"
        raise ValueError(f"{forced} leave nothing of {steps} steps; lower them or raise --steps")
    if options.time_only and options.judge is not None:
        raise ValueError(f"--judge={options.judge}: --time-only looks at no frame; give one of them")
    prompts = _prompts(options, config)
    request = DiffusionUserParams(
        width=video.width,
        height=video.height,
        num_frames=video.num_frames,
        num_inference_steps=steps,
        guidance_scale=options.guidance,
    )
    places = _places(options.shard, len(prompts))
    return _Plan(options, config, video, prompts, _seeds(options.seeds), places, request, steps)


def _prompts(options: argparse.Namespace, config: Config) -> tuple[str, ...]:
    file = options.prompts
    if file is None:
        return CAPTIONS if config.models.name == "demo" else PROMPTS
    if not file.is_file():
        raise ValueError(f"--prompts={file}: no such file; write one prompt a line into it")
    found = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    if not found:
        raise ValueError(f"--prompts={file}: holds no prompt; write one a line")
    return found


def _seeds(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--seeds={text}: write whole numbers, such as 1,2")
    return tuple(dict.fromkeys(map(int, words)))


def _places(shard: str | None, count: int) -> tuple[int, ...]:
    if shard is None:
        return tuple(range(count))
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if found is None or not int(found[1]) < int(found[2]) <= count:
        raise ValueError(f"--shard={shard}: write I/N, I below N, and N at most the {count} prompts")
    return tuple(range(int(found[1]), count, int(found[2])))


def _variants(options: argparse.Namespace) -> tuple[Variant, ...]:
    known = plugins.names(STRATEGY_PACKAGE)
    if options.strategies is None:
        names = [name for name in known if name not in LEFT_OUT]
    else:
        names = list(dict.fromkeys(word.strip() for word in options.strategies.split(",") if word.strip()))
    if not names or not set(names) <= set(known):
        raise ValueError(f"--strategies={options.strategies}: choose from {', '.join(known)}")
    ratios = _ratios(options.ratios)
    forced = {"warmup": options.warmup, "cooldown": options.cooldown}
    return tuple(
        Variant(name, ratio, FlexCacheParams(name, ratio, **forced)) for name in names for ratio in ratios
    )


def _ratios(text: str) -> tuple[float, ...]:
    words = [word.strip() for word in text.split(",")]
    found = [float(word) for word in words if re.fullmatch(r"\d*\.?\d+", word)]
    if len(found) < len(words) or not all(0 < ratio <= 1 for ratio in found):
        raise ValueError(f"--ratios={text}: write numbers above 0, at most 1, such as 0.5,1")
    return tuple(dict.fromkeys(found))


def _measure(plan: _Plan, variants: Sequence[Variant], judge: Judge | None) -> FlexCacheReport:
    options, engine = plan.options, build_engine(plan.config)
    with ExitStack() as stack:
        stack.callback(engine.close)
        folder = options.out / "videos"
        if options.keep_videos:
            folder.mkdir(exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        similarity = None if options.time_only else Similarity(engine.device)
        runs = Runs(engine, plan.request, tuple(variants), folder, similarity=similarity, judge=judge)
        _warm_up(plan, runs)
        for place in plan.places:
            for seed in plan.seeds:
                runs.add(place, plan.prompts[place], seed)
        scales = plan.config.models.sampler.guidance_scale
        report = FlexCacheReport(
            **heading(options, "flexcache", add_arguments, plan.video.name, subject_of(engine)),
            attention=engine.pipeline.attention.name,
            steps=plan.steps,
            guidance=scales if options.guidance is None else (options.guidance,) * len(scales),
            warmup=options.warmup,
            cooldown=options.cooldown,
            prompts=plan.prompts,
            seeds=plan.seeds,
            forwards=exact_forwards(plan.request, plan.config.models, engine.pipeline),
            judge=None if judge is None else str(judge.path),
            missing={} if similarity is None else similarity.missing,
            shard=None if options.time_only else options.shard,
            time_only=options.time_only,
            timed="a run with --time-only" if options.time_only else "this run",
            rows=runs.rows,
        )
    return summarised(report)


def _warm_up(plan: _Plan, runs: Runs) -> None:
    """One request of two steps, which does not count."""
    few, file = min(WARM_UP_STEPS, plan.steps), runs.folder / "warm_up.mp4"
    request = replace(plan.request, prompt=plan.prompts[0], seed=0, num_inference_steps=few)
    make(runs.engine, replace(request, save_path=str(file)), wants_frames=False)


def _tell(report: FlexCacheReport, out: Path) -> int:
    show(report)
    write(report, out)
    return 0 if any(row.summary for row in report.rows[1:]) else 1


def _calibrate(plan: _Plan) -> int:
    """Run every prompt without a cache and write the YAML; 0, for what cannot be fitted raises."""
    options, config = plan.options, plan.config
    settings = config.models.sampler
    runs = [
        resolve(replace(plan.request, prompt=plan.prompts[place], seed=seed), config.models)
        for place in plan.places
        for seed in plan.seeds
    ]
    make_folder(options)
    engine = build_engine(config)
    with ExitStack() as stack:
        stack.callback(engine.close)
        pipeline = engine.pipeline
        observed = observe(runs, pipeline, settings, engine.device)
        course = course_of(
            runs[0],
            settings,
            pipeline.spec,
            model_of(config.models.name, pipeline),
            warmup=options.warmup,
            cooldown=options.cooldown,
        )
        where = heading(options, "flexcache", add_arguments, plan.video.name, subject_of(engine))
    chosen = calibrate(observed, course)
    size = f"{plan.video.width}x{plan.video.height}, {plan.video.num_frames} frames"
    scales = ", ".join(f"{scale:g}" for scale in runs[0].guidance_scale)
    machine = where["environment"]
    device = "CPU" if engine.device.type == "cpu" else machine.device
    about = (
        "Measured by chitu bench flexcache --calibrate.",
        f"{config.models.name}, {size}, {plan.steps} steps, guidance {scales}; {len(runs)} clips.",
        f"{dtype_name(engine.dtype)}, {device}, torch {machine.torch}, {where['weights']} weights.",
    )
    path = options.out / f"{config.models.name}.yaml"
    path.write_text(yaml_of(chosen, about), encoding="utf-8")
    for remark in chosen.remarks:
        say(remark)
    say(f"{path}: use it with infer.diffusion.flexcache_calibration={path}")
    return 0
