"""Confidence that means something: temperatures, thresholds, and how far they hold, all from labelled rows.

A label that is missing counts nowhere; one never seen in training is wrong, whatever was said (`data.attributes`).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.attributes import MISSING
from metrics import path_columns
from models.decode import AT_ONCE, Answers, Decoder
from models.schema import labels_of

TARGET_PRECISION = 0.98
LUCKY = 0.05  # the chance that a threshold passes that should not, were it the only one tried
BINS = 15  # of equal width, as Guo et al. have them
COOLEST, HOTTEST = 0.05, 20.0


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T that minimises the negative log-likelihood of `softmax(logits / T)` (N, C) over labels (N,) >= 0.

    Labels are smoothed as if one row more had a label at random, after Platt (1999): where no row is wrong, all
    confidences would be 1. The loss is convex in 1/T; its slope there, the mean expected logit less the mean true one,
    is bisected to zero.
    """
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    if not len(labels):
        return 1.0
    smoothing = 1 / (len(labels) + 1)
    true = logits.gather(1, labels[:, None]).squeeze(1).double()
    true = (1 - smoothing) * true + smoothing * logits.mean(1, dtype=torch.double)
    low, high = math.log(1 / HOTTEST), math.log(1 / COOLEST)
    for _ in range(24):  # to within 4e-7 of T
        middle = (low + high) / 2
        expected = torch.cat([_expected(some.double(), math.exp(middle)) for some in logits.split(AT_ONCE)])
        low, high = (middle, high) if (expected - true).mean() < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def _expected(logits: Tensor, coldness: float) -> Tensor:
    """(n,) the mean logit of `softmax(logits / T)`, coldness being 1/T."""
    return ((logits * coldness).softmax(-1) * logits).sum(-1)


class Bin(NamedTuple):
    """Answers of similar confidence: how many, their mean confidence, and how many of them are right."""

    rows: int
    confidence: float
    accuracy: float


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[Bin]:
    """The bins of confidence that hold any of the rows (N,)."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    inside = [bins == b for b in np.unique(bins)]
    return [Bin(int(i.sum()), float(confidence[i].mean()), float(right[i].mean())) for i in inside]


def calibration_error(bins: list[Bin]) -> float | None:
    """Expected calibration error: how far confidence is from accuracy, over bins weighted by their rows."""
    rows = sum(b.rows for b in bins)
    return sum(b.rows * abs(b.confidence - b.accuracy) for b in bins) / rows if rows else None


def coverage_curve(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each possible threshold, falling, with the number of rows at or above it and how many of those are right."""
    order = np.argsort(-confidence, kind="stable")
    thresholds, hits = confidence[order], right[order].cumsum()
    last = np.append(thresholds[1:] != thresholds[:-1], True)[: len(order)]  # equal confidences stand or fall together
    return thresholds[last], np.flatnonzero(last) + 1, hits[last]


def precision_threshold(confidence: np.ndarray, right: np.ndarray, target: float) -> float | None:
    """The lowest threshold whose precision, were it the only one tried, is at least `target` with 95 % certainty.

    The plain fraction would promise too much: as often as not it is too high by chance, the more so the fewer the rows.
    A precision of just `target` would give m = rows · (1 - target) mistakes on average; the chance that it gives as few
    as were made must be at most 5 %. This chance is taken from Poisson's distribution, in which few mistakes are a
    little likelier than in the binomial one (Anderson and Samuels 1967).

    Of many thresholds some pass by luck. Where precision clearly falls as confidence does, that makes little
    difference: the promise is broken in 5 % of samples or so. Where precision is nearly the same everywhere and just
    too low, the promise is broken in 20 % of samples of 2,000 rows, and more often in larger ones
    (`tests/test_calibration.py` draws some). Testing each at 1 % would end that, and accept much less.

    Rows are taken to be independent.

    The threshold is always above 0.5: an answer more likely wrong than right is for a person to review, even where
    other answers make up for it. None where no threshold is enough.
    """
    thresholds, rows, hits = coverage_curve(confidence, right)
    mistakes, expected = torch.from_numpy(rows - hits).double(), torch.from_numpy(rows * (1 - target))
    lucky = torch.special.gammaincc(mistakes + 1, expected).numpy()  # chance of no more mistakes than these
    enough = np.flatnonzero((lucky <= LUCKY) & (thresholds > 0.5))
    return float(thresholds[enough[-1]]) if len(enough) else None


def one_of_each(keys: np.ndarray) -> np.ndarray:
    """A row of each distinct key (N,), drawn at random, the same ones each time; ascending."""
    order = np.random.default_rng(0).permutation(len(keys))
    return np.sort(order[np.unique(keys[order], return_index=True)[1]])


def calibrate(
    logits: Mapping[str, Tensor],
    labels: np.ndarray,
    keys: np.ndarray,
    config: dict,
    target: float = TARGET_PRECISION,
) -> dict:
    """A checkpoint's `calibration`: temperatures, then thresholds for the answers those give, decoded either way.

    Thresholds are fitted to one labelled row of each key, because answers about one picture, or photos of one article,
    are right or wrong together: counted as independent, they would promise too much. So they do where a catalogue has
    several photos of its articles, and no column `article` that says so.

    An attribute keeps its temperature in `config` if no row has a label of it that the model knows. If no row has any
    label of it, it keeps its thresholds too, provided that they are for the same target.

    Args:
        logits: {attribute: (N, classes)} of rows the model was not trained on.
        labels: (N, A) their labels.
        keys: (N,) by which they are split (`data.store.ImageStore.keys`).
    """
    truths, names = torch.from_numpy(labels).long(), list(labels_of(config))
    temperature = {name: fit_temperature(logits[name], truths[:, i]) for i, name in enumerate(names)}
    if before := config.get("calibration"):
        unlabelled = [name for i, name in enumerate(names) if (labels[:, i] == MISSING).all()]
        unknown = [name for i, name in enumerate(names) if (labels[:, i] < 0).all()]
        temperature |= {name: before["temperature"][name] for name in unknown}
    fitted = {"target_precision": target, "rows": len(labels), "temperature": temperature, "threshold": {}}
    for how in ("joint", "independent"):
        nothing_yet = {"temperature": temperature, "threshold": {how: {}}}
        answers = Decoder(config | {"calibration": nothing_yet}, how == "joint")(logits)
        fitted["threshold"][how] = {
            name: precision_threshold(*judged(answers, labels, column, keys), target)
            for column, name in enumerate(names)
        }
        if before and before["target_precision"] == target:
            fitted["threshold"][how] |= {name: before["threshold"][how][name] for name in unlabelled}
    return fitted


def judged(
    answers: Answers, labels: np.ndarray, column: int, keys: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Confidence (n,) and rightness (n,) of one attribute's answers, over the n rows whose label is known, or with
    `keys` (N,) over one such row of each key."""
    known = np.flatnonzero(labels[:, column] != MISSING)
    if keys is not None:
        known = known[one_of_each(keys[known])]
    confidence, said = answers.confidence[:, column].double().numpy(), answers.labels[:, column].numpy()
    return confidence[known], (said == labels[:, column])[known]


def calibration_scores(answers: Answers, raw: Answers, labels: np.ndarray, names: list[str], paths: list[dict]) -> dict:
    """What calibration is worth on rows with labels (N, A): error before and after, and what needs no person.

    `accepted` are shares of all rows, labelled or not; `precision` is over those accepted whose label is known.
    `rows_accepted` and `paths_accepted` are the shares of rows in which all labels, or all those in a hierarchy, are
    accepted; the latter is None where there is no hierarchy.
    """
    accepted = answers.accepted.numpy()
    known, right = labels != MISSING, answers.labels.numpy() == labels
    sure = accepted & known
    attributes = {
        name: {
            "ece_before": calibration_error(reliability(*judged(raw, labels, column))),
            "ece": calibration_error(reliability(*judged(answers, labels, column))),
            "accepted": float(accepted[:, column].mean()),
            "precision": float(right[sure[:, column], column].mean()) if sure[:, column].any() else None,
        }
        for column, name in enumerate(names)
    }
    return {
        "attributes": attributes,
        "accepted": float(accepted.mean()),
        "precision": float(right[sure].mean()) if sure.any() else None,
        "rows_accepted": float(accepted.all(1).mean()),
        "paths_accepted": float(accepted[:, path_columns(paths, names)].all(1).mean()) if paths else None,
    }
