"""Labels in doubt, against a catalogue small enough to see through."""

import csv

import numpy as np
import pytest

from data.attributes import MISSING, UNSEEN
from data.catalogue import Catalogue
from data.cells import inert
from report.suspects import EXCLUDED, Suspect, conflicting, contradicted, write_csv

ROWS = np.array([10, 11, 12, 13, 14])
P = {  # gender of three classes, usage of two
    "gender": np.array(
        [[0.9, 0.0999, 0.0001], [0.99, 0.0099, 0.0001], [0.4, 0.5995, 0.0005], [0.49, 0.5, 0.0002], [1, 0, 0]]
    ),
    "usage": np.array([[0.5, 0.5], [0.99995, 0.00005], [0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]),
}
SAID = np.array([[0, 0], [0, 0], [1, 0], [1, 0], [0, 1]])


def test_contradicted_are_labels_all_but_excluded_where_the_answer_is_likely():
    labels = np.array([[1, 1], [2, 1], [2, 0], [2, MISSING], [UNSEEN, 0]])
    found = contradicted(ROWS, labels, SAID, P)
    assert found == [
        Suspect(11, "usage", 1, 0, 0.00005, 0.99995),
        Suspect(11, "gender", 2, 0, 0.0001, 0.99),
        Suspect(12, "gender", 2, 1, 0.0005, 0.5995),
    ]  # row 13's answer is no more likely than not, row 14's label has no probability
    assert all(suspect.given_p < EXCLUDED for suspect in found)


def test_conflicting_are_identical_pictures_alone_by_attribute_clearest_first():
    hashes = np.array([7, 3, 7, 3, 9], dtype=np.uint64)
    labels = np.array([[0, 1], [0, 1], [1, 1], [2, MISSING], [1, 0]])
    groups = conflicting(ROWS, hashes, labels, SAID, P)
    assert [[(s.row, s.attribute, s.given) for s in group] for group in groups] == [
        [(11, "gender", 0), (13, "gender", 2)],  # 0.0002 is the least of any given label
        [(10, "gender", 0), (12, "gender", 1)],
    ]
    assert conflicting(ROWS, np.arange(5, dtype=np.uint64), labels, SAID, P) == []


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+1", "-1.", "-1\n", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_cells_that_look_like_formulas_are_made_inert(text):
    assert inert(text) == "'" + text
    assert inert("x" + text) == "x" + text
    assert inert("-500") == "-500", "a number, and an id that must be found again"


def test_csv_holds_every_suspect_and_no_formula(tmp_path):
    titles = [None] * 10 + ['=HYPERLINK("http://x","y")', None, "Plain, with a comma", "@SUM(A1)", None]
    ids = [str(i) for i in range(10)] + ["-10+1", "11", "12", "13", "14"]
    catalogue = Catalogue("shop", ids, {}, lambda i: b"", "")
    single = [Suspect(10, "gender", 2, 0, 0.0001, 0.9)]
    groups = [[Suspect(12, "usage", 0, 0, 0.6, 0.6), Suspect(13, "usage", 1, 0, 0.1, 0.9)]]
    classes = {"gender": ["Boys", "Men", "=1+1"], "usage": ["+Casual", "Sports"]}
    write_csv(tmp_path / "suspects.csv", single, groups, catalogue, classes, titles)
    with open(tmp_path / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["why"], r["group"], r["id"], r["attribute"]) for r in rows] == [
        ("contradicted", "", "'-10+1", "gender"),
        ("identical pictures", "1", "12", "usage"),
        ("identical pictures", "1", "13", "usage"),
    ]
    assert (rows[0]["given"], rows[0]["predicted"]) == ("'=1+1", "Boys")
    assert rows[1]["title"] == "Plain, with a comma"
    assert float(rows[0]["given_probability"]) == 0.0001
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@"))]
