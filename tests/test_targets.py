"""What is said of labels while they are fitted."""

import numpy as np

from data.catalogue import Catalogue
from data.schema import read_schema
from targets import fit_targets


def test_an_attribute_that_few_rows_have_a_label_of_is_named(tmp_path, capsys):
    """As of cells that a spreadsheet has merged, of which only the first keeps its text."""
    (tmp_path / "a.toml").write_text("[attributes.kind]\n[attributes.colour]\n")
    schema = read_schema(tmp_path / "a.toml")
    columns = {"kind": ["A", *[None] * 4, "B", *[None] * 4], "colour": [*"RGRGRGRGR", None]}
    catalogue = Catalogue("shop", list(map(str, range(10))), columns, None, "")
    fit_targets(catalogue, {}, np.arange(10), schema.attributes, 10)
    hints = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hint")]
    assert hints == ["hint: kind has a label in 2 of 10 train rows; fill cells down if they were meant for more rows"]
