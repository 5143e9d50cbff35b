"""Cells of a CSV file that a spreadsheet will show and not run."""


def inert(cell):
    """Text that a spreadsheet would take for a formula, with an apostrophe before it; everything else as it is.

    The rule and its characters: OWASP, "CSV Injection".
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell
