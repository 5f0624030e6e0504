"""Attention backends: one file each, chosen by `infer.attn_type`.

`auto` is the only name that may choose; a named backend that cannot run is an error.
"""

import logging

from chitu_core import plugins
from chitu_core.attention._base import Attention

logger = logging.getLogger(__name__)

ALIASES = {"sdpa": "torch_sdpa", "torch": "torch_sdpa"}
AUTO = "torch_sdpa"  # exact on every device; on CUDA torch itself picks a kernel for it

__all__ = ["ALIASES", "AUTO", "Attention", "build"]


def build(attn_type: str) -> Attention:
    """The backend that `infer.attn_type` names. Raises ValueError, with the known names, for any other."""
    name = AUTO if attn_type == "auto" else ALIASES.get(attn_type, attn_type)
    attention: Attention = plugins.load("chitu_core.attention", name, "Backend", "infer.attn_type")()
    logger.info("self-attention: %s (infer.attn_type=%s)", name, attn_type)
    return attention
