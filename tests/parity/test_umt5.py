"""The text encoder against `UMT5EncoderModel` of transformers with eager attention, on random weights."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from chitu_diffusion.encoders.umt5 import UMT5Config, UMT5Encoder, relative_bucket, relative_buckets

KEYS = Path(__file__).parents[1] / "data" / "keys" / "t5_umt5_xxl_encoder.tsv"
XXL = UMT5Config(vocab_size=256384, dim=4096, attention_dim=4096, num_heads=64, ffn_dim=10240, num_layers=24)
# attention_dim differs from dim, as in some T5 sizes
TINY = UMT5Config(vocab_size=300, dim=64, attention_dim=48, num_heads=4, ffn_dim=160, num_layers=3)


def key_rows() -> list[list[str]]:
    """[official key, shape as 32x64, key in transformers] of every tensor."""
    return [line.split("\t") for line in KEYS.read_text().splitlines()[1:]]


def random_state(encoder: UMT5Encoder, seed: int) -> dict[str, Tensor]:
    """Random values for every tensor, norms included: fresh modules hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, tensor in encoder.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in key:
            state[key] = 1 + 0.1 * noise
        elif "pos_embedding" in key:
            state[key] = 0.5 * noise
        elif "token_embedding" in key:
            state[key] = noise
        elif ".attn.q." in key:
            state[key] = noise / tensor.shape[1] ** 0.5 / (TINY.attention_dim // TINY.num_heads) ** 0.5
        else:
            state[key] = noise / tensor.shape[1] ** 0.5
    return state


def build_pair(dtype: torch.dtype) -> tuple[UMT5Encoder, transformers.UMT5EncoderModel]:
    """Our encoder and the one of transformers with the same weights; the names are mapped by the key list."""
    ours = UMT5Encoder(TINY)
    state = random_state(ours, seed=0)
    ours.load_state_dict(state)
    theirs = transformers.UMT5EncoderModel._from_config(
        transformers.UMT5Config(
            vocab_size=300, d_model=64, d_kv=12, d_ff=160, num_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0,
        ),
        attn_implementation="eager",
    )  # fmt: skip
    names = {official: other for official, _, other in key_rows()}
    renamed = {names[key]: tensor for key, tensor in state.items()}
    theirs.load_state_dict(renamed | {"encoder.embed_tokens.weight": state["token_embedding.weight"]})
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(2, TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).float().norm() / expected.float().norm()).item()


@pytest.mark.parametrize("length", [1, 2, 9, 40, 200])  # 200: past the last bucket
@torch.no_grad()
def test_encoder_equals_transformers_in_fp32(length):
    ours, theirs = build_pair(torch.float32)
    ids = random_ids(2, length)
    actual = ours(ids)
    assert (actual.shape, actual.dtype) == ((2, length, 64), torch.float32)
    assert relative_error(actual, theirs(input_ids=ids).last_hidden_state) <= 1e-5  # fp32, order of sums


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@torch.no_grad()
def test_encoder_equals_transformers_with_padding(dtype):
    ours, theirs = build_pair(torch.float32)
    ids = random_ids(3, 160)
    mask = torch.arange(160) < torch.tensor([5, 140, 160])[:, None]
    actual = ours(ids, mask.to(dtype))
    expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert relative_error(actual[mask], expected[mask]) <= 1e-5  # fp32, order of sums


@pytest.mark.parametrize("length", [1, 7, 150])
@torch.no_grad()
def test_an_unpadded_prompt_gives_the_rows_of_the_padded_one(length):
    ours, _ = build_pair(torch.float32)
    ids = random_ids(1, length)
    padded = torch.cat([ids, ids.new_zeros(1, 512 - length)], dim=1)
    mask = torch.arange(512)[None] < length
    assert relative_error(ours(ids), ours(padded, mask)[:, :length]) <= 1e-6  # fp32, order of sums


@pytest.mark.parametrize("length", [9, 40, 150])
@torch.no_grad()
def test_bf16_rounds_where_transformers_rounds(length):
    ours, theirs = build_pair(torch.bfloat16)
    ids = random_ids(2, length)
    actual = ours(ids)
    assert actual.dtype == torch.bfloat16
    # measured 0, 0 and 3.4e-3 (its softmax sums in another order); a fused GELU, fp32 scores or a norm cast
    # elsewhere cost 8e-3 to 1.3e-2
    assert relative_error(actual, theirs(input_ids=ids).last_hidden_state) <= 5e-3


def test_keys_and_shapes_are_those_of_the_official_checkpoint():
    with torch.device("meta"):
        encoder = UMT5Encoder(XXL)
    actual = {key: "x".join(map(str, tensor.shape)) for key, tensor in encoder.state_dict().items()}
    assert actual == {official: shape for official, shape, _ in key_rows()}


@torch.no_grad()
def test_the_encoder_runs_on_meta():
    with torch.device("meta"):
        encoder = UMT5Encoder(TINY)
        assert encoder(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 5, 64)


@pytest.mark.parametrize(
    ("distance", "bucket"),
    [
        (-300, 15), (-127, 15), (-64, 14), (-20, 10), (-16, 10), (-9, 8), (-8, 8), (-7, 7), (-1, 1), (0, 0),
        (1, 17), (7, 23), (8, 24), (9, 24), (16, 26), (20, 26), (64, 30), (127, 31), (300, 31),
    ],
)  # fmt: skip
def test_bucket_of_a_distance(distance, bucket):
    assert relative_bucket(distance, XXL) == bucket


def test_buckets_of_all_pairs_equal_those_of_transformers():
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    attention = UMT5Attention(transformers.UMT5Config(d_model=8, num_heads=2, d_kv=4), True, layer_idx=0)
    position = torch.arange(512)
    expected = attention._relative_position_bucket(position[None, :] - position[:, None])
    assert torch.equal(relative_buckets(512, XXL, torch.device("cpu")), expected)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="attention_dim must be a multiple of num_heads = 5, got 48"):
        UMT5Config(vocab_size=300, dim=64, attention_dim=48, num_heads=5, ffn_dim=160, num_layers=3)
