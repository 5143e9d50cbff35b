"""Dropout that costs next to nothing: which elements are hidden is drawn for the hidden ones alone, and kept as their
places; under torch.compile it is computed from an element's place, and neither drawn nor kept.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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


def zeroed(x: Tensor, dropped: Tensor | None, own: bool = True) -> Tensor:
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
