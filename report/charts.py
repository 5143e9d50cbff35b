"""What the page shows, as plain lists and numbers: points of charts, tables, the mistakes to look at."""

import numpy as np

from calibration import coverage_curve, reliability
from data.attributes import MISSING, UNSEEN

CONFUSED = 12  # classes in a confusion matrix
OFTEN = (1, 10, 50, 200, 1000)  # train rows of a class, from which each group of classes starts
LEFT, RIGHT, TOP, BOTTOM = 42, 234, 12, 160  # of a chart's plot area, in the units of its viewBox


def _x(share: float) -> float:
    return round(LEFT + share * (RIGHT - LEFT), 1)


def _y(share: float, floor: float = 0.0) -> float:
    return round(BOTTOM - (share - floor) / (1 - floor) * (BOTTOM - TOP), 1)


def reliability_points(confidence: np.ndarray, right: np.ndarray) -> list[dict]:
    """A point for each bin of confidence: where it lies, and an area in proportion to its rows."""
    return [
        {"x": _x(b.confidence), "y": _y(b.accuracy), "r": round(1.5 + 9 * (b.rows / len(right)) ** 0.5, 1), "bin": b}
        for b in reliability(confidence, right)
    ]


def coverage_chart(confidence: np.ndarray, right: np.ndarray, threshold: float | None, target: float) -> dict:
    """Precision (up) of the most confident share (along) of the rows, from `floor` up.

    Returns:
        `floor`, `line` (SVG points, at most 100), `target` (its height), `accepted` (the threshold, a point).
    """
    thresholds, rows, hits = coverage_curve(confidence, right)
    precision = hits / rows
    chosen = np.unique(np.linspace(0, len(rows) - 1, 100).astype(int)) if len(rows) else []
    floor = min(0.9, np.floor(10 * min(target, precision[chosen].min())) / 10) if len(rows) else 0.0
    points = [(_x(rows[i] / len(right)), _y(precision[i], floor)) for i in chosen]
    last = -1 if threshold is None else int((thresholds >= threshold).sum()) - 1
    return {
        "floor": floor,
        "line": " ".join(f"{x},{y}" for x, y in points),
        "target": _y(target, floor),
        "accepted": (_x(rows[last] / len(right)), _y(precision[last], floor)) if last >= 0 else None,
    }


def by_frequency(given: np.ndarray, said: np.ndarray, counts: dict[str, list[int]]) -> dict[str, list[dict]]:
    """For each attribute, accuracy of its rows in groups by how many train rows their class had (`OFTEN`), rare first.

    The first group is of labels that training never had.
    """
    table = {}
    for column, (name, of_class) in enumerate(counts.items()):
        labels, right = given[:, column], given[:, column] == said[:, column]
        group = np.digitize(np.array(of_class)[labels.clip(min=0)], OFTEN)
        group[labels == UNSEEN] = 0
        inside = [(group == g) & (labels != MISSING) for g in range(len(OFTEN) + 1)]
        table[name] = [{"rows": int(i.sum()), "accuracy": float(right[i].mean()) if i.any() else None} for i in inside]
    return table


def confusion(given: np.ndarray, said: np.ndarray, texts: list[str]) -> dict:
    """The classes with the most mistakes, at most `CONFUSED`, by given label (down) and answer (along).

    Returns:
        `classes`, `cells` (counts, whose last column is all other answers), `rows` (of each given label), and `pairs`,
        the most frequent mistakes as (given, answer, count).
    """
    seen = given >= 0
    given, said = given[seen], said[seen]
    wrong = given != said
    both = np.stack([given, said], axis=1)
    involved, present = (np.bincount(both[some].ravel(), minlength=len(texts)) for some in (wrong, ...))
    chosen = np.sort(np.argsort(-involved, kind="stable")[:CONFUSED])
    chosen = chosen[present[chosen] > 0]
    place = np.full(len(texts), -1)  # in the table, whose last row and column are all that have none
    place[chosen] = np.arange(len(chosen))
    table = np.zeros((len(chosen) + 1, len(chosen) + 1), dtype=int)
    np.add.at(table, (place[given], place[said]), 1)
    pairs, counts = np.unique(both[wrong], axis=0, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:8]
    return {
        "classes": [texts[c] for c in chosen],
        "cells": table[:-1].tolist(),
        "rows": table[:-1].sum(1).tolist(),
        "pairs": [(texts[a], texts[b], int(count)) for (a, b), count in zip(pairs[most], counts[most], strict=True)],
    }


def confident_mistakes(
    rows: np.ndarray, given: np.ndarray, said: np.ndarray, confidence: np.ndarray, texts: list[str], most: int
) -> list[dict]:
    """The wrong answers of one attribute, the most confident first; all arrays (N,)."""
    wrong = np.flatnonzero((given != said) & (given != MISSING))
    return [
        {
            "row": int(rows[i]),
            "given": texts[given[i]] if given[i] >= 0 else "a label unknown to training",
            "said": texts[said[i]],
            "confidence": float(confidence[i]),
        }
        for i in wrong[np.argsort(-confidence[wrong], kind="stable")[:most]]
    ]
