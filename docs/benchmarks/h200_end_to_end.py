"""One GPU, random weights: Wan2.1-T2V-1.3B end to end, ours and diffusers' in one process, order A B A B;
then 14B.

    python docs/benchmarks/h200_end_to_end.py [--steps 50] [--rounds 2] [--out FILE.json]   # needs diffusers

Both sides: 832x480, 81 frames, guidance 5, two branches a step, bf16 transformer and T5, fp32 VAE, eager,
attention by cuDNN through SDPA, 512 text tokens. Ours goes through task pool, engine and the mp4 file; the
peer stops at frames in memory. The 14B part loads random weights and takes two steps at 1280x720x81.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers import __version__ as diffusers_version
from hydra import compose, initialize_config_module
from transformers import UMT5Config, UMT5EncoderModel

from chitu_core.config import load
from chitu_core.environment import Environment
from chitu_diffusion.engine import Engine
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskPool

PROMPT = "a cat walks on grass " * 40
WIDTH, HEIGHT, FRAMES = 832, 480, 81


def build_engine(model: str, root: str, attn_type: str) -> tuple[Engine, float]:
    overrides = [f"models={model}", "debug.skip_model_load=true", f"output.root_dir={root}"]
    overrides.append(f"infer.attn_type={attn_type}")
    with initialize_config_module("chitu_core.config", version_base=None):
        config = load(compose("serve_config", overrides=overrides))
    begin = time.perf_counter()
    engine = Engine(config, TaskPool(), Environment())
    torch.cuda.synchronize()
    return engine, time.perf_counter() - begin


def run_engine(engine: Engine, width: int, height: int, steps: int) -> dict:
    params = DiffusionUserParams(
        prompt=PROMPT, width=width, height=height, num_frames=FRAMES, num_inference_steps=steps, seed=1
    )
    task = DiffusionTask.from_user_request(params)
    begin = time.perf_counter()
    engine.pool.add(task)
    while not engine.pool.all_finished():
        engine.step()
    torch.cuda.synchronize()
    total = time.perf_counter() - begin
    if task.result is None:
        raise SystemExit(f"ours failed: {task.error_message}")
    return {"total_s": total, "stages_s": task.result.seconds, "peak_gib": task.result.peak_memory.device_gib}


def build_peer() -> WanPipeline:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        transformer = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30
        )
        config = UMT5Config(
            vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        text_encoder = UMT5EncoderModel(config)
    torch.set_default_dtype(torch.float32)
    vae = AutoencoderKLWan().to("cuda", torch.float32)
    transformer.set_attention_backend("_native_cudnn")
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    pipe = WanPipeline(
        tokenizer=None, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
    )
    for module in (transformer, text_encoder, vae):
        module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_peer(pipe: WanPipeline, steps: int) -> dict:
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with torch.inference_mode():
        ids = torch.randint(3, 1000, (1, 512), device="cuda")
        embeds = [pipe.text_encoder(ids).last_hidden_state for _ in range(2)]
        pipe(
            prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], width=WIDTH, height=HEIGHT,
            num_frames=FRAMES,
            num_inference_steps=steps, guidance_scale=5.0, output_type="pt",
            generator=torch.Generator("cuda").manual_seed(1),
        )  # fmt: skip
    torch.cuda.synchronize()
    return {"total_s": time.perf_counter() - begin, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--attn-type", default="sdpa", help="of ours; the peer takes cuDNN, as sdpa does")
    parser.add_argument("--skip-14b", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/h200_end_to_end.json"))
    options = parser.parse_args()
    record: dict = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "diffusers": diffusers_version,
        "python": platform.python_version(), "steps": options.steps, "size": f"{WIDTH}x{HEIGHT}x{FRAMES}",
        "attn_type": options.attn_type,
    }  # fmt: skip
    engine, record["ours_init_s"] = build_engine("Wan2.1-T2V-1.3B", "/tmp/bench", options.attn_type)
    weights_gib = torch.cuda.memory_allocated() / 2**30
    peer = build_peer()
    run_engine(engine, WIDTH, HEIGHT, 2)  # warm-up of both
    run_peer(peer, 2)
    record["ours"], record["peer"] = [], []
    for _ in range(options.rounds):
        record["ours"].append(run_engine(engine, WIDTH, HEIGHT, options.steps))
        print("ours", record["ours"][-1], flush=True)
        record["peer"].append(run_peer(peer, options.steps))
        print("peer", record["peer"][-1], flush=True)
    peer_gib = torch.cuda.memory_allocated() / 2**30 - weights_gib
    for run in record["ours"]:
        run["peak_gib"] = round(run["peak_gib"] - peer_gib, 2)  # without the peer's weights beside it
    for run in record["peer"]:
        run["peak_gib"] = round(run["peak_gib"] - weights_gib, 2)
    ours, theirs = (statistics.median(run["total_s"] for run in record[side]) for side in ("ours", "peer"))
    record["ratio"] = theirs / ours
    engine.close()
    del engine, peer
    gc.collect()
    torch.cuda.empty_cache()
    if not options.skip_14b:
        engine, record["14b_init_s"] = build_engine("Wan2.1-T2V-14B", "/tmp/bench", options.attn_type)
        record["14b_1280x720x81_2_steps"] = run_engine(engine, 1280, 720, 2)
        print("14B", record["14b_1280x720x81_2_steps"])
        engine.close()
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"1.3B {record['size']}, {options.steps} steps: ours {ours:.1f} s, diffusers {theirs:.1f} s, "
        f"{record['ratio']:.3f}x"
    )


if __name__ == "__main__":
    main()
