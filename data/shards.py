"""The inputs of `infer.py` (picture files, parquet, tar, CSV, hub datasets), cut into shards that are read row by row.

Except for CSV, nothing is read as a whole first, so memory does not grow with the number of rows. (A page of parquet
must be in memory whole, and pyarrow fills it with 1,024 rows.)

    picture files   a slice of the sorted listing is a shard; a picture is read when its turn comes
    parquet         a range of rows is a shard, and only the columns that are needed are read. A range that begins
                    inside a row group reads the rows before it too, so row groups that span many shards cost time
    tar             one shard each, as WebDataset writes them: members whose names agree up to the first dot are one
                    product; each of its pictures is a row, its title is in a `.txt`, or in a `.json` under the column
    CSV             a file beside a folder `images/`, as training takes it; a slice of its rows is a shard, and after
                    these come the rows without a picture
    hub:OWNER/NAME  each of its files is a shard, streamed by `datasets`

A picture that cannot be read gives a row with the reason. A parquet file that does not open raises a `UserError`; if it
turns out to be damaged later, every row from there to the end of the shard says so. A tar that is damaged or cut short
gives the pictures before that place, then a row with the tar's own name that says so. A failed disk raises `UserError`.
"""

import functools
import hashlib
import itertools
import os
import tarfile
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import hub
from data.catalogue import Catalogue
from data.cells import clean, text
from data.csv_folder import open_csv
from data.images import ImageError, no_image, raise_if_failing
from data.inputs import find_inputs, kind_of
from data.parquet import File, open_file
from data.parquet import rows as parquet_rows
from data.tars import IMAGES, NOT_PLAIN, NOT_READ, UNREAD, cleaned, is_plain, members, product, read_titles
from errors import UserError, first_line, told

SHARD_ROWS = 4096


class Row(NamedTuple):
    """A picture to look at.

    Attributes:
        name: its name in the answers: the file's; in CSV the row's `id`; in parquet and on the hub its `id`, else
            image.path, else FILE#ROW (on the hub, FILE includes the commit); in a tar the member's name, which occurs
            once in a set of tars.
        picture: the encoded bytes, or the file that holds them, or the reason why there is no picture.
        title: None if there is none, or if titles were not asked for.
    """

    name: str
    picture: bytes | Path | str
    title: str | None = None


class Shard(NamedTuple):
    """Rows that are read in one go, the same ones each time; their number is unknown for a tar or the hub."""

    rows: int | None
    read: Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Source:
    """Attributes:
    shards: in order; together they have all rows that were asked for.
    fingerprint: changes with the name or the size of any input, for CSV also with the catalogue's fingerprint, and with
        the names of the rows that are left out.
    files: the picture files among the inputs.
    paths: all files among the inputs, and the pictures beside a CSV file.
    hub: the hub datasets among the inputs, each with the commit that is read.
    notes: what the user should know about how the inputs were understood.
    """

    shards: list[Shard]
    fingerprint: str
    files: list[Path]
    paths: list[Path]
    hub: list[str]
    notes: list[str]

    @property
    def rows(self) -> int | None:
        """The number of rows, or None if that of some shard is unknown."""
        counts = [shard.rows for shard in self.shards]
        return None if None in counts else sum(counts)


def open_source(
    asked: list[str],
    title: str | None = None,
    rows: int = SHARD_ROWS,
    labelled: Set[str] = frozenset(),
) -> Source:
    """Open files, folders, globs and `hub:OWNER/NAME` (see `find_inputs`), in order, each once.

    Args:
        title: the column of titles, if titles are asked for.
        rows: the most rows of a shard, where the input can be cut into shards.
        labelled: names of rows to leave out.

    Raises:
        UserError: an input does not exist; there are no rows; a parquet file is not parquet or lacks `image`.
    """
    notes: list[str] = []
    found = {name: None for word in asked for name in find_inputs(word, notes)}  # each once
    shards, facts, files, beside, hub_names = [], [], [], [], []
    for kind, some in itertools.groupby(found, kind_of):
        some = list(some)
        if kind == "hub":
            for name in some:
                hub_names.append(name := hub.pinned(name))
                facts.append(name)
                shards += _without(stream_shards(name, _load_hub(name), title), labelled)
            continue
        facts += [(os.fsencode(path), path.stat().st_size if os.path.exists(path) else None) for path in some]
        if kind == "image":
            left = [path for path in some if _file_name(path) not in labelled]
            _note_left_out(len(some), len(left), labelled, notes)
            files += (some := left)
            cuts = [some[start : start + rows] for start in range(0, len(some), rows)]
            shards += [Shard(len(cut), functools.partial(_file_rows, cut)) for cut in cuts]
        elif kind == "parquet":
            for path in some:
                shards += _without(_parquet_shards(path, rows, title, notes), labelled)
        elif kind == "csv":
            for path in some:
                catalogue = _open_csv(path, title, notes)
                facts.append((os.fsencode(path), catalogue.fingerprint))
                cut = _csv_shards(catalogue, rows, title, labelled)
                left = sum(shard.rows for shard in cut)
                _note_left_out(len(catalogue) + len(catalogue.skipped), left, labelled, notes)
                shards += cut
                beside += (p for p in (path.parent / "images").rglob("*") if p.is_file())
        else:
            shards += _without([Shard(None, functools.partial(_tar_rows, path, title)) for path in some], labelled)
    if not shards and not labelled:
        raise UserError(f"{', '.join(asked)} has no rows")
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    for name in sorted(labelled):
        digest.update(f"{name}\n".encode())
    paths = [*(p for p in found if isinstance(p, Path)), *beside]
    return Source(shards, digest.hexdigest(), files, paths, hub_names, notes)


def _note_left_out(rows: int, left: int, labelled: Set[str], notes: list[str]) -> None:
    if labelled:
        notes.append(f"left out, as they have labels: {rows - left:,} of {rows:,}")


def _without(shards: list[Shard], labelled: Set[str]) -> list[Shard]:
    """The shards without the rows of these names, which become known only as rows are read."""

    def rest(shard: Shard) -> Iterator[Row]:
        return (row for row in shard.read() if row.name not in labelled)

    return [Shard(None, functools.partial(rest, shard)) for shard in shards] if labelled else shards


def _file_name(path: Path) -> str:
    # A file name need not be valid text; bytes that are not are replaced, or no format could write the name.
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def _file_rows(paths: list[Path]) -> Iterator[Row]:
    return (Row(_file_name(path), path) for path in paths)


def _open_csv(table: Path, title: str | None, notes: list[str]) -> Catalogue:
    with told(f"cannot read {table}"):
        catalogue = open_csv(table)
    if title and title not in catalogue.columns:
        notes.append(f"{table} lacks the column of titles, {title}: its pictures are read without")
    return catalogue


def _csv_shards(catalogue: Catalogue, rows: int, title: str | None, labelled: Set[str]) -> list[Shard]:
    lost = [Row(skipped.id, skipped.reason) for skipped in catalogue.skipped if skipped.id not in labelled]
    left = [i for i, id in enumerate(catalogue.ids) if id not in labelled]
    cuts = [left[start : start + rows] for start in range(0, len(left), rows)]
    shards = [Shard(len(cut), functools.partial(_csv_rows, catalogue, cut, title)) for cut in cuts]
    return shards + ([Shard(len(lost), lambda: iter(lost))] if lost else [])


def _csv_rows(catalogue: Catalogue, some: list[int], title: str | None) -> Iterator[Row]:
    titles = catalogue.columns.get(title)
    for i in some:
        try:
            picture = catalogue.read(i)
        except ImageError as error:
            raise_if_failing(error, f"{catalogue.name}, id {catalogue.ids[i]}")
            picture = str(error)
        yield Row(catalogue.ids[i], picture, titles[i] if titles else None)


def _parquet_shards(path: Path, rows: int, title: str | None, notes: list[str]) -> list[Shard]:
    file = open_file(path)
    if title and title not in file.schema.names:
        notes.append(f"{path} lacks the column of titles, {title}: its pictures are read without")
    return [
        Shard(stop - start, functools.partial(_parquet_rows, file, start, stop, title))
        for start in range(0, file.rows, rows)
        for stop in [min(start + rows, file.rows)]
    ]


def _parquet_rows(file: File, start: int, stop: int, title: str | None) -> Iterator[Row]:
    columns = ["id", "image.bytes", "image.path", *([title] if title else [])]
    for number, cells in enumerate(parquet_rows(file, start, stop, columns), start):
        name = f"{file.path}#{number}"
        yield Row(name, cells) if isinstance(cells, str) else _row(cells, name, title)


def _row(cells: dict, otherwise: str, title: str | None) -> Row:
    """A row in the hub's schema, with the name `otherwise` if it gives none."""
    image = cells["image"] or {}
    name = text(cells.get("id")) or cleaned(image.get("path")) or otherwise
    return Row(name, image.get("bytes") or no_image(image), text(cells.get(title)) if title else None)


def _tar_rows(path: Path, title: str | None) -> Iterator[Row]:
    count = 0
    try:
        titles = read_titles(path, title) if title else {}
        for name, some in itertools.groupby(members(path, IMAGES | UNREAD), lambda found: product(found[1].name)):
            unread, before = None, count
            for tar, member in some:
                if PurePosixPath(member.name).suffix.lower() in UNREAD:
                    unread = clean(member.name)
                    continue
                picture = tar.extractfile(member).read() if is_plain(member) else NOT_PLAIN
                yield Row(clean(member.name), picture, titles.get(name))
                count += 1
            if unread and count == before:  # not if its JPEG lies beside it, as phones export them
                yield Row(unread, NOT_READ, titles.get(name))
    except (tarfile.TarError, OSError) as error:
        if getattr(error, "errno", None):  # a disk failed, which says nothing about the rows and may be temporary
            raise UserError(f"{path} broke off: {os.strerror(error.errno)}; start again") from error
        yield Row(_file_name(path), clean(f"damaged or cut short after {count:,} pictures: {error}"))


def _load_hub(name: str) -> dict:
    """The streamed splits of a dataset on the hub, at the commit that is a part of its name."""
    repo, revision = name.removeprefix("hub:").split("@")
    import datasets

    try:
        return dict(datasets.load_dataset(repo, streaming=True, revision=revision))
    except Exception as error:  # several libraries raise here; any error means no dataset
        raise UserError(f"cannot stream {name}: {first_line(error)}") from error


def stream_shards(name: str, splits: dict, title: str | None = None) -> list[Shard]:
    """One shard for each file of the streamed splits, {split: `datasets.IterableDataset`}.

    Raises:
        UserError: a split has no column of images.
    """
    from datasets import Image

    shards = []
    for split, rows in splits.items():
        if "image" not in (columns := rows.column_names or []):
            raise UserError(f"{name}, split {split}, has no column image; it has {', '.join(columns) or 'none'}")
        rows = rows.select_columns([column for column in ("id", "image", title) if column in columns])
        rows = rows.cast_column("image", Image(decode=False))
        for i in range(rows.num_shards):
            part = rows.shard(rows.num_shards, i)
            shards.append(Shard(None, functools.partial(_stream_rows, part, f"{name}/{split}-{i}", title)))
    return shards


def _stream_rows(part, name: str, title: str | None) -> Iterator[Row]:
    number = 0
    try:
        for cells in part:
            yield _row(cells, f"{name}#{number}", title)
            number += 1
    except Exception as error:  # several libraries raise here; a failed network says nothing about the rows
        raise UserError(f"{name} broke off after {number:,} rows: {first_line(error)}; start again") from error
