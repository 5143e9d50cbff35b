"""A catalogue as Kaggle and shops have it: a CSV file beside a folder `images/`."""

from pathlib import Path, PurePosixPath

from data.catalogue import Catalogue, Skipped, stat_fingerprint
from data.images import ImageError
from data.table import composed, read_rows
from data.tars import IMAGES
from errors import UserError


def find_csv(path: Path) -> Path | None:
    """The CSV file named by itself or by its folder: `styles.csv` there, or the only one beside a folder `images/`."""
    if path.suffix.lower() == ".csv" and path.is_file():
        return path
    if (styles := path / "styles.csv").is_file():
        return styles
    tables = sorted(path.glob("*.csv")) if (path / "images").is_dir() else []
    if len(tables) > 1:
        raise UserError(f"{path} holds several CSV files; name one: --data {tables[0]}")
    return tables[0] if tables else None


def open_csv(table: Path) -> Catalogue:
    """A CSV file beside `images/`. A row's picture is the file there that its `image` names, or ID.jpg or the like."""
    images = table.parent / "images"
    if not images.is_dir():
        raise UserError(f"{table.parent} has {table.name} but no folder images/")
    # Looking names up in this listing, never joining them to a path, is also what confines an id like '../x'.
    files = {str(path.relative_to(images)): path.stat() for path in images.rglob("*") if path.is_file()}
    named: dict[str, str] = {}
    for name in sorted(files, key=lambda name: (Path(name).suffix.lower() not in IMAGES, name)):  # pictures first
        stem = str(Path(name).with_suffix(""))
        named.setdefault(stem, name)
        named.setdefault(composed(stem), name)
    named |= {composed(name): name for name in sorted(files)} | {name: name for name in files}
    rows, skipped, seen, pictures = [], [], set(), []
    for number, row in read_rows(table):
        if isinstance(row, str):
            skipped.append(Skipped(f"line {number}", row))
        elif not row["id"]:
            skipped.append(Skipped(f"line {number}", "no id"))
        elif (picture := _named(named, _in_images(row["image"]) if row.get("image") else row["id"])) is None:
            skipped.append(Skipped(str(row["id"]), "no such file in images/"))
        elif row["id"] in seen:
            skipped.append(Skipped(row["id"], f"line {number} has an id that came before"))
        else:
            seen.add(row["id"])
            rows.append(row)
            pictures.append(picture)
    ids = [row["id"] for row in rows]
    return Catalogue(
        name=table.resolve().parent.name,
        ids=ids,
        columns={name: [row[name] for row in rows] for name in (rows[0] if rows else {})},
        read=lambda i: _read_file(images / pictures[i]),
        fingerprint=stat_fingerprint(files | {f"../{table.name}": table.stat()}),
        skipped=skipped,
    )


def _named(files: dict[str, str], name: str) -> str | None:
    """The file of this name, else of one that differs in how its accents are written."""
    return files.get(name) or files.get(composed(name))


def _in_images(name: str) -> str:
    """A picture's name in a table -> within `images/`, whose own name, and what leads there, may stand before it."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return str(Path(*parts[parts.index("images") + 1 :] if "images" in parts else parts))


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        error.filename = str(path)  # which opening tells, and reading does not
        raise ImageError(error.strerror) from error
