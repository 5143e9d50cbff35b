"""Train, val and test split by content: the split of a picture depends only on its pixels.

So identical pictures are never in two splits, and adding, removing or reordering rows moves no other row.
"""

import numpy as np

SPLITS = ("train", "val", "test")


def in_split(hashes: np.ndarray, split: str) -> np.ndarray:
    """uint64 pixel hashes (N,) -> bool (N,): 80 / 10 / 10 percent of the distinct pictures."""
    digit = hashes % np.uint64(10)
    return {"test": digit == 0, "val": digit == 1, "train": digit >= 2}[split]


def at_most(rows: np.ndarray, most: int) -> np.ndarray:
    """These rows or, if there are more than `most`, that many of them: always the same ones, in ascending order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False, shuffle=False))]
