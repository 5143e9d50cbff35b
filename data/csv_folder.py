"""A catalogue as Kaggle and shops have it: a CSV file beside a folder `images/`."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from data.catalogue import Catalogue, Skipped, stat_fingerprint
from data.images import MACS_OWN, ImageError
from data.inputs import all_files
from data.table import TABLES, composed, read_rows
from data.tars import IMAGES
from errors import UserError, say_once

URLS = re.compile(r"(?<![\s,;|])[\s,;|]+(?=\w+://)")  # what stands between the URLs in one cell


def find_csv(path: Path) -> Path | None:
    """The table `path`, or the one in folder `path`: `styles.csv`, else the only one beside a folder `images/`."""
    if path.suffix.lower() in TABLES and path.is_file():
        return path
    if (styles := path / "styles.csv").is_file():
        return styles
    files = sorted(path.glob("*.*")) if (path / "images").is_dir() else []
    files = [file for file in files if file.suffix.lower() in TABLES and not file.name.startswith(MACS_OWN)]
    if len(files) > 1:
        files = [file for file in files if not _written_by_us(file)]
    tables = [file for file in files if file.suffix.lower() == ".csv"] or files
    if len(tables) > 1:
        raise UserError(f"{path} holds several CSV files; name one: --data {tables[0]}")
    return tables[0] if tables else None


def _written_by_us(table: Path) -> bool:
    """Whether `infer.py` or `evaluate.py --report` wrote this file, whose output may lie beside the catalogue."""
    with table.open(encoding="utf-8", errors="replace") as file:
        head = file.readline(10**6).rstrip()
    return (head.startswith("image,") and head.endswith(",error")) or head.startswith("why,group,id,attribute,")


def open_csv(table: Path) -> Catalogue:
    """A CSV file beside `images/`. A row's picture is the file that its `image` names, else ID.jpg or the like.

    Where `image` holds several URLs, the first names the picture: shops put the main one there. Rows whose different
    URLs all lead to one file are skipped, as it can be the picture of one of them at most.
    """
    images = table.parent / "images"
    if not images.is_dir():
        raise UserError(f"{table.parent} has {table.name} but no folder images/")
    files = {path.relative_to(images).as_posix(): path.stat() for path in all_files(images)}
    names = Names(files)
    found, skipped, seen, several = [], [], set(), 0
    for number, row in read_rows(table):
        if isinstance(row, str):
            skipped.append(Skipped(f"line {number}", row))
            continue
        cell = row.get("image") or ""
        name = URLS.split(cell)[0]
        if not row["id"]:
            skipped.append(Skipped(f"line {number}", "no id"))
        elif (picture := names.find(name) if name else names.spelt(row["id"])) is None:
            lacking = "what its column image names is not in images/" if name else "no such file in images/"
            skipped.append(Skipped(row["id"], lacking))
        elif row["id"] in seen:
            skipped.append(Skipped(row["id"], f"line {number} has an id that came before"))
        else:
            seen.add(row["id"])
            found.append((row, picture, name))
            several += name != cell
    if several:
        say_once(f"{table}: column image names several pictures in {several:,} rows; the first is taken")
    doubtful = _meant_by_several((picture, name) for _, picture, name in found if "://" in name)
    reason = "URLs of other rows end in the same name; keep the folders of URLs in images/, or name the file in image"
    skipped += [Skipped(row["id"], reason) for row, picture, _ in found if picture in doubtful]
    rows = [row for row, picture, _ in found if picture not in doubtful]
    pictures = [picture for _, picture, _ in found if picture not in doubtful]
    ids = [row["id"] for row in rows]
    # Labels do not count, as editing one leaves decoded pictures valid; nor do files that no row refers to.
    facts = stat_fingerprint({picture: files[picture] for picture in pictures}), ids, pictures
    return Catalogue(
        name=table.resolve().parent.name,
        ids=ids,
        columns={name: [row[name] for row in rows] for name in (rows[0] if rows else {})},
        read=lambda i: _read_file(images / pictures[i]),
        fingerprint=hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest(),
        skipped=skipped,
    )


class Names:
    """Finds the file in `images/` that a table means by a name.

    Names are looked up in a listing and never joined to a path, so that a name like '../x' cannot leave the folder.
    """

    def __init__(self, files: Iterable[str]):
        self.exact: dict[str, str] = {}
        for file in sorted(files, key=lambda file: (Path(file).suffix.lower() not in IMAGES, file)):  # pictures first
            stem = str(PurePosixPath(file).with_suffix(""))
            self.exact.setdefault(stem, file)
            self.exact.setdefault(composed(stem), file)
        self.exact |= {composed(file): file for file in sorted(files)} | {file: file for file in files}
        meant: dict[str, set[str]] = {}
        for name, file in self.exact.items():
            meant.setdefault(name.casefold(), set()).add(file)
        self.in_any_case = {name: files.pop() for name, files in meant.items() if len(files) == 1}

    def find(self, name: str) -> str | None:
        """The file of a name, which may begin with `images/` and the folders that lead there. A URL's path is shortened
        from the left until it names a file; it is tried as written, then decoded."""
        parts = PurePosixPath(name.replace("\\", "/")).parts
        asked = [parts, *(parts[i + 1 :] for i, part in enumerate(parts) if part.casefold() == "images")]
        if "://" in name:
            path = re.split("[?#]", name)[0]
            *folders, last = PurePosixPath(path).parts or ("",)
            ways = (*folders, last + name[len(path) :]), PurePosixPath(unquote(path)).parts
            asked = sorted((way[i:] for way in ways for i in range(len(way))), key=len, reverse=True)
        return next(filter(None, (self.spelt(str(PurePosixPath(*some))) for some in asked)), None)

    def spelt(self, name: str) -> str | None:
        """The file of exactly this name, with or without suffix; else of one with other accent encoding, else case."""
        return self.exact.get(name) or self.exact.get(composed(name)) or self.in_any_case.get(composed(name).casefold())


def _meant_by_several(found: Iterable[tuple[str, str]]) -> set[str]:
    """Given pairs of a file and a URL that leads to it: the files with URLs of different paths, on any server."""
    paths = defaultdict(set)
    for file, url in found:
        paths[file].add(unquote(re.split("[?#]", url.partition("://")[2].partition("/")[2])[0]).casefold())
    return {file for file, some in paths.items() if len(some) > 1}


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        error.filename = str(path)  # opening a file sets it, reading does not
        raise ImageError(error.strerror) from error
