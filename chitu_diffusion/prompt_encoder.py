"""From prompts to what conditions the transformer: tokens, and embeddings, kept for the next time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from chitu_diffusion.encoders.tokenizer import PromptTokenizer, TokenizedPrompt
from chitu_diffusion.encoders.umt5 import UMT5Encoder
from chitu_diffusion.prompt_cache import PromptCache
from chitu_diffusion.residency import Residency


class PromptEncoder:
    """A text encoder, which may live on the host, its tokenizer, and the embeddings of earlier prompts."""

    def __init__(
        self, tokenizer: PromptTokenizer, encoder: UMT5Encoder, residency: Residency, cache: PromptCache
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self._residency = residency
        self._cache = cache

    def tokenize(self, prompt: str) -> TokenizedPrompt:
        """The prompt's tokens, and how many of them did not fit."""
        return self.tokenizer.encode(prompt)

    def embed(self, tokens: TokenizedPrompt) -> Tensor:
        """Text embeddings [n, dim] of one prompt by itself, without padding, which the transformer adds.

        The encoder must be on the device: `Residency.text`.
        """
        ids = torch.tensor([tokens.ids], device=self._residency.device)
        embeddings: Tensor = self.encoder(ids)[0]
        return embeddings

    def embed_all(self, texts: Mapping[str, TokenizedPrompt]) -> dict[str, Tensor]:
        """Embeddings [n, dim] by the same names, on the device; new texts alone bring the encoder."""
        kept = {name: self._cache.get(tokens.ids) for name, tokens in texts.items()}
        found = {name: known.to(self._residency.device) for name, known in kept.items() if known is not None}
        new = {name: tokens for name, tokens in texts.items() if name not in found}
        if new:
            with self._residency.text():
                found |= {name: self.embed(tokens) for name, tokens in new.items()}
        for name, tokens in new.items():
            self._cache.put(tokens.ids, found[name])
        return found
