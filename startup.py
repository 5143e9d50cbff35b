"""Imported first by the commands: it makes torch and timm load in half the time, keeps memory from growing with the
pictures and from being fetched anew for each batch, and keeps to the cores that a container gives.

The two imports make 600,000 objects, which Python's garbage collector would scan again and again meanwhile, and once
more at exit, though none of them is ever garbage. So it is off during the imports, and ignores these objects from then
on.
"""

import contextlib
import gc
import math
import os
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036, whoever has an older one is to be told
    print(f"error: this needs Python 3.11 or newer, not {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)

from memory import keep_freed_memory, share_one_arena


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many cores this process may use: of those given to it, no more than the quota of its container."""
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file; "max" is no number
        time, period = map(int, quota.read_text().split())
        given = min(given, math.ceil(time / period))
    return given


if cores() < (os.cpu_count() or 1):  # torch would start a thread for each core of the machine
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
share_one_arena()  # before torch starts threads
keep_freed_memory()
if "RANK" in os.environ:  # torchrun's processes: torch would warn of what `distributed.in_step` asks for
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
gc.disable()
import timm  # noqa: E402, F401
import torch  # noqa: E402, F401

gc.freeze()
gc.enable()
