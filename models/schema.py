"""What a checkpoint's `config.json` must look like before anything is built from it: a stranger may have written it."""

import math
from collections.abc import Collection

from models.text import SPECIAL


def number(value) -> bool:
    return type(value) in (int, float) and abs(value) < (math.inf if type(value) is float else 2**53)


def positive(value) -> bool:
    return number(value) and value > 0


def temperature(value) -> bool:
    return number(value) and 1e-3 <= value <= 1e3  # `calibration.py` fits 0.05 to 20


def share(value) -> bool:
    return positive(value) and value <= 1


def labels_of(config: dict) -> dict[str, list[str]]:
    """Class attribute -> its labels, in the order of the label columns."""
    return {a["name"]: a["labels"] for a in config["attributes"] if a["kind"] == "class"}


def learnt_from(config: dict) -> list[str]:
    """Fingerprints of the catalogues whose rows a checkpoint has seen: that of its run, those its heads were fitted
    to since, and those that the checkpoint it was started from had seen."""
    return [config["data"]["fingerprint"], *config["data"].get("heads_fingerprint", "").split()]


def learnt_on(config: dict, fingerprint: str, limit: int | None) -> bool:
    """Whether a checkpoint was trained on the files of a catalogue, even if on another choice of rows than its `limit`.
    A copy of the files counts as another catalogue."""
    found = fingerprint.removesuffix(f"-{limit}")
    return any(one.startswith(found) for one in learnt_from(config))


# Bounds, so that no number in a file causes an unbounded allocation.
SIDE, PATCH, RANK, MANY = range(1, 4097), range(1, 257), range(1, 4097), range(10**9)
MOST_PATCHES = 256  # per side
TAKEN = ("image", "error")  # columns beside those of the attributes

# A shape is a type; a predicate; a range of integers; a literal string; None; a tuple of alternatives; [shape] for a
# list of any length, or [shape, shape] for a list of two; {str: shape} for a mapping; else an object with these keys,
# of which those that end in "?" may be absent, and with further keys if `...` is among them.
ATTRIBUTE = {
    "name": str,
    "level": range(1, 100),
    "column": str,
    "derive": ("brand", "price", None),
    "weight": positive,
    "parents": [str],
    ...: None,
}
CLASS = ATTRIBUTE | {"kind": "class", "labels": [str], "counts": [MANY], "aliases": ({str: str}, None)}
QUANTITY = ATTRIBUTE | {"kind": "number", "mean": number, "std": positive, "median": number}
CONFIG = {
    "backbone": {
        "name": str,
        "img_size": (SIDE, None),
        "patch_size": (PATCH, None),
        "keep_patches": share,
        "fingerprint": str,
        ...: None,
    },
    "lora": {
        "targets": [str],
        "rank": (RANK, {str: RANK}),
        "alpha": (number, {str: number}),
        "dropout": number,
        "layers?": ([range(1000)], None),
        "rslora?": bool,
        "dora?": bool,
        "pissa?": bool,
    },
    "attributes": [(CLASS, QUANTITY)],
    "paths": [{"attributes": [str], "known": [[range(10**6)]]}],
    "title": (str, None),
    "article?": (str, None),
    "data": {"fingerprint": str, "heads_fingerprint?": str, ...: None},
    "inputs": ("image", "title", "image+title"),
    "text": (None, {"vocab": [str], "length": range(3, 513), "mask": bool}),
    "preprocess": {
        "canvas": [SIDE, SIDE],
        "size": [SIDE, SIDE],
        "interpolation": ("bicubic", "bilinear"),
        "mean": [number] * 3,
        "std": [positive] * 3,
    },
    "calibration?": {
        "target_precision": share,
        "rows": MANY,
        "temperature": {str: temperature},
        "threshold": {"joint": {str: (number, None)}, "independent": {str: (number, None)}},
    },
    ...: None,
}


def misfit(value, shape=CONFIG, where: str = "") -> str | None:
    """The first place where a JSON value does not match a shape, such as "lora.rank"; None if all of it matches."""
    if isinstance(shape, tuple):
        return where if all(misfit(value, option, where) for option in shape) else None
    if isinstance(shape, list):
        if not isinstance(value, list) or len(shape) not in (1, len(value)):
            return where
        shapes = shape * len(value) if len(shape) == 1 else shape
        found = (misfit(v, one, f"{where}[{i}]") for i, (v, one) in enumerate(zip(value, shapes, strict=True)))
        return next(filter(None, found), None)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return where or "all of it"
        if str in shape:
            return next(filter(None, (misfit(v, shape[str], f"{where}.{k}") for k, v in value.items())), None)
        known = {name.rstrip("?"): name for name in shape if name is not ...}
        dot = f"{where}." if where else ""
        if ... not in shape and (extra := sorted(value.keys() - known)):
            return f"{dot}{extra[0]}"
        for key, name in known.items():
            if key in value and (found := misfit(value[key], shape[name], f"{dot}{key}")):
                return found
            if key not in value and not name.endswith("?"):
                return f"{dot}{key}"
        return None
    if isinstance(shape, range):
        return None if type(value) is int and value in shape else where
    if isinstance(shape, type):
        return None if isinstance(value, shape) else where
    if callable(shape):
        return None if shape(value) else where
    return None if value == shape else where


def contradiction(config: dict) -> str | None:
    """How a config of the right shape contradicts itself; None if it does not."""
    names = [a["name"] for a in config["attributes"]]
    classes = {a["name"]: a for a in config["attributes"] if a["kind"] == "class"}
    if not classes:
        return "none of its attributes has labels"
    for kind, given in [("attributes", names), *((f"labels of {name}", a["labels"]) for name, a in classes.items())]:
        if not given or len(set(given)) < len(given):
            return f"its {kind} are none, or one comes twice"
    said = [*names, *(f"{name}_{key}" for name in classes for key in ("confidence", "decision")), *TAKEN]
    if len(set(said)) < len(said):
        return "an attribute is called like another column of what infer.py writes"
    for name, a in classes.items():
        if len(a["counts"]) != len(a["labels"]):
            return f"its counts of {name} are not of its labels"
    for a in config["attributes"]:
        for parent in a["parents"]:
            if parent not in classes or classes[parent]["level"] >= a["level"]:
                return f"its {parent} is a parent of {a['name']}, and no attribute with labels above it"
    for path in config["paths"]:
        if not path["attributes"] or not set(path["attributes"]) <= classes.keys():
            return "a path is of attributes that are not there"
        sizes = [len(classes[name]["labels"]) for name in path["attributes"]]
        if not all(_within(known, sizes) for known in path["known"]):
            return "a path names a class that no label has"
    fitted = config.get("calibration")
    if fitted and any(k.keys() != classes.keys() for k in (fitted["temperature"], *fitted["threshold"].values())):
        return "its temperatures or thresholds are of other attributes"
    if max(config["preprocess"]["canvas"]) > max(config["preprocess"]["size"]):
        return "its preprocess.canvas is larger than the size that its backbone reads"
    backbone = config["backbone"]
    if (backbone["img_size"] or 1) > MOST_PATCHES * (backbone["patch_size"] or 16):
        return f"its img_size has more than {MOST_PATCHES} patches a side"
    reads, text = "title" in config["inputs"], config["text"]
    if reads != (text is not None) or (reads and not (config["title"] and set(SPECIAL) <= set(text["vocab"]))):
        return "its inputs and its text do not go together"
    return None


def _within(path: Collection[int], sizes: Collection[int]) -> bool:
    return len(path) == len(sizes) and all(0 <= c < size for c, size in zip(path, sizes, strict=True))
