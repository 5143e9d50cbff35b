"""Train, val and test split by content: the split of a picture depends only on its pixels.

So identical pictures are never in two splits, and adding, removing or reordering rows moves no other row. Where a
catalogue says which article each picture shows, the pictures of an article, but those that others share, are in one.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

SPLITS = ("train", "val", "test")


def in_split(keys: np.ndarray, split: str) -> np.ndarray:
    """uint64 keys (N,), such as pixel hashes -> bool (N,): 80 / 10 / 10 percent of the distinct keys."""
    digit = keys % np.uint64(10)
    return {"test": digit == 0, "val": digit == 1, "train": digit >= 2}[split]


def keys_of_articles(hashes: np.ndarray, articles: Iterable[str | None]) -> np.ndarray:
    """Pixel hashes uint64 (N,) and each row's article -> keys uint64 (N,) to split by.

    Pictures of one article have one key. A picture that several articles share, such as "no photo yet", goes by its
    pixels, and so does one without an article: identical pictures stay together too.
    """
    names = (int(h) if article is None else _hash(article) for h, article in zip(hashes, articles, strict=True))
    keys = np.fromiter(names, np.uint64, len(hashes))
    (_, picture), (distinct, article) = (np.unique(of, return_inverse=True) for of in (hashes, keys))
    pairs = np.unique(picture * len(distinct) + article)  # of a picture and an article, each once
    articles_of = np.bincount(pairs // max(1, len(distinct)))
    return np.where(articles_of[picture] > 1, hashes, keys)


def _hash(article: str) -> int:
    return int.from_bytes(hashlib.blake2b(article.encode(errors="replace"), digest_size=8).digest(), "little")


def at_most(rows: np.ndarray, most: int) -> np.ndarray:
    """These rows or, if there are more than `most`, that many of them: always the same ones, in ascending order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False, shuffle=False))]
