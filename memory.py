"""Memory of a process that labels on a CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
OLD_MOST = 32 << 20  # what older glibc allows


def keep_freed_memory() -> None:
    """Let what a batch frees stay with this process for the next one: of glibc, elsewhere nothing is done.

    glibc would give it back to the system, and each batch would have all its pages given and zeroed anew: where
    ViT-Tiny labels in fp32, that is a quarter of the time.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, OLD_MOST)
