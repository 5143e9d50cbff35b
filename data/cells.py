"""Cells of a table: as text, as text that a spreadsheet will show and not run, and as numbers."""

import math
import re
from collections.abc import Sequence

import numpy as np

from errors import UserError, say_once

NULLS = {"", "na", "n/a", "#n/a", "<na>", "nan", "none", "null"}
THOUSANDS = re.compile(r"-?[1-9]\d{0,2}\.\d{3}")  # "1.250" may mean 1250 or 1.25
POINTED = re.compile(r"-?[1-9]\d{0,2}(\.\d{3})+")  # "1.250" and "1.250.000"
DECIMAL_COMMA = re.compile(r"-?([1-9]\d{0,2}(\.\d{3})+|\d+),\d+")  # "1.250,00" or "12,5"
COMMA_OF_EITHER = re.compile(r"-?[1-9]\d{0,2},\d{3}")  # "1,250" may mean 1250 or 1.25
NAMED = 5  # cells that a message names, at most


def text(value) -> str | None:
    """A cell as text; None for the many ways to write a missing one. 2012.0 is '2012': a null makes a column float."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    stripped = str(value).strip()
    return None if stripped.casefold() in NULLS else stripped


def clean(name: str) -> str:
    """Text that any format can hold: bytes of a name that are not UTF-8, and lone surrogates in JSON, are replaced."""
    return name.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def inert(cell):
    """Put an apostrophe before text that a spreadsheet would take for a formula; leave everything else as it is, such
    as the number -500.

    The rule and its characters are those of OWASP, "CSV Injection".
    """
    suspect = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    return f"'{cell}" if suspect and not re.fullmatch(r"-\d+(\.\d+)?", cell) else cell


def without_apostrophe(cell: str) -> str:
    """The inverse of `inert`, except for text in which an apostrophe already stood before a formula."""
    return cell[1:] if cell.startswith("'") and inert(cell[1:]) == cell else cell


def to_numbers(cells: Sequence[str | None], column: str, ids: Sequence[str]) -> np.ndarray:
    """A column's numbers, float64 (N,), NaN where there is none; also with decimal commas, as spreadsheets write them.

    Raises:
        UserError: cells are not numbers; the message says how many, and names the first few.
    """
    if _has_decimal_commas(cells):
        say_once(f"column {column}: commas are read as decimal points")
        cells = (text and text.replace(".", "").replace(",", ".") for text in cells)
    found, bad, first = np.empty(len(ids)), 0, []
    either, decimal = None, False  # a number whose point may mark thousands; whether others show that it does not
    for row, (text, id) in enumerate(zip(cells, ids, strict=True)):
        found[row] = _number(text)
        if text is not None and THOUSANDS.fullmatch(text):
            either = either or text
        elif text is not None:
            decimal = decimal or "." in text or abs(found[row]) >= 1000
        if text is not None and not math.isfinite(found[row]):
            bad += 1
            if bad <= NAMED:
                first.append(f"{text!r} (id {id})")
    if bad:
        several = f"{bad:,} cells that are no numbers" if bad > 1 else "a cell that is no number"
        more = f" and {bad - NAMED:,} more" if bad > NAMED else ""
        hint = "write 1250.00 without a currency or thousands' marks, or empty the cell"
        raise UserError(f"column {column} has {several}: {', '.join(first)}{more}; {hint}")
    if either and not decimal:
        say_once(f"column {column}: {either} is read as {float(either):g}; if points mark thousands, take them out")
    return found


def _has_decimal_commas(cells: Sequence[str | None]) -> bool:
    """Whether all that holds a comma is a number with a decimal one, for some beyond doubt, and no point is decimal."""
    commas = [text for text in cells if text and "," in text]
    if not all(map(DECIMAL_COMMA.fullmatch, commas)) or all(map(COMMA_OF_EITHER.fullmatch, commas)):
        return False
    return all(POINTED.fullmatch(text) for text in cells if text and "." in text and "," not in text)


def _number(text: str | None) -> float:
    try:
        return math.nan if text is None or "_" in text else float(text)  # Python reads "12_5" as 125
    except ValueError:
        return math.nan
