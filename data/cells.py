"""Cells of a table: as text, as text that a spreadsheet will show and not run, and as a number."""

import math
import re

from errors import UserError

NULLS = {"", "na", "nan", "none", "null"}


def text(value) -> str | None:
    """A cell as text; None for the many ways to write a missing one. 2012.0 is '2012': a null made the column float."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    stripped = str(value).strip()
    return None if stripped.casefold() in NULLS else stripped


def inert(cell):
    """Text that a spreadsheet would take for a formula, with an apostrophe before it; everything else as it is, also a
    number such as -500.

    The rule and its characters: OWASP, "CSV Injection".
    """
    suspect = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    return f"'{cell}" if suspect and not re.fullmatch(r"-\d+(\.\d+)?", cell) else cell


def without_apostrophe(cell: str) -> str:
    """The inverse of `inert`, but for text that had one before what a spreadsheet would run."""
    return cell[1:] if cell.startswith("'") and inert(cell[1:]) == cell else cell


def number(text: str | None, column: str, id: str) -> float:
    """A cell's number; NaN where there is none. Raises a `UserError`, which names the cell, where it is no number."""
    if text is None:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{text!r} in column {column}, id {id}, is not a number; mend that cell, or empty it")
    return value
