"""Attention on a GPU: exact backends against fp32, their LSE, what auto takes, and a run with each."""

import pytest
import torch
from oracles import relative_error

from chitu_core import attention
from chitu_core.attention import Place

pytestmark = pytest.mark.gpu


def place(head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Place:
    return Place("cuda", torch.cuda.get_device_capability(), dtype, head_dim)


def backend(name: str, head_dim: int):
    reason = attention.unavailable(name, place(head_dim))
    if reason is not None:
        pytest.skip(reason)
    return attention.create(name, place(head_dim), sparsity_ratio=0.5)


def reference(q, k, v, queries=256):
    """Output and LSE of the first queries, in fp32."""
    q, k, v = (t.float().transpose(1, 2) for t in (q[:, :queries], k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


EXACT = [name for name in attention.names() if name not in attention.LOSSY]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    ("length", "heads", "dim"),
    [(32760, 12, 128), (33390, 12, 128), (75600, 2, 128), (4095, 4, 64), (300, 4, 64)],
)
def test_an_exact_backend_agrees_with_float32(name, length, heads, dim):
    if name == "sdpa_math" and length > 5000:
        pytest.skip("materialises all scores")
    run = backend(name, dim)
    q, k, v = (torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, lse = reference(q, k, v)
    assert relative_error(run(q, k, v)[:, :256], out) < 5e-3  # bf16 in and out: 2.3e-3
    if length <= 33390 and name in attention.GIVES_LSE:
        merged, theirs = run.with_lse(q, k, v)
        assert relative_error(merged[:, :256], out) < 5e-3
        assert theirs.shape == (1, heads, length)
        torch.testing.assert_close(theirs[..., :256], lse, atol=2e-3, rtol=1e-3)  # bf16 products, fp32 sums


@pytest.mark.parametrize("name", EXACT)
def test_cross_attention_shapes_work(name):
    run = backend(name, 128)
    q = torch.randn(1, 3000, 4, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 512, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert relative_error(run(q, k, v)[:, :256], reference(q, k, v)[0]) < 5e-3


def test_auto_takes_the_first_backend_of_its_table_that_is_here():
    taken = attention.choose("auto", place(), key="infer.attn_type")
    here = [
        rank.name for rank in attention.ranking(place()) if attention.unavailable(rank.name, place()) is None
    ]
    print(taken, here)
    assert taken == here[0]
    assert taken not in attention.LOSSY


@pytest.mark.parametrize("name", ["sdpa", "sdpa_cudnn", "fa4"])
def test_a_compiled_block_keeps_one_graph(name):
    run = backend(name, 128)
    q, k, v = (torch.randn(1, 512, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: run(q * 2, k, v) + 1, fullgraph=True)
    assert relative_error(compiled(q, k, v), run(q * 2, k, v) + 1) < 5e-3
