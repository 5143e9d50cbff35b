"""A frozen linear layer in 8 bits, its weight rounded for the inputs that the layer is going to see."""

import torch
from torch import Tensor, nn

from .functional import INT8_UNIT, Frozen, autocast_dtype, int8_linear, linear

DAMPING = 0.01  # of the mean square of an input, added to each: inputs that were hardly seen are not relied on
BLOCK = 128  # inputs whose errors are passed on one by one; to all others they go as one matrix product


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is kept as int8, symmetric, with a scale for each output row.

        W ≈ scale[:, None] * quantised,    scale = max |W| of the row / 127

    Only the weight is quantised: inputs, outputs and products stay in the dtype that is computed in.

    Args:
        layer: the layer to replace. Its weight is not changed; its bias is kept by reference, and frozen.
        inputs: (..., in) that it has seen, for which to round; default: each weight to the nearest.
    """

    def __init__(self, layer: nn.Linear, inputs: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        wide = layer.weight.detach().float()
        scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        steps = wide / scale[:, None]
        rounded = steps.round() if inputs is None else round_for(inputs, steps)
        self.register_buffer("quantised", rounded.to(torch.int8).contiguous())  # NCCL sends no other
        self.register_buffer("scale", scale)
        self.bias = layer.bias if layer.bias is None else layer.bias.requires_grad_(False)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight that is computed with, widened anew at each call: (out, in), float32."""
        return self.quantised * self.scale[:, None]

    def frozen(self, dtype: torch.dtype) -> Frozen:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Frozen(self.quantised, bias, (self.scale * INT8_UNIT).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        dtype = autocast_dtype(x.device.type) or x.dtype
        return int8_linear(x.to(dtype), self.frozen(dtype))


@torch.no_grad()
def round_for(inputs: Tensor, weight: Tensor) -> Tensor:
    """Whole numbers from -127 to 127 near `weight` (out, in), such that outputs for `inputs` (..., in) change little.

    With H = xᵀx of the inputs = L Lᵀ, L lower triangular, an error e of a row of the weight changes the outputs by a
    sum of squares e H eᵀ = |e L|², and entry k of e L is L_kk e_k + (what the errors behind k give). So from the last
    input to the first, each weight is rounded after it has made up for the errors behind it:

        rounded_k = round(w_k + sum of e_j L_jk / L_kk over j > k),    e = w - rounded

    It is GPTQ (Frantar et al. 2022, arXiv:2210.17323), put as in QuIP (Chee et al. 2023, arXiv:2307.13304). The largest
    inputs come first, whose errors all others can make up for.
    """
    columns = inputs.detach().reshape(-1, inputs.shape[-1]).float().T.contiguous()  # (in, n)
    moments = linear(columns, columns).double()  # (in, in)
    moments.diagonal().add_(DAMPING * moments.diagonal().mean() + torch.finfo(torch.float32).tiny)
    order = moments.diagonal().argsort(stable=True)
    passed = torch.linalg.cholesky(moments[order][:, order])
    passed /= passed.diagonal().clone()
    w = weight.double().T[order]  # (in, out): the weights of an input lie together
    e = torch.zeros_like(w)
    for stop in range(len(w), 0, -BLOCK):
        start = max(0, stop - BLOCK)
        wanted = w[start:stop] + passed[stop:, start:stop].T @ e[stop:]
        for k in reversed(range(start, stop)):
            exact = wanted[k - start] + passed[k + 1 : stop, k] @ e[k + 1 : stop]
            e[k] = w[k] - exact.round().clamp(-127, 127)
    rounded = torch.empty_like(w)
    rounded[order] = (w - e).round()  # what was subtracted, to the bit
    return rounded.T
