"""Where a catalogue comes from: the hub, parquet or tar files, a CSV file beside a folder of images, the drawn demo.

All give the same `Catalogue`: rows of text columns, and encoded picture bytes on demand. The column `id` and those that
the caller asks for must exist; all other columns are included too.
"""

import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import hub
from data.catalogue import Catalogue, skipped_why, stat_fingerprint
from data.cells import clean
from data.columns import VERSION, Column, check_columns, columns_of
from data.csv_folder import find_csv, open_csv
from data.images import MACS_OWN, ImageError, no_image
from data.inputs import all_files, without_answers
from data.parquet import BUFFER, open_parquet
from data.tars import open_tars
from errors import UserError, first_line, say_once

NAME_BYTES = 80  # of a catalogue's name in file names: some disks allow 143 in all


def load_source(spec: str, cache_dir: Path, limit: int | None = None, needs: Sequence[str] = ()) -> Catalogue:
    """Load a catalogue.

    Args:
        spec: "demo"; a CSV file with a folder `images/` beside it, or the folder that holds both; a parquet or tar
            file or a folder of them; a hub id "owner/name", to be downloaded; or "hub:owner/name", whose parquet files
            are read where they lie. A file or folder that exists wins over a hub id.
        cache_dir: where text columns of parquet and tar are copied to, and the drawn demo is kept.
        needs: the columns it must have, besides `id` and the pictures.
        limit: keep this many rows, a fixed pseudo-random choice spread over the whole catalogue.

    Raises:
        UserError: there is no such source, it cannot be reached, has no rows, or lacks a column.
    """
    path = Path(os.path.expanduser(spec))  # `Path.expanduser` raises where there is no such user
    try:
        if spec == "demo":
            catalogue = _demo(cache_dir)
        elif (table := find_csv(path)) is not None:
            catalogue = open_csv(table)
        elif path.exists():
            catalogue = _files(path, cache_dir, needs)
        elif spec.startswith("hub:"):
            catalogue = _streamed(hub.pinned(spec), cache_dir, needs)
        elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", spec):
            catalogue = _hub(spec)
        else:
            raise UserError(f"no such data: {spec!r}; give --data a folder, a hub id OWNER/NAME, or demo")
    except OSError as error:
        raise UserError(
            f"cannot read {spec}, or not unpack it into {cache_dir} (--cache-dir names another folder): {error}"
        ) from error
    if not len(catalogue):
        hint = "; a column image names each row's picture, or it is images/ID.jpg" if find_csv(path) else ""
        raise UserError(f"{spec} has no rows with an image ({skipped_why(catalogue.skipped)}){hint}")
    check_columns(catalogue.columns, needs, catalogue.name)
    catalogue = replace(catalogue, name=clean(catalogue.name))
    return catalogue if limit is None or limit >= len(catalogue) else _take(catalogue, limit)


def _take(catalogue: Catalogue, limit: int) -> Catalogue:
    wanted = np.zeros(len(catalogue), dtype=bool)
    wanted[np.random.default_rng(0).permutation(len(catalogue))[:limit]] = True
    rows = np.flatnonzero(wanted).tolist()

    def taken(cells: Sequence) -> Sequence:
        return cells.only(wanted) if isinstance(cells, Column) else [cells[row] for row in rows]

    return replace(
        catalogue,
        ids=taken(catalogue.ids),
        columns={name: taken(cells) for name, cells in catalogue.columns.items()},
        read=lambda i: catalogue.read(rows[i]),
        fingerprint=f"{catalogue.fingerprint}-{limit}",
        run=catalogue.run and max(1, catalogue.run * limit // len(catalogue)),  # as many of a run are kept
    )


def in_file_name(name: str) -> str:
    """As much of a catalogue's name as fits into any file name; callers append a key that tells catalogues apart."""
    return name.replace("/", "--").encode(errors="ignore")[:NAME_BYTES].decode(errors="ignore")


def _files(path: Path, cache_dir: Path, needs: Sequence[str]) -> Catalogue:
    """Open a parquet or tar file, or a folder of them; their text columns are copied to the cache."""
    opens = {".parquet": open_parquet, ".tar": open_tars}
    there = sorted(without_answers(all_files(path))) if path.is_dir() else [path]
    there = [p for p in there if not p.name.startswith(MACS_OWN)]
    found = {suffix: [file for file in there if file.suffix.lower() == suffix] for suffix in opens}
    suffix = next((s for s, files in found.items() if files), None)
    if others := sum(map(len, found.values())) - len(found.get(suffix, [])):
        say_once(f"{path}: took the {suffix} files; {others:,} .tar left out")
    if suffix is None and path.is_file():
        raise UserError(f"{path} is no table, parquet or tar file; save a table as CSV, in UTF-8, with the suffix .csv")
    if suffix is None:
        raise UserError(f"{path} holds neither a CSV file with images/ nor *.parquet nor *.tar")
    files, root = found[suffix], path if path.is_dir() else path.parent
    fingerprint = stat_fingerprint({str(file.relative_to(root)): file.stat() for file in files})
    name = path.resolve().stem if path.is_file() else path.resolve().name
    return _copied(opens[suffix], files, name, fingerprint, cache_dir, needs)


def _copied(opens: Callable, files: list, name: str, key: str, cache_dir: Path, needs: Sequence[str], *at) -> Catalogue:
    """A catalogue whose text columns are copied to the cache under a name and a key."""
    texts = cache_dir / "columns" / f"{in_file_name(name)}-{key}-{VERSION}.arrow"
    columns, read, run = opens(files, texts, ("id", *needs), *at)
    return Catalogue(name, columns["id"], columns, read, key, run=run)


def _hub(repo_id: str) -> Catalogue:
    """All splits of a dataset on the hub, or in the local cache if the hub cannot be reached."""
    datasets = _quiet_datasets()
    online = hub.reachable()
    datasets.config.HF_HUB_OFFLINE = not online  # the library's copy of the flag, read at import
    try:
        splits = datasets.load_dataset(repo_id)
        table = datasets.concatenate_datasets(list(splits.values()))
    except Exception as error:  # several libraries raise here; any error means no catalogue
        if online:
            raise UserError(f"cannot load {repo_id} from the hub: {first_line(error)}") from error
        raise UserError(
            f"{repo_id}: no such folder, and the hub cannot be reached; use --data FOLDER or --data demo"
        ) from error
    return _from_table(repo_id, table, "-".join(split._fingerprint for split in splits.values()))


def _streamed(spec: str, cache_dir: Path, needs: Sequence[str]) -> Catalogue:
    """The parquet files of all splits of hub:OWNER/NAME@COMMIT: text columns are copied, pictures are streamed."""
    from huggingface_hub import HfFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    repo, commit = spec.removeprefix("hub:").split("@")
    files = HfFileSystem(endpoint=hub.ENDPOINT, block_size=BUFFER)
    try:
        paths = sorted(files.glob(f"datasets/{repo}@{commit}/**/*.parquet"))
    except Exception as error:  # several libraries raise here; any error means no catalogue
        raise UserError(f"cannot read {spec}: {first_line(error)}") from error
    if not paths:
        raise UserError(f"{spec} holds no parquet files; {repo} alone is downloaded, whatever it holds")
    return _copied(open_parquet, paths, repo, commit, cache_dir, needs, PyFileSystem(FSSpecHandler(files)))


def _from_table(name: str, table, fingerprint: str) -> Catalogue:
    """A `datasets.Dataset` -> Catalogue. The pictures stay on disk: Arrow maps them and reads a row at a time."""
    from datasets import Image

    columns = columns_of(table.data)
    check_columns([column for column in table.column_names if column in {*columns, "image"}], ("id", "image"), name)
    images = table.cast_column("image", Image(decode=False)).data.column("image")

    def read(i: int) -> bytes:
        image = images[int(i)].as_py() or {}
        if not image.get("bytes"):
            raise ImageError(no_image(image))
        return image["bytes"]

    return Catalogue(name, columns["id"], columns, read, fingerprint)


def _demo(cache_dir: Path) -> Catalogue:
    """The drawn catalogue. `datasets` keeps the drawings, so they are made once for each version of the scripts."""
    from data import fashion, pen

    scripts = (Path(module.__file__).read_bytes() for module in (fashion, pen))
    version = hashlib.blake2b(b"".join(scripts), digest_size=16).hexdigest()
    folder, given = cache_dir / "demo", {"rows": fashion.ROWS, "version": version}
    try:
        table = _quiet_datasets().Dataset.from_generator(_drawings, gen_kwargs=given, cache_dir=str(folder))
    except Exception as error:  # the library wraps the disk's error
        reason = first_line(error.__cause__ or error)
        raise UserError(f"cannot draw the demo into {folder}: {reason}; make room, or delete that folder") from error
    return _from_table("demo", table, f"demo-{fashion.ROWS}-{version}")


def _drawings(rows: int, version: str):
    """Rows in the hub's schema. `version` is a part of the key under which `datasets` caches them."""
    from data import fashion

    for index in tqdm(range(rows), desc="drawing the demo", unit="img"):
        fields, image = fashion.draw(index)
        image.save(buffer := io.BytesIO(), "png")
        yield fields | {"image": {"bytes": buffer.getvalue(), "path": None}}


def _quiet_datasets():
    """`datasets` without progress bars and log lines, imported only when needed because that takes a second."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return datasets
