"""Linear layers of which nothing trains, and what they keep to compute with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import Frozen, autocast_dtype, linear, needs_gradient, pack

SMALL = 2**25  # multiplications of a product in fp32 up to which oneDNN costs more than it saves, on a machine with AMX


class Prepared:
    """A layer that may keep what it computes with beside the weight that it was given."""

    kept: Frozen | None = None

    def __getstate__(self) -> dict:
        # oneDNN's layout cannot be copied: a copy has to be prepared anew.
        return super().__getstate__() | {"kept": None}

    def _apply(self, *args, **kwargs):
        self.kept = None  # moved, or of another dtype
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self.kept = None
        super()._load_from_state_dict(*args, **kwargs)


class FrozenLinear(Prepared, nn.Linear):
    """`nn.Linear` where nothing trains: the same numbers, on a CPU sooner (see `linear`)."""

    @torch.no_grad()
    def keep_base_in(self, dtype: torch.dtype) -> None:
        """As `LoRALayer.keep_base_in`, for inference."""
        self.kept = pack(cast(self, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        kept = None if torch.compiler.is_compiling() else self.kept
        wide = kept and kept.weight.dtype is self.weight.dtype is torch.float32
        if wide and x.numel() * self.out_features <= SMALL:
            return F.linear(x, self.weight, self.bias)
        if kept and not needs_gradient(x, self.weight, self.bias):
            dtype = autocast_dtype(x.device.type) or x.dtype
            if serves(kept, dtype):
                return linear(x.to(dtype), kept.weight, kept.bias)
        return linear(x, self.weight, self.bias)


def cast(layer: nn.Linear, dtype: torch.dtype) -> Frozen:
    """What a frozen layer computes with, in `dtype`."""
    return Frozen(layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))


def serves(kept: Frozen | None, dtype: torch.dtype) -> bool:
    """Whether what `keep_base_in` made, if anything, can be computed with in `dtype`."""
    # The compiler knows no layout of oneDNN's, and casts beside other work.
    return not torch.compiler.is_compiling() and kept is not None and kept.weight.dtype == dtype
