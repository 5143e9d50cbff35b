"""Imported first by the commands: torch and timm in half the time, and memory that stays.

They make 600,000 objects, which Python's garbage collector goes over again and again as they are made, and once more at
exit, though none of them is ever garbage. So it waits meanwhile, and leaves them out of account from then on.

What a batch frees, glibc would give back to the system, and the next batch would have all its pages given and zeroed
anew: where ViT-Tiny labels in fp32 on a CPU, that is a quarter of the time. So it stays for the next one.
"""

import ctypes
import gc
import sys

gc.disable()
import timm  # noqa: E402, F401
import torch  # noqa: E402, F401

gc.freeze()
gc.enable()

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it allows: larger blocks go back
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
