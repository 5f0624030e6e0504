"""fp8 layers of the transformer: which, what they cost on the demo model, and where they are refused."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import new_engine, submit
from oracles import relative_error

from chitu_core.ops.fp8 import Fp8Linear
from chitu_diffusion.models.wan import WanConfig, WanDiT
from chitu_diffusion.quantisation import QUANTISED, check_quantisation, kept_blocks, kept_share

FULL = WanConfig(5120, 13824, 40, 40, 256, 4096, 512, 16, 16, (1, 2, 2), 1e-6)


def latents_at_the_end(engine, steps):
    task = submit(engine, prompt="a red circle moves right", size=(64, 64), num_inference_steps=steps)
    while task.current_step < steps:
        engine.step()
    latents = task.buffer.latents.clone()
    engine.step()
    assert task.is_finished()
    return latents, task.result


def test_fp8_costs_a_few_percent_on_the_demo_model_and_is_named(tmp_path, caplog):
    exact_engine = new_engine(f"output.root_dir={tmp_path}")
    exact, exact_result = latents_at_the_end(exact_engine, 1)
    exact_engine.close()
    with caplog.at_level(logging.INFO):
        engine = new_engine(f"output.root_dir={tmp_path}", "quant=fp8")
    assert any("quant=fp8: self_attn.qkv" in record.message for record in caplog.records)
    quantised, result = latents_at_the_end(engine, 1)
    engine.close()
    noise = relative_error(quantised, exact)
    assert 1e-4 < noise < 5e-2  # e4m3 keeps 3 bits, of which sums over a row leave about one percent
    assert (exact_result.quant, exact_result.approximations) == (None, ())
    assert (result.quant, result.approximations) == ("fp8", ("linear layers: fp8",))
    record = json.loads(Path(result.video_path).with_suffix(".json").read_text())
    assert (record["quant"], record["approximations"]) == ("fp8", ["linear layers: fp8"])


def test_blocks_hold_fp8_layers_but_the_first_and_the_last(tmp_path):
    engine = new_engine(f"output.root_dir={tmp_path}", "quant=fp8", "fp8_fast_accumulation=false")
    dit = engine.pipeline.experts["dit"]
    for index, block in enumerate(dit.block_list()):
        layers = [block.get_submodule(name) for name in QUANTISED]
        is_inner = 0 < index < len(dit.blocks) - 1
        assert all(isinstance(layer, Fp8Linear) == is_inner for layer in layers)
        assert not any(layer.uses_fast_accumulation for layer in layers if is_inner)
        assert isinstance(block.cross_attn.k, torch.nn.Linear)
    engine.close()


def test_at_most_15_percent_of_the_linear_flops_of_the_large_models_stay_16_bit():
    assert kept_blocks(40) == {0, 39}
    assert kept_share(FULL) == 0.05
    assert kept_share(replace(FULL, num_layers=30)) < 0.15
    assert kept_blocks(2) == frozenset()


def test_quantised_layers_are_those_of_every_block():
    with torch.device("meta"):
        block = WanDiT(replace(FULL, num_layers=1)).blocks[0]
    linear = {name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear - set(QUANTISED) == {"cross_attn.k", "cross_attn.v"}


@pytest.mark.parametrize(("key", "width"), [("dim", 5128), ("ffn_dim", 13_825)])
def test_widths_that_fp8_cannot_take_are_refused(key, width):
    with pytest.raises(ValueError, match=rf"multiples of 16, {key} is {width}; leave quant=null"):
        check_quantisation(torch.device("cpu"), torch.float32, replace(FULL, **{key: width}))


@pytest.mark.parametrize(
    ("capability", "dtype", "match"),
    [
        ((8, 0), torch.bfloat16, "needs compute capability 8.9, this GPU has 8.0"),
        ((9, 0), torch.float16, "infer.dtype"),
    ],
)
def test_a_gpu_that_cannot_is_refused_before_anything_is_loaded(monkeypatch, capability, dtype, match):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ValueError, match=match):
        check_quantisation(torch.device("cuda"), dtype, FULL)
