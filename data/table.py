"""CSV files as shops export them: rows of text, with the reason in place of each that cannot be read."""

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

TABLES = (".csv", ".tsv")  # how files of them end
UNQUOTED = "productDisplayName"  # of Kaggle's columns the one whose commas are not quoted, nor does it hold line breaks
LINES = 500  # of a row, at most
OF_NO_LETTER = re.compile(rb"[\x00\x81\x8d\x8f\x90\x9d]")  # in Windows-1252
SEPARATORS = ",;\t"  # semicolons are what spreadsheets write where a comma is the decimal sign
SAID = re.compile(rb"sep=([\t -!#-~])\s*")  # a line before the header, by which Excel is told what separates cells


def read_rows(table: Path, needs: Sequence[str] = ("id",)) -> Iterator[tuple[int, dict[str, str | None] | str]]:
    """(line number, {column: text}) of each row of a CSV file with the columns `needs`; the reason where none is read.
    Lines of empty cells are passed over. Cells are separated by what a line `sep=;` before the first says, else by what
    separates most of the first line's.

    A cell in quotes may hold line breaks, but not in a table with the column `UNQUOTED`. A quote left open swallows no
    rows after it, unless a later one ends a row of the right width: its line is left out, and lines up to a later one
    that lack cells are too, as they may be the rest of its cell. So is a row of too many cells.
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
    """What the header says of all rows.

    Attributes:
        mark: what separates cells.
        width: columns.
        spare: empty cells behind them.
        title: the column whose commas are not quoted, where there is one: then each line is a row.
    """

    mark: str
    width: int
    spare: int
    title: int | None


def is_windows(table: Path) -> bool:
    """Whether a file has letters beyond ASCII, all of them Windows-1252's and in most lines none of UTF-8: as Excel
    saves "CSV". There two letters (`É®`) may by chance be one of UTF-8's, but hardly one that Windows-1252 has too:
    where lines with such a letter are a tenth of the others it is UTF-8, and these are damage; if fewer, they were
    pasted from elsewhere. Encodings of other alphabets may look the same.
    """
    if not table.is_file():  # a pipe is read once
        return False
    lines_of, sure = {True: 0, False: 0}, 0  # with letters of UTF-8 or with none; and those of letters as é
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
    """(number of its first line, `width` cells) of each row, no cells where it is empty, or the reason.

    Args:
        number: of the first of `lines`.
    """
    lines, ahead = iter(lines), deque()
    most, quoted = LINES if head.title is None else 1, 0  # lines before that one may be within quotes
    while ahead.extend(islice(lines, most - len(ahead))) or ahead:
        cells, taken = _row(ahead, head.mark, strict=True) if head.title is None else (None, 1)
        if cells is None or len(cells := _without_spare(cells, head)) != head.width:
            cells, quoted, taken = _single(ahead[0], head, number < quoted), max(quoted, number + taken), 1
        yield number, cells
        number += taken
        for _ in range(taken):
            ahead.popleft()


def _single(line: bytes, head: _Head, doubtful: bool) -> list[str] | str:
    """The cells of a line that is a row, or the reason why it is none. Unless it is `doubtful` it may end early:
    spreadsheets leave out the commas before empty cells."""
    (cells, taken), (mark, width, _, title) = _row([line], head.mark), head
    if cells is None:
        return "not UTF-8, or no CSV"
    cells = _without_spare(cells, head)
    if title is not None and (surplus := len(cells) - width) > 0:
        cells[title : title + surplus + 1] = [mark.join(cells[title : title + surplus + 1])]
    if taken > 1 and (title is None or len(cells) < width):  # a title may well begin with one
        return "a quote that is left open"
    if len(cells) > width:
        return f"{len(cells)} cells under {width} columns"
    if doubtful and 0 < len(cells) < width:
        return f"{len(cells)} cells under {width} columns, perhaps of a row before it that lacks some"
    if cells and len(cells) < width and not line.endswith(b"\n"):
        return f"{len(cells)} cells under {width} columns, where the file breaks off"
    return cells and cells + [""] * (width - len(cells))


def _row(lines: Iterable[bytes], mark: str, strict: bool = False) -> tuple[list[str] | None, int]:
    """The cells of the first row and how many lines it takes: one more than there are where a quote is left open.

    None where it is not UTF-8 or no CSV (a cell of more than 128 kB), or `strict` and a quote does not end with its
    cell.
    """
    try:
        text = (line.decode().rstrip("\r\n") + "\n" for line in lines)
        reader = csv.reader(itertools.chain(text, [] if strict else [""]), delimiter=mark, strict=strict)
        return next(reader, []), reader.line_num
    except (UnicodeDecodeError, csv.Error):
        return None, 1


def _trimmed(cells: list[str], width: int) -> list[str]:
    """Without the empty cells at the end that a spreadsheet adds to those of the header."""
    while len(cells) > width and not cells[-1]:
        cells = cells[:-1]
    return cells


def _without_spare(cells: list[str], head: _Head) -> list[str]:
    """Without the empty cells that a spreadsheet adds at the end: as many as the header has, or all that are too many.

    These are kept where a cell begins with a space, as it does behind a text's own comma that is not quoted: without
    its last, empty cell such a row would have the right width, and its cells lie a column off.
    """
    mark, width, spare, title = head
    cells = _trimmed(cells, max(width, len(cells) - spare))
    first, last = (1, None) if title is None else (title + 1, title + 1 + len(cells) - width)
    behind = [] if title == width - 1 else cells[first:last]
    spaced = [cell.startswith(" ") for cell in behind if cell]
    tables_own = title is None and (mark == "\t" or all(spaced))  # the way that all of it is written
    return cells if any(spaced) and not tables_own else _trimmed(cells, width)


def composed(name: str) -> str:
    """A picture's name as others spell it too: macOS writes é in a file's name as an e and an accent."""
    return unicodedata.normalize("NFC", name)
