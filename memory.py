"""Make glibc keep memory that a process frees (elsewhere nothing is done); use smaller batches when it runs out."""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
OLD_MOST = 32 << 20  # what older glibc allows


def share_one_arena() -> None:
    """Let all threads take their memory from one arena; to be called before there are any.

    glibc would give each an arena of its own. Those of threads that decode pictures fill with holes that only they can
    fill again, and grow with the number of pictures (`benchmarks/large_catalogue.py`).
    """
    _set(M_ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Let what a batch frees stay with this process for the next one.

    glibc would give it back to the system, and each batch would have all its pages given and zeroed anew: 59,000 of
    them in a training step of 64 pictures (`benchmarks/page_faults.py`).
    """
    _set(M_TRIM_THRESHOLD, 2**31 - 1)
    _set(M_MMAP_THRESHOLD, 1 << 30) or _set(M_MMAP_THRESHOLD, OLD_MOST)


def in_parts(answer: Callable[[slice], Any], count: int, most: int | None) -> tuple[list, int]:
    """Answers for `count` inputs, at most `most` of them at a time, halved each time that memory runs out; and how many
    at a time it was in the end. If memory is not enough for a single one, torch's error is raised."""
    most, done, answers = most or count, 0, []
    while done < count:
        try:
            answers.append(answer(slice(done, done + most)))
            done += most
        except RuntimeError as error:
            if not ran_out(error) or most == 1:
                raise
            most //= 2
            print(f"out of memory: going on with batches of {most}", file=sys.stderr)
    return answers, most


def ran_out(error: Exception) -> bool:
    """Whether memory ran out. For a GPU torch mostly has an exception class, for a CPU only the message tells."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    words = "out of memory", "defaultcpuallocator", "alloc_failed"  # of CUDA and NCCL, of torch on a CPU, of CUBLAS
    return named or any(some in str(error).lower() for some in words)


def _set(option: int, value: int) -> bool:
    """Set an option of glibc's malloc; returns whether glibc is there and accepts it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt and mallopt(option, value))
