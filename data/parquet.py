"""Parquet in the hub's schema (text columns, and `image`, a struct of bytes and path), read in place.

Text columns are copied once into a memory-mapped file; pictures are not copied. Parquet cannot read a single row, so
pictures are read in runs of neighbouring rows, of which the last few are kept in memory: if rows are read in order, or
shuffled within a few runs, each run is read once.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from data.columns import Opened, as_text, cell_names, check_columns, class_names, columns_of, kept
from data.images import ImageError
from errors import UserError, first_line

READ = 64  # rows at a time: with pictures of 5 MB that is 320 MB
BUFFER = 1 << 20  # bytes of a column that are read ahead
RUN_ROWS, RUN_BYTES = 4096, 32 << 20  # a run, at most
WINDOW = 4  # runs that are shuffled together
LAG = 1024  # pictures that other threads may ask for while one decodes a large one
BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)  # null: the type in a file without pictures


class File(NamedTuple):
    path: Path | str
    rows: int
    nbytes: int
    schema: pa.Schema
    filesystem: FileSystem | None  # for a path that is not on this machine
    stat: tuple[int, int] | None = None  # size and time of a file on this machine, as it was when it was first opened

    def open(self, **options) -> pq.ParquetFile:
        """Raises a `UserError` if the file was replaced since, as its rows are others."""
        if self.stat and self.stat != stat_of(self.path):
            raise UserError(f"{self.path} was replaced meanwhile; start again, a run with --resume")
        return pq.ParquetFile(self.path, filesystem=self.filesystem, **options)

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What reading may raise: over a network, errors of several libraries."""
        return (Exception,) if self.filesystem else (pa.ArrowException, OSError, ValueError, OverflowError)


def stat_of(path: Path | str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def open_file(path: Path | str, filesystem: FileSystem | None = None) -> File:
    """Read a file's footer.

    Raises:
        UserError: the file is not parquet, or has no column `image` with bytes.
    """
    found = File(path, 0, 0, pa.schema([]), filesystem)
    try:
        found = found._replace(stat=None if filesystem else stat_of(path))
        with found.open() as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            rows, nbytes = sum(group.num_rows for group in groups), sum(group.total_byte_size for group in groups)
            found = found._replace(rows=rows, nbytes=nbytes, schema=file.schema_arrow)
    except found.failures as error:
        raise UserError(f"{path} cannot be read as parquet: {first_line(error)}") from None
    if twice := [name for name, times in Counter(found.schema.names).items() if times > 1]:
        raise UserError(f"{path} has the column {twice[0]} twice")
    if "image" not in found.schema.names:
        raise UserError(f"{path} lacks the column image; it has {', '.join(found.schema.names)}")
    image = found.schema.field("image").type
    where = image.get_field_index("bytes") if pa.types.is_struct(image) else -1
    if where < 0 or not any(kind(image.field(where).type) for kind in BINARY):
        raise UserError(f"{path}: its column image holds {image}, and should hold bytes, in binary, and path")
    return found


def open_parquet(
    paths: list[Path] | list[str], texts: Path, needs: Sequence[str], filesystem: FileSystem | None = None
) -> Opened:
    """Open the files of one catalogue, in order.

    Args:
        texts: the file that the text columns are copied to; if it exists, it holds them already.
        needs: the text columns that must exist.
        filesystem: where the files are, if not on this machine; pictures are read a run at a time and never copied.

    Raises:
        UserError: a file is not parquet, lacks pictures or a column, or has other columns than the first.
    """
    files = [open_file(path, filesystem) for path in paths]
    names = cell_names(files[0].schema)
    for file in files[1:]:
        if odd := set(names) ^ set(cell_names(file.schema)):
            raise UserError(f"{file.path} and {files[0].path} differ in the column {min(odd)}")
    check_columns(names, needs, files[0].path)
    schema = pa.schema([(name, pa.string()) for name in names])
    table = kept(texts, schema, _texts(files, schema))
    per_row = sum(file.nbytes for file in files) / max(1, sum(file.rows for file in files))
    run = max(1, min(RUN_ROWS, int(RUN_BYTES / max(1, per_row))))
    return columns_of(table), Pictures(files, run), run


def _texts(files: list[File], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for file in files:
        classes = class_names(file.schema)
        try:
            with file.open() as opened:
                for batch in opened.iter_batches(RUN_ROWS, columns=schema.names):
                    cells = [_cells(file, name, batch.column(name), classes.get(name)) for name in schema.names]
                    yield pa.record_batch(cells, schema)
        except UserError:
            raise
        except file.failures as error:
            raise UserError(f"{file.path} cannot be read as parquet: {first_line(error)}") from None


def _cells(file: File, name: str, cells: pa.Array, classes: list[str] | None) -> pa.Array:
    try:
        return pa.array([as_text(cell, classes) for cell in cells.to_pylist()], pa.string())
    except (OverflowError, ValueError) as error:  # as of dates: Python's years end with 9999
        if isinstance(error, UnicodeError | pa.ArrowException):
            raise
        raise UserError(f"{file.path}: a cell of the column {name} cannot be read ({error}); leave it out") from None


class Pictures:
    """A callable, row -> encoded bytes, for any thread."""

    def __init__(self, files: list[File], run: int):
        self.files, self.run = files, run
        self.begins = [0, *itertools.accumulate(file.rows for file in files)]
        # {run: (each picture or the reason why there is none, the value of `asked` when the run was last needed)}
        self.kept: dict[int, tuple[list[bytes | str | None], int]] = {}
        self.asked = 0  # number of pictures asked for so far
        self.ahead, self.next = iter(()), -1  # the rows after the run that was read last, and the next run's number
        self.lock = Lock()

    def __call__(self, row: int) -> bytes:
        number, place = divmod(int(row), self.run)
        with self.lock:
            if number not in self.kept:
                self._make_room()
                self.kept[number] = self._read(number), 0
            pictures, _ = self.kept.pop(number)  # put back as the last: the first is idle for longest
            self.asked += 1
            self.kept[number] = pictures, self.asked
            picture = pictures[place]
        if not isinstance(picture, bytes):
            raise ImageError(picture or "no image in this row")
        return picture

    def _make_room(self) -> None:
        """Drop runs that are no longer asked for: for reading in order, two runs are enough."""
        for number, (_, last) in list(self.kept.items()):
            idle = self.asked - last >= self.run + LAG  # never true of rows shuffled within a window
            # An upper bound for any order of reading. With --limit a run of the chosen rows may span two of the file's.
            if idle or len(self.kept) > 2 * WINDOW:
                del self.kept[number]

    def _read(self, number: int) -> list[bytes | str | None]:
        """Read a run. In order, each picture is read once; else rows before it in its row group are read too."""
        if number != self.next:
            self.ahead = self._from(number * self.run)
        self.next = -1  # if the next line raises, the run is read anew
        pictures = list(itertools.islice(self.ahead, self.run))
        # After damage, the next run is read anew, as it may be intact.
        self.next = -1 if pictures and isinstance(pictures[-1], str) else number + 1
        return pictures

    def _from(self, start: int) -> Iterator[bytes | str | None]:
        for file, begin in zip(self.files, self.begins, strict=False):
            if (first := max(0, start - begin)) < file.rows:
                for row in rows(file, first, file.rows):
                    yield row if isinstance(row, str) else row["image"] and row["image"]["bytes"]


def rows(file: File, start: int, stop: int, columns: Iterable[str] = ("image.bytes",)) -> Iterator[dict | str]:
    """Rows `start` to `stop` of a file; from where it turns out to be damaged, the reason in the place of each row.

    Raises:
        UserError: a network or a disk failed, which says nothing about the rows.
    """
    row = start
    try:
        for cells in _intact_rows(file, start, stop, columns):
            row += 1
            yield cells
    except file.failures as error:
        if file.filesystem or getattr(error, "errno", None):
            raise UserError(f"{file.path} broke off: {first_line(error)}; start again, a run with --resume") from error
        yield from [f"damaged parquet: {first_line(error)}"] * (stop - row)


def _intact_rows(file: File, start: int, stop: int, columns: Iterable[str]) -> Iterator[dict]:
    """Read the row groups that hold any of the rows; rows before `start` are discarded."""
    # Without these two options, pyarrow loads a row group's whole columns into memory.
    with file.open(buffer_size=BUFFER, pre_buffer=False) as opened:
        sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        begins = [0, *itertools.accumulate(sizes)]
        groups = [i for i, size in enumerate(sizes) if begins[i] < stop and begins[i] + size > start]
        at = begins[groups[0]]
        for batch in opened.iter_batches(READ, row_groups=groups, columns=list(columns)):
            low, high = max(start - at, 0), min(stop - at, len(batch))
            if low < high:
                yield from batch.slice(low, high - low).to_pylist()
            at += len(batch)
            if at >= stop:
                return
