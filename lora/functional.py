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

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
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
    rows: Sequence[slice],
    scaled_B: Sequence[Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """Frozen linear layer plus low-rank updates of some of its output rows.

        y = W x + b;    y[rows_k] += scaled_B_k A_k dropout(x)    for each k

    Args:
        x: (..., in).
        base: W and b, in the dtype to compute in; they get no gradient.
        lora_A: (sum of ranks, in), the A_k stacked, so that all of them are one matrix product.
        rows: for each k the output rows that it updates.
        scaled_B: for each k (rows, rank), with the LoRA scaling already in it.
        dropout: probability that an element of `x` is hidden from the updates; the base always sees all of `x`.

    Returns:
        (..., out), in the dtype of `base`. Gradients come back in each input's own dtype.
    """
    dropped = None
    if dropout:
        dropped = draw_dropped(x.numel(), dropout, x.device)
        lora_A = lora_A / (1 - dropout)  # the keep-scale of dropout costs a pass over small A instead of one over x
    # autograd Functions are opaque to autocast. Casting A and B out here lets autograd cast their gradients back.
    dtype = base.weight.dtype if base.scale is None else base.scale.dtype
    y = _LoRALinearFunction.apply(
        x.reshape(-1, x.shape[-1]).contiguous(),
        lora_A.to(dtype),
        base,
        rows,
        dropped,
        source_of(x),
        *(B.to(dtype) for B in scaled_B),
    )
    return y.view(*x.shape[:-1], y.shape[-1])


class _LoRALinearFunction(torch.autograd.Function):
    """With d(·) zeroing the dropped elements, h = d(x) Aᵀ (n, ranks), and one row block for brevity:

    y  = x Wᵀ + b + h Bᵀ
    dh = dy B,    dA = dhᵀ d(x),    dB = dyᵀ h,    dx = dy W + d(dh A)

    Of its input it keeps what `source` makes it from, else x, which another operation may keep too; or its own cast of
    x, in which the dropped elements are 0 already. The base never changes, so it is kept as it is.
    """

    @staticmethod
    def forward(ctx, x, lora_A, base, rows, dropped, source, *lora_B):
        cast = x.to(lora_A.dtype)
        y = frozen_linear(cast, base)  # (n, out)
        own = cast if cast is not x or dropped is None else x.clone()
        h = linear(_zero_(own, dropped), lora_A)  # (n, sum of ranks)
        for block, h_k, B_k in zip(rows, _parts(h, lora_B), lora_B, strict=True):
            y[:, block].addmm_(h_k, B_k.T)  # into y: the update never exists as a tensor of its own
        ctx.base, ctx.rows, ctx.x_dtype = base, rows, x.dtype
        ctx.make, kept = source or (torch.clone, (cast,))
        ctx.save_for_backward(h, dropped, lora_A, *lora_B, *kept)
        return y

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)  # all is in the dtype of forward, whatever backward is called in
    @torch.autocast("cuda", enabled=False)
    def backward(ctx, dy):
        h, dropped, lora_A, *rest = ctx.saved_tensors
        lora_B, kept = rest[: len(ctx.rows)], rest[len(ctx.rows) :]
        needs_x, needs_A, *_ = ctx.needs_input_grad
        needs_B = ctx.needs_input_grad[-len(lora_B) :]
        dx = dA = None
        if needs_x or needs_A:
            dh = torch.cat([linear(dy[:, block], B_k.T) for block, B_k in zip(ctx.rows, lora_B, strict=True)], dim=1)
        if needs_A:
            x = ctx.make(*kept).to(dh.dtype).reshape(-1, lora_A.shape[1]).contiguous()  # as `_zero_` takes it
            dA = dh.T @ _zero_(x, dropped)
        if needs_x:
            dx = _zero_(linear(dh, lora_A.T), dropped)
            dx = add_frozen_gradient(dx, dy, ctx.base).to(ctx.x_dtype)
        dB = [
            (h_k.T @ dy[:, block]).T if needed else None  # so rather than dyᵀ h: a third sooner where out is large
            for block, h_k, needed in zip(ctx.rows, _parts(h, lora_B), needs_B, strict=True)
        ]
        return dx, dA, None, None, None, None, *dB


def _parts(h: Tensor, lora_B: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(n, sum of ranks) -> (n, rank) for each pair."""
    return h.split([B.shape[1] for B in lora_B], dim=1)


def frozen_linear(x: Tensor, base: Frozen) -> Tensor:
    """x Wᵀ + b. An int8 weight is widened for this product alone; its rows' scales multiply the outputs, not W."""
    weight, bias, scale, _ = base
    if scale is None:
        return linear(x, weight, bias)
    y = linear(x, _widened(weight, x.dtype)).mul_(scale)
    return y if bias is None else y.add_(bias)


def add_frozen_gradient(dx: Tensor, dy: Tensor, base: Frozen) -> Tensor:
    """dx + dy W, perhaps in place: what `frozen_linear` adds to the gradient of its input."""
    weight, _, scale, transposed = base
    if scale is not None:
        return linear(dy * scale, _widened(weight, dy.dtype).T, onto=dx)
    return linear(dy, weight.T if transposed is None else transposed, onto=dx)


def _widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """An int8 weight in `dtype`, exactly, in units of `INT8_UNIT` steps."""
    return weight.to(dtype).div_(INT8_UNIT)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, or where `onto` (n, out) is given, its sum with x Wᵀ, perhaps in place.

    On a CPU, where no gradient is asked for, oneDNN is called by name. In fp32 torch would take MKL, which uses half of
    what some AMD processors can do. In bf16 it would take oneDNN too, but have the bias written into every row first
    and the product added to that.
    """
    if weight.is_mkldnn or _fits_onednn(x, weight):
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


def _has_onednn(x: Tensor) -> bool:
    narrow = ONEDNN_BF16 and x.dtype is torch.bfloat16
    return (ONEDNN if x.dtype is torch.float32 else narrow) and x.device.type == "cpu"


def _fits_onednn(x: Tensor, weight: Tensor) -> bool:
    # The cheapest questions first: at batch 1 a microsecond shows.
    return (
        x.dtype is weight.dtype
        and _has_onednn(x)
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and (not torch.is_autocast_enabled("cpu") or x.dtype is torch.get_autocast_dtype("cpu"))  # else it casts first
        and not torch.compiler.is_compiling()  # the compiler chooses by itself
    )


def draw_dropped(numel: int, p: float, device: torch.device) -> Tensor:
    """Which of `numel` elements dropout drops, each on its own with probability `p`, from the default generator.

    Off the CPU, and under torch.compile, a boolean mask (numel,). On the CPU, where drawing a number per element would
    take a fifth of a training step, the positions of the dropped elements: the gap from one to the next is geometric,
    `1 + floor(log(1 - u) / log(1 - p))` for uniform u, so only about `p * numel` numbers are drawn, and about `4 p`
    bytes per element are kept.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():  # how many are dropped would be a number to wait for
        return torch.empty(numel, dtype=torch.bool, device=device).bernoulli_(p)
    # Six standard deviations over the expected count: too few about once in 10⁹ draws, and then only a tail is kept.
    count = min(numel, math.ceil(numel * p + 6 * math.sqrt(numel * p)) + 8)
    u = torch.rand(count, dtype=torch.float64)  # in [0, 1), so log(1 - u) is finite
    gaps = u.neg_().log1p_().div_(math.log1p(-p)).floor_().add_(1)
    positions = gaps.cumsum(0).sub_(1)
    positions = positions[: int(torch.searchsorted(positions, numel))]
    return positions.to(torch.int32 if numel < 2**31 else torch.int64)


def _zero_(x: Tensor, dropped: Tensor | None) -> Tensor:
    """Zero in place what `draw_dropped` chose of contiguous `x`; None is nothing."""
    if dropped is None:
        return x
    flat = x.view(-1)
    if dropped.dtype == torch.bool:
        flat.masked_fill_(dropped, 0)
    else:
        flat.index_fill_(0, dropped.long(), 0)
    return x
