"""The shell's `chitu`: thin verbs over the library.

`chitu generate PROMPT [options] [hydra.overrides ...]` makes videos; the path of each is a line on standard
output, all else goes to standard error. `chitu eval` scores videos. `chitu doctor` says what this machine can
do. `chitu run` is the launcher.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from tqdm import tqdm

from chitu_core import launch, plugins
from chitu_core import logging as chitu_logging
from chitu_core.config import VideoSize, load
from chitu_core.distributed import RankFailure
from chitu_core.environment import Environment
from chitu_core.launch_settings import quote
from chitu_diffusion import run_eval
from chitu_diffusion.bench import attention, compare, dit, e2e, flexcache, profile, t5, vae
from chitu_diffusion.doctor import report
from chitu_diffusion.engine import Engine
from chitu_diffusion.eval.manager import check_types
from chitu_diffusion.outputs import check_writable
from chitu_diffusion.params import STRATEGY_PACKAGE
from chitu_diffusion.plan_table import plan_table
from chitu_diffusion.resolve import resolve
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, FlexCacheParams, TaskPool


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; 0 when all went well, 1 when something failed, 2 for a command line that cannot be read."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"]:  # the launcher reads its own command line
        return launch.main(arguments[1:])
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)  # overrides may stand behind options
    if any(word.startswith("-") for word in rest) or (rest and "words" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.words += rest
    try:
        return options.run(options)
    except (ValueError, OSError, RuntimeError, HydraException) as error:
        sys.stderr.write(f"Error: {error}\n" if _speaks(error) else "")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Error: interrupted\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chitu", description="Text to video with Wan diffusion transformers."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    generate = verbs.add_parser("generate", help="make videos from prompts", description=_generate.__doc__)
    generate.add_argument(
        "words", nargs="*", metavar="PROMPT|key=value", help="the prompt, then Hydra overrides"
    )
    generate.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt a line, in place of PROMPT"
    )
    generate.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid; '' for nothing")
    generate.add_argument(
        "--model", metavar="NAME", help="demo, Wan2.1-T2V-1.3B, Wan2.1-T2V-14B, Wan2.2-T2V-A14B"
    )
    generate.add_argument("--ckpt-dir", metavar="DIR", help="checkpoint directory or Hugging Face repo id")
    generate.add_argument("--size", type=_size, metavar="WxH", help="pixels, multiples of 16")
    generate.add_argument("--frames", type=int, metavar="N", help="4n + 1")
    generate.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    generate.add_argument(
        "--guidance", type=_guidance, metavar="G[,G]", help="one value, or low-noise,high-noise"
    )
    generate.add_argument("--seed", type=int, metavar="N", help="drawn, and reported, when left out")
    generate.add_argument("--solver", metavar="NAME", help="unipc, dpm++ or euler")
    _add_reuse(generate)
    generate.add_argument("--fps", type=float, metavar="F", help="of the file; the model's own when left out")
    generate.add_argument("--output", metavar="FILE", help="path of the video; a run directory when left out")
    generate.add_argument(
        "--json", action="store_true", help="print the result records in place of the paths"
    )
    generate.set_defaults(run=_generate)
    verbs.add_parser("run", help="launch from a system_config.yaml", add_help=False)
    run_eval.add_arguments(verbs.add_parser("eval", help="score videos"))
    _add_benches(verbs.add_parser("bench", help="measure"))
    _add_doctor(verbs.add_parser("doctor", help="what this machine can do"))
    return parser


def _add_reuse(generate: argparse.ArgumentParser) -> None:
    """Options of a cache strategy; they turn infer.diffusion.enable_flexcache on."""
    generate.add_argument(
        "--flexcache", metavar="NAME", help=f"reuse features: {', '.join(plugins.names(STRATEGY_PACKAGE))}"
    )
    generate.add_argument(
        "--cache-ratio", type=float, metavar="R", help="0 quality first to 1 speed first; 0.5"
    )
    generate.add_argument("--warmup", type=int, metavar="N", help="first steps, always computed; 5")
    generate.add_argument("--cooldown", type=int, metavar="N", help="last steps, always computed; 5")


def _add_benches(bench: argparse.ArgumentParser) -> None:
    """A verb a module, named and described by it."""
    kinds = bench.add_subparsers(required=True)
    for module in (attention, dit, vae, t5, e2e, compare, flexcache, profile):
        about = (module.__doc__ or "").partition(": ")[2]
        kind = kinds.add_parser(module.__name__.rpartition(".")[2], help=about.partition("\n")[0])
        module.add_arguments(kind)
        kind.set_defaults(run=module.run)


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.add_argument(
        "--plan",
        nargs="+",
        metavar=("MODEL WxHxF", "key=value"),
        help="what a video takes at every infer.diffusion.low_mem_level; no checkpoint is needed",
    )
    doctor.set_defaults(run=_doctor)


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 832x480")
    return int(width), int(height)


def _guidance(text: str) -> float | tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    return values[0] if len(values) == 1 else values


def _doctor(options: argparse.Namespace) -> int:
    if options.plan is not None:
        return _plan(options)
    found = report()
    sys.stdout.write((json.dumps(asdict(found), indent=2) if options.json else str(found)) + "\n")
    return 0


def _plan(options: argparse.Namespace) -> int:
    """Memory of one video by level. Raises ValueError for words that are not MODEL, WxHxF and overrides."""
    if len(options.plan) < 2:
        raise ValueError(f"--plan {options.plan[0]}: add the video, WIDTHxHEIGHTxFRAMES, such as 832x480x81")
    model, size, *overrides = options.plan
    video = VideoSize.parse(size, "--plan")
    words = [f"models={quote(model)}", *overrides, "debug.skip_model_load=true"]
    with initialize_config_module("chitu_core.config", version_base=None):
        config = load(compose("serve_config", overrides=words))
    table = plan_table(config, video)
    sys.stdout.write((json.dumps(table.record(), indent=2) if options.json else str(table)) + "\n")
    return 0


def _generate(options: argparse.Namespace) -> int:
    """Make a video per prompt. The first word is the prompt, the rest overrides; with --prompts all are."""
    prompts, overrides = _prompts(options)
    params = [_user_params(options, prompt) for prompt in prompts]  # bad values fail before a model is read
    with initialize_config_module("chitu_core.config", version_base=None):
        args = compose("serve_config", overrides=overrides)
    if options.output is not None:
        check_writable(Path(options.output), "save_path")
    environment = Environment.read()
    chitu_logging.setup(environment)
    config = load(args)
    check_types(config.eval.eval_type)
    resolved = [resolve(one, config.models) for one in params]  # what does not fit the model fails here
    videos = [VideoSize(one.width, one.height, one.num_frames) for one in resolved]
    engine = Engine(config, TaskPool(), environment, expected=videos)
    shows_bar = sys.stderr.isatty() and not environment.debug and environment.rank == 0
    if shows_bar:
        chitu_logging.set_console_level(logging.WARNING)
    try:
        tasks = [DiffusionTask.from_user_request(one) for one in params]
        for task in tasks:
            engine.pool.add(task)
        _run(engine, tasks, shows_bar)
    finally:
        engine.close()
    run_eval.evaluate_run(engine, environment)
    return _tell(tasks, as_json=options.json, is_quiet=environment.rank > 0)


def _prompts(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The prompts and the Hydra overrides of a command line."""
    words: list[str] = list(options.words)
    if options.prompts is not None:
        if words and "=" not in words[0]:
            raise ValueError(f"PROMPT {words[0]!r} and --prompts exclude each other; give one of them")
        prompts = _read_prompts(options.prompts)
    elif words:
        prompts = [words.pop(0)]
    else:
        raise ValueError("no prompt; put it in quotes after `chitu generate`, or name a file with --prompts")
    if options.output is not None and len(prompts) > 1:
        raise ValueError(f"--output={options.output} names one file for {len(prompts)} prompts; leave it out")
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise ValueError(f"{word!r} is not a Hydra override (key=value); put the prompt into quotes")
    chosen = {"models": options.model, "models.ckpt_dir": options.ckpt_dir}
    flags = [f"{key}={quote(value)}" for key, value in chosen.items() if value is not None]
    return prompts, [*flags, *_reuse_flags(options), *words]


def _read_prompts(file: Path) -> list[str]:
    """The lines of a UTF-8 file that hold anything. Raises ValueError naming the file."""
    if not file.is_file():
        raise ValueError(f"--prompts={file}: no such file; write one prompt a line into it")
    try:
        text = file.read_bytes().decode("utf-8-sig")  # Windows editors put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts={file}: the file is not UTF-8; save it as UTF-8") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]  # splitlines cuts at form feeds too
    if not prompts:
        raise ValueError(f"--prompts={file}: the file holds no prompt; write one a line")
    return prompts


def _reuse_flags(options: argparse.Namespace) -> list[str]:
    """What `--flexcache` means for the configuration; an override that follows wins."""
    asked = _flexcache(options)
    if asked is None or asked.strategy is None:
        return []
    # DiTango reuses groups of ranks that Ulysses must divide
    fitting = ["infer.diffusion.up_limit=2"] if asked.strategy == "ditango" else []
    return ["infer.diffusion.enable_flexcache=true", *fitting]


def _flexcache(options: argparse.Namespace) -> FlexCacheParams | None:
    """The reuse that the options ask for. Raises ValueError for settings without a strategy."""
    given = {name: vars(options)[name] for name in ("cache_ratio", "warmup", "cooldown")}
    settings = {name: value for name, value in given.items() if value is not None}
    if options.flexcache is None:
        for name, value in settings.items():
            raise ValueError(
                f"--{name.replace('_', '-')}={value} needs a strategy; name one with --flexcache"
            )
        return None
    return FlexCacheParams(options.flexcache, **settings)


def _user_params(options: argparse.Namespace, prompt: str) -> DiffusionUserParams:
    width, height = options.size or (None, None)
    return DiffusionUserParams(
        prompt=prompt,
        negative_prompt=options.negative_prompt,
        width=width,
        height=height,
        num_frames=options.frames,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        seed=options.seed,
        sample_solver=options.solver or "unipc",
        fps=options.fps,
        save_path=options.output,
        flexcache_params=_flexcache(options),
    )


def _run(engine: Engine, tasks: Sequence[DiffusionTask], shows_bar: bool) -> None:
    """Step until all tasks have ended, with a bar of denoising steps on a terminal."""
    totals = [task.params.num_inference_steps for task in tasks if task.params]
    with tqdm(total=sum(totals), unit="step", disable=not shows_bar) as bar:
        while not engine.pool.all_finished():
            running = next((task for task in tasks if task.is_running()), None)
            bar.set_description(running.phase if running else "pending")
            engine.step()
            bar.update(sum(task.current_step for task in tasks) - bar.n)


def _speaks(error: Exception) -> bool:
    """Whether this rank tells of an error: one a machine of what all see, any rank of its own failure."""
    try:
        return Environment.read().local_rank == 0 or isinstance(error, RankFailure)
    except ValueError:  # a malformed variable: which rank this is remains open
        return True


def _tell(tasks: Sequence[DiffusionTask], as_json: bool, is_quiet: bool) -> int:
    """Failures to standard error, then the results to standard output, the last of them on the last line."""
    failed = [task for task in tasks if task.result is None]
    results = [task.result for task in tasks if task.result is not None]
    if is_quiet:  # rank 0 says it for all
        return 1 if failed else 0
    for task in failed:
        sys.stderr.write(f"Error: {task.phase}: {task.error_message}\n")
    for result in results:
        line = json.dumps(asdict(result), ensure_ascii=False) if as_json else result.video_path
        sys.stdout.write(line + "\n")
    return 1 if failed else 0
