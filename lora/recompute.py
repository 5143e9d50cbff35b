"""Inputs that backward can recompute instead of keeping, because what they were made from is kept anyway."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def source_of(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor | None, ...]] | None:
    """How to compute `x` again from what autograd keeps for the GELU or layer norm that made it: `make` and `tensors`,
    where `make(*tensors)` is x. None if neither made it, or if autograd has let go of it.

    In a ViT this saves the inputs of the attention's first layer and of both MLP layers: six of the sixteen embedding
    widths per token that a block would keep.
    """
    # The compiler decides itself what to recompute, and sees no `grad_fn`.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    node = x.grad_fn
    if node is None or x._version:  # changed in place since
        return None
    try:
        if type(node).__name__ == "GeluBackward0" and not _packed(node._raw_saved_self):
            return partial(F.gelu, approximate=node._saved_approximate), (node._saved_self,)
        if type(node).__name__ == "NativeLayerNormBackward0" and not _packed(node._raw_saved_input):
            names = ("input", "result1", "result2", "weight", "bias")
            return normalize, tuple(getattr(node, f"_saved_{name}") for name in names)
    except RuntimeError:  # a backward pass through `x` has freed them already
        return None
    return None


def _packed(saved) -> bool:
    """Whether hooks hold a saved tensor, as in a checkpointed block: unpacking it now would recompute that block."""
    return saved.unpack_hook is not None


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer norm with the statistics (..., 1) of the forward pass; `rstd` is 1 / sqrt(variance + eps)."""
    y = (x - mean).mul_(rstd)
    if weight is None:
        return y
    return y.mul_(weight) if bias is None else torch.addcmul(bias, y, weight)
