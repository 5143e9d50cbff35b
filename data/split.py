"""Train, val and test by content: a picture's side is a function of its pixels alone.

So identical pictures are never on two sides, and adding, removing or reordering rows moves no other row.
"""

import numpy as np

SPLITS = ("train", "val", "test")


def in_split(hashes: np.ndarray, split: str) -> np.ndarray:
    """uint64 pixel hashes (N,) -> bool (N,): 80 / 10 / 10 percent of the distinct pictures."""
    digit = hashes % np.uint64(10)
    return {"test": digit == 0, "val": digit == 1, "train": digit >= 2}[split]


def at_most(rows: np.ndarray, most: int) -> np.ndarray:
    """All of these rows, or where there are more than `most`, so many of them: always the same ones, ascending."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False, shuffle=False))]
