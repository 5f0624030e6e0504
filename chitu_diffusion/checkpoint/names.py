"""Key names of Wan checkpoints: Diffusers and transformers spellings to the official ones, which modules use.

Tables hold module paths without `.weight`/`.bias`/`.gamma`; `#` stands for the number of a block. Official
keys pass through, unknown ones too, so that strict loading can name them. Leaves out image-to-video parts.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

_LEAVES = ("weight", "bias", "gamma")


@dataclass(frozen=True)
class NameMap:
    """A two-way map of key names: `rename` into official spelling, `spell` back into the checkpoint's."""

    to_official: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    @cached_property
    def _to_checkpoint(self) -> dict[str, str]:
        return {official: theirs for theirs, official in self.to_official.items()}

    def rename(self, key: str) -> str | None:
        """The official name of a checkpoint key; None for a key that is known and not needed."""
        if key in self.ignored or ".norm_added_q." in key:  # left over in some converted image-to-video files
            return None
        return _translate(self.to_official, key.removeprefix("model.diffusion_model."))

    def spell(self, name: str) -> str:
        """The checkpoint's key for an official name."""
        return _translate(self._to_checkpoint, name)


def _translate(table: Mapping[str, str], key: str) -> str:
    stem, dot, leaf = key.rpartition(".")
    if leaf not in _LEAVES:
        stem, dot, leaf = key, "", ""
    if stem in table:
        return table[stem] + dot + leaf
    number = re.search(r"(?<=\.)\d+(?=\.|$)", stem)
    if number is None:
        return key
    template = f"{stem[: number.start()]}#{stem[number.end() :]}"
    return table[template].replace("#", number[0]) + dot + leaf if template in table else key


def _attention(official: str, theirs: str) -> dict[str, str]:
    to_out = {f"blocks.#.{theirs}.to_out.0": f"blocks.#.{official}.o"}
    to_qkv = {f"blocks.#.{theirs}.to_{part}": f"blocks.#.{official}.{part}" for part in "qkv"}
    norms = {f"blocks.#.{theirs}.norm_{part}": f"blocks.#.{official}.norm_{part}" for part in "qk"}
    return to_qkv | to_out | norms


OFFICIAL = NameMap()

DIT = NameMap(
    {
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "scale_shift_table": "head.modulation",
        "proj_out": "head.head",
        "blocks.#.scale_shift_table": "blocks.#.modulation",
        "blocks.#.norm2": "blocks.#.norm3",  # NOTE Diffusers numbers norms in call order
        "blocks.#.ffn.net.0.proj": "blocks.#.ffn.0",
        "blocks.#.ffn.net.2": "blocks.#.ffn.2",
        **_attention("self_attn", "attn1"),
        **_attention("cross_attn", "attn2"),
    }
)

_UMT5_BLOCK = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}


def umt5_names(keys: Collection[str]) -> NameMap:
    """Map of transformers' UMT5EncoderModel, whose embedding is stored under one of two names, or both."""
    alias = "encoder.embed_tokens"
    embedding = "shared" if "shared.weight" in keys or f"{alias}.weight" not in keys else alias
    blocks = {f"encoder.block.#.{theirs}": f"blocks.#.{official}" for theirs, official in _UMT5_BLOCK.items()}
    table = {embedding: "token_embedding", "encoder.final_layer_norm": "norm", **blocks}
    return NameMap(table, frozenset({f"{alias}.weight"} if embedding == "shared" else ()))


_RES_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def vae_names(keys: Collection[str]) -> NameMap:
    """Map of Diffusers' AutoencoderKLWan (Wan2.1 form).

    The official decoder numbers its entries through all levels, so the map depends on how many levels there
    are and on how many residual blocks each has; both are read off the keys.
    """
    places = [re.match(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", key) for key in keys]
    levels = 1 + max((int(place[1]) for place in places if place), default=3)
    blocks = 1 + max((int(place[2]) for place in places if place), default=2)
    table = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    res_blocks = {"encoder.down_blocks.#": "encoder.downsamples.#"}
    for coder in ("encoder", "decoder"):
        ends = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
        table |= {f"{coder}.{theirs}": f"{coder}.{official}" for theirs, official in ends.items()}
        res_blocks |= {f"{coder}.mid_block.resnets.{i}": f"{coder}.middle.{2 * i}" for i in range(2)}
        parts = ("norm", "to_qkv", "proj")
        table |= {f"{coder}.mid_block.attentions.0.{part}": f"{coder}.middle.1.{part}" for part in parts}
    table |= {
        f"encoder.down_blocks.#.{part}": f"encoder.downsamples.#.{part}"
        for part in ("resample.1", "time_conv")
    }
    for level in range(levels):
        up, first = f"decoder.up_blocks.{level}", level * (blocks + 1)
        res_blocks |= {f"{up}.resnets.{i}": f"decoder.upsamples.{first + i}" for i in range(blocks)}
        upsampler = f"decoder.upsamples.{first + blocks}"
        table |= {f"{up}.upsamplers.0.{part}": f"{upsampler}.{part}" for part in ("resample.1", "time_conv")}
    for block, official_block in res_blocks.items():
        table |= {
            f"{block}.{theirs}": f"{official_block}.{official}" for theirs, official in _RES_BLOCK.items()
        }
    return NameMap(table)
