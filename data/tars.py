"""Tar files as WebDataset writes them: members whose names agree up to the first dot are one product.

For labelling, they are read from front to back. In a catalogue, a product with its first picture is a row; its `.txt`,
its `.cls` and the keys of its `.json` are columns. The place of each picture is recorded, so it can be read by itself.
"""

import contextlib
import itertools
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pyarrow as pa
from tqdm import tqdm

from data.cells import clean, text
from data.columns import Opened, check_columns, columns_of, kept
from data.images import MACS_OWN, ImageError
from errors import UserError, first_line, say_once

TEXT_BYTES = 1 << 20  # of a .txt or .json, at most
READ = 8192  # products at a time
IMAGES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
UNREAD = {".heic", ".heif", ".avif"}  # pictures too, which are reported but not read
NOT_READ, NOT_PLAIN = "of a format that is not read; convert it to JPEG", "not a plain file"
TEXTS = {".json", ".txt", ".cls"}
# Columns that say where a picture lies, or why it is not read.
PLACE = {"file #": pa.int64(), "offset #": pa.int64(), "size #": pa.int64(), "why #": pa.string()}


@dataclass
class Faults:
    """What is wrong with the texts of products in tars.

    Attributes:
        differing: {column in which files of one product differ: which product's files}.
        unread: how many .json files are not read.
        first: the first of these .json files.
    """

    differing: dict[str, str] = field(default_factory=dict)
    unread: int = 0
    first: str = ""


def open_tars(paths: list[Path], texts: Path, needs: Sequence[str]) -> Opened:
    """Open the files of one catalogue, in order.

    Args:
        texts: the file that text and the places of pictures are copied to; if it exists, it holds both already.
        needs: the text columns that must exist.

    Raises:
        UserError: a file is not a tar or is damaged, or a column is missing or contradictory.
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
    for name in ("id", *needs):  # checked in what is kept: its writer may have needed other columns
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

    return columns_of(table.drop_columns(list(PLACE))), read, None


def _batches(paths: list[Path], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    products = iter(tqdm(_products(paths, Faults()), desc="reading tar files", unit="row"))  # one bar for all batches
    while some := list(itertools.islice(products, READ)):
        rows = [cells | dict(zip(PLACE, (file, *place), strict=True)) for file, cells, place in some]
        yield pa.RecordBatch.from_pylist(rows, schema)


def _products(paths: list[Path], faults: Faults) -> Iterator[tuple[int, dict[str, str | None], tuple]]:
    """For each product with a picture: the number of its tar file, its cells, and the place of its picture.

    Raises:
        UserError: a tar is damaged, or a product's text does not lie beside its picture.
    """
    for number, path in enumerate(paths):
        lone = set()  # products without a readable picture here, though one may lie elsewhere
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
    """A product's cells, and the place of its first picture: (offset, size, None); (None, None, reason) if none can be
    read; None if it has none."""
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
    """A file's cells for its product; None for a .json that is not an object of at most `TEXT_BYTES`."""
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
    """A value that was read, as a cell of text that any format can hold."""
    cell = text(value)
    return cell and clean(cell)


def read_titles(path: Path, column: str) -> dict[str, str | None]:
    """{product: title} of a tar: from the column, as training reads it, else from the text file. This is a separate
    pass, so that no picture has to wait in memory for its title."""
    said: dict[str, dict] = defaultdict(dict)
    with contextlib.suppress(tarfile.TarError):  # reading the pictures meets the same damage and reports it
        for tar, member in members(path, TEXTS):
            if is_plain(member):
                suffix = PurePosixPath(member.name).suffix.lower()
                cells = _cells(suffix, tar.extractfile(member).read(TEXT_BYTES + 1)) or {}
                said[product(member.name)] |= {key: cells[key] for key in (column, "txt") if cells.get(key)}
    return {name: cells.get(column) or cells.get("txt") for name, cells in said.items()}


def is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()  # a sparse file may claim any size


def product(name: str) -> str:
    """The part of the name that all members of a product share: the folder, and the file name up to its first dot."""
    path = PurePosixPath(clean(name))
    return str(path.with_name(path.name.split(".")[0] or path.name))


def members(path: Path, suffixes: Iterable[str]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members with these suffixes, in order, read as they come, without macOS's metadata files (`._shirt.jpg`).

    Raises:
        tarfile.TarError, OSError: the tar is damaged, or lacks its end mark.
    """
    size, end = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep them all in memory
                has_data = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
                whole = member.size >= 0 and tar.offset > end  # else it would be read again, and again
                if not whole or (has_data and member.offset_data + member.size > size):
                    raise tarfile.ReadError(f"{member.name} is not whole")
                end = tar.offset
                name = PurePosixPath(member.name)
                if not member.isdir() and name.suffix.lower() in suffixes and not name.name.startswith(MACS_OWN):
                    yield tar, member
            tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header, or none, for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("no end mark")
    except (ValueError, OverflowError, MemoryError, RecursionError) as error:  # tarfile believes any size in a header
        raise tarfile.ReadError(f"a damaged header ({first_line(error)})") from error
