"""Tar files as WebDataset writes them, read from front to back: members, damage, and the titles beside pictures."""

import contextlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from data.cells import text

TITLE_BYTES = 1 << 20  # more in a .txt or .json is no title


def read_titles(path: Path, column: str) -> dict[str, str | None]:
    """{product: title} of a tar. A pass of its own, so that no picture has to wait in memory for its title."""
    plain, listed = {}, {}
    with contextlib.suppress(tarfile.TarError, OSError):  # reading the pictures comes to the same place and says so
        for tar, member in members(path, {".txt", ".json"}):
            data = tar.extractfile(member).read(TITLE_BYTES) if member.isreg() and not member.issparse() else b""
            if member.name.lower().endswith(".txt"):
                plain[product(member.name)] = text(data.decode("utf-8", "replace"))
                continue
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(facts := json.loads(data), dict):
                    listed[product(member.name)] = text(facts.get(column))
    return listed | plain


def product(name: str) -> str:
    """What the members of one product have in common: the folder, and the name up to the first dot."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".")[0] or path.name))


def members(path: Path, suffixes: Iterable[str]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of some kinds, in order, read as they come.

    Raises:
        tarfile.TarError, OSError: the tar is damaged, or ends without the mark that ends a tar.
    """
    size = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            if member.offset_data + member.size > size and member.isreg():
                raise tarfile.ReadError(f"{member.name} is not whole")
            if not member.isdir() and PurePosixPath(member.name).suffix.lower() in suffixes:
                yield tar, member
        tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header, or none, for the end
        if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no end mark")
