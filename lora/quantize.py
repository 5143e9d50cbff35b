"""A frozen base in 8 bits: a quarter of its memory, for training; merging is done onto the original weights."""

import torch
from torch import Tensor, nn

from .functional import Frozen, frozen_linear


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is kept as int8, symmetric, with a scale for each output row.

        W ≈ scale[:, None] * quantised,    scale = max |W| of the row / 127

    Only the weight is quantised: inputs, outputs and products stay in the dtype that is computed in.

    Args:
        linear: the layer to replace.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        wide = linear.weight.detach().float()
        scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("quantised", (wide / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias if linear.bias is None else linear.bias.requires_grad_(False)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight that is computed with, widened anew at each call: (out, in), float32."""
        return self.quantised * self.scale[:, None]

    def frozen(self, dtype: torch.dtype) -> Frozen:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Frozen(self.quantised, bias, self.scale.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return frozen_linear(x, self.frozen(x.dtype))


def quantize_base(model: nn.Module) -> nn.Module:
    """Quantise every frozen linear layer of `model`, in place, LoRA on it or not; returns `model`."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not any(p.requires_grad for p in module.parameters()):
            model.set_submodule(path, Int8Linear(module))
    return model
