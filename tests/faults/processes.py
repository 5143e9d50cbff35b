"""Real processes to do damage to, forked from one that has imported everything, as importing torch takes seconds."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "infer", "data.fashion", "datasets"])


def _main(script: str, words: list[str], log: str, fault) -> None:
    os.setsid()  # a group of its own: what outlives it can be seen
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    if fault:
        fault()
    with contextlib.suppress(BrokenPipeError):
        importlib.import_module(script).main(words)


def start(script: str, *words, log: Path, fault=None):
    """Start a command; `fault`, a picklable callable, is run in its process first."""
    process = CONTEXT.Process(target=_main, args=(script, [str(word) for word in words], str(log), fault))
    process.start()
    return process


def finish(process, seconds: float = 120) -> int:
    """Wait; the exit code, negative for a signal."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("the command does not end")
    return process.exitcode


def die_at(count: int, module: str, name: str, number: int = signal.SIGKILL, after: bool = False) -> None:
    """Let this process get a signal at the `count`th call of a function, before the call or after it."""
    owner, calls = importlib.import_module(module), []
    real = getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count and not after:
            os.kill(os.getpid(), number)
        result = real(*args, **kwargs)
        if len(calls) == count and after:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, counted)
    print(f"fault: signal {number} at call {count} of {module}.{name}", file=sys.stderr)
