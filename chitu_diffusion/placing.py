"""Where the weights of each network live, by `infer.diffusion.low_mem_level`, and how they are brought.

What lives on the host is read straight into page-locked slabs. The VAE, and of a transformer what lies
outside its blocks, are on the device at every level.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from chitu_core import weights
from chitu_core.arena import Arena, Guest, Lane
from chitu_core.block_stream import BlockStream, Streamed
from chitu_core.slab import Selection, Slab, loaded_bytes, tensor_names
from chitu_diffusion.encoders.umt5 import UMT5Encoder
from chitu_diffusion.memory_setting import DIT_ON_HOST, STREAMED, TEXT_ON_HOST
from chitu_diffusion.models.wan import WanDiT
from chitu_diffusion.survey import Fill

logger = logging.getLogger(__name__)

_TABLE = "token_embedding.weight"
_TEXT_PROJECTION = ("cross_attn.k.", "cross_attn.v.", "cross_attn.norm_k.")  # of a block; once per prompt


@dataclass(frozen=True)
class Placing:
    """Fills networks where a level has them. What is not on the device for good comes back as a guest."""

    level: int
    packs: bool  # whether streamed linear weights are stored in fp8
    resident_bytes: int  # of each transformer's blocks, at most, that are not streamed
    fill: Fill
    lane: Lane

    def encoder(self, encoder: UMT5Encoder, dtype: torch.dtype) -> Guest | None:
        """The text encoder: from level 2 on its table is read on the host and its blocks are brought."""
        if self.level < TEXT_ON_HOST:
            self.fill(encoder, "text_encoder", lambda _: dtype, weights.whole, weights.ON_DEVICE)
            return None
        if self.level < STREAMED:
            parts = [Selection("", tuple(name for name in tensor_names(encoder) if name != _TABLE))]
        else:
            parts = [Selection(f"blocks.{i}", tensor_names(block)) for i, block in enumerate(encoder.blocks)]
        slab = Slab(encoder, [*parts, Selection("", (_TABLE,))], lambda _: dtype, self.lane.device)
        self.fill(encoder, "text_encoder", lambda _: dtype, weights.whole, slab)
        *parcels, _ = slab.parcels
        if self.level < STREAMED:
            self._log("text_encoder", slab, "brought as a whole to encode")
            return Arena(encoder, slab, parcels[0], self.lane)
        stream = BlockStream(encoder, slab, parcels, self.lane, is_cyclic=False)
        encoder.call_block = Streamed(stream, list(encoder.blocks), encoder.call_block)
        self._log("text_encoder", slab, f"all of {len(parcels)} blocks streamed to encode")
        return stream

    def expert(self, dit: WanDiT, name: str, dtype: torch.dtype) -> Guest | None:
        """A transformer, with its `call_block` set: from level 3 on its blocks are brought."""

        def dtype_of(parameter: str) -> torch.dtype:
            return WanDiT.weight_dtype(parameter, dtype)

        if self.level >= STREAMED:
            return self._streamed(dit, name, dtype_of)
        if self.level < DIT_ON_HOST:
            self.fill(dit, name, dtype_of, WanDiT.parts_of, weights.ON_DEVICE)
            return None
        slab = Slab(dit, [Selection("blocks", tensor_names(dit.blocks))], dtype_of, self.lane.device)
        self.fill(dit, name, dtype_of, WanDiT.parts_of, slab)
        self._log(name, slab, "blocks brought as a whole to denoise")
        return Arena(dit, slab, slab.parcels[0], self.lane)

    def _streamed(self, dit: WanDiT, name: str, dtype_of: weights.DtypeOf) -> Guest:
        """Blocks beyond the budget are streamed; their projections of the text, used once a prompt, apart."""
        blocks = dit.block_list()
        sizes = [loaded_bytes(dit, f"blocks.{i}", dtype_of) for i in range(len(blocks))]
        kept = resident_blocks(sizes, self.resident_bytes)
        streamed = [i for i in range(len(blocks)) if i not in kept]
        parts = [_split(f"blocks.{i}", blocks[i], self.packs) for i in streamed]
        selections = [rest for rest, _ in parts] + [text for _, text in parts]
        slab = Slab(dit, selections, dtype_of, self.lane.device)
        self.fill(dit, name, dtype_of, WanDiT.parts_of, slab)
        modules, parcels = [blocks[i] for i in streamed], slab.parcels
        stream = BlockStream(dit, slab, parcels[: len(modules)], self.lane)
        dit.call_block = Streamed(stream, modules, dit.call_block)
        texts = BlockStream(dit, slab, parcels[len(modules) :], self.lane, is_cyclic=False)
        dit.call_text = Streamed(texts, [block.cross_attn for block in modules], dit.call_text)
        how = f"{len(modules)} of {len(blocks)} blocks streamed, {stream.num_bytes / 1e9:.3g} GB at a time"
        self._log(name, slab, how)
        return stream

    def _log(self, name: str, slab: Slab, how: str) -> None:
        stored = f"{slab.num_bytes / 1e9:.3g} GB on the host"
        logger.info("infer.diffusion.low_mem_level=%d: %s: %s, %s", self.level, name, stored, how)


def resident_blocks(sizes: Sequence[int], budget_bytes: int) -> frozenset[int]:
    """Which blocks stay on the device: as many as the budget holds, spread evenly.

    A copy is hidden by what is computed since the one before it; spread evenly, resident blocks give all
    copies the same time, while in a row they would give it to one.
    """
    total = len(sizes)
    for count in range(total, 0, -1):
        chosen = frozenset((2 * i + 1) * total // (2 * count) for i in range(count))
        if sum(sizes[i] for i in chosen) <= budget_bytes:
            return chosen
    return frozenset()


def _split(owner: str, block: nn.Module, packs: bool) -> tuple[Selection, Selection]:
    """A block without its projections of the text, and these."""
    matrices = {f"{name}.weight" for name, part in block.named_modules() if isinstance(part, nn.Linear)}
    names = tensor_names(block)
    text = tuple(name for name in names if name.startswith(_TEXT_PROJECTION))
    rest = tuple(name for name in names if name not in text)
    first, second = (
        Selection(owner, part, frozenset(matrices.intersection(part) if packs else ()))
        for part in (rest, text)
    )
    return first, second
