"""Random weights and distances for comparisons with an independent implementation."""

import torch
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter a random value of a sensible scale: fresh norms of 1 and tables of 0 hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "scale_shift_table" in name or "modulation" in name:
            value = 0.3 * noise
        elif name.endswith("bias") and "relative_attention" not in name:
            value = 0.05 * noise
        elif "norm" in name or name.endswith("gamma"):
            value = 1 + 0.1 * noise
        elif "relative_attention_bias" in name or "pos_embedding" in name:
            value = 0.5 * noise
        elif "shared" in name or "embed_tokens" in name:
            value = noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data = value.to(parameter.dtype)
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; NaN never passes a bound."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(difference)
