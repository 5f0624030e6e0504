"""Linear layers in fp8: weights quantised while they are loaded, activations by the operation before.

Values are float8_e4m3fn with one fp32 scale a row of the weight and one a token (row-wise scaling): the scale
of a token needs that token alone, so a norm can quantise its own result. Needs compute capability 8.9; on a
CPU the same numbers are multiplied in fp32, which is exact and slow.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chitu_core.ops.rows import FP8, Quantised, Rows, quantise, quantise_rows
from chitu_core.weights import Receiver

LOWEST_CAPABILITY = (8, 9)
ALIGNMENT = 16  # of widths in and out, for the matrix units


class Fp8Linear(Receiver, nn.Module):
    """x W^T + b with W and the rows of x in fp8; the result has the dtype of the bias.

    `uses_fast_accumulation` leaves out the promotion of partial sums to full fp32 registers.
    """

    def __init__(self, in_features: int, out_features: int, uses_fast_accumulation: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=FP8), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)
        self.register_buffer("weight_scales", torch.empty(1, out_features), persistent=False)
        self.uses_fast_accumulation = uses_fast_accumulation

    def receive(self, leaf: str, tensor: Tensor) -> None:
        """Take the weight [N, K], to be quantised row by row, or the bias [N], whose dtype results have."""
        if leaf == "weight":
            tensor, scales = quantise_rows(tensor)
            self.weight_scales = scales.view(1, -1)
        setattr(self, leaf, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Rows) -> Tensor:
        """x [..., K], quantised here if it is not yet, to [..., N]."""
        values, scales = quantise(x) if isinstance(x, Tensor) else x
        flat, weight = values.flatten(0, -2), self.weight
        if values.is_cuda:
            y = torch._scaled_mm(
                flat,
                weight.t(),
                scale_a=scales,
                scale_b=self.weight_scales,
                bias=self.bias,
                out_dtype=self.bias.dtype,
                use_fast_accum=self.uses_fast_accumulation,
            )
        else:
            y = _scaled_product(Quantised(flat, scales), weight, self.weight_scales, self.bias)
        return y.view(*values.shape[:-1], -1)


def _scaled_product(x: Quantised, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    """The definition: products of fp8 values summed in fp32, then both scales, then the bias."""
    product = F.linear(x.values.float(), weight.float())
    return (product * x.scales * weight_scales + bias.float()).to(bias.dtype)
