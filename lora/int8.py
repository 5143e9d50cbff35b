"""A frozen linear layer in 8 bits, whose weight is rounded so that its outputs for typical inputs change little."""

import torch
from torch import Tensor, nn

from .functional import INT8_UNIT, Frozen, autocast_dtype, int8_linear, linear, without_autocast

DAMPING = 0.01  # this share of the inputs' mean square is added to each input's: hardly active inputs are not relied on
BLOCK = 128  # inputs within which errors are passed on one by one; one matrix product passes them to all others


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is stored as symmetric int8 with a scale for each output row.

        W ≈ scale[:, None] * quantised,    scale = max |W| of the row / 127, in bf16

    Only the weight is quantised: inputs, outputs and products stay in the compute dtype.

    Args:
        layer: the layer to replace. Its weight is not changed; its bias is kept by reference, and frozen.
        inputs: (..., in) inputs of the layer to round the weight for (see `round_for`); default: round to nearest.
    """

    def __init__(self, layer: nn.Linear, inputs: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        wide = layer.weight.detach().float()
        # To bf16 and back: all dtypes compute with the same weight.
        scale = (wide.abs().amax(1) / 127).bfloat16().float().clamp(min=torch.finfo(torch.float32).tiny)
        steps = wide / scale[:, None]
        rounded = steps.round() if inputs is None else round_for(inputs, steps)
        self.register_buffer("quantised", rounded.to(torch.int8).contiguous())  # NCCL sends only such
        self.register_buffer("scale", scale)
        self.bias = layer.bias if layer.bias is None else layer.bias.requires_grad_(False)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight (out, in) in float32, computed at each access."""
        return self.quantised * self.scale[:, None]

    def frozen(self, dtype: torch.dtype) -> Frozen:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Frozen(self.quantised, bias, (self.scale * INT8_UNIT).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        dtype = autocast_dtype(x.device.type) or x.dtype
        return int8_linear(x.to(dtype), self.frozen(dtype))


@torch.no_grad()
@without_autocast  # what runs the model may have autocast on, and rounded moments may not be positive definite
def round_for(inputs: Tensor, weight: Tensor) -> Tensor:
    """Round `weight` (out, in) to integers from -127 to 127 so that the outputs for `inputs` (..., in) change little.

    Let H = xᵀx = L Lᵀ for the inputs x, with L lower triangular. An error e in a row of the weight changes the outputs
    by e H eᵀ = |e L|² in squares, and entry k of e L is L_kk e_k plus the sum of e_j L_jk over j > k. So weights are
    rounded from the last input to the first, each after it has been shifted to offset the errors of those after it:

        rounded_k = round(w_k + sum of e_j L_jk / L_kk over j > k),    e = w - rounded

    This is GPTQ (Frantar et al. 2022, arXiv:2210.17323), in the form of QuIP (Chee et al. 2023, arXiv:2307.13304). The
    weights of the largest inputs are rounded first, so that all others can offset their errors.
    """
    columns = inputs.detach().reshape(-1, inputs.shape[-1]).float().T.contiguous()  # (in, n)
    moments = linear(columns, columns).double()  # (in, in)
    moments.diagonal().add_(DAMPING * moments.diagonal().mean() + torch.finfo(torch.float32).tiny)
    order = moments.diagonal().argsort(stable=True)
    passed = torch.linalg.cholesky(moments[order][:, order])
    passed /= passed.diagonal().clone()
    w = weight.double().T[order]  # (in, out): a row has all weights of one input
    e = torch.zeros_like(w)
    for stop in range(len(w), 0, -BLOCK):
        start = max(0, stop - BLOCK)
        wanted = w[start:stop] + passed[stop:, start:stop].T @ e[stop:]
        for k in reversed(range(start, stop)):
            exact = wanted[k - start] + passed[k + 1 : stop, k] @ e[k + 1 : stop]
            e[k] = w[k] - exact.round().clamp(-127, 127)
    rounded = torch.empty_like(w)
    rounded[order] = (w - e).round()  # exactly the integers subtracted above
    return rounded.T
