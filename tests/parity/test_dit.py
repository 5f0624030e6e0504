"""The transformer against diffusers' WanTransformer3DModel with the same random weights."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from diffusers import WanTransformer3DModel
from oracles import randomise, relative_error

from chitu_core import weights
from chitu_diffusion.checkpoint.names import DIT
from chitu_diffusion.models.wan import WanConfig, WanDiT
from chitu_diffusion.seam import Site

TINY = WanConfig(
    dim=64,
    ffn_dim=160,
    num_heads=4,
    num_layers=3,
    freq_dim=32,
    text_dim=48,
    text_len=40,
    in_dim=16,
    out_dim=16,
    patch_size=(1, 2, 2),
    eps=1e-6,
)
FULL = {
    "dit_wan2.1_t2v_1.3b.tsv": replace(
        TINY, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, freq_dim=256, text_dim=4096, text_len=512
    ),
    "dit_wan2.1_t2v_14b_and_wan2.2_t2v_a14b_each_expert.tsv": replace(
        TINY, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, freq_dim=256, text_dim=4096, text_len=512
    ),
}
KEYS = Path(__file__).parent.parent / "data" / "keys"


def oracle(config: WanConfig) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
    )
    return randomise(model.eval().requires_grad_(False), seed=7)


def ours(config: WanConfig, reference: WanTransformer3DModel, dtype: torch.dtype = torch.float32) -> WanDiT:
    model = WanDiT(config).requires_grad_(False)
    state = {DIT.rename(key): value for key, value in reference.state_dict().items()}
    model.load_state_dict(weights.pack(state, model.state_dict(), model.parts_of), strict=True)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(model.weight_dtype(name, dtype))
    return model


def inputs(config: WanConfig, size: tuple[int, int, int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(1, config.in_dim, *size, generator=generator)
    return latent, torch.randn(1, tokens, config.text_dim, generator=generator)


def expected(reference: WanTransformer3DModel, config: WanConfig, latent, text, t) -> torch.Tensor:
    padded = torch.nn.functional.pad(text, (0, 0, 0, config.text_len - text.shape[1]))
    return reference(latent, timestep=torch.tensor([t]), encoder_hidden_states=padded, return_dict=False)[0]


@pytest.mark.parametrize("heads", [4, 1], ids=["head_dim_16", "head_dim_128"])
@pytest.mark.parametrize("size", [(3, 6, 10), (1, 4, 2), (5, 2, 6)])
@pytest.mark.parametrize("t", [3, 500, 999])
def test_float32_velocity_agrees_with_diffusers(heads, size, t):
    config = TINY if heads == 4 else replace(TINY, dim=128, num_heads=1, text_len=512)
    reference = oracle(config)
    model = ours(config, reference)
    latent, text = inputs(config, size, tokens=13)
    actual = model(latent, torch.tensor(t), model.encode_text(text))
    # diffusers computes the time sinusoid in fp32 instead of fp64, which alone moves the output by up to 6e-6
    assert relative_error(actual, expected(reference, config, latent, text, t)) < 1e-5


def test_bfloat16_velocity_stays_within_one_percent_of_float32():
    reference = oracle(TINY)
    latent, text = inputs(TINY, (3, 6, 10), tokens=13)
    exact, half = ours(TINY, reference), ours(TINY, reference, torch.bfloat16)
    t = torch.tensor(500)
    velocity = half(latent, t, half.encode_text(text))
    assert velocity.dtype == torch.float32  # head and residual stream stay fp32
    assert relative_error(velocity, exact(latent, t, exact.encode_text(text))) < 1e-2  # bf16 operands: 4e-3


def test_a_batch_gives_what_its_videos_give_alone():
    model = ours(TINY, oracle(TINY))
    latents = torch.randn(2, TINY.in_dim, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 9, TINY.text_dim, generator=torch.Generator().manual_seed(1))
    t = torch.tensor(321)
    together = model(latents, t, model.encode_text(text))
    alone = [model(latents[i : i + 1], t, model.encode_text(text[i : i + 1])) for i in range(2)]
    torch.testing.assert_close(
        together, torch.cat(alone), atol=1e-5, rtol=1e-5
    )  # only the order of sums differs


class Spy:
    """A strategy that computes everything and notes where it was asked."""

    def __init__(self, sites: set[str]) -> None:
        self.sites = frozenset(sites)
        self.seen: list[Site] = []

    def around(self, site, compute, x, signal):
        assert signal.shape == (6, TINY.dim)
        self.seen.append(site)
        return compute(x)


def test_a_strategy_sees_every_site_in_order_and_changes_nothing():
    model = ours(TINY, oracle(TINY))
    latent, text = inputs(TINY, (2, 4, 6), tokens=5)
    cache, t = model.encode_text(text), torch.tensor(700)
    inner = ["self_attn", "attention", "cross_attn", "ffn"]
    spy = Spy({"blocks", "block", *inner})
    assert torch.equal(model(latent, t, cache, around=spy), model(latent, t, cache))
    layers = [Site(kind, i) for i in range(TINY.num_layers) for kind in ["block", *inner]]
    assert spy.seen == [Site("blocks"), *layers]


def test_a_strategy_is_asked_only_at_its_own_sites():
    model = ours(TINY, oracle(TINY))
    latent, text = inputs(TINY, (2, 4, 6), tokens=5)
    spy = Spy({"block"})
    model(latent, torch.tensor(700), model.encode_text(text), around=spy)
    assert spy.seen == [Site("block", i) for i in range(TINY.num_layers)]


def test_time_signal_is_the_modulation_that_the_blocks_get():
    model = ours(TINY, oracle(TINY))
    latent, text = inputs(TINY, (1, 4, 4), tokens=5)
    cache = model.encode_text(text)
    timesteps = torch.tensor([999, 500, 3])
    signals = model.time_signal(timesteps)
    for t, signal in zip(timesteps, signals, strict=True):
        torch.testing.assert_close(model.embed(latent, t, cache)[1].modulation, signal, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("table", FULL)
def test_full_size_parameters_are_those_of_the_released_checkpoint(table):
    with torch.device("meta"):
        model = WanDiT(FULL[table])
    with (KEYS / table).open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    listed = {row["official_key"]: tuple(map(int, row["shape"].split("x"))) for row in rows}
    ours = {}
    for name, parameter in model.named_parameters():
        parts = model.parts_of(name)
        shape = (parameter.shape[0] // len(parts), *parameter.shape[1:])
        ours |= dict.fromkeys(parts, shape)
    assert ours == listed


def test_blocks_compile_to_one_graph():
    torch._dynamo.reset()
    model = ours(TINY, oracle(TINY))
    latent, text = inputs(TINY, (2, 4, 6), tokens=5)
    cache, t = model.encode_text(text), torch.tensor(700)
    eager = model(latent, t, cache)
    counter = torch._dynamo.testing.CompileCounter()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(model(latent, t, cache), eager, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1  # no per-layer Python value enters a block
