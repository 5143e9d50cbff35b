"""Titles from a separate table."""

from pathlib import Path, PurePosixPath

from data.table import composed, read_rows
from data.tars import IMAGES
from errors import UserError, told


class TitleTable:
    """A picture's name -> its title, None where the table has none.

    A row of the table names its picture in `image` or `id`: by the file's name, with or without its suffix, after as
    many of its folders as tell it from others; or, if the picture has no file, by its name in the answers.

    Args:
        path: a CSV file.
        column: the column that holds titles.

    Raises:
        UserError: the file cannot be read, or lacks the columns.
    """

    def __init__(self, path: Path, column: str):
        by_id: dict[str, str | None] = {}
        by_image: dict[str, str | None] = {}
        with told(f"cannot read --titles {path}"):
            for _, cells in read_rows(path, [column]):
                if isinstance(cells, str):
                    continue
                if not {"image", "id"} & cells.keys():
                    raise UserError(f"--titles {path} names no pictures: it has neither a column image nor id")
                for titles, key in ((by_id, "id"), (by_image, "image")):
                    if name := composed(cells.get(key) or ""):
                        for spelt in (_plain(name), str(PurePosixPath(name))):
                            titles[spelt] = cells[column] or titles.get(spelt)  # a product may be told of once
        self.titles = by_id, by_image

    def __call__(self, name: str) -> str | None:
        name, (by_id, by_image) = composed(name), self.titles
        of_a_file = PurePosixPath(name).suffix.lower() in IMAGES  # else an id, which may well be another picture's name
        for titles in (by_image, by_id) if of_a_file else (by_id, by_image):
            for spelt in (str(PurePosixPath(name)), _plain(name)):
                parts = PurePosixPath(spelt).parts
                for start in range(len(parts)):  # the most folders first
                    if (found := str(PurePosixPath(*parts[start:]))) in titles:
                        return titles[found]
        return None


def _plain(name: str) -> str:
    """The name without a picture's suffix; any other suffix stays, as an id may hold a dot."""
    path = PurePosixPath(name)
    return str(path.with_suffix("") if path.suffix.lower() in IMAGES else path)
