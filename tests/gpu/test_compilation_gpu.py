"""Compiled blocks, CUDA graphs and fp8 in a whole transformer on a GPU."""

import pytest
import torch
import torch._dynamo
from engines import configured
from oracles import relative_error

from chitu_core.environment import Environment
from chitu_core.ops import rows
from chitu_core.weights import randomise
from chitu_diffusion.cuda_graph import GRAPHS_KEPT, GraphedForward, plain_forward
from chitu_diffusion.engine import Engine
from chitu_diffusion.models.wan import WanConfig, WanDiT
from chitu_diffusion.sequence import NO_SHARD
from chitu_diffusion.task import DiffusionTask, DiffusionTaskStatus, DiffusionUserParams, TaskPool

pytestmark = pytest.mark.gpu

SIZE = (16, 3, 8, 12)


@pytest.fixture
def make_engine(tmp_path):
    engines = []

    def make(*overrides):
        config = configured(f"output.root_dir={tmp_path}", *overrides)
        engines.append(Engine(config, TaskPool(), Environment()))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@torch.inference_mode()
def inputs(engine, size=SIZE, seed=0):
    dit = engine.pipeline.experts["dit"]
    generator = torch.Generator("cuda").manual_seed(seed)
    latent = torch.randn(1, *size, generator=generator, device="cuda")
    text = torch.randn(1, 9, dit.config.text_dim, generator=generator, device="cuda")
    return dit, latent, torch.tensor(500 + seed, device="cuda"), dit.encode_text(text)


@torch.inference_mode()
def velocity(engine, **which):
    return engine.pipeline.forward(*inputs(engine, **which), shard=NO_SHARD)


def test_compiled_blocks_predict_what_eager_ones_do(make_engine):
    eager = make_engine("infer.compile=off", "infer.use_cuda_graph=off")
    expected = velocity(eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = make_engine("infer.compile=on", "infer.use_cuda_graph=off")
    assert (
        relative_error(velocity(compiled), expected) < 1e-3
    )  # our operators are kept, products are the same
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_recorded_forward_serves_every_request_of_its_size(make_engine):
    engine = make_engine("infer.compile=off", "infer.use_cuda_graph=on")
    forward = engine.pipeline.forward
    assert isinstance(forward, GraphedForward)
    sizes = [(16, frames, 8, 12) for frames in range(1, GRAPHS_KEPT + 2)]  # the last one drops the first
    with torch.inference_mode():
        for seed, size in enumerate([*sizes, *sizes]):
            given = inputs(engine, size, seed)
            assert torch.equal(forward(*given, shard=NO_SHARD), plain_forward(*given, shard=NO_SHARD))
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward(*given, shard=NO_SHARD)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_auto_records_a_small_video_and_the_video_is_the_same(make_engine):
    videos = []
    for mode in ("off", "auto"):
        engine = make_engine(f"infer.use_cuda_graph={mode}")
        task = DiffusionTask.from_user_request(DiffusionUserParams(prompt="a red circle", seed=5))
        engine.pool.add(task)
        while task.current_step < task.params.num_inference_steps:
            engine.step()
        videos.append(task.buffer.latents.clone())
        engine.step()
        assert task.status == DiffusionTaskStatus.Completed, task.error_message
    assert torch.equal(*videos)


def test_the_demo_model_in_fp8_moves_a_velocity_by_a_few_percent(make_engine):
    exact = velocity(make_engine("infer.use_cuda_graph=off"))
    for precise in ("true", "false"):
        quantised = make_engine("quant=fp8", f"fp8_fast_accumulation={precise}", "infer.use_cuda_graph=off")
        error = relative_error(velocity(quantised), exact)
        print(f"fp8_fast_accumulation={precise}: {error:.4f}")
        assert 1e-4 < error < 6e-2
    recorded = make_engine("quant=fp8", "fp8_fast_accumulation=false", "infer.use_cuda_graph=on")
    assert torch.equal(velocity(recorded), velocity(quantised))
    compiled = make_engine(
        "quant=fp8", "fp8_fast_accumulation=false", "infer.compile=on", "infer.use_cuda_graph=off"
    )
    assert (
        relative_error(velocity(compiled), velocity(quantised)) < 1e-2
    )  # a rounding may cross a step of fp8


@torch.inference_mode()
def test_the_fused_forward_of_the_1_3b_model_is_that_of_the_definitions(monkeypatch):
    with torch.device("meta"):
        dit = WanDiT(WanConfig(1536, 8960, 12, 30, 256, 4096, 512, 16, 16, (1, 2, 2), 1e-6))
    device = torch.device("cuda")
    randomise(dit, device=device, dtype_of=lambda name: WanDiT.weight_dtype(name, torch.bfloat16), seed=0)
    latent, text = (torch.randn(shape, device=device) for shape in ((1, 16, 3, 60, 104), (1, 512, 4096)))
    call = (latent, torch.tensor(500, device=device), dit.encode_text(text))
    fused = dit(*call)
    monkeypatch.setattr(rows, "HAS_TRITON", False)
    error = relative_error(fused, dit(*call))
    print(f"fused against eager: {error:.2e}")
    assert error < 1e-2  # both round to bf16 between operations, at other places
