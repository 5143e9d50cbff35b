"""CSV files as shops export them: rows of text, with a reason in place of each row that cannot be read."""

import codecs
import csv
import itertools
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data.cells import text
from data.columns import check_columns
from errors import UserError, say_once

TABLES = (".csv", ".tsv")  # suffixes
UNQUOTED = "productDisplayName"  # the column in Kaggle's table whose commas are not quoted; it has no line breaks
LINES = 500  # that a row may have, at most
OF_NO_LETTER = re.compile(rb"[\x00\x81\x8d\x8f\x90\x9d]")  # bytes that are no letter in Windows-1252
SEPARATORS = ",;\t"  # spreadsheets write semicolons where a comma is the decimal sign
SAID = re.compile(rb"sep=([\t -!#-~])\s*")  # a line before the header that tells Excel the separator


def read_rows(table: Path, needs: Sequence[str] = ("id",)) -> Iterator[tuple[int, dict[str, str | None] | str]]:
    """Yield each row of a CSV file with the columns `needs`: (line number, {column: text}), or (line number, reason) if
    the row cannot be read. Rows of empty cells are skipped. The separator is what a line such as `sep=;` before the
    header says, else the one that splits the header into most cells.

    A quoted cell may hold line breaks, but not in a table with the column `UNQUOTED`. A quote that is left open does
    not swallow the rows after it, unless a later quote ends a row of the right width: its line is left out, and so are
    lines up to a later quote that lack cells, as they may be the rest of its cell. So is a row with too many cells.
    """
    with table.open("rb") as lines:
        if is_windows(table):
            say_once(f"{table} is not in UTF-8: read as Windows-1252")
            lines = (line.decode("cp1252").encode() for line in lines)
        first, marks, begin = next(lines, b"").removeprefix(codecs.BOM_UTF8), SEPARATORS, 2
        if said := SAID.fullmatch(first):
            first, marks, begin = next(lines, b""), said[1].decode(), 3
        mark = max(marks, key=lambda mark: len(_row([first], mark)[0] or []))
        header, taken = _row([first], mark)
        if header is None or taken > 1:
            raise UserError(f"{table} is not UTF-8 text with a row in each line; save it as CSV in UTF-8")
        cells, header = len(header), [name.strip() for name in _trimmed(header, 0)]
        for own in ("id", "image"):
            if own not in header:
                header = [own if name.lower() == own else name for name in header]
        if twice := [name for name, times in Counter(header).items() if times > 1]:
            raise UserError(f"{table} has the column {twice[0] or 'without a name'} twice")
        check_columns(header, needs, table)
        title = header.index(UNQUOTED) if UNQUOTED in header else None
        head = _Head(mark, len(header), cells - len(header), title)
        for number, cells in _rows(lines, begin, head):
            if isinstance(cells, str):
                yield number, cells
            elif any(texts := [text(cell) for cell in cells]):
                yield number, dict(zip(header, texts, strict=True))


class _Head(NamedTuple):
    """What the header says about all rows.

    Attributes:
        mark: the separator of cells.
        width: the number of columns.
        spare: the number of empty cells after them.
        title: the index of the column whose commas are not quoted, or None; if there is one, each line is a row.
    """

    mark: str
    width: int
    spare: int
    title: int | None


def is_windows(table: Path) -> bool:
    """Whether a file is in Windows-1252, as Excel saves "CSV": it has lines beyond ASCII, all are valid Windows-1252,
    and most of these lines hold no UTF-8 letter. Two letters of Windows-1252 (`É®`) may form a UTF-8 letter by chance,
    but hardly one that Windows-1252 has too. If lines with such a letter are a tenth of those without UTF-8 letters,
    the file is UTF-8 and the latter are damaged; if they are fewer, they were pasted from elsewhere. Encodings of other
    alphabets may look the same.
    """
    if not table.is_file():  # a pipe can be read only once
        return False
    lines_of, sure = {True: 0, False: 0}, 0  # with UTF-8 letters or without; how many with letters such as é
    with table.open("rb") as lines:
        for line in lines:
            if OF_NO_LETTER.search(line):  # UTF-16 too
                return False
            if not line.isascii():
                letters = line.decode(errors="ignore")
                lines_of[not letters.isascii()] += 1
                sure += not letters.encode("cp1252", "ignore").isascii()
    return lines_of[False] > max(lines_of[True], 10 * sure)


def _rows(lines: Iterable[bytes], number: int, head: _Head) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (number of its first line, cells) for each row, `width` cells or none if it is empty; or (number, reason).

    Args:
        number: the line number of the first of `lines`.
    """
    lines, ahead = iter(lines), deque()
    most, quoted = LINES if head.title is None else 1, 0  # lines before line `quoted` may be within quotes
    while ahead.extend(islice(lines, most - len(ahead))) or ahead:
        cells, taken = _row(ahead, head.mark, strict=True) if head.title is None else (None, 1)
        if cells is None or len(cells := _without_spare(cells, head)) != head.width:
            cells, quoted, taken = _single(ahead[0], head, number < quoted), max(quoted, number + taken), 1
        yield number, cells
        number += taken
        for _ in range(taken):
            ahead.popleft()


def _single(line: bytes, head: _Head, doubtful: bool) -> list[str] | str:
    """The cells of a line that is a row, or the reason why it is none. Unless it is `doubtful`, it may have too few
    cells: spreadsheets leave out the commas before empty cells."""
    (cells, taken), (mark, width, _, title) = _row([line], head.mark), head
    if cells is None:
        return "not UTF-8, or no CSV"
    cells = _without_spare(cells, head)
    if title is not None and (surplus := len(cells) - width) > 0:
        cells[title : title + surplus + 1] = [mark.join(cells[title : title + surplus + 1])]
    if taken > 1 and (title is None or len(cells) < width):  # a title may begin with a quote
        return "a quote that is left open"
    if len(cells) > width:
        return f"{len(cells)} cells under {width} columns"
    if doubtful and 0 < len(cells) < width:
        return f"{len(cells)} cells under {width} columns, perhaps of a row before it that lacks some"
    if cells and len(cells) < width and not line.endswith(b"\n"):
        return f"{len(cells)} cells under {width} columns, where the file breaks off"
    return cells and cells + [""] * (width - len(cells))


def _row(lines: Iterable[bytes], mark: str, strict: bool = False) -> tuple[list[str] | None, int]:
    """The cells of the first row and the number of lines it takes: one more than there are if a quote is left open.

    The cells are None if the row is not UTF-8 or not CSV (a cell of more than 128 kB), or if `strict` and a quote does
    not end with its cell.
    """
    try:
        text = (line.decode().rstrip("\r\n") + "\n" for line in lines)
        reader = csv.reader(itertools.chain(text, [] if strict else [""]), delimiter=mark, strict=strict)
        return next(reader, []), reader.line_num
    except (UnicodeDecodeError, csv.Error):
        return None, 1


def _trimmed(cells: list[str], width: int) -> list[str]:
    """The cells without the empty ones beyond `width` that a spreadsheet adds at the end."""
    while len(cells) > width and not cells[-1]:
        cells = cells[:-1]
    return cells


def _without_spare(cells: list[str], head: _Head) -> list[str]:
    """The cells without the empty ones that a spreadsheet adds at the end: as many as the header has, or all surplus.

    Surplus cells are kept if a cell begins with a space, as after an unquoted comma of a text: without its last, empty
    cell, such a row would have the right width, but with its cells shifted by one column.
    """
    mark, width, spare, title = head
    cells = _trimmed(cells, max(width, len(cells) - spare))
    first, last = (1, None) if title is None else (title + 1, title + 1 + len(cells) - width)
    behind = [] if title == width - 1 else cells[first:last]
    spaced = [cell.startswith(" ") for cell in behind if cell]
    tables_own = title is None and (mark == "\t" or all(spaced))  # the whole table is written so
    return cells if any(spaced) and not tables_own else _trimmed(cells, width)


def composed(name: str) -> str:
    """A picture's name with composed accents (NFC): macOS writes é in a file's name as an e and an accent."""
    return unicodedata.normalize("NFC", name)
