"""Cells of a table: text that a spreadsheet will show and not run, and text that is a number."""

import math

from errors import UserError


def inert(cell):
    """Text that a spreadsheet would take for a formula, with an apostrophe before it; everything else as it is.

    The rule and its characters: OWASP, "CSV Injection".
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


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
