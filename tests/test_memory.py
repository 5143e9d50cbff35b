"""memory.py: what glibc's malloc does once it is told, seen from outside."""

import platform
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc alone")
def test_pages_of_a_batch_are_not_faulted_in_anew():
    script = """
import resource, sys
if sys.argv[1] == "keep":
    import startup
import timm, torch
model, images = timm.create_model("vit_tiny_patch16_224", img_size=112, depth=1).eval(), torch.zeros(256, 3, 112, 112)
with torch.inference_mode():
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model(images)  # its largest tensors have 39 MB
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    keep, let_go = (
        subprocess.run([sys.executable, "-c", script, how], stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout.split()
        for how in ("keep", "let go")
    )
    # The median: what is kept may still not lie in one piece where a tensor needs it.
    assert 10 * statistics.median(map(int, keep[3:])) < statistics.median(map(int, let_go[3:]))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc alone")
def test_all_threads_share_one_arena(tmp_path):
    script = """
import ctypes, sys, threading
if sys.argv[2] == "one":
    import startup
libc, together = ctypes.CDLL(None), threading.Barrier(4)
libc.fopen.restype = ctypes.c_void_p
def take():
    together.wait()
    libc.malloc(10_000)
    together.wait()
threads = [threading.Thread(target=take) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""
    arenas = {}
    for how in ("one", "many"):
        subprocess.run([sys.executable, "-c", script, tmp_path / how, how], check=True, cwd=ROOT)
        arenas[how] = (tmp_path / how).read_text().count("<heap nr=")
    assert arenas["one"] == 1 < arenas["many"]
