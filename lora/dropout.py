"""Cheap dropout. On a CPU, the dropped elements are looked up in a precomputed tape and kept as a list of positions;
under torch.compile, a hash of two random numbers, its row's and its column's, drops an element, and no mask is kept.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

TAPE = 2**22  # elements


def draw_dropped(numel: int, p: float, device: torch.device) -> Tensor:
    """Choose which of `numel` elements dropout drops, each with probability `p`, with the default generator.

    On a device other than the CPU, returns a boolean mask (numel,). On the CPU, where drawing a number per element
    would take a fifth of a training step, returns the positions of the dropped elements, about `4 p` bytes per element.
    They are read from a tape at a random offset, as evolution strategies read their noise (Salimans et al. 2017,
    arXiv:1703.03864, section 2). Two elements of different draws are dropped independently of each other; two elements
    of the same draw are both dropped with probability p², give or take p (1 - p) / √TAPE (the standard deviation over
    all distances between them; at one distance it is always the same, as the tape is).
    """
    if device.type != "cpu":  # the host would have to wait for the number of positions
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
    """The sorted positions of the dropped elements of a circular tape of `TAPE` elements, over two turns of it."""
    chosen = torch.randperm(TAPE, generator=torch.Generator().manual_seed(0))[: round(p * TAPE)].sort().values
    return torch.cat([chosen, chosen + TAPE]).int()


def zeroed(x: Tensor, dropped: Tensor | None, own: bool = True) -> Tensor:
    """Zero the elements of a contiguous `x` that `draw_dropped` chose (None: no element), in place if `own` is true."""
    if dropped is None:
        return x
    if dropped.dtype == torch.bool:
        return x.masked_fill_(dropped.view_as(x), 0) if own else torch.where(dropped.view_as(x), 0, x)
    x = x if own else x.clone()
    x.view(-1).index_fill_(0, dropped.long(), 0)
    return x


def draw_marks(x: Tensor) -> tuple[Tensor, Tensor]:
    """The random numbers for `hide`, by the default generator: one per row (n,) and one per column (in,) of `x`."""
    rows, columns = (torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32, device=x.device) for n in x.shape)
    return rows, columns


def hide(x: Tensor, marks: Sequence[Tensor | None], p: float) -> Tensor:
    """Zero each element of `x` (n, in) with probability `p`, any two independently; the same marks zero the same ones.

    This is for torch.compile, which fuses it into the kernel that computes `x`. A hash of its row's and its column's
    mark decides whether an element is dropped. So no mask is kept and no number is drawn per element, which would take
    longer than writing the elements.
    """
    rows, columns = marks
    if rows is None:
        return x
    # By the marks alone, three corners of a rectangle would decide the fourth (the XOR of all is 0).
    uniform = _hash(rows[:, None] ^ columns)
    return torch.where(uniform < round(p * 2**32) - 2**31, 0, x)


def _hash(z: Tensor) -> Tensor:
    """Hash int32 to int32 so that flipping any input bit flips each output bit about half the time: "lowbias32"
    (Wellons 2018, nullprogram.com/blog/2018/07/31). `>>` copies the sign bit, so the copies are masked."""
    z = (z ^ ((z >> 16) & 0xFFFF)) * 0x7FEB352D
    z = (z ^ ((z >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return z ^ ((z >> 16) & 0xFFFF)
