"""How good predictions are: accuracy, F1, paths, errors of numbers, and the tables that show them."""

import numpy as np

from data.attributes import MISSING


def average(values) -> float | None:
    return float(np.mean(values)) if len(values) else None


def f1_scores(true: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Macro and weighted F1 over the classes that occur as truth or as prediction, as scikit-learn counts them.

    All labels never seen in training are one class here, which nobody can predict.
    """
    classes, codes = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    true, predicted = codes[: len(true)], codes[len(true) :]
    hits = np.bincount(true[true == predicted], minlength=len(classes))
    support = np.bincount(true, minlength=len(classes))
    f1 = 2 * hits / (support + np.bincount(predicted, minlength=len(classes)))
    return float(f1.mean()), float((f1 * support).sum() / support.sum())


def score(labels: np.ndarray, predicted: np.ndarray, names: list[str], paths: list[dict]) -> dict:
    """All metrics of predictions (N, A) against labels (N, A).

    A missing label is left out and `rows` says how many there were; a label never seen in training is wrong whatever
    was predicted. `path_accuracy` is over rows whose hierarchies (`paths`, see `data.attributes.known_paths`) are
    labelled in full; `valid_path_rate` is the share of rows whose predicted paths are known; both are None where
    there is no hierarchy. `exact_match` is the share of rows with labels that has them all right;
    `mean_accuracy`, the mean over attributes, is what the best epoch is chosen by.
    """
    present, right = labels != MISSING, labels == predicted
    attributes = {}
    for column, name in enumerate(names):
        rows = present[:, column]
        if not rows.any():
            attributes[name] = {"accuracy": None, "macro_f1": None, "weighted_f1": None, "rows": 0}
            continue
        macro, weighted = f1_scores(labels[rows, column], predicted[rows, column])
        accuracy = float(right[rows, column].mean())
        attributes[name] = {"accuracy": accuracy, "macro_f1": macro, "weighted_f1": weighted, "rows": int(rows.sum())}

    path = path_columns(paths, names)
    whole = present[:, path].all(1)
    valid = np.ones(len(labels), dtype=bool)
    for p in paths:
        known = set(map(tuple, p["known"]))
        valid &= [tuple(row) in known for row in predicted[:, [names.index(name) for name in p["attributes"]]].tolist()]
    return {
        "rows": len(labels),
        "attributes": attributes,
        "mean_accuracy": average([a["accuracy"] for a in attributes.values() if a["rows"]]),
        "path_accuracy": average(right[whole][:, path].all(1)) if paths else None,
        "valid_path_rate": average(valid) if paths else None,
        "exact_match": average((right | ~present)[present.any(1)].all(1)),
    }


def path_columns(paths: list[dict], names: list[str]) -> list[int]:
    """The columns of all attributes that are part of a hierarchy."""
    return [names.index(name) for path in paths for name in path["attributes"]]


def score_number(true: np.ndarray, guesses: np.ndarray, constant: float, floor: np.ndarray | None = None) -> dict:
    """Mean absolute error and R² of guesses (N,) of a number (N,), NaN where it is missing.

    Args:
        constant: the median of train rows, the constant of the least error there; its R² may be below 0.
        floor: (N,) the best guesses that anybody could make; known only for a simulated number.
    """
    present = ~np.isnan(true)
    if not present.any():
        return {"mae": None, "r2": None, "rows": 0}
    true = true[present]
    spread = np.square(true - true.mean()).sum() if np.ptp(true) else 0.0  # of equal ones the mean is not always exact

    def errors(guesses: np.ndarray) -> tuple[float, float | None]:
        missed = guesses[present] - true
        return float(np.abs(missed).mean()), float(1 - np.square(missed).sum() / spread) if spread else None

    scores = dict(zip(("mae", "r2"), errors(guesses), strict=True)) | {"rows": len(true)}
    scores["constant_mae"], scores["constant_r2"] = errors(np.full(len(guesses), constant))
    if floor is not None:
        scores["floor_mae"], scores["floor_r2"] = errors(floor)
    return scores


def scores_table(scores: dict) -> str:
    """The metrics as text, a line per attribute, numbers last."""
    lines = [f"{'attribute':<16}{'accuracy':>9}{'macro F1':>10}{'weighted F1':>13}{'rows':>8}"]
    classes = {name: a for name, a in scores["attributes"].items() if "accuracy" in a}
    for name, a in classes.items():
        figures = (
            f"{a['accuracy']:>9.3f}{a['macro_f1']:>10.3f}{a['weighted_f1']:>13.3f}"
            if a["rows"]
            else f"{'no labels':>32}"
        )
        lines.append(f"{name:<16}{figures}{a['rows']:>8,}")
    whole = [(key, scores[key]) for key in ("mean_accuracy", "path_accuracy", "valid_path_rate", "exact_match")]
    lines.append("  ".join(f"{key} {value:.3f}" for key, value in whole if value is not None))
    for name, a in scores["attributes"].items():
        if name not in classes:
            lines.append(f"{name:<16}" + (number_line(a) if a["rows"] else "no labels"))
    return "\n".join(lines)


def rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def number_line(a: dict) -> str:
    """The errors of a number beside those of the best constant, and beside what no guess can be better than."""
    parts = [("MAE", ""), ("best constant", "constant_"), ("simulated: its noise alone", "floor_")]
    return "; ".join(
        f"{what} {rounded(a[f'{key}mae'])} (R² {'–' if a[f'{key}r2'] is None else format(a[f'{key}r2'], '.3f')})"
        for what, key in parts
        if f"{key}mae" in a
    )


def trust_table(scores: dict) -> str:
    """What decoding along the paths and calibration are worth, as text beside `scores_table`."""
    lines = [
        "  ".join([f"{how:<12}", *(f"{key} {value:.3f}" for key, value in scores[how].items() if value is not None)])
        for how in ("joint", "independent")
    ]
    if "calibration" in scores:
        c = scores["calibration"]
        lines.append(f"\n{'attribute':<16}{'ECE before':>11}{'after':>8}{'accepted':>10}{'precision':>11}")
        for name, a in c["attributes"].items():
            before, after, accepted, precision = (
                "–" if a[key] is None else f"{a[key]:.3f}" for key in ("ece_before", "ece", "accepted", "precision")
            )
            lines.append(f"{name:<16}{before:>11}{after:>8}{accepted:>10}{precision:>11}")
        right = f", {c['precision']:.3f} of them right" if c["precision"] is not None else ""
        paths = f"{c['paths_accepted']:.3f} of all paths, " if c["paths_accepted"] is not None else ""
        lines.append(
            f"accepted at target precision {c['target_precision']}: {c['accepted']:.3f} of all labels{right}; "
            f"{paths}{c['rows_accepted']:.3f} of all rows in full"
        )
    return "\n".join(lines)


def path_distance(labels: np.ndarray, predicted: np.ndarray, columns: list[int]) -> list[int]:
    """How far off answers (N, A) are along a hierarchy: at which level the rows that are labelled in full go wrong.

    Args:
        columns: of an attribute and those above it, coarse to fine.

    Returns:
        counts of rows whose last attribute is right; wrong, but all above it right (distance 1); ...; whose first
        attribute is wrong already (distance `len(columns)`).
    """
    known = (labels[:, columns] != MISSING).all(1)
    right = (labels == predicted)[known][:, columns]  # (n, len(columns))
    agree = right[:, :-1].cumprod(1).sum(1)  # how many levels from the top agree
    distance = np.where(right[:, -1], 0, len(columns) - agree)
    return np.bincount(distance, minlength=len(columns) + 1).tolist()
