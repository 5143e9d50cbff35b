"""A catalogue from any source: rows of text columns, and encoded picture bytes on demand."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from errors import CONTROLS


@dataclass(frozen=True)
class Skipped:
    """A row without a usable picture, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Catalogue:
    """Attributes:
    name: what to call it in reports; never a path of this machine.
    ids: one for each row.
    columns: all metadata as text, column -> one value per row, None where missing.
    read: row -> the picture's encoded bytes; raises `ImageError` where there are none.
    fingerprint: changes when a row is added or removed, or a picture may have changed.
    skipped: rows left out because their picture does not exist.
    run: how many neighbouring rows are read together; None if each row is read by itself.
    """

    name: str
    ids: Sequence[str]
    columns: dict[str, Sequence[str | None]]
    read: Callable[[int], bytes]
    fingerprint: str
    skipped: list[Skipped] = field(default_factory=list)
    run: int | None = None

    def __len__(self) -> int:
        return len(self.ids)


def stat_fingerprint(files: dict[str, os.stat_result]) -> str:
    facts = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files.items())
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def digest(ids: Sequence[str | None]) -> str:
    """A hash of all ids in their order, from which a run makes its batches."""
    found = hashlib.blake2b(digest_size=16)
    for id in ids:
        found.update(f"{id}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


def skipped_why(skipped: Sequence[Skipped]) -> str:
    """One line: how many rows were skipped, how many of them for the most common reason, and the first of these."""
    if not skipped:
        return "0 skipped"
    reason, count = Counter(re.sub(r"\d+", "…", row.reason) for row in skipped).most_common(1)[0]
    first = next(row for row in skipped if re.sub(r"\d+", "…", row.reason) == reason)
    return f"{len(skipped):,} skipped, {count:,} of them as {first.id}: {first.reason}".translate(CONTROLS)
