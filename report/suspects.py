"""Labels of the catalogue that look wrong: the model all but excludes them, or identical pictures disagree on them."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.catalogue import Catalogue
from data.cells import inert
from durable import replace_csv

# A given label is suspect where the model, calibrated, gives it less probability than `EXCLUDED` and its answer more
# than `LIKELY`. How improbable the given label is tells labels flipped on purpose from hard pictures far better than
# how sure the answer is (`benchmarks/label_suspects.py`). Few answers are likely for what can hardly be seen.
EXCLUDED, LIKELY = 0.001, 0.5

COLUMNS = (
    *("why", "group", "id", "attribute", "given", "given_probability"),
    *("predicted", "predicted_probability", "title"),
)


class Suspect(NamedTuple):
    """A label in doubt.

    Attributes:
        row: in the store.
        attribute: which label.
        given, said: the catalogue's label and the model's answer, as classes.
        given_p, said_p: their calibrated probabilities.
    """

    row: int
    attribute: str
    given: int
    said: int
    given_p: float
    said_p: float


def contradicted(
    rows: np.ndarray, labels: np.ndarray, said: np.ndarray, probabilities: Mapping[str, np.ndarray]
) -> list[Suspect]:
    """Labels that the model all but excludes, and knows better: the least probable first.

    Args:
        rows: (N,) in the store; labels, said: (N, A) given and predicted classes; a negative label is left out.
        probabilities: {attribute: (N, classes)}, calibrated.
    """
    found = []
    for column, (name, p) in enumerate(probabilities.items()):
        given, answer = labels[:, column], said[:, column]
        given_p, said_p = (p[np.arange(len(p)), classes] for classes in (given.clip(min=0), answer))
        for i in np.flatnonzero((given >= 0) & (given_p < EXCLUDED) & (said_p > LIKELY)):
            found.append(_suspect(name, p[i], rows[i], given[i], answer[i]))
    return sorted(found, key=lambda suspect: suspect.given_p)


def conflicting(
    rows: np.ndarray, hashes: np.ndarray, labels: np.ndarray, said: np.ndarray, probabilities: Mapping[str, np.ndarray]
) -> list[list[Suspect]]:
    """Identical pictures whose labels of an attribute differ: a list for each such group and attribute.

    The clearest come first: where the model is surest that one of the given labels is wrong.

    Args:
        hashes: (N,) of the rows' pixels. The rest as for `contradicted`.
    """
    order = np.argsort(hashes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(hashes[order])) + 1)
    found = []
    for members in (group for group in groups if len(group) > 1):
        for column, (name, p) in enumerate(probabilities.items()):
            known = members[labels[members, column] >= 0]
            if len(np.unique(labels[known, column])) > 1:
                found.append([_suspect(name, p[i], rows[i], labels[i, column], said[i, column]) for i in known])
    return sorted(found, key=lambda group: min(suspect.given_p for suspect in group))


def _suspect(attribute: str, p: np.ndarray, row, given, said) -> Suspect:
    return Suspect(int(row), attribute, int(given), int(said), float(p[given]), float(p[said]))


def write_csv(
    path: Path,
    single: list[Suspect],
    groups: list[list[Suspect]],
    catalogue: Catalogue,
    classes: Mapping[str, list[str]],
    titles: list[str | None],
) -> None:
    """A line for each suspect, in order: what the model contradicts, then identical pictures, numbered by group."""
    numbered = [("contradicted", "", s) for s in single]
    numbered += [("identical pictures", number, s) for number, group in enumerate(groups, 1) for s in group]
    lines = [COLUMNS]
    for why, group, s in numbered:
        given, said = (inert(classes[s.attribute][c]) for c in (s.given, s.said))
        cells = (inert(catalogue.ids[s.row]), inert(s.attribute), given, f"{s.given_p:.2e}", said, f"{s.said_p:.4f}")
        lines.append((why, group, *cells, inert(titles[s.row])))
    replace_csv(path, lines)
