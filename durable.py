"""Files that outlive a crash: whole and on the disk, or not there at all; and a lock that dies with its process."""

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from errors import UserError, told


def write_synced(path: Path, data: bytes) -> None:
    """Write and wait until the disk has it; a rename that follows cannot overtake the bytes."""
    path.write_bytes(data)
    sync_file(path)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names: without it a rename may not survive a power cut."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, data: bytes) -> None:
    """Give a file new content: whoever looks sees the old or the new, whole. A link or a device is written through."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(data)
        return
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # a stranger's folder may hold a link of this name
    try:
        part.write_bytes(data)
        give_name(part, path)
    finally:
        part.unlink(missing_ok=True)


def replace_csv(path: Path, rows: Iterable[Iterable]) -> None:
    """`replace_file` with a table in UTF-8."""
    csv.writer(text := io.StringIO(newline="")).writerows(rows)
    replace_file(path, text.getvalue().encode())


def sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def give_name(part: Path, path: Path) -> None:
    """Rename a finished file, once the disk has it: there is never half a file of that name."""
    sync_file(part)
    os.replace(part, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def claim(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file for this process, unless another does; yields whether it is ours.

    The system lets go of it when the process ends, however it ends. The file itself stays: whoever deleted it could
    delete one that others hold.

    Raises:
        UserError: the file system has no locks. (A lock that is just a file would outlive a killed process.)
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        with contextlib.suppress(Timeout):
            lock.acquire(blocking=wait)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        raise UserError(f"{path.parent}: its file system has no locks (flock); name a folder on another") from None
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextlib.contextmanager
def at_rest(run: Path) -> Iterator[None]:
    """Hold the folder of a run that has ended, so that nothing in it changes meanwhile; other folders are left alone.

    Raises:
        UserError: the run has not ended, or was stopped before its end, or may not be written to.
    """
    with contextlib.ExitStack() as stack:
        with told(f"cannot write to {run}", "; name a copy of its checkpoint"):
            still = not (lock := run / ".lock").exists() or stack.enter_context(claim(lock))
        if not still:
            raise UserError(f"{run} is a run that has not ended; wait for it, or name a copy of its checkpoint")
        if _was_stopped(run):  # --resume would put the next good epoch in the place of what is made here
            raise UserError(f"{run} was stopped before its end: --resume it first, or name a copy of its checkpoint")
        yield


def _was_stopped(run: Path) -> bool:
    """Whether a run has epochs left; False for a folder that is no run, or of a run too old to say."""
    last = "last.previous" if (run / "last.damaged").is_dir() and not (run / "last").is_dir() else "last"
    try:
        config, options = (json.loads((run / name).read_bytes()) for name in (f"{last}/config.json", "options.json"))
        return config["progress"]["epochs_scored"] < options["epochs"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def alone_in(folder: Path, why: str = "in use by a run that has not ended; name another folder") -> Iterator[None]:
    """Hold a folder for this process. The system lets go of it when the process ends, however it ends.

    Args:
        why: what the error says of the folder.

    Raises:
        UserError: another process holds it.
    """
    with contextlib.ExitStack() as stack:
        with told(f"cannot write --out {folder}"):
            ours = stack.enter_context(claim(folder / ".lock"))
        if not ours:
            raise UserError(f"--out {folder} is {why}")
        yield
