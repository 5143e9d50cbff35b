"""What a checkpoint's `config.json` must look like before anything is built from it: a stranger may have written it."""

import math

SIDE, RANK = range(1, 4097), range(1, 4097)  # bounds, so that no number in a file makes us allocate without end
NUMBER = float  # a JSON number that is finite
PAIR, TRIPLE = [SIDE], [NUMBER]

# A type; a range of whole numbers; a literal text; None; a tuple of alternatives; [shape] for a list of it;
# {str: shape} for a mapping; else an object of these keys, "?" where one may be absent, and of others too where `...`
# is among them.
ATTRIBUTE = {
    "name": str,
    "level": range(1, 100),
    "column": str,
    "derive": ("brand", "price", None),
    "weight": NUMBER,
    "parents": [str],
    ...: None,
}
CLASS = ATTRIBUTE | {"kind": "class", "labels": [str], "aliases": ({str: str}, None)}
QUANTITY = ATTRIBUTE | {"kind": "number", "mean": NUMBER, "std": NUMBER, "median": NUMBER}
CONFIG = {
    "backbone": {
        "name": str,
        "img_size": (SIDE, None),
        "patch_size": (SIDE, None),
        "keep_patches": NUMBER,
        "fingerprint": str,
        ...: None,
    },
    "lora": {
        "targets": [str],
        "rank": (RANK, {str: RANK}),
        "alpha": (NUMBER, {str: NUMBER}),
        "dropout": NUMBER,
        "layers?": ([range(1000)], None),
        "rslora?": bool,
        "dora?": bool,
        "pissa?": bool,
    },
    "attributes": [(CLASS, QUANTITY)],
    "paths": [{"attributes": [str], "known": [[range(10**6)]]}],
    "title": (str, None),
    "inputs": ("image", "title", "image+title"),
    "text": (None, {"vocab": [str], "length": range(3, 513), "mask": bool}),
    "preprocess": {
        "canvas": PAIR,
        "size": PAIR,
        "interpolation": ("bicubic", "bilinear"),
        "mean": TRIPLE,
        "std": TRIPLE,
    },
    "calibration?": {
        "temperature": {str: NUMBER},
        "threshold": {str: {str: (NUMBER, None)}},
        ...: None,
    },
    ...: None,
}


def misfit(value, shape=CONFIG, where: str = "") -> str | None:
    """The first place where a JSON value is not of a shape, such as "lora.rank"; None where all of it is."""
    if isinstance(shape, tuple):
        return where if all(misfit(value, option, where) for option in shape) else None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return where
        return next(filter(None, (misfit(v, shape[0], f"{where}[{i}]") for i, v in enumerate(value))), None)
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
    if shape is NUMBER:
        return None if type(value) in (int, float) and math.isfinite(value) else where
    if isinstance(shape, type):
        return None if isinstance(value, shape) else where
    return None if value == shape else where
