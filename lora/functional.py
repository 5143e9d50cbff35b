"""The arithmetic of a LoRA layer: an exact gradient that computes and keeps only what LoRA needs.

Plain autograd over `base(x) + scaling * (dropout(x) @ A.T) @ B.T` gives the same numbers, but it makes a full-size
tensor for the update and another for its sum with the base, in both directions, and passes over each of them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import draw_dropped, draw_marks, hide, zeroed
from .recompute import source_of

# Where AVX2 is all that a CPU has MKL, which torch takes by itself, is the sooner (`benchmarks/packed_products.py`).
AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not AVX2
ONEDNN_BF16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
INT8_UNIT = 128  # steps of an int8 weight: sums of products with whole steps would soon be too large for fp16


class Frozen(NamedTuple):
    """The weight (out, in) and bias (out,) of a frozen linear layer; an int8 weight has a scale (out,) for its rows,
    which is what `INT8_UNIT` steps of it are worth.

    `transposed` (in, out) is what gradients are taken with where `pack` made it; else they take `weight.T`.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    transposed: Tensor | None = None


def lora_linear(
    x: Tensor,
    base: Frozen,
    lora_A: Tensor,
    scaled_B: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Frozen linear layer plus a low-rank update.

        y = W x + b + scaled_B A dropout(x)

    Args:
        x: (..., in).
        base: W and b, in the dtype to compute in; they get no gradient.
        lora_A: (rank, in).
        scaled_B: (out, rank), with the LoRA scaling already in it.
        dropout: probability that an element of `x` is hidden from the updates; the base always sees all of `x`.

    Returns:
        (..., out), in the dtype of `base`. Gradients come back in each input's own dtype.
    """
    # autograd Functions are opaque to autocast. Casting A and B out here lets autograd cast their gradients back.
    dtype = base.weight.dtype if base.scale is None else base.scale.dtype
    if dropout:
        lora_A = lora_A / (1 - dropout)  # the keep-scale of dropout costs a pass over small A instead of one over x
    rows, lora_B = x.reshape(-1, x.shape[-1]).contiguous(), scaled_B.to(dtype)
    if torch.compiler.is_compiling():
        weight = base.weight if base.scale is None else _widened(base.weight, dtype) * base.scale[:, None]
        y = _ForCompiler.apply(rows, lora_A.to(dtype), lora_B, weight, base.bias, dropout)
    else:
        dropped = draw_dropped(x.numel(), dropout, x.device) if dropout else None
        y = _LoRALinearFunction.apply(rows, lora_A.to(dtype), lora_B, base, dropped, source_of(x))
    return y.view(*x.shape[:-1], y.shape[-1])


class _LoRALinearFunction(torch.autograd.Function):
    """With d(·) zeroing the dropped elements and h = d(x) Aᵀ (n, rank):

    y  = x Wᵀ + b + h Bᵀ
    dh = dy B,    dA = dhᵀ d(x),    dB = dyᵀ h,    dx = dy W + d(dh A)

    Of its input it keeps what `source` makes it from, else x, which another operation may keep too; or its own cast of
    x, in which the dropped elements are 0 already. The base never changes, so it is kept as it is.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, base, dropped, source):
        cast = x.to(lora_A.dtype)
        y = frozen_linear(cast, base)  # (n, out)
        h = linear(zeroed(cast, dropped, own=cast is not x), lora_A)  # (n, rank)
        y.addmm_(h, lora_B.T)  # into y: the update never exists as a tensor of its own
        ctx.base, ctx.x_dtype = base, x.dtype
        ctx.make, kept = source or (None, (cast,))
        ctx.save_for_backward(h, dropped, lora_A, lora_B, *kept)
        return y

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)  # all is in the dtype of forward, whatever backward is called in
    @torch.autocast("cuda", enabled=False)
    def backward(ctx, dy):
        h, dropped, lora_A, lora_B, *kept = ctx.saved_tensors
        needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
        dx = dA = dB = None
        if needs_x or needs_A:
            dh = linear(dy, lora_B.T)
        if needs_A:
            x = ctx.make(*kept).to(dh.dtype).reshape(-1, lora_A.shape[1]).contiguous() if ctx.make else kept[0]
            if ctx.make or ctx.x_dtype == dh.dtype:  # in a cast of its own they are hidden already
                x = zeroed(x, dropped, own=ctx.make is not None)
            dA = dh.T @ x
        if needs_x:
            dx = zeroed(dh @ lora_A, dropped)
            dx = add_frozen_gradient(dx, dy, ctx.base).to(ctx.x_dtype)
        if needs_B:
            dB = (h.T @ dy).T  # so rather than dyᵀ h: a third sooner on a CPU where out is large
        return dx, dA, dB, None, None, None


class _ForCompiler(torch.autograd.Function):
    """The same for torch.compile, which makes one pass of all that lies between two products. So products are few:

    y = [x h] [W B]ᵀ + b,    [dx₀ dh] = dy [W B],    dx = dx₀ + d(dh A)

    What of this is kept the compiler chooses. Plain autograd would compute dW with dB. Nothing is changed in place:
    where a Function's output is, torch 2.11 compiles its gradient to zero.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, weight, bias, dropout):
        ctx.x_dtype, ctx.dropout = x.dtype, dropout
        x = x.to(weight.dtype)
        marks = draw_marks(x) if dropout else (None, None)
        seen = hide(x, marks, dropout)
        h = seen @ lora_A.T  # (n, rank)
        joined = torch.cat([weight, lora_B], dim=1)  # (out, in + rank)
        ctx.save_for_backward(seen, h, lora_A, joined, *marks)
        return F.linear(torch.cat([x, h], dim=1), joined, bias)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def backward(ctx, dy):
        seen, h, lora_A, joined, *marks = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            dx, dh = (dy @ joined).split([lora_A.shape[1], lora_A.shape[0]], dim=1)
            dx = (dx + hide(dh @ lora_A, marks, ctx.dropout)).to(ctx.x_dtype)
        else:
            dx, dh = None, dy @ joined[:, lora_A.shape[1] :]
        return dx, dh.T @ seen, (h.T @ dy).T, None, None, None  # what nobody asked for of these the compiler leaves out


def frozen_linear(x: Tensor, base: Frozen) -> Tensor:
    """x Wᵀ + b. An int8 weight is widened for this product alone; its rows' scales multiply the outputs, not W."""
    weight, bias, scale, _ = base
    if scale is None:
        return linear(x, weight, bias)
    y = linear(x, _widened(weight, x.dtype)).mul_(scale)
    return y if bias is None else y.add_(bias)


class _Int8LinearFunction(torch.autograd.Function):
    """`frozen_linear` of an int8 weight, which is widened once more for the gradient instead of being kept so."""

    @staticmethod
    def forward(ctx, x, base):
        ctx.base = base
        return frozen_linear(x, base)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def backward(ctx, dy):
        return add_frozen_gradient(None, dy, ctx.base), None


def int8_linear(x: Tensor, base: Frozen) -> Tensor:
    """x Wᵀ + b by an int8 weight, with a gradient for x alone."""
    return frozen_linear(x, base) if torch.compiler.is_compiling() else _Int8LinearFunction.apply(x, base)


def add_frozen_gradient(dx: Tensor | None, dy: Tensor, base: Frozen) -> Tensor:
    """dx + dy W, perhaps in place: what `frozen_linear` adds to the gradient of its input; without `dx`, dy W."""
    weight, _, scale, transposed = base
    if scale is not None:
        return linear(dy * scale, _widened(weight, dy.dtype).T, onto=dx)
    return linear(dy, weight.T if transposed is None else transposed, onto=dx)


def _widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """An int8 weight in `dtype`, exactly, in units of `INT8_UNIT` steps."""
    return weight.to(dtype).div_(INT8_UNIT)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, or where `onto` (n, out) is given, its sum with x Wᵀ, perhaps in place.

    On a CPU with more than AVX2, where no gradient is asked for, oneDNN is called by name. In fp32 torch would take
    MKL, which uses half of what some AMD processors can do. In bf16 it would take oneDNN too, but have the bias written
    into every row first and the product added to that.
    """
    if weight.is_mkldnn or _fits_onednn(x, weight, bias):
        if onto is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        if weight.is_mkldnn or x.dtype is torch.float32:  # in bf16 `addmm_` is oneDNN's as well
            return torch.ops.mkldnn._linear_pointwise.binary(x, onto, weight, None, "add")
    return F.linear(x, weight, bias) if onto is None else onto.addmm_(x, weight.T)


def pack(base: Frozen, for_gradients: bool = False) -> Frozen:
    """The same layer with its weight in the layout that oneDNN computes in, if `linear` would turn to oneDNN.

    A plain weight is brought into that layout anew by each product (`benchmarks/packed_products.py`: 4 to 13 % of its
    time in bf16, at 1,576 rows). One that never changes can stay in it.

    Args:
        for_gradients: the transpose too, a second copy.
    """
    if not _has_onednn(base.weight):
        return base
    reorder, weight = torch.ops.mkldnn._reorder_linear_weight, base.weight
    return base._replace(weight=reorder(weight), transposed=reorder(weight.T.contiguous()) if for_gradients else None)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on this type of device; None where it is off."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to know of what is computed from these, which it does not of oneDNN called by name."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _has_onednn(x: Tensor) -> bool:
    narrow = ONEDNN_BF16 and x.dtype is torch.bfloat16
    return (ONEDNN if x.dtype is torch.float32 else narrow) and x.device.type == "cpu"


def _fits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    # The cheapest questions first: at batch 1 a microsecond shows.
    return (
        x.dtype is weight.dtype
        and _has_onednn(x)
        and not needs_gradient(x, weight, bias)
        and autocast_dtype("cpu") in (None, x.dtype)  # else it casts first
        and not torch.compiler.is_compiling()  # the compiler chooses by itself
    )
