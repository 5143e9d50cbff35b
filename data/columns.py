"""Text columns that stay on disk: read in order, so that the number of rows does not show in memory."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data.cells import text
from data.schema import nearest
from durable import claim, give_name
from errors import UserError

READ = 8192  # rows at a time
VERSION = 4  # of the files: raise it when their cells would be written otherwise


class Column(Sequence):
    """The cells of a column of Arrow's, as text, None where missing: `cells` may lie in a mapped file. They may be the
    numbers of classes that have `names`."""

    def __init__(self, cells: pa.ChunkedArray, names: Sequence[str] | None = None):
        self.cells, self.names = cells, names

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, row: int | slice) -> str | list[str | None] | None:
        if isinstance(row, slice):
            return [as_text(_plain(cell), self.names) for cell in self.cells[row]]
        return as_text(_plain(self.cells[int(row)]), self.names)

    def only(self, wanted: np.ndarray) -> "Column":
        """The rows where `wanted` (N,) is true, in memory, without all others on the way."""
        return Column(self.cells.filter(pa.array(wanted)), self.names)

    def __iter__(self) -> Iterator[str | None]:
        for start in range(0, len(self), READ):
            yield from (as_text(cell, self.names) for cell in _plain(self.cells.slice(start, READ)))


def as_text(cell, names: Sequence[str] | None) -> str | None:
    """A cell, or the name of the class whose number it is; None where missing: with `names`, also what is negative."""
    if names is None or cell is None:
        return text(cell)
    return text(names[cell]) if 0 <= cell < len(names) else None


def _plain(cells: pa.ChunkedArray | pa.Scalar):
    """As Python has them. Raises a `UserError` for text that is none, which Arrow takes from a file unseen."""
    try:
        return cells.as_py() if isinstance(cells, pa.Scalar) else cells.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"a cell of the table, {error.object[:80]!r}, is not UTF-8; write it anew as such") from None


class Opened(NamedTuple):
    """Files of a catalogue, open.

    Attributes:
        columns: of text.
        read: row -> the picture's encoded bytes, in any thread; raises `ImageError` where there are none.
        run: how many neighbouring rows are read together; None where any row is read by itself.
    """

    columns: dict[str, Column]
    read: Callable[[int], bytes]
    run: int | None


def check_columns(found: Collection[str], required: Sequence[str], where: object) -> None:
    """Raise a `UserError` where not all columns that are required are found."""
    if missing := [name for name in dict.fromkeys(required) if name not in found]:
        hint = "; rename to id the one that tells rows apart" * (missing[0] == "id")
        names = ", ".join(missing) + nearest(missing[0], found)
        raise UserError(f"{where} lacks the column {names}; it has {', '.join(found)}{hint}")


def cell_names(schema: pa.Schema) -> list[str]:
    """The columns that hold text or numbers: no further pictures, and no lists."""
    apart = pa.types.is_nested, pa.types.is_binary, pa.types.is_large_binary
    return [field.name for field in schema if field.name != "image" and not any(kind(field.type) for kind in apart)]


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Of the columns that hold numbers of classes, as `datasets` keeps a `ClassLabel` in Arrow and parquet."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"].items()
    except (KeyError, TypeError, ValueError, AttributeError):  # not written by it
        return {}
    numbers = {field.name for field in schema if pa.types.is_integer(field.type)}  # or they were replaced since
    classes = {name: f for name, f in features if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    return {name: f["names"] for name, f in classes.items() if name in numbers and "names" in f}


def columns_of(table: pa.Table) -> dict[str, Column]:
    names = class_names(table.schema)
    return {name: Column(table.column(name), names.get(name)) for name in cell_names(table.schema)}


def kept(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """A table whose rows lie in the file `path`, mapped; written first, as they come, if it is not there.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with claim(path.with_name(f".{path.name}.lock"), wait=True):  # of several at once one writes
            if not path.exists():
                _write(path, schema, batches)
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged ({error}); delete it") from None


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    part = path.with_name(f".{path.name}.part")  # over what a killed process may have left
    try:
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        give_name(part, path)
    finally:
        part.unlink(missing_ok=True)


class Chosen(Iterable):
    """The cells of some rows that there are, in the order of the column; read anew each time they are asked for."""

    def __init__(self, cells: Sequence[str | None], rows: Sequence[int]):
        self.cells, self.wanted = cells, np.zeros(len(cells), dtype=bool)
        self.wanted[rows] = True

    def __iter__(self) -> Iterator[str]:
        return (text for text in compress(self.cells, self.wanted) if text is not None)
