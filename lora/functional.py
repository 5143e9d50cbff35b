"""The arithmetic of a LoRA layer: an exact gradient that computes and keeps only what LoRA needs.

Plain autograd over `base(x) + scaling * (dropout(x) @ A.T) @ B.T` gives the same numbers. But in the forward and in
the backward pass it makes a full-size tensor for the update and another for its sum with the base.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import draw_dropped, draw_marks, hide, zeroed
from .recompute import source_of

# On a CPU whose widest instruction set is AVX2, torch's own choice, MKL, is faster (`benchmarks/packed_products.py`).
AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not AVX2
ONEDNN_BF16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
INT8_UNIT = 128  # products take an int8 weight q as q / 128: sums of q itself would overflow fp16


def without_autocast(function):
    """Decorate a function that computes in the dtypes of its arguments. Each call has contexts of its own: those of a
    function decorated with `torch.autocast` keep their state on one object, for all threads."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


class Frozen(NamedTuple):
    """The weight (out, in) and bias (out,) of a frozen linear layer. An int8 weight also has a scale (out,): the value
    of `INT8_UNIT` steps in each of its rows.

    Gradients are computed with `transposed` (in, out) if `pack` made it, else with `weight.T`.
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
        dropout: probability that an element of `x` is hidden from the update; the base always sees all of `x`.

    Returns:
        (..., out), in the dtype of `base`. Gradients come back in each input's own dtype.
    """
    # autocast does not cast what an autograd Function is given. Casting A and B here lets autograd cast their gradients
    # back.
    dtype = base.weight.dtype if base.scale is None else base.scale.dtype
    if dropout:
        lora_A = lora_A / (1 - dropout)  # dropout's factor costs a pass over the small A instead of one over x
    rows, lora_B = x.reshape(-1, x.shape[-1]).contiguous(), scaled_B.to(dtype)
    if torch.compiler.is_compiling():
        weight = base.weight if base.scale is None else _widened(base.weight, dtype) * base.scale[:, None]
        y = _ForCompiler.apply(rows, lora_A.to(dtype), lora_B, weight, base.bias, dropout)
    else:
        dropped = draw_dropped(x.numel(), dropout, x.device) if dropout else None
        y = _LoRALinearFunction.apply(rows, lora_A.to(dtype), lora_B, base, dropped, source_of(x))
    return y.view(*x.shape[:-1], y.shape[-1])


class _LoRALinearFunction(torch.autograd.Function):
    """With drop(·) for dropout, whose factor 1 / (1 - p) is in A already, and dh for the gradient of h:

    h  = drop(x) Aᵀ (n, rank),    y  = x Wᵀ + b + h Bᵀ
    dh = dy B,    dA = dhᵀ drop(x),    dB = dyᵀ h,    dx = dy W + drop(dh A)

    For dA it keeps the tensors that `source` makes x from again, if there is one; else, if x was cast, the cast, whose
    dropped elements are zero already; else x itself, which another operation may keep too. The base is kept by
    reference: nothing may change it between forward and backward, which autograd would notice and this does not.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, lora_A, lora_B, base, dropped, source):
        cast = x.to(lora_A.dtype)
        y = frozen_linear(cast, base)  # (n, out)
        h = linear(zeroed(cast, dropped, own=cast is not x), lora_A)  # (n, rank)
        y.addmm_(h, lora_B.T)  # into y: the update never exists as a tensor of its own
        ctx.base, ctx.x_dtype = base, x.dtype
        ctx.make, saved = source or (None, (cast,))
        ctx.save_for_backward(h, dropped, lora_A, lora_B, *saved)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast  # compute in the dtype of forward, even if backward runs under autocast
    def backward(ctx, dy):
        h, dropped, lora_A, lora_B, *saved = ctx.saved_tensors
        needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
        dx = dA = dB = None
        if needs_x or needs_A:
            dh = linear(dy, lora_B.T)
        if needs_A:
            x = ctx.make(*saved).to(dh.dtype).reshape(-1, lora_A.shape[1]).contiguous() if ctx.make else saved[0]
            if ctx.make or ctx.x_dtype == dh.dtype:  # else x is forward's cast, zeroed already
                x = zeroed(x, dropped, own=ctx.make is not None)
            dA = dh.T @ x
        if needs_x:
            dx = zeroed(dh @ lora_A, dropped)
            dx = add_frozen_gradient(dx, dy, ctx.base).to(ctx.x_dtype)
        if needs_B:
            dB = (h.T @ dy).T  # dyᵀ h, but in a third less time on a CPU where out is large
        return dx, dA, dB, None, None, None


class _ForCompiler(torch.autograd.Function):
    """The same for torch.compile, which fuses all operations between two matrix products. So it has few products:

    y = [x h] [W B]ᵀ + b,    [dx₀ dh] = dy [W B],    dx = dx₀ + drop(dh A)

    The compiler chooses which tensors to keep. Plain autograd would compute dW along with dB. Forward changes nothing
    in place: torch 2.11 compiles the gradient of an output that was changed there to zero.
    """

    @staticmethod
    @without_autocast
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
    @without_autocast
    def backward(ctx, dy):
        seen, h, lora_A, joined, *marks = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            dx, dh = (dy @ joined).split([lora_A.shape[1], lora_A.shape[0]], dim=1)
            dx = (dx + hide(dh @ lora_A, marks, ctx.dropout)).to(ctx.x_dtype)
        else:
            dx, dh = None, dy @ joined[:, lora_A.shape[1] :]
        return dx, dh.T @ seen, (h.T @ dy).T, None, None, None  # the compiler omits gradients that are not needed


def frozen_linear(x: Tensor, base: Frozen) -> Tensor:
    """x Wᵀ + b. An int8 weight is widened for this product only; the scales of its rows multiply the output, not W."""
    weight, bias, scale, _ = base
    if scale is None:
        return linear(x, weight, bias)
    y = linear(x, _widened(weight, x.dtype)).mul_(scale)
    return y if bias is None else y.add_(bias)


class _Int8LinearFunction(torch.autograd.Function):
    """`frozen_linear` with an int8 weight: backward widens the weight again, so that no widened copy is kept."""

    @staticmethod
    def forward(ctx, x, base):
        ctx.base = base
        return frozen_linear(x, base)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        return add_frozen_gradient(None, dy, ctx.base), None


def int8_linear(x: Tensor, base: Frozen) -> Tensor:
    """x Wᵀ + b with an int8 weight; only x gets a gradient."""
    return frozen_linear(x, base) if torch.compiler.is_compiling() else _Int8LinearFunction.apply(x, base)


def add_frozen_gradient(dx: Tensor | None, dy: Tensor, base: Frozen) -> Tensor:
    """dx + dy W, where dy W is the gradient of `frozen_linear`'s input; it may overwrite `dx`. Without `dx`, dy W."""
    weight, _, scale, transposed = base
    if scale is not None:
        return linear(dy * scale, _widened(weight, dy.dtype).T, onto=dx)
    return linear(dy, weight.T if transposed is None else transposed, onto=dx)


def _widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert an int8 weight to `dtype` without rounding, in units of `INT8_UNIT` steps."""
    return weight.to(dtype).div_(INT8_UNIT)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """x Wᵀ + b; or, if `onto` (n, out) is given, onto + x Wᵀ, which may overwrite `onto`.

    On a CPU with more than AVX2, it calls oneDNN directly where no gradient is needed. In fp32, torch itself would call
    MKL, which reaches half the speed of some AMD processors. In bf16, torch would call oneDNN too, but write the bias
    into every row first and add the product to that.
    """
    if weight.is_mkldnn or _fits_onednn(x, weight, bias):
        if onto is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        if weight.is_mkldnn or x.dtype is torch.float32:  # in bf16 `addmm_` calls oneDNN too
            return torch.ops.mkldnn._linear_pointwise.binary(x, onto, weight, None, "add")
    return F.linear(x, weight, bias) if onto is None else onto.addmm_(x, weight.T)


def pack(base: Frozen, for_gradients: bool = False) -> Frozen:
    """The same layer with its weight in the layout that oneDNN computes in, if `linear` would call oneDNN.

    Each product converts a plain weight to that layout again (`benchmarks/packed_products.py`: this takes 4 to 13 % of
    the product's time in bf16, at 1,576 rows). A weight that never changes can stay in that layout.

    Args:
        for_gradients: also keep the transposed weight in that layout, as a second copy.
    """
    if not _has_onednn(base.weight):
        return base
    reorder, weight = torch.ops.mkldnn._reorder_linear_weight, base.weight
    return base._replace(weight=reorder(weight), transposed=reorder(weight.T.contiguous()) if for_gradients else None)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on this type of device; None if autocast is off."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd must record what is computed from these tensors; it does not record direct oneDNN calls."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _has_onednn(x: Tensor) -> bool:
    narrow = ONEDNN_BF16 and x.dtype is torch.bfloat16
    return (ONEDNN if x.dtype is torch.float32 else narrow) and x.device.type == "cpu"


def _fits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    # The cheapest checks come first: at batch 1 a microsecond shows.
    return (
        x.dtype is weight.dtype
        and _has_onednn(x)
        and not needs_gradient(x, weight, bias)
        and autocast_dtype("cpu") in (None, x.dtype)  # else autocast casts first
        and not torch.compiler.is_compiling()  # the compiler chooses its own kernels
    )
