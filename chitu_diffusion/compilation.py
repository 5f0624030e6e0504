"""Blocks through torch.compile: one graph serves every block of a network, for each number of tokens.

A compiled block is a value, `WanDiT.call_block`, so parameter names stay and nothing is patched. Where a
strategy wants a site inside a block, the block runs as it is written.
"""

import logging

import torch
from torch import Tensor

from chitu_core.distributed import ParallelMesh
from chitu_diffusion.models.wan import BlockCall, LayerCondition, WanBlock
from chitu_diffusion.seam import Run, inline

logger = logging.getLogger(__name__)


class CompiledBlocks:
    """Calls a block through its compiled graph; `WanDiT.call_block` of networks that share it."""

    def __init__(self) -> None:
        from torch._dynamo import config, exc  # a second of imports, for compiled blocks alone

        self._beyond_limit, self._uncompilable = exc.FailOnRecompileLimitHit, exc.TorchDynamoException
        self._limit: int = config.recompile_limit
        self._compiled = torch.compile(_call, fullgraph=True, dynamic=False)
        self._eager_shapes: set[torch.Size] = set()

    def __call__(self, block: WanBlock, x: Tensor, cond: LayerCondition, run: Run) -> Tensor:
        """The block's own forward, compiled. Raises RuntimeError with the reason where it cannot be."""
        if run is not inline or x.shape in self._eager_shapes:
            return _call(block, x, cond, run)
        try:
            return self._compiled(block, x, cond, run)
        except self._beyond_limit:
            self._eager_shapes.add(x.shape)
            logger.warning(
                "infer.compile: no further graph for %d tokens, torch keeps %d; such videos run eager",
                x.shape[1],
                self._limit,
            )
            return _call(block, x, cond, run)
        except self._uncompilable as error:
            reason = str(error).strip().partition("\n")[0]
            remedy = "set infer.compile=off, or give torch what it names (a C++ compiler, Triton)"
            raise RuntimeError(
                f"infer.compile=on: a block cannot be compiled ({reason}); {remedy}"
            ) from error


def choose_block_call(mode: str, mesh: ParallelMesh) -> BlockCall:
    """How blocks are called under `infer.compile`: compiled for `on`, else as they are written.

    NOTE `auto` is eager: blocks are made of fused operations already, and compiling them gained 0.1 % on an
    H100 (docs/speed.md). Raises ValueError where `on` cannot apply.
    """
    if mode != "on":
        return WanBlock.__call__
    if mesh.ring is not None:  # its point-to-point exchanges cannot be traced
        remedy = (
            "set infer.compile=auto, or a cp_size that Ulysses alone can serve (infer.diffusion.up_limit)"
        )
        raise ValueError(f"infer.compile=on: a ring of {mesh.ring.size()} ranks runs eager; {remedy}")
    return CompiledBlocks()


def _call(block: WanBlock, x: Tensor, cond: LayerCondition, run: Run) -> Tensor:
    return block(x, cond, run)
