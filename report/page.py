"""The report: one HTML file that opens without a server or a network, and the suspects beside it as CSV.

Everything is computed here; `page.html.j2` only lays it out. Charts are inline SVG, pictures are inlined as JPEG.
"""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from calibration import coverage_curve, judged, reliability
from data.attributes import MISSING, PATH, UNSEEN
from data.sources import TITLE
from metrics import path_distance
from models.decode import Decoder
from report.suspects import EXCLUDED, LIKELY, Suspect, conflicting, contradicted, write_csv

MISTAKES, SUSPECTS, PICTURES = 12, 60, 30  # shown: mistakes of an attribute, suspect rows, pictures of many rows
SIDE = 120  # pixels, the longest side of an inlined picture
CONFUSED = 12  # classes in a confusion matrix
OFTEN = (1, 10, 50, 200, 1000)  # train rows of a class, from which each group of classes starts
LEFT, RIGHT, TOP, BOTTOM = 42, 234, 12, 160  # of a chart's plot area, in the units of its viewBox


def write_report(folder: Path, checkpoint: str, task, found) -> None:
    """Write `report.html` and `suspects.csv` of a calibrated checkpoint.

    Args:
        checkpoint: what to call it.
        task, found: an `evaluate.Task` and the `Evaluation` of one of its splits.
    """
    config, catalogue, store = task.config, task.catalogue, task.store
    rows, given = found.rows, task.labels[found.rows]
    said = found.answers.labels.numpy()
    p = {name: scores.numpy() for name, scores in found.answers.probabilities.items()}
    classes = task.classes
    single = contradicted(rows, given, said, p)
    groups = conflicting(rows, store.hashes[rows], given, said, p)
    write_csv(folder / "suspects.csv", single, groups, catalogue, classes)

    by_row: dict[int, list[Suspect]] = {}
    for suspect in single:
        by_row.setdefault(suspect.row, []).append(suspect)
    by_picture: dict[int, list[list[Suspect]]] = {}
    for group in groups:
        by_picture.setdefault(int(store.hashes[group[0].row]), []).append(group)
    raw = Decoder(config | {"calibration": None}, PATH, found.scores["decoding"] == "joint")(found.logits)
    thresholds = config["calibration"]["threshold"][found.scores["decoding"]]
    charts, confusions, mistakes = {}, {}, {}
    for column, (name, texts) in enumerate(classes.items()):
        judgement = judged(found.answers, given, column)
        charts[name] = {
            "before": reliability_points(*judged(raw, given, column)),
            "after": reliability_points(*judgement),
            "coverage": coverage_chart(*judgement, thresholds[name], config["calibration"]["target_precision"]),
            "threshold": thresholds[name],
        }
        confusions[name] = confusion(given[:, column], said[:, column], texts)
        confidence = found.answers.confidence[:, column].numpy()
        wrong = np.flatnonzero((given[:, column] != said[:, column]) & (given[:, column] != MISSING))
        mistakes[name] = [
            {
                "row": int(rows[i]),
                "given": texts[given[i, column]] if given[i, column] >= 0 else "a label unknown to training",
                "said": texts[said[i, column]],
                "confidence": float(confidence[i]),
            }
            for i in wrong[np.argsort(-confidence[wrong], kind="stable")[:MISTAKES]]
        ]

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # titles and labels are a stranger's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        checkpoint=checkpoint,
        backbone=config["backbone"],
        catalogue=catalogue.name,
        scores=found.scores,
        skipped=len(store.skipped),
        distances=path_distance(given, said, list(classes)),
        often=by_frequency(given, said, {a["name"]: a["counts"] for a in config["attributes"]}),
        starts=OFTEN,
        charts=charts,
        target=config["calibration"]["target_precision"],
        area={"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        confusions=confusions,
        mistakes=mistakes,
        suspects=list(by_row.values())[:SUSPECTS],
        excluded=EXCLUDED,
        likely=LIKELY,
        suspect_rows=len(by_row),
        suspect_labels=len(single),
        pictures=list(by_picture.values())[:PICTURES],
        picture_total=len(by_picture),
        classes=classes,
        title=lambda row: catalogue.columns[TITLE][row] or "",
        ids=catalogue.ids,
        picture=lambda row: picture_uri(store.pixels[row]),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def picture_uri(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) -> a data URI, small enough for hundreds on a page."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    image.save(buffer := io.BytesIO(), "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


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
    floor = min(0.9, np.floor(10 * precision[chosen].min()) / 10) if len(rows) else 0.0
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
    table = np.zeros((len(texts), len(texts)), dtype=int)
    np.add.at(table, (given, said), 1)
    wrong = table - np.diag(table.diagonal())
    involved = wrong.sum(0) + wrong.sum(1)
    chosen = np.sort(np.argsort(-involved, kind="stable")[:CONFUSED])
    chosen = chosen[(table.sum(0) + table.sum(1))[chosen] > 0]
    inner = table[np.ix_(chosen, chosen)]
    total = table[chosen].sum(1)
    pairs = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None, kind="stable")[:8]]
    return {
        "classes": [texts[c] for c in chosen],
        "cells": np.column_stack([inner, total - inner.sum(1)]).tolist(),
        "rows": total.tolist(),
        "pairs": [(texts[a], texts[b], int(wrong[a, b])) for a, b in pairs if wrong[a, b]],
    }
