"""infer.vae_dtype and infer.vae_chunk, from the configuration to the record of a video."""

import logging

import pytest
import torch
from engines import new_engine, run, submit

from chitu_diffusion.survey import pick_vae_chunk
from chitu_diffusion.vaes.wan import WanVAE


def make_video(tmp_path, *overrides):
    """One small video: its record, and the networks that made it."""
    engine = new_engine("infer.op_impl=torch", f"output.root_dir={tmp_path}", *overrides)
    task = submit(engine, num_inference_steps=1)
    run(engine)
    pipeline = engine.pipeline
    engine.close()
    assert task.result is not None, task.error_message
    return task.result, pipeline


def test_by_default_the_vae_computes_in_float32_and_nothing_is_approximate(tmp_path):
    result, pipeline = make_video(tmp_path, "infer.op_impl=cpu")
    assert (pipeline.vae.dtype, pipeline.vae_chunk) == (torch.float32, 1)
    assert result.approximations == ()


def test_a_vae_in_bfloat16_is_named_by_record_and_log(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="chitu_diffusion"):
        result, pipeline = make_video(tmp_path, "infer.vae_dtype=bfloat16")
    assert pipeline.vae.dtype == torch.bfloat16
    assert result.approximations == ("VAE in bfloat16",)
    assert "infer.vae_dtype=bfloat16" in caplog.text


def test_the_chunk_of_the_configuration_reaches_the_decoder(tmp_path, monkeypatch):
    asked, decode = [], WanVAE.decode
    monkeypatch.setattr(
        WanVAE,
        "decode",
        lambda vae, latent, chunk=1, strips=None: asked.append(chunk) or decode(vae, latent, chunk),
    )
    make_video(tmp_path, "infer.vae_chunk=3")
    assert asked == [3]


@pytest.mark.parametrize(
    ("chunk", "device", "dtype", "expected"),
    [
        ("auto", "cpu", torch.bfloat16, 1),
        ("auto", "cuda", torch.float32, 1),
        ("auto", "cuda", torch.bfloat16, 2),
        (5, "cpu", torch.float32, 5),
    ],
)
def test_auto_takes_two_latent_frames_in_bfloat16_on_a_gpu(chunk, device, dtype, expected):
    assert pick_vae_chunk(chunk, device, dtype) == expected
