"""Inputs that need not be kept for the backward pass, since what they were made from is kept anyway."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Source(NamedTuple):
    """A tensor as `make(*tensors)`."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]


def source_of(x: Tensor) -> Source | None:
    """How to compute `x` again from what autograd keeps of the GELU or the layer norm that made it, else None.

    In a ViT these are the inputs of the first layer of attention and of both layers of the MLP: six of the sixteen
    token widths that a block would keep.
    """
    if torch.compiler.is_compiling():  # the compiler chooses by itself what to compute again, and sees no `grad_fn`
        return None
    node = x.grad_fn
    if node is None or x._version:  # changed in place since
        return None
    if type(node).__name__ == "GeluBackward0" and not _packed(node._raw_saved_self):
        return Source(partial(F.gelu, approximate=node._saved_approximate), (node._saved_self,))
    if type(node).__name__ == "NativeLayerNormBackward0" and not _packed(node._raw_saved_input):
        kept = ("input", "result1", "result2", "weight", "bias")
        return Source(normalize, tuple(getattr(node, f"_saved_{name}") for name in kept))
    return None


def _packed(saved) -> bool:
    """Whether hooks keep a saved tensor, as in a checkpointed block: to unpack it now would compute that block anew."""
    return saved.unpack_hook is not None


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer norm with the statistics (..., 1) that its first computation found; `rstd` is 1 / sqrt(variance + eps)."""
    y = (x - mean).mul_(rstd)
    if weight is None:
        return y
    return y.mul_(weight) if bias is None else torch.addcmul(bias, y, weight)
