"""Compiled blocks, warm-up and CUDA graphs: what they compute, when they apply, what they say otherwise."""

import logging
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from engines import new_engine
from oracles import relative_error
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchRuntimeError

from chitu_core.distributed import ParallelMesh
from chitu_diffusion.compilation import CompiledBlocks, choose_block_call
from chitu_diffusion.cuda_graph import LAUNCH_BOUND_FLOPS, plain_forward
from chitu_diffusion.models.wan import WanBlock, WanConfig
from chitu_diffusion.sequence import NO_SHARD

SIZE = (16, 2, 4, 6)  # a small latent


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = new_engine(f"output.root_dir={tmp_path_factory.mktemp('outputs')}")
    yield engine
    engine.close()


@torch.inference_mode()
def velocity(engine, size=SIZE):
    dit = engine.pipeline.experts["dit"]
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, *size, generator=generator)
    text = dit.encode_text(torch.randn(1, 5, dit.config.text_dim, generator=generator))
    return engine.pipeline.forward(dit, latent, torch.tensor(500), text, shard=NO_SHARD)


def test_the_demo_model_compiled_predicts_what_it_predicts_eager(engine, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = new_engine(f"output.root_dir={tmp_path}", "infer.compile=on")
    assert isinstance(compiled.pipeline.experts["dit"].call_block, CompiledBlocks)
    # Inductor fuses other sums than the eager operators do
    assert relative_error(velocity(compiled), velocity(engine)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for eight blocks
    compiled.close()


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_blocks_are_compiled_only_where_it_is_asked_for(engine, tmp_path, mode):
    other = new_engine(f"output.root_dir={tmp_path}", f"infer.compile={mode}")
    assert other.pipeline.experts["dit"].call_block is WanBlock.__call__
    assert torch.equal(velocity(other), velocity(engine))
    other.close()


def test_a_ring_refuses_compiled_blocks():
    class Ring:
        def size(self):
            return 2

    with pytest.raises(ValueError, match=r"infer\.compile=on: a ring of 2 ranks .*up_limit"):
        choose_block_call("on", replace(ParallelMesh(), ring=Ring()))


class Failing:
    """Stands for what torch.compile returns."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, *args):  # noqa: ARG002  (whatever a block is given)
        self.calls += 1
        raise self.error


@pytest.fixture
def failing(engine, monkeypatch):
    """The demo model with blocks whose compilation raises."""
    dit = engine.pipeline.experts["dit"]

    def give(error):
        made = Failing(error)
        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: made)
        dit.call_block = CompiledBlocks()
        return made

    yield give
    dit.call_block = WanBlock.__call__


def test_a_size_beyond_the_limit_of_graphs_runs_eager_with_one_warning(engine, failing, caplog):
    expected = velocity(engine)
    compiled = failing(FailOnRecompileLimitHit("recompile_limit reached"))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(velocity(engine), expected)
        assert torch.equal(velocity(engine), expected)
    assert compiled.calls == 1
    (record,) = caplog.records
    assert "12 tokens" in record.message


def test_what_cannot_be_compiled_is_an_error(engine, failing):
    failing(TorchRuntimeError("no C++ compiler"))
    with pytest.raises(RuntimeError, match=r"infer\.compile=on: .*no C\+\+ compiler.*infer\.compile=off"):
        velocity(engine)


def test_a_warm_up_runs_every_network_at_every_size(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        new_engine(f"output.root_dir={tmp_path}", "infer.warmup=[32x32x5,48x32x17]").close()
    said = [record.message for record in caplog.records if record.message.startswith("warm-up at")]
    assert [text.split(":")[0] for text in said] == ["warm-up at 32x32x5", "warm-up at 48x32x17"]


def test_a_warm_up_that_fails_names_its_size(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr("chitu_diffusion.cuda_graph.plain_forward", fail)
    with pytest.raises(RuntimeError, match=r"infer\.warmup=32x32x5: no memory"):
        new_engine(f"output.root_dir={tmp_path}", "infer.warmup=[32x32x5]")
    monkeypatch.undo()
    new_engine(f"output.root_dir={tmp_path}").close()  # nothing is left that the next engine would trip over


def test_a_cuda_graph_that_is_required_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match=r"infer\.use_cuda_graph=on: there is no GPU; .*=auto"):
        new_engine(f"output.root_dir={tmp_path}", "infer.use_cuda_graph=on")


def test_without_a_gpu_the_forward_is_the_networks_own(engine):
    assert engine.pipeline.forward is plain_forward


def test_small_videos_are_bound_by_launches_and_large_ones_are_not():
    size = WanConfig(1536, 8960, 12, 30, 256, 4096, 512, 16, 16, (1, 2, 2), 1e-6)
    small, large = (sum(size.block_flops(tokens)) for tokens in (3_200, 32_760))
    assert large * 30 == pytest.approx(283e12, rel=0.01)
    assert small < LAUNCH_BOUND_FLOPS < large
