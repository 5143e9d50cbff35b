"""Mistakes of the user and refusals of the machine end a command with one line and exit code 2; every other error keeps
its traceback."""

import argparse
import contextlib
import errno
import functools
import io
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from memory import ran_out

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room: on a disk, in a user's share of it, in a file
BARRED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)  # may be raised by merely asking about a path
FAILING = {  # the fault of a disk, a network or this process, not of a file: it may be over soon
    *(errno.EIO, errno.ENXIO, errno.ENODEV, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}

CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), " ")  # for `str.translate`: one line, that no terminal obeys
MOST = 10**12  # the largest count of anything that an option takes


class UserError(Exception):
    """A mistake the user can fix. The message names the value and says what to do."""


def say_once(note: str) -> None:
    """Print a note to stderr; of torchrun's processes, which all have the same to say, only the first does."""
    if not int(os.environ.get("RANK", 0)):
        print(note.translate(CONTROLS), file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line like any other, not below a page of usage."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


def positive_int(text: str) -> int:
    """An option's type: a whole number from 1 to `MOST`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    if int(text) > MOST:
        raise argparse.ArgumentTypeError(f"{text} is more than {MOST:,}")
    return int(text)


def named(text: str) -> str:
    """An option's type: any text but an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def gigabytes(text: str) -> float:
    """An option's type: a number from 0 on."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def fraction(text: str) -> float:
    """An option's type: a number above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1")
    return value


def first_line(error: object) -> str:
    """What an error says, where libraries say more than one line, or nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def told(what: str, then: str = "") -> Iterator[None]:
    """Make an `OSError` a `UserError`: `what` could not be done, why, and what to do `then`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {os.strerror(error.errno) if error.errno else error}{then}") from None


def make_folder(path: Path, option: str) -> None:
    """Make a folder for results now, or raise a `UserError`."""
    with told(f"cannot write {option} {path}"):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def check_writable(path: Path, option: str, inputs: Iterable[Path | None] = ()) -> None:
    """Raise a `UserError` now, not after the work, if the file could not be written, or is one of the inputs."""
    if path.is_dir():
        raise UserError(f"cannot write {option} {path}: it is a folder")
    if path.exists() and any(read and os.path.exists(read) and path.samefile(read) for read in inputs):
        raise UserError(f"{option} {path} would replace what is read; give another name")
    with told(f"cannot write {option} {path}"):
        tempfile.TemporaryFile(dir=path.parent).close()


def exits_cleanly(main):
    """Decorate a command's `main`. An error that `line_of` has a line for becomes that line on stderr and exit code 2;
    Ctrl-C gives exit code 130, and output that nobody reads any more 141, as shells report both signals."""

    @functools.wraps(main)
    def command(*args, **kwargs):
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # the shell closed it (`>&-`), so what is printed goes nowhere
                setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        if isinstance(sys.stdout, io.TextIOWrapper):  # no name ends a command in any locale, and JSON is UTF-8
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        try:
            code = main(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        except BrokenPipeError:  # as with `| head`: nobody reads on, and what is still to be flushed goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 141
        except Exception as error:
            if (line := line_of(error)) is None:
                raise
            process = int(os.environ.get("RANK", 0))  # torchrun's; most errors are the same in all
            print(f"error{f' in process {process}' if process else ''}: {line.translate(CONTROLS)}", file=sys.stderr)
            code = 2
        sys.exit(code)

    return command


def line_of(error: Exception) -> str | None:
    """The line that a command ends with: for a `UserError`, a full disk or memory, a disk or network that fails, a path
    that may not be entered or is no text. None for a bug, which keeps its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeEncodeError) and error.reason.startswith("surrogates"):  # bytes that are no UTF-8
        return f"the name {error.object!r} is not UTF-8, as it has to be here; rename it"
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOMEM or (isinstance(error, MemoryError | RuntimeError) and ran_out(error)):
        return "out of memory; free some and start again"
    if number in FULL:
        return f"cannot write {error.filename or 'the results'}: {error.strerror}; make room"
    if number in BARRED and error.filename:
        return f"{error.filename}: {error.strerror}; name another place, or have it opened to you"
    if number in FAILING:
        return f"{error.filename or 'a file'}: {error.strerror}; start again"
    return None
