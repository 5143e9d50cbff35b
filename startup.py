"""Imported first by the commands: it makes torch and timm load in half the time, and keeps memory from growing with the
pictures and from being fetched anew for each batch.

The two imports make 600,000 objects, which Python's garbage collector would scan again and again meanwhile, and once
more at exit, though none of them is ever garbage. So it is off during the imports, and ignores these objects from then
on.
"""

import gc
import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036, whoever has an older one is to be told
    print(f"error: this needs Python 3.11 or newer, not {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)

from memory import keep_freed_memory, share_one_arena

share_one_arena()  # before torch starts threads
keep_freed_memory()
if "RANK" in os.environ:  # torchrun's processes: torch would warn of what `distributed.in_step` asks for
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
gc.disable()
import timm  # noqa: E402, F401
import torch  # noqa: E402, F401

gc.freeze()
gc.enable()
