"""The arithmetic of a LoRA layer: cheap dropout, and an exact gradient that computes and keeps only what LoRA needs.

Plain autograd over `base(x) + scaling * (dropout(x) @ A.T) @ B.T` gives the same numbers, but it makes a full-size
tensor for the update and another for its sum with the base, in both directions, and passes over each of them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        h = linear(_zeroed(cast, dropped, own=cast is not x), lora_A)  # (n, rank)
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
                x = _zeroed(x, dropped, own=ctx.make is not None)
            dA = dh.T @ x
        if needs_x:
            dx = _zeroed(dh @ lora_A, dropped)
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
        and (not torch.is_autocast_enabled("cpu") or x.dtype is torch.get_autocast_dtype("cpu"))  # else it casts first
        and not torch.compiler.is_compiling()  # the compiler chooses by itself
    )


def draw_dropped(numel: int, p: float, device: torch.device) -> Tensor:
    """Which of `numel` elements dropout drops, each on its own with probability `p`, from the default generator.

    Off the CPU a boolean mask (numel,). On the CPU, where drawing a number per element would take a fifth of a training
    step, the positions of the dropped elements: the gap from one to the next is geometric, `1 + floor(log(u) /
    log(1 - p))` for uniform u, so only about `p * numel` numbers are drawn, and about `4 p` bytes per element are kept.
    """
    if device.type != "cpu":  # how many are dropped would be a number to wait for
        return torch.empty(numel, dtype=torch.bool, device=device).bernoulli_(p)
    # Six standard deviations over the expected count: too few about once in 10⁹ draws, and then only a tail is kept.
    count = min(numel, math.ceil(numel * p + 6 * math.sqrt(numel * p)) + 8)
    # A word of 64 bits is two numbers of 31, which takes a third of the time of `torch.rand`.
    words = torch.empty((count + 1) // 2, dtype=torch.int64).random_(-(2**63), None)
    u = words.view(torch.int32).bitwise_and_(2**31 - 1).float().add_(0.5).mul_(2**-31)  # above 0, so log(u) is finite
    gaps = u.log_().div_(math.log1p(-p)).add_(1)
    positions = gaps.cumsum(0, dtype=torch.int64).sub_(1)  # of whole numbers: the cast comes first
    positions = positions[: int(torch.searchsorted(positions, numel))]
    return positions.to(torch.int32 if numel < 2**31 else torch.int64)


def _zeroed(x: Tensor, dropped: Tensor | None, own: bool = True) -> Tensor:
    """Contiguous `x` with zeros where `draw_dropped` chose, in place if it is the caller's `own`; None is nothing."""
    if dropped is None:
        return x
    if dropped.dtype == torch.bool:
        return x.masked_fill_(dropped.view_as(x), 0) if own else torch.where(dropped.view_as(x), 0, x)
    x = x if own else x.clone()
    x.view(-1).index_fill_(0, dropped.long(), 0)
    return x


def draw_marks(x: Tensor) -> tuple[Tensor, Tensor]:
    """For `hide`: a number for each row (n,) and one for each column (in,) of `x`, from the default generator."""
    rows, columns = (torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32, device=x.device) for n in x.shape)
    return rows, columns


def hide(x: Tensor, marks: Sequence[Tensor | None], p: float) -> Tensor:
    """(n, in) -> the same with zeros, each element on its own with probability `p`; by the same marks the same ones.

    For torch.compile, which makes this a part of the pass that `x` comes from. Which elements are dropped is neither
    drawn one by one, which would take longer than to write them, nor kept: it is a hash of their row's and column's
    marks.
    """
    rows, columns = marks
    if rows is None:
        return x
    even = _hash(rows[:, None] ^ columns)  # of numbers without a pattern, so one round is enough
    return torch.where(even < round(p * 2**32) - 2**31, 0, x)


def _hash(z: Tensor) -> Tensor:
    """int32 -> int32, such that each bit of the input flips each bit of the output about half the time: "lowbias32"
    (Wellons 2018, nullprogram.com/blog/2018/07/31). `>>` copies the sign, which is masked."""
    z = (z ^ ((z >> 16) & 0xFFFF)) * 0x7FEB352D
    z = (z ^ ((z >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return z ^ ((z >> 16) & 0xFFFF)
