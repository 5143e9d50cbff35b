"""Tar files as WebDataset writes them: members whose names agree up to the first dot are one product.

To be labelled they are read from front to back. As a catalogue, a product's first picture is its row, the keys of its
`.json` are columns, and so are `.txt` and `.cls`; where each picture lies is noted, so that any is read by itself.
"""

import contextlib
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pyarrow as pa
from tqdm import tqdm

from data.cells import clean, text
from data.columns import Opened, check_columns, columns_of, kept
from data.images import MACS_OWN, ImageError
from errors import UserError, say_once

TEXT_BYTES = 1 << 20  # of a .txt or .json, at most
READ = 8192  # products at a time
IMAGES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
UNREAD = {".heic", ".heif", ".avif"}  # pictures too, of which a word is said
NOT_READ, NOT_PLAIN = "of a format that is not read; convert it to JPEG", "not a plain file"
TEXTS = {".json", ".txt", ".cls"}
# Columns that say where a picture lies, or why it is not read.
PLACE = {"file #": pa.int64(), "offset #": pa.int64(), "size #": pa.int64(), "why #": pa.string()}


@dataclass
class Faults:
    """What is wrong with what tars say of products.

    Attributes:
        differing: columns in which files of one product differ, and which product's do.
        unread: how many .json files are not read.
        first: one of these.
    """

    differing: dict[str, str] = field(default_factory=dict)
    unread: int = 0
    first: str = ""


def open_tars(paths: list[Path], texts: Path, needs: Sequence[str]) -> Opened:
    """Files of one catalogue, in order.

    Args:
        texts: where their text is copied to, with the places of the pictures; a file that is there holds both.
        needs: the text columns that there must be.

    Raises:
        UserError: a file is no tar, or damaged, no product has a picture, or a column is missing.
    """
    schema = None
    if not texts.exists():
        faults = Faults()
        names = {"id": None} | {name: None for _, cells, _ in _products(paths, faults) for name in cells}
        if faults.unread:
            what = f"{faults.unread:,} .json files are no JSON object of at most {TEXT_BYTES >> 20} MB"
            say_once(f"{what}, and left out, such as {faults.first}")
        check_columns(names, needs, paths[0].parent)
        schema = pa.schema([*((name, pa.string()) for name in names), *PLACE.items()], faults.differing)
    table = kept(texts, schema, _batches(paths, schema))
    for name in ("id", *needs):  # asked of what is kept: who wrote it may have needed other columns
        if whose := (table.schema.metadata or {}).get(name.encode()):
            raise UserError(f"{whose.decode()} differ in {name}")
    file, start, size, why = (table.column(name) for name in PLACE)

    def read(row: int) -> bytes:
        row = int(row)
        if reason := why[row].as_py():
            raise ImageError(reason)
        try:
            with open(paths[file[row].as_py()], "rb") as opened:
                opened.seek(start[row].as_py())
                return opened.read(size[row].as_py())
        except OSError as error:
            raise ImageError(error.strerror) from error

    return Opened(columns_of(table.drop_columns(list(PLACE))), read, None)


def _batches(paths: list[Path], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    products = iter(tqdm(_products(paths, Faults()), desc="reading tar files", unit="row"))  # one bar
    while some := list(itertools.islice(products, READ)):
        rows = [cells | dict(zip(PLACE, (file, *place), strict=True)) for file, cells, place in some]
        yield pa.RecordBatch.from_pylist(rows, schema)


def _products(paths: list[Path], faults: Faults) -> Iterator[tuple[int, dict[str, str | None], tuple]]:
    """Of each product with a picture: the number of its file, its cells, and the place of its picture.

    Raises:
        UserError: a tar is damaged, or what it says of a product lies apart from the picture.
    """
    for number, path in enumerate(paths):
        lone = set()  # products without a picture that is read, of which one may lie elsewhere
        try:
            found = members(path, IMAGES | UNREAD | TEXTS)
            for name, files in itertools.groupby(found, lambda one: product(one[1].name)):
                facts, place = _product(path, name, files, faults)
                if place:
                    yield number, {"id": name} | facts, place
                if not (place and place[-1] is None) and facts not in ({}, {"id": name}):
                    lone.add(name)
            pictured = (product(member.name) for _, member in members(path, IMAGES) if is_plain(member))
            if lone and (apart := sorted(lone.intersection(pictured))):
                raise UserError(
                    f"{path}: what it says of {len(apart):,} products, such as {apart[0]}, is not beside their "
                    "pictures; pack it with tar --sort=name"
                )
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path} cannot be read as tar: {error}") from None


def _product(path: Path, name: str, files: Iterable, faults: Faults) -> tuple[dict[str, str | None], tuple | None]:
    """What the files of a product say, and its first picture's offset, size and None; or None, None and why none is
    read; or None, where it has none."""
    facts, place, why = {}, None, None
    for tar, member in files:
        suffix = PurePosixPath(member.name).suffix.lower()
        if suffix in UNREAD:
            why = NOT_READ
        elif not is_plain(member):
            why = NOT_PLAIN if suffix in IMAGES else why
        elif suffix in IMAGES:
            place = place or (member.offset_data, member.size, None)
        elif (told := _cells(suffix, tar.extractfile(member).read(TEXT_BYTES + 1))) is None:
            faults.unread += 1
            faults.first = faults.first or f"{clean(member.name)} in {path}"
        else:
            told = {key: cell for key, cell in told.items() if cell is not None or key not in facts}
            for key in (key for key in told if facts.get(key) not in (None, told[key])):
                faults.differing[key] = f"{clean(path.name)}: files of {name}, a name that ends at its first dot,"
            facts |= told
    return facts, place or (why and (None, None, why))


def _cells(suffix: str, data: bytes) -> dict[str, str | None] | None:
    """What a file tells of its product; None where it is a .json that tells nothing that could be columns."""
    if suffix != ".json":
        return {suffix[1:]: text(data[:TEXT_BYTES].decode("utf-8", "replace"))}
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(facts, dict) or len(data) > TEXT_BYTES:
        return None
    cells = {clean(key): cleaned(value) for key, value in facts.items() if key not in PLACE}
    return {key: cell for key, cell in cells.items() if cell is not None or key != "id"}


def cleaned(value) -> str | None:
    """A cell of what was read, as text."""
    cell = text(value)
    return cell and clean(cell)


def read_titles(path: Path, column: str) -> dict[str, str | None]:
    """{product: title} of a tar: its column, as training reads it, else its text file. A pass of its own, so that no
    picture has to wait in memory for its title."""
    plain, listed = {}, {}
    with contextlib.suppress(tarfile.TarError):  # reading the pictures comes to the same place and says so
        for tar, member in members(path, {".txt", ".json"}):
            data = tar.extractfile(member).read(TEXT_BYTES) if is_plain(member) else b""
            if member.name.lower().endswith(".txt"):
                plain[product(member.name)] = text(data.decode("utf-8", "replace"))
                continue
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(facts := json.loads(data), dict):
                    listed[product(member.name)] = cleaned(facts.get(column))
    return plain | {name: title for name, title in listed.items() if title}


def is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()  # a sparse one may claim any size


def product(name: str) -> str:
    """What the members of one product have in common: the folder, and the name up to the first dot."""
    path = PurePosixPath(clean(name))
    return str(path.with_name(path.name.split(".")[0] or path.name))


def members(path: Path, suffixes: Iterable[str]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of some kinds, in order, read as they come; none of macOS's own, `._shirt.jpg` beside `shirt.jpg`.

    Raises:
        tarfile.TarError, OSError: the tar is damaged, or ends without the mark that ends a tar.
    """
    size = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            if member.offset_data + member.size > size and member.isreg():
                raise tarfile.ReadError(f"{member.name} is not whole")
            name = PurePosixPath(member.name)
            if not member.isdir() and name.suffix.lower() in suffixes and not name.name.startswith(MACS_OWN):
                yield tar, member
        tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header, or none, for the end
        if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no end mark")
