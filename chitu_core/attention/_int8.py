"""Attention on int8 queries and keys in Triton: scores on int8 tensor cores, values in fp16, sums in fp32.

Unlike the kernel of the package sageattention 1 it masks the keys beyond the end, accumulates in fp32 (fp16
sums may overflow) and gives the log-sum-exp. Leaves out quantisation, causality and grouped heads.
"""

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

QUERY_BLOCK, KEY_BLOCK = 128, 64  # rows that share one scale; also the tiles of the kernel
STAGES = 3  # loads in flight: what fits the 99 KiB of shared memory of capability 8.6, 8.9 and 12.0


def attend(
    q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], v: Tensor, *, exact_q: Tensor, k_mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax attention from quantised queries and keys.

    q: int8 [B, S, H, D] and its scales, fp32 [B, H, ceil(S / 128), 1], which hold log2(e) / sqrt(D) too.
    k: int8 [B, N, H, D], the keys less `k_mean`, and its scales [B, H, ceil(N / 64), 1]. v: [B, N, H, D].
    exact_q [B, S, H, D] and k_mean [B, 1, H, D] only correct the LSE. D is a power of 2 and at least 32.
    Returns [B, S, H, D] in the dtype of exact_q, and the LSE, natural log, fp32 [B, H, S].
    Source: SageAttention (arXiv:2410.02367), section 4; online softmax of arXiv:2205.14135.
    """
    batch, q_len, heads, dim = exact_q.shape
    out = exact_q.new_empty(exact_q.shape)
    lse = exact_q.new_empty(batch, heads, q_len, dtype=torch.float32)
    values = v.to(torch.float16).contiguous()
    _kernel[(triton.cdiv(q_len, QUERY_BLOCK), heads, batch)](
        *(q[0], q[1], k[0], k[1], values, exact_q.contiguous(), k_mean.contiguous(), out, lse),
        *(q_len, v.shape[1], dim**-0.5, heads, dim, QUERY_BLOCK, KEY_BLOCK),
        num_warps=warps(dim, torch.cuda.get_device_capability(v.device) if v.is_cuda else (0, 0)),
        num_stages=STAGES,
    )
    return out, lse


def warps(dim: int, capability: tuple[int, int]) -> int:
    """4 on Hopper, whose tensor cores work on 4 warps at once (12.3 ms against 14.6 on H200 at 32,760 tokens,
    12 heads of 128); elsewhere as many as hold the sums of a tile, 128 x `dim` in fp32, in registers.
    """
    return 4 if dim <= 64 or capability[0] == 9 else 8


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _fold(
    acc: tl.tensor,
    total: tl.tensor,
    peak: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    scale: tl.tensor,
    left: tl.tensor,
    IS_LAST: tl.constexpr,
) -> tl.tensor:
    """One block of keys into the online softmax, base 2; of the last block only `left` keys count."""
    scores = tl.dot(q, tl.trans(k)).to(tl.float32) * scale  # [M, N]
    if IS_LAST:
        scores = tl.where(tl.arange(0, k.shape[0])[None, :] < left, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    acc = tl.dot(weights.to(tl.float16), v, acc * decay[:, None])
    return acc, total * decay + tl.sum(weights, 1), new_peak


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(
    q_ptr: tl.tensor,
    q_scale_ptr: tl.tensor,
    k_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_ptr: tl.tensor,
    exact_q_ptr: tl.tensor,
    k_mean_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_len: tl.tensor,
    kv_len: tl.tensor,
    sm_scale: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """One block of M queries of one head; every tensor is contiguous, [B, S, H, D] or [B, H, ...]."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dims, keys = tl.arange(0, D)[None, :], tl.arange(0, N)[:, None]
    rows = block * M + tl.arange(0, M)
    is_query = rows < q_len
    q_at = (batch * q_len + rows[:, None]) * (HEADS * D) + head * D + dims  # int64, for batch is
    kv_at = (batch * kv_len + keys) * (HEADS * D) + head * D + dims
    k_scale_ptr += (batch * HEADS + head) * tl.cdiv(kv_len, N)
    q_scale = tl.load(q_scale_ptr + (batch * HEADS + head) * tl.cdiv(q_len, M) + block)
    q = tl.load(q_ptr + q_at, mask=is_query[:, None], other=0)
    k_ptrs, v_ptrs = k_ptr + kv_at, v_ptr + kv_at

    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    peak = tl.full([M], float("-inf"), tl.float32)
    full = (
        kv_len - 1
    ) // N  # the last block, of 1 to N keys, is taken apart: a mask costs each score a compare
    for j in range(full):
        k, v, scale = tl.load(k_ptrs), tl.load(v_ptrs), q_scale * tl.load(k_scale_ptr + j)
        acc, total, peak = _fold(acc, total, peak, q, k, v, scale, N, False)
        k_ptrs += N * HEADS * D
        v_ptrs += N * HEADS * D
    left = kv_len - full * N
    k = tl.load(k_ptrs, mask=keys < left, other=0)
    v = tl.load(v_ptrs, mask=keys < left, other=0)
    scale = q_scale * tl.load(k_scale_ptr + full)
    acc, total, peak = _fold(acc, total, peak, q, k, v, scale, left, True)

    tl.store(out_ptr + q_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_query[:, None])
    # without their mean the keys score q . mean less, all alike: the output does not see it, the LSE does
    exact_q = tl.load(exact_q_ptr + q_at, mask=is_query[:, None], other=0).to(tl.float32)
    k_mean = tl.load(k_mean_ptr + (batch * HEADS + head) * D + dims).to(tl.float32)
    lse = (peak + tl.log2(total)) * 0.6931471805599453 + tl.sum(exact_q * k_mean, 1) * sm_scale
    tl.store(lse_ptr + (batch * HEADS + head) * q_len + rows, lse, mask=is_query)
