"""Text columns that stay on disk and are read in order, so that memory does not grow with the number of rows."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import compress
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.cells import text
from data.schema import nearest
from durable import claim, give_name
from errors import UserError

READ = 8192  # rows at a time
VERSION = 4  # of the files: raise it when cells are written in another way


class Column(Sequence):
    """The cells of an Arrow column as text, None where missing. `cells` may lie in a memory-mapped file. With `names`,
    they are class numbers, and their text is the name of the class."""

    def __init__(self, cells: pa.ChunkedArray, names: Sequence[str] | None = None):
        self.cells, self.names = cells, names

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, row: int | slice) -> str | list[str | None] | None:
        if isinstance(row, slice):
            return [as_text(_plain(cell), self.names) for cell in self.cells[row]]
        return as_text(_plain(self.cells[int(row)]), self.names)

    def only(self, wanted: np.ndarray) -> "Column":
        """The rows where `wanted` (N,) is true, copied into memory without loading all others."""
        return Column(self.cells.filter(pa.array(wanted)), self.names)

    def __iter__(self) -> Iterator[str | None]:
        for start in range(0, len(self), READ):
            yield from (as_text(cell, self.names) for cell in _plain(self.cells.slice(start, READ)))


def as_text(cell, names: Sequence[str] | None) -> str | None:
    """A cell as text, or with `names` the name of that class; None where it is missing or no number of a class."""
    if names is None or cell is None:
        return text(cell)
    return text(names[cell]) if 0 <= cell < len(names) else None


def _plain(cells: pa.ChunkedArray | pa.Scalar):
    """Cells as Python values. Raises `UserError` for text that is not UTF-8, which Arrow does not check on reading."""
    try:
        return cells.as_py() if isinstance(cells, pa.Scalar) else cells.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"a cell of the table, {error.object[:80]!r}, is not UTF-8; write it anew as such") from None


Opened = tuple[dict[str, Column], Callable[[int], bytes], int | None]  # `columns`, `read` and `run` of a `Catalogue`


def check_columns(found: Collection[str], required: Sequence[str], where: object) -> None:
    """Raise a `UserError` if a required column is missing."""
    if missing := [name for name in dict.fromkeys(required) if name not in found]:
        hint = "; rename to id the one that tells rows apart" * (missing[0] == "id")
        names = ", ".join(missing) + nearest(missing[0], found)
        raise UserError(f"{where} lacks the column {names}; it has {', '.join(found)}{hint}")


def cell_names(schema: pa.Schema) -> list[str]:
    """The names of the columns that hold text or numbers, without those of pictures or lists."""
    apart = pa.types.is_nested, pa.types.is_binary, pa.types.is_large_binary
    return [field.name for field in schema if field.name != "image" and not any(kind(field.type) for kind in apart)]


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """{column: class names} for columns of class numbers, as `datasets` keeps a `ClassLabel` in Arrow and parquet."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"].items()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):  # not written by `datasets`
        return {}
    numbers = {field.name for field in schema if pa.types.is_integer(field.type)}  # else other cells replaced them
    classes = {name: f for name, f in features if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    return {name: f["names"] for name, f in classes.items() if name in numbers and isinstance(f.get("names"), list)}


def columns_of(table: pa.Table) -> dict[str, Column]:
    names = class_names(table.schema)
    return {name: Column(table.column(name), names.get(name)) for name in cell_names(table.schema)}


def kept(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """A table that is memory-mapped from the file `path`, which is first written from `batches` if it is missing.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with claim(path.with_name(f".{path.name}.lock"), wait=True):  # of several processes one writes
            if not path.exists():
                _write(path, schema, batches)
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged ({error}); delete it") from None


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    part = path.with_name(f".{path.name}.part")  # replaces what a killed process may have left
    try:
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        give_name(part, path)
    finally:
        part.unlink(missing_ok=True)


class Chosen(Iterable):
    """The cells of some rows that are not missing, in the order of the column; each iteration reads them again."""

    def __init__(self, cells: Sequence[str | None], rows: Sequence[int]):
        self.cells, self.wanted = cells, np.zeros(len(cells), dtype=bool)
        self.wanted[rows] = True

    def __iter__(self) -> Iterator[str]:
        return (text for text in compress(self.cells, self.wanted) if text is not None)
