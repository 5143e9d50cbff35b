"""Find the inputs that words of a command line name (files, folders to any depth, globs), and note what is left out."""

import functools
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from data.images import MACS_OWN
from data.table import TABLES
from data.tars import IMAGES, UNREAD
from errors import UserError, say_once

KINDS = {"image": IMAGES, "parquet": {".parquet"}, "tar": {".tar"}}  # what folders are searched for
SOUGHT = set().union(*KINDS.values())
NAMED = 5  # kinds of other files that a note names, at most
JOB = ("labels", "locks")  # folders of a job, where a job.json lies beside them


def kind_of(name: str | Path) -> str:
    """The kind of an input: "hub", "parquet", "tar", "csv", or "image", which is any other file that a user named."""
    if isinstance(name, str):
        return "hub"
    kinds = KINDS | {"csv": set(TABLES)}
    return next((kind for kind, suffixes in kinds.items() if name.suffix.lower() in suffixes), "image")


def find_inputs(word: str, notes: list[str]) -> list[str | Path]:
    """The files that a word means, or the word itself where it names a dataset on the hub.

    A folder or glob stands for the pictures in it, else the parquet files, else the tar files. A broken link counts as
    a picture that cannot be read, not as one that does not exist.

    Args:
        notes: messages about what was left out are appended to it.

    Raises:
        UserError: there is no such input.
    """
    if not word:
        raise UserError("one of the inputs is an empty word; name files or folders")
    if word.startswith("hub:"):
        return [word]
    path = Path(word)
    if os.path.isfile(word):  # false for a word too long for a name, where `Path.is_file` raises
        return [path]
    is_folder = os.path.isdir(word)
    if is_folder:
        matches = _inside(path, notes)
    else:  # a folder that a glob matches is searched like a named one; with `**`, others that match lie in it
        found = list(map(Path, glob.glob(word, recursive=True)))
        folders = {p for p in found if os.path.isdir(p)}
        outer = (p for p in sorted(folders) if folders.isdisjoint(p.parents))
        matches = list(dict.fromkeys([*found, *(p for folder in outer for p in _inside(folder, notes))]))
    matches = [p for p in without_answers(matches) if os.path.isfile(p) or not os.path.exists(p)]
    matches = [p for p in matches if not p.name.startswith(MACS_OWN)]
    beside = path.glob("*") if is_folder and os.path.isdir(path / "images") else []
    tables = sorted(p for p in beside if p.suffix.lower() in TABLES)
    _note_others(word, len(path.parts) if is_folder else -1, matches, tables, notes)
    by_kind = {kind: sorted(p for p in matches if p.suffix.lower() in KINDS[kind]) for kind in KINDS}
    chosen, *others = [kind for kind, some in by_kind.items() if some] or [None]
    if chosen is None:
        where = f"no image in folder {word}" if is_folder else f"no image file, folder or match for {word!r}"
        raise UserError("; ".join([f"{where} (looked for {', '.join(sorted(SOUGHT))})", *notes]))
    for kind in others:
        count = f"{len(by_kind[kind]):,} {kind} file{'s' * (len(by_kind[kind]) > 1)}"
        notes.append(f"{word}: took the {chosen} files; {count} left out, name them to have them read")
    return by_kind[chosen]


def without_answers(paths: Iterable[Path]) -> list[Path]:
    """Those that are not in the folders of a job of `infer.py`, whose answers are parquet too."""

    @functools.cache  # many files, few folders
    def of_a_job(folder: Path) -> bool:
        above, name = os.path.split(os.path.realpath(folder))
        return name in JOB and os.path.isfile(os.path.join(above, "job.json"))

    return [path for path in paths if not of_a_job(path.parent)]


def _inside(folder: Path, notes: list[str]) -> list[Path]:
    """The files in a folder, to any depth; folders that cannot be read or are links are left out with a note."""
    closed = []
    found, linked = _walk(folder, closed.append)
    if closed:
        notes.append(f"{folder}: {len(closed):,} in it cannot be read, {closed[0].filename}: {closed[0].strerror}")
    if linked:
        notes.append(f"{folder}: {linked:,} linked folder{'s' * (linked > 1)} left out, name them to have them read")
    return found


def _walk(folder: Path, on_error: Callable[[OSError], object]) -> tuple[list[Path], int]:
    """The files in a folder, to any depth, and the number of links to folders, which are not followed."""
    found, linked = [], 0
    for where, folders, names in os.walk(folder, onerror=on_error):
        found += (Path(where, name) for name in names)
        linked += sum(os.path.islink(os.path.join(where, name)) for name in folders)
    return found, linked


def all_files(folder: Path) -> list[Path]:
    """The files in a folder of a catalogue, to any depth.

    Raises:
        UserError: a folder in it cannot be read: otherwise rows would be missing and nobody would know.
    """

    def refuse(error: OSError) -> None:
        if os.path.basename(error.filename) != "lost+found":  # the file system's own
            raise UserError(f"cannot read {error.filename}: {error.strerror}; have it opened to you, or move it")

    found, linked = _walk(folder, refuse)
    if linked:
        say_once(f"{folder}: {linked:,} linked folder{'s' * (linked > 1)} left out; put the files themselves there")
    return [path for path in found if path.is_file()]


def _note_others(word: str, depth: int, matches: list[Path], tables: list[Path], notes: list[str]) -> None:
    """Note how many files of other kinds there are and, where possible, what to do about them. Hidden files, those with
    a part of their path from `depth` on that begins with a dot, are not counted."""
    shown = [p for p in matches if p not in tables and not any(part.startswith(".") for part in p.parts[depth:])]
    others = Counter(suffix for p in shown if (suffix := p.suffix.lower()) not in SOUGHT)
    for kind in sorted(others.keys() & UNREAD):
        notes.append(f"{word}: {others.pop(kind):,} {kind} left out, a format that is not read; convert them to JPEG")
    if tables:
        notes.append(f"{word}: {', '.join(map(str, tables))} left out; name one to have answers go by its ids")
    if others:
        said = ", ".join(f"{count:,} {kind or 'without a suffix'}" for kind, count in others.most_common(NAMED))
        notes.append(f"{word}: left out as no pictures: {said}{', and others' * (len(others) > NAMED)}")
