"""Dropout that costs next to nothing: which elements are hidden is looked up, and kept as the places of the hidden ones
alone; under torch.compile it is computed from an element's place, and neither drawn nor kept.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

TAPE = 2**22  # elements


def draw_dropped(numel: int, p: float, device: torch.device) -> Tensor:
    """Which of `numel` elements dropout drops, each with probability `p`, from the default generator.

    Off the CPU a boolean mask (numel,). On the CPU, where drawing a number for each element would take a fifth of a
    training step, the positions of the dropped elements, about `4 p` bytes per element: they are read from a tape, from
    a random place on, as evolution strategies read their noise (Salimans et al. 2017, arXiv:1703.03864, section 2). Two
    elements of different draws are dropped independently of each other, two of the same with the probability
    p² ± p / √TAPE.
    """
    if device.type != "cpu":  # how many are dropped would be a number to wait for
        return torch.empty(numel, dtype=torch.bool, device=device).bernoulli_(p)
    tape, windows = _tape(p), []
    for begin in range(0, max(numel, 1), TAPE):
        start = int(torch.randint(TAPE, ()))
        window = torch.tensor([start, start + min(TAPE, numel - begin)], dtype=torch.int32)
        first, last = torch.searchsorted(tape, window).tolist()
        windows.append(tape[first:last].to(torch.int32 if numel < 2**31 else torch.int64) + (begin - start))
    return torch.cat(windows)


@functools.cache
def _tape(p: float) -> Tensor:
    """The positions of the elements that are dropped of a ring of `TAPE`, in order, twice around."""
    chosen = torch.randperm(TAPE, generator=torch.Generator().manual_seed(0))[: round(p * TAPE)].sort().values
    return torch.cat([chosen, chosen + TAPE]).int()


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
