"""Linear layers that do not train, and the weights that they keep ready to compute with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import Frozen, autocast_dtype, linear, needs_gradient, pack

SMALL = 2**25  # up to so many multiplications, oneDNN costs an fp32 product more than it saves, on a machine with AMX


class Prepared:
    """A layer that may keep, beside its given weight, a copy in the dtype and layout that it computes in."""

    prepared: Frozen | None = None

    def __getstate__(self) -> dict:
        # oneDNN's layout cannot be copied: a copy has to be prepared anew.
        return super().__getstate__() | {"prepared": None}

    def _apply(self, *args, **kwargs):
        self.prepared = None  # the layer was moved or cast
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self.prepared = None
        super()._load_from_state_dict(*args, **kwargs)


class FrozenLinear(Prepared, nn.Linear):
    """An `nn.Linear` that does not train: the same output, computed faster on a CPU (see `linear`)."""

    @torch.no_grad()
    def keep_base_in(self, dtype: torch.dtype) -> None:
        """As `LoRALayer.keep_base_in`, for inference."""
        self.prepared = pack(cast(self, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        dtype = autocast_dtype(x.device.type) or x.dtype
        if not serves(self.prepared, dtype) or needs_gradient(x, self.weight, self.bias):
            return linear(x, self.weight, self.bias)
        if dtype is self.weight.dtype is torch.float32 and x.numel() * self.out_features <= SMALL:
            return F.linear(x, self.weight, self.bias)
        return linear(x.to(dtype), self.prepared.weight, self.prepared.bias)


def cast(layer: nn.Linear, dtype: torch.dtype) -> Frozen:
    """The weight and bias of a frozen layer, in `dtype`."""
    return Frozen(layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))


def serves(prepared: Frozen | None, dtype: torch.dtype) -> bool:
    """Whether `prepared`, which `keep_base_in` may have made, can be used to compute in `dtype`."""
    # The compiler cannot read oneDNN's layout, and it fuses the cast into other operations.
    return not torch.compiler.is_compiling() and prepared is not None and prepared.weight.dtype == dtype
