"""Train, val and test split by content: the split of a picture depends only on its pixels.

So identical pictures are never in two splits, and adding, removing or reordering rows moves no other row. Where a
catalogue says which article each picture shows, all pictures of an article are in one split (`keys_of_articles`).
"""

import hashlib
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "val", "test")
SHARED = 10  # articles that one picture ties together, at most: one of more, such as "no photo yet", shows none of them


def in_split(keys: np.ndarray, split: str) -> np.ndarray:
    """uint64 keys (N,), such as pixel hashes -> bool (N,): 80 / 10 / 10 percent of the distinct keys."""
    digit = keys % np.uint64(10)
    return {"test": digit == 0, "val": digit == 1, "train": digit >= 2}[split]


def keys_of_articles(hashes: np.ndarray, articles: Sequence[str | None]) -> np.ndarray:
    """Pixel hashes uint64 (N,) and each row's article -> keys uint64 (N,) to split by.

    Rows of one article have one key, and so have articles that share a picture, unless more than `SHARED` do. A row
    without an article is one by itself, named by its pixels.
    """
    names = (int(h) if article is None else _hash(article) for h, article in zip(hashes, articles, strict=True))
    keys = np.fromiter(names, np.uint64, len(hashes))
    (_, picture), (distinct, article) = (np.unique(of, return_inverse=True) for of in (hashes, keys))
    pairs = np.unique(picture * len(distinct) + article)  # of a picture and an article, each once
    ties = np.bincount(pairs // max(1, len(distinct)))[picture] <= SHARED
    while True:  # the least key spreads from article to picture to article
        before = keys
        for group, rows in ((picture, ties), (article, slice(None))):
            least = np.full(len(keys), np.iinfo(np.uint64).max)
            np.minimum.at(least, group[rows], keys[rows])
            keys = np.minimum(keys, least[group])
        if (keys == before).all():
            return keys


def _hash(article: str) -> int:
    return int.from_bytes(hashlib.blake2b(article.encode(errors="replace"), digest_size=8).digest(), "little")


def at_most(rows: np.ndarray, most: int) -> np.ndarray:
    """These rows or, if there are more than `most`, that many of them: always the same ones, in ascending order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False, shuffle=False))]
