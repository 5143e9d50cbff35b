"""What `infer.py` reads, cut into shards that are read one row at a time: picture files, parquet, tar, CSV, the hub's.

But for CSV nothing is read as a whole first, so the number of rows does not show in memory. (A page of parquet has to
be there whole, and pyarrow fills it with 1,024 rows.)

    picture files   a slice of the sorted listing is a shard; a picture is read when it is its turn
    parquet         a range of rows is a shard, and only the columns that are needed are read. A range that begins
                    inside a row group reads past the rows before it, so row groups of many shards cost time
    tar             one shard each, as WebDataset writes them: members whose names agree up to the first dot are one
                    product; each of its pictures is a row, its title is in a `.txt`, or in a `.json` under the column
    CSV             a file beside a folder `images/`, as training takes it; a slice of its rows is a shard, and after
                    these come the rows without a picture
    hub:OWNER/NAME  each of its files is a shard, streamed by `datasets`

A picture that cannot be had is a row with the reason. A parquet file that does not open is a `UserError`; where it
turns out damaged later, every row from there to the end of the shard says so. A tar that is damaged or cut short has,
after the pictures before that place, a row by the tar's own name that says so.
"""

import functools
import glob
import hashlib
import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import hub
from data.catalogue import Catalogue
from data.cells import text
from data.csv_folder import open_csv
from data.images import ImageError
from data.parquet import File, open_file
from data.parquet import rows as parquet_rows
from data.tars import IMAGES, clean, members, product, read_titles
from errors import UserError

KINDS = {"image": IMAGES, "parquet": {".parquet"}, "tar": {".tar"}}  # that folders are searched for
CSV = ".csv"
UNREAD = {".heic", ".heif", ".avif"}
SHARD_ROWS = 4096


class Row(NamedTuple):
    """A picture to look at.

    Attributes:
        name: what an answer calls it: the file; of a CSV file its `id`; of parquet and the hub too, else image.path,
            else FILE#ROW; of a tar the member's name, which in a set of tars is there once.
        picture: encoded, or the file it lies in, or the reason why there is none.
        title: None where none is given, or nobody asked for titles.
    """

    name: str
    picture: bytes | Path | str
    title: str | None = None


class Shard(NamedTuple):
    """Rows that are read in one go, the same ones each time; how many is not known of a tar or the hub."""

    rows: int | None
    read: Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Source:
    """Attributes:
    shards: in order; their rows are all that was asked for.
    fingerprint: changes with the name or the size of any input, of CSV also with what a catalogue's does.
    files: the picture files among the inputs.
    paths: all files among them, and those that they name.
    notes: what the user should know about how the inputs were understood.
    """

    shards: list[Shard]
    fingerprint: str
    files: list[Path]
    paths: list[Path]
    notes: list[str]

    @property
    def rows(self) -> int | None:
        """None where some shard does not know."""
        counts = [shard.rows for shard in self.shards]
        return None if None in counts else sum(counts)


def open_source(
    asked: list[str], title: str | None = None, rows: int = SHARD_ROWS, without: Path | None = None
) -> Source:
    """Files, folders (searched to any depth), globs and `hub:OWNER/NAME`, in order, each once.

    A folder or glob is taken for what it holds: pictures, else parquet, else tar.

    Args:
        title: the column of titles, where they are asked for.
        rows: of a shard, at most, where a shard can be cut.
        without: a job's folder, whose results are no input.

    Raises:
        UserError: there is no such input, or none of its rows; a parquet file that is none, or lacks `image`.
    """
    notes: list[str] = []
    found = {name: None for item in asked for name in _find(item, without, notes)}  # each once
    shards, facts, files, beside = [], [], [], []
    for kind, some in itertools.groupby(found, _kind):
        some = list(some)
        if kind == "hub":
            for name in some:
                splits, revision = _load_hub(name)
                facts.append((name, revision))
                shards += stream_shards(name, splits, title)
            continue
        facts += [(os.fsencode(path), path.stat().st_size) for path in some]
        if kind == "image":
            files += some
            cuts = [some[start : start + rows] for start in range(0, len(some), rows)]
            shards += [Shard(len(cut), functools.partial(_file_rows, cut)) for cut in cuts]
        elif kind == "parquet":
            for path in some:
                shards += _parquet_shards(path, rows, title, notes)
        elif kind == "csv":
            for path in some:
                catalogue = _open_csv(path, title, notes)
                facts.append((os.fsencode(path), catalogue.fingerprint))
                shards += _csv_shards(catalogue, rows, title)
                beside += (p for p in (path.parent / "images").rglob("*") if p.is_file())
        else:
            shards += [Shard(None, functools.partial(_tar_rows, path, title)) for path in some]
    if not shards:
        raise UserError(f"{', '.join(asked)} has no rows")
    fingerprint = hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
    return Source(shards, fingerprint, files, [*(p for p in found if isinstance(p, Path)), *beside], notes)


def _kind(name: str | Path) -> str:
    """Of an input: "hub", "parquet", "tar", "csv", or "image", which is any other file that a user named."""
    if isinstance(name, str):
        return "hub"
    kinds = KINDS | {"csv": {CSV}}
    return next((kind for kind, suffixes in kinds.items() if name.suffix.lower() in suffixes), "image")


def _find(item: str, without: Path | None, notes: list[str]) -> list[str | Path]:
    """The files that a word of the command line means, or the word itself where it names a dataset on the hub."""
    if not item:
        raise UserError("one of the inputs is an empty word; name files or folders")
    if item.startswith("hub:"):
        return [item]
    path = Path(item)
    if os.path.isfile(item):  # which says no to a word too long for a name, where `Path.is_file` raises
        return [path]
    is_folder = os.path.isdir(item)
    matches = path.rglob("*") if is_folder else map(Path, glob.glob(item, recursive=True))
    matches = [p for p in matches if not p.name.startswith("._")]  # of macOS, which holds no picture
    every = set().union(*KINDS.values())
    files = sorted(p for p in matches if p.suffix.lower() in every and p.is_file())
    for kind, count in Counter(p.suffix.lower() for p in matches).items():
        if kind in UNREAD:
            notes.append(f"{item}: {count:,} {kind} left out, a format that is not read; convert them to JPEG")
    if is_folder and (links := sum(p.is_symlink() and p.is_dir() for p in matches if p.suffix.lower() not in every)):
        notes.append(f"{item}: {links:,} linked folder{'s' * (links > 1)} left out, name them to have them read")
    by_kind = {kind: [p for p in files if _kind(p) == kind] for kind in KINDS}
    if is_folder and (path / "images").is_dir() and (tables := sorted(path.glob(f"*{CSV}"))):
        notes.append(f"{item}: {', '.join(map(str, tables))} left out; name one to have answers go by its ids")
    if without:  # results of an earlier run are parquet too
        labels = (without / "labels").resolve()
        by_kind["parquet"] = [p for p in by_kind["parquet"] if labels not in p.resolve().parents]
    chosen, *others = [kind for kind, some in by_kind.items() if some] or [None]
    if chosen is None:
        where = f"no image in folder {item}" if is_folder else f"no image file, folder or match for {item!r}"
        raise UserError("; ".join([f"{where} (looked for {', '.join(sorted(every))})", *notes]))
    for kind in others:
        count = f"{len(by_kind[kind]):,} {kind} file{'s' * (len(by_kind[kind]) > 1)}"
        notes.append(f"{item}: took the {chosen} files; {count} left out, name them to have them read")
    return by_kind[chosen]


def _file_rows(paths: list[Path]) -> Iterator[Row]:
    for path in paths:
        # A file name need not be text; what no text can hold is replaced, or no format could write it.
        yield Row(os.fsencode(path).decode("utf-8", "replace"), path)


def _open_csv(table: Path, title: str | None, notes: list[str]) -> Catalogue:
    try:
        catalogue = open_csv(table)
    except OSError as error:
        raise UserError(f"cannot read {table}: {error.strerror}") from None
    if title and title not in catalogue.columns:
        notes.append(f"{table} lacks the column of titles, {title}: its pictures are read without")
    return catalogue


def _csv_shards(catalogue: Catalogue, rows: int, title: str | None) -> list[Shard]:
    lost = [Row(skipped.id, skipped.reason) for skipped in catalogue.skipped]
    cuts = [range(len(catalogue))[start : start + rows] for start in range(0, len(catalogue), rows)]
    shards = [Shard(len(cut), functools.partial(_csv_rows, catalogue, cut, title)) for cut in cuts]
    return shards + ([Shard(len(lost), lambda: iter(lost))] if lost else [])


def _csv_rows(catalogue: Catalogue, some: range, title: str | None) -> Iterator[Row]:
    titles = catalogue.columns.get(title)
    for i in some:
        try:
            picture = catalogue.read(i)
        except ImageError as error:
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
    """Rows `start` to `stop` of a file; from where it turns out damaged, each with that as its reason."""
    number = start
    try:
        for cells in parquet_rows(file, start, stop, ["id", "image.bytes", "image.path", *([title] if title else [])]):
            yield _row(cells, f"{file.path}#{number}", title)
            number += 1
    except file.failures as error:
        reason = f"damaged parquet: {error}".splitlines()[0]
        yield from (Row(f"{file.path}#{n}", reason) for n in range(number, stop))


def _row(cells: dict, otherwise: str, title: str | None) -> Row:
    """A row in the hub's schema, with the name it has where it gives none."""
    image = cells["image"] or {}
    name = text(cells.get("id")) or image.get("path") or otherwise
    return Row(name, image.get("bytes") or "no image in this row", text(cells.get(title)) if title else None)


def _tar_rows(path: Path, title: str | None) -> Iterator[Row]:
    titles, count = read_titles(path, title) if title else {}, 0
    try:
        for tar, member in members(path, IMAGES):
            plain = member.isreg() and not member.issparse()  # a sparse one may claim any size
            picture = tar.extractfile(member).read() if plain else "not a plain file"
            yield Row(clean(member.name), picture, titles.get(product(member.name)))
            count += 1
    except (tarfile.TarError, OSError) as error:
        yield Row(str(path), f"damaged or cut short after {count:,} pictures: {error}")


def _load_hub(name: str) -> tuple[dict, str]:
    """The streamed splits of a dataset on the hub, and the commit they are of, which is the same in every process."""
    repo, revision = hub.pinned(name).removeprefix("hub:").split("@")
    import datasets

    try:
        return dict(datasets.load_dataset(repo, streaming=True, revision=revision)), revision
    except Exception as error:  # of several libraries; whatever it is, there is no dataset
        raise UserError(f"cannot stream {name}: {error}".splitlines()[0]) from error


def stream_shards(name: str, splits: dict, title: str | None = None) -> list[Shard]:
    """The files of streamed splits, {split: `datasets.IterableDataset`}, a shard each.

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
    except Exception as error:  # of several libraries; a network that fails is no property of the rows
        raise UserError(f"{name} broke off after {number:,} rows: {error}; start again".splitlines()[0]) from error
