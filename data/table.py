"""CSV files as shops export them: rows of text, with the reason in place of each that cannot be read."""

import codecs
import csv
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path

from data.cells import text
from data.columns import check_columns
from errors import UserError

UNQUOTED = "productDisplayName"  # of Kaggle's columns the one whose commas are not quoted, nor does it hold line breaks
LINES = 500  # of a row, at most


def read_rows(table: Path, needs: Sequence[str] = ("id",)) -> Iterator[tuple[int, dict[str, str | None] | str]]:
    """(line number, {column: text}) of each row of a CSV file with the columns `needs`; the reason where none is read.

    A cell in quotes may hold line breaks. A quote left open swallows no rows after it, unless a later one ends a row
    of the right width: its line is left out.
    """
    with table.open("rb") as lines:
        header, taken = _row([next(lines, b"").removeprefix(codecs.BOM_UTF8)])
        if header is None or taken > 1:
            raise UserError(f"{table} is not UTF-8 text with a row in each line; save it as such")
        header = _trimmed(header, 0)
        if twice := [name for name, times in Counter(header).items() if times > 1]:
            raise UserError(f"{table} has the column {twice[0] or 'without a name'} twice")
        check_columns(header, needs, table)
        for number, cells in _rows(lines, len(header), 1 if UNQUOTED in header else LINES):
            if isinstance(cells, str):
                yield number, cells
                continue
            if surplus := max(0, len(cells) - len(header)):
                if UNQUOTED not in header:
                    yield number, f"{len(cells)} cells under {len(header)} columns"
                    continue
                title = header.index(UNQUOTED)  # whose own commas these are
                cells[title : title + surplus + 1] = [",".join(cells[title : title + surplus + 1])]
            if cells:
                yield number, dict(zip_longest(header, map(text, cells)))


def _rows(lines: Iterable[bytes], width: int, most: int) -> Iterator[tuple[int, list[str] | str]]:
    """(number of its first line, cells) of each row of at most so many lines, or the reason why there are none."""
    lines, ahead, number = iter(lines), deque(), 2
    while ahead.extend(islice(lines, most - len(ahead))) or ahead:
        cells, taken = _row(ahead, strict=True) if most > 1 else (None, 1)
        if cells is None or (taken > 1 and len(_trimmed(cells, width)) != width):
            cells, taken = _row([ahead[0]])
            if cells is None:
                cells = "not UTF-8, or no CSV"
            elif taken > 1 and most > 1:
                cells = "a quote that is left open"
            taken = 1
        yield number, cells if isinstance(cells, str) else _trimmed(cells, width)
        number += taken
        for _ in range(taken):
            ahead.popleft()


def _row(lines: Iterable[bytes], strict: bool = False) -> tuple[list[str] | None, int]:
    """The cells of the first row and how many lines it takes: one more than there are where a quote is left open.

    None where it is not UTF-8 or no CSV (a cell of more than 128 kB), or `strict` and a quote does not end with its
    cell.
    """
    try:
        text = (line.decode().rstrip("\r\n") + "\n" for line in lines)
        reader = csv.reader(itertools.chain(text, [] if strict else [""]), strict=strict)
        return next(reader, []), reader.line_num
    except (UnicodeDecodeError, csv.Error):
        return None, 1


def _trimmed(cells: list[str], width: int) -> list[str]:
    """Without the empty cells at the end that a spreadsheet adds to those of the header."""
    while len(cells) > width and not cells[-1]:
        cells = cells[:-1]
    return cells
