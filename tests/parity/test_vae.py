"""The Wan2.1 VAE against diffusers' AutoencoderKLWan, with random weights in every parameter."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from oracles import randomise, relative_error
from torch import Tensor

from chitu_core.ops import conv as ops
from chitu_diffusion.vaes.wan import (
    WAN21_LATENTS_MEAN,
    WAN21_LATENTS_STD,
    RMSNorm,
    Stream,
    Upsample,
    WanVAE,
    WanVAEConfig,
    pointwise,
)

KEYS = Path(__file__).parents[1] / "data" / "keys" / "vae_wan2.1.tsv"
FP32 = 1e-5  # relative L2: only the order of sums differs
BF16 = 2e-2  # relative L2 of a bf16 decode; the official VAE shows 1.3e-2 to 1.5e-2


def config(base_dim: int = 16) -> WanVAEConfig:
    return WanVAEConfig(
        base_dim=base_dim,
        z_dim=16,
        dim_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        temporal_downsample=(False, True, True),
        latents_mean=WAN21_LATENTS_MEAN,
        latents_std=WAN21_LATENTS_STD,
    )


def key_table() -> list[list[str]]:
    """Rows of official key, shape, diffusers key, for the released VAE; the names are those of any width."""
    return [line.split("\t") for line in KEYS.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return randomise(WanVAE(config()), seed=0)


@pytest.fixture(scope="module")
def oracle(vae: WanVAE) -> AutoencoderKLWan:
    model = AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
    )
    weights = vae.state_dict()
    model.load_state_dict({diffusers: weights[official] for official, _, diffusers in key_table()})
    return model.eval()


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_video(frame_num: int, height: int = 24, width: int = 40) -> Tensor:
    return random(3, frame_num, height, width).clamp(-1, 1)


def channelwise(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def decode(vae: WanVAE, latent: Tensor, latent_frames_per_chunk: int = 1) -> Tensor:
    return torch.cat(list(vae.decode(latent, latent_frames_per_chunk)), dim=1)


def test_parameters_of_the_full_size_model_are_those_of_the_official_checkpoint():
    with torch.device("meta"):
        model = WanVAE(config(base_dim=96))
    shapes = {name: "x".join(map(str, value.shape)) for name, value in model.state_dict().items()}
    assert shapes == {official: shape for official, shape, _ in key_table()}


def test_latent_statistics_are_those_of_the_released_vae(oracle):
    assert list(WAN21_LATENTS_MEAN) == oracle.config.latents_mean
    assert list(WAN21_LATENTS_STD) == oracle.config.latents_std


def test_stride_follows_from_the_levels():
    assert config().stride == (4, 8, 8)


@pytest.mark.parametrize("latent_frames", [1, 2, 4])
@pytest.mark.parametrize("latent_frames_per_chunk", [1, 3])
def test_decode_equals_diffusers(vae, oracle, latent_frames, latent_frames_per_chunk):
    latent = random(16, latent_frames, 3, 5)
    raw = latent * channelwise(WAN21_LATENTS_STD) + channelwise(WAN21_LATENTS_MEAN)
    with torch.no_grad():
        expected = oracle.decode(raw[None]).sample[0]
    assert expected.shape == (3, 4 * latent_frames - 3, 24, 40)
    assert relative_error(decode(vae, latent, latent_frames_per_chunk), expected) <= FP32


@pytest.mark.parametrize("latent_frames", [1, 2, 4])
def test_encode_equals_diffusers(vae, oracle, latent_frames):
    video = random_video(4 * latent_frames - 3)
    with torch.no_grad():
        raw = oracle.encode(video[None]).latent_dist.mode()[0]
    expected = (raw - channelwise(WAN21_LATENTS_MEAN)) / channelwise(WAN21_LATENTS_STD)
    assert expected.shape == (16, latent_frames, 3, 5)
    assert relative_error(vae.encode(video), expected) <= FP32


@pytest.mark.parametrize("latent_frames_per_chunk", [2, 3, 4, 9])
def test_any_chunking_decodes_the_same_video(vae, latent_frames_per_chunk):
    latent = random(16, 4, 3, 5)
    chunked = decode(vae, latent, latent_frames_per_chunk)
    assert relative_error(chunked, decode(vae, latent)) <= FP32


def test_the_convolution_of_other_devices_decodes_the_same_video(vae, monkeypatch):
    latent = random(16, 3, 3, 5)
    expected = decode(vae, latent)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert relative_error(decode(vae, latent), expected) <= FP32


@pytest.mark.parametrize("latent_frames_per_chunk", [1, 3])
def test_products_of_shifted_rows_decode_and_encode_the_same_video(vae, monkeypatch, latent_frames_per_chunk):
    latent, video = random(16, 4, 3, 5), random_video(13)
    expected = decode(vae, latent), vae.encode(video)
    monkeypatch.setattr(ops, "prefers_shifted", lambda x, dim_out: True)
    assert relative_error(decode(vae, latent, latent_frames_per_chunk), expected[0]) <= FP32
    chunked = vae.encode(video, latent_frames_per_chunk=latent_frames_per_chunk)
    assert relative_error(chunked, expected[1]) <= FP32


@pytest.mark.parametrize("latent_frames_per_chunk", [2, 3, 9])
def test_any_chunking_encodes_the_same_latent(vae, latent_frames_per_chunk):
    video = random_video(13)
    chunked = vae.encode(video, latent_frames_per_chunk=latent_frames_per_chunk)
    assert relative_error(chunked, vae.encode(video)) <= FP32


def test_encode_refuses_empty_chunks(vae):
    with pytest.raises(ValueError, match="latent_frames_per_chunk must be >= 1, got 0"):
        vae.encode(random_video(5), latent_frames_per_chunk=0)


def test_encoding_in_chunks_equals_encoding_at_once(vae):
    video = random_video(13)
    with torch.no_grad():
        moments = pointwise(vae.conv1, vae.encoder(video.permute(1, 2, 3, 0), Stream()))
    at_once = moments[..., :16].permute(3, 0, 1, 2) - channelwise(WAN21_LATENTS_MEAN)
    assert relative_error(vae.encode(video), at_once / channelwise(WAN21_LATENTS_STD)) <= FP32


def test_a_shorter_latent_decodes_to_the_first_frames_bit_for_bit(vae):
    latent = random(16, 4, 3, 5)
    assert torch.equal(decode(vae, latent[:, :2]), decode(vae, latent)[:, :5])


def test_chunks_are_final_when_they_are_yielded(vae):
    chunks = vae.decode(random(16, 3, 3, 5))
    seen = [next(chunks), next(chunks)]
    copies = [chunk.clone() for chunk in seen]
    last = next(chunks)
    assert all(torch.equal(chunk, copy) for chunk, copy in zip(seen, copies, strict=True))
    assert [chunk.shape[1] for chunk in (*seen, last)] == [1, 4, 4]


def test_two_clips_decoded_in_turns_do_not_see_each_other(vae):
    one, other = random(16, 3, 3, 5, seed=2), random(16, 3, 3, 5, seed=3)
    pairs = list(zip(vae.decode(one), vae.decode(other), strict=True))
    assert torch.equal(torch.cat([first for first, _ in pairs], dim=1), decode(vae, one))
    assert torch.equal(torch.cat([second for _, second in pairs], dim=1), decode(vae, other))


def test_upsampling_keeps_the_first_frame_single_and_out_of_the_history_of_the_others():
    torch.manual_seed(0)
    layer = Upsample(8, is_temporal=True)
    x = random(3, 2, 3, 8)
    changed = torch.cat((x[:1] + 1, x[1:]))
    with torch.no_grad():
        before, after = layer(x, Stream()), layer(changed, Stream())
    assert before.shape == (5, 4, 6, 4)
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])


def test_norm_of_zeros_is_zero():
    assert torch.equal(RMSNorm(8)(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_bf16_weights_decode_close_to_fp32(vae):
    half = WanVAE(config()).to(torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    latent = random(16, 3, 3, 5)
    video = decode(half, latent)
    assert video.dtype == torch.float32
    assert relative_error(video, decode(vae, latent)) <= BF16


def test_decoded_video_is_clamped_to_the_range_of_pixels(vae):
    video = decode(vae, 10 * random(16, 2, 3, 5))
    assert (video.min(), video.max()) == (-1, 1)


def test_a_model_built_on_meta_decodes_once_it_is_loaded(vae):
    with torch.device("meta"):
        model = WanVAE(config())
    model.to_empty(device="cpu").load_state_dict(vae.state_dict())
    latent = random(16, 2, 3, 5)
    assert torch.equal(decode(model, latent), decode(vae, latent))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 4, 24, 40), "frames must be 4 n \\+ 1, got 4"),
        ((3, 0, 24, 40), "frames must be 4 n \\+ 1, got 0"),
        ((3, 5, 20, 40), "height must be a multiple of 8, got 20"),
        ((3, 5, 24, 44), "width must be a multiple of 8, got 44"),
        ((1, 5, 24, 40), "must be \\[3, F, H, W\\], got \\[1, 5, 24, 40\\]"),
    ],
)
def test_encode_refuses_a_video_that_does_not_fit(vae, shape, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


def test_decode_refuses_a_latent_of_other_channels_at_once(vae):
    with pytest.raises(ValueError, match="latent must be \\[16, T, h, w\\], got \\[4, 1, 3, 5\\]"):
        vae.decode(torch.zeros(4, 1, 3, 5))


def test_decode_refuses_empty_chunks_at_once(vae):
    with pytest.raises(ValueError, match="latent_frames_per_chunk must be >= 1, got 0"):
        vae.decode(torch.zeros(16, 1, 3, 5), latent_frames_per_chunk=0)
