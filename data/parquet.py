"""Parquet as the hub keeps it, text columns and `image`, a struct of bytes and path: read where it lies.

Text columns are copied once into a file that is mapped; pictures are not. Parquet has no way to read a single row, so
pictures are read in runs of neighbouring rows, of which the last few are kept: whoever reads rows in order, or shuffled
within a few runs, reads each run once.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem

from data.cells import text
from data.columns import Opened, columns_of, kept
from data.images import ImageError
from errors import UserError

READ = 64  # rows at a time: of pictures of 5 MB that is 320 MB
BUFFER = 1 << 20  # bytes of a column that are read ahead
RUN_ROWS, RUN_BYTES = 4096, 32 << 20  # a run, at most
WINDOW = 4  # runs that are shuffled together


class File(NamedTuple):
    path: Path | str
    rows: int
    nbytes: int
    schema: pa.Schema
    filesystem: HfFileSystem | None  # that of a path which is not on this machine


def failures(filesystem: HfFileSystem | None) -> tuple[type[Exception], ...]:
    """What reading a file may raise: over a network, errors of several libraries."""
    return (Exception,) if filesystem else (pa.ArrowException, OSError)


def open_file(path: Path | str, filesystem: HfFileSystem | None = None) -> File:
    """What a file's footer says.

    Raises:
        UserError: it is no parquet, or has no such column `image`.
    """
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            schema, groups = file.schema_arrow, [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            nbytes = sum(group.total_byte_size for group in groups)
            sizes = File(path, file.metadata.num_rows, nbytes, schema, filesystem)
    except failures(filesystem) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}".splitlines()[0]) from None
    if "image" not in schema.names:
        raise UserError(f"{path} lacks the column image; it has {', '.join(schema.names)}")
    image = schema.field("image").type
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise UserError(f"{path}: its column image holds {image}, and should hold bytes and path")
    return sizes


def open_parquet(paths: list[Path] | list[str], texts: Path, filesystem: HfFileSystem | None = None) -> Opened:
    """Files of one catalogue, in order.

    Args:
        filesystem: where they are, if not on this machine: read a run at a time, and never copied.
        texts: where the text columns are copied to; a file that is there holds them.

    Raises:
        UserError: a file is no parquet, has no pictures, or other columns than the first.
    """
    files = [open_file(path, filesystem) for path in paths]
    names = [name for name in files[0].schema.names if name != "image"]
    for file in files[1:]:
        if odd := set(names) ^ {name for name in file.schema.names if name != "image"}:
            raise UserError(f"{file.path} and {files[0].path} differ in the column {min(odd)}")
    schema = pa.schema([(name, pa.string()) for name in names])
    table = kept(texts, schema, _texts(files, schema))
    per_row = sum(file.nbytes for file in files) / max(1, sum(file.rows for file in files))
    run = max(1, min(RUN_ROWS, int(RUN_BYTES / max(1, per_row))))
    return Opened(columns_of(table), Pictures(files, run), run)


def _texts(files: list[File], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for file in files:
        try:
            with pq.ParquetFile(file.path, filesystem=file.filesystem) as opened:
                for batch in opened.iter_batches(RUN_ROWS, columns=schema.names):
                    cells = [[text(cell) for cell in batch.column(name).to_pylist()] for name in schema.names]
                    yield pa.record_batch([pa.array(some, pa.string()) for some in cells], schema)
        except failures(file.filesystem) as error:
            raise UserError(f"{file.path} cannot be read as parquet: {error}".splitlines()[0]) from None


class Pictures:
    """row -> encoded bytes, for any thread."""

    def __init__(self, files: list[File], run: int):
        self.files, self.run = files, run
        self.begins = [0, *itertools.accumulate(file.rows for file in files)]
        self.kept: OrderedDict[int, list[bytes | str | None]] = OrderedDict()  # or the reason why there is none
        self.lock = Lock()

    def __call__(self, row: int) -> bytes:
        number, place = divmod(int(row), self.run)
        with self.lock:
            if number not in self.kept:
                if len(self.kept) > 2 * WINDOW:  # a run of a part of the rows can lie in two of all
                    self.kept.popitem(last=False)
                self.kept[number] = list(self._read(number * self.run, (number + 1) * self.run))
            self.kept.move_to_end(number)
            picture = self.kept[number][place]
        if not isinstance(picture, bytes):
            raise ImageError(picture or "no image in this row")
        return picture

    def _read(self, start: int, stop: int) -> Iterator[bytes | str | None]:
        for file, begin in zip(self.files, self.begins, strict=False):
            low, high = max(start - begin, 0), min(stop - begin, file.rows)
            if low < high:
                done = low
                try:
                    for cells in rows(file.path, low, high, filesystem=file.filesystem):
                        yield cells["image"] and cells["image"]["bytes"]
                        done += 1
                except failures(file.filesystem) as error:
                    if file.filesystem:  # a network that fails is no property of the rows
                        raise UserError(f"{file.path} broke off: {error}".splitlines()[0]) from error
                    yield from [f"damaged parquet: {error}".splitlines()[0]] * (high - done)


def rows(
    path: Path | str,
    start: int,
    stop: int,
    columns: Iterable[str] = ("image.bytes",),
    filesystem: HfFileSystem | None = None,
) -> Iterator[dict]:
    """Rows `start` to `stop` of a file, from the row groups that hold any of them: those before `start` are read past.

    Raises:
        pa.ArrowException, OSError: the file is damaged.
    """
    # Without the two options pyarrow has a row group's columns in memory whole.
    with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False, filesystem=filesystem) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        begins = [0, *itertools.accumulate(sizes)]
        groups = [i for i, size in enumerate(sizes) if begins[i] < stop and begins[i] + size > start]
        at = begins[groups[0]]
        for batch in file.iter_batches(READ, row_groups=groups, columns=list(columns)):
            low, high = max(start - at, 0), min(stop - at, len(batch))
            if low < high:
                yield from batch.slice(low, high - low).to_pylist()
            at += len(batch)
            if at >= stop:
                return
