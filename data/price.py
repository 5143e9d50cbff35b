"""`price_in_vnd`, simulated with the table of the notebook that this project re-creates: the catalogue has no prices.

A price is drawn uniformly from a range that a row's labels and year determine. The draw depends only on `SEED` and the
row's id, so a price is the same in every run, whatever the order of the rows.
"""

import hashlib

import numpy as np

from data.cells import to_numbers

COLUMNS = ("masterCategory", "subCategory", "articleType", "year")
SEED = 42
VND = 2500  # the ranges below are in units of so many VND
ARTICLE_TYPE = {
    "Shirts": (15, 70),
    "Watches": (50, 300),
    "Sports Shoes": (40, 200),
    "Sunglasses": (30, 150),
    "Perfumes": (25, 120),
}
MASTER_CATEGORY = {
    "Apparel": (10, 20),
    "Accessories": (5, 100),
    "Footwear": (20, 200),
    "Personal Care": (5, 300),
    "Free Items": (0, 5),
    "Sporting Goods": (100, 250),
    "Home": (100, 300),
}
SUB_CATEGORY = {
    "Topwear": (5, 50),
    "Watches": (30, 150),
    "Shoes": (20, 100),
    "Bags": (10, 70),
    "Fragrance": (5, 80),
    "Jewellery": (10, 200),
}
OTHER_MASTER, OTHER_SUB = (10, 100), (0, 0)


def ranges(columns: dict[str, list[str | None]]) -> np.ndarray:
    """Lowest and highest price of each row, in VND: (N, 2)."""
    found, years = np.empty((len(columns["id"]), 2)), to_numbers(columns["year"], "year", columns["id"])
    rows = zip(*(columns[name] for name in COLUMNS[:-1]), years, strict=True)
    for row, (master, sub, article, year) in enumerate(rows):
        both = np.add(MASTER_CATEGORY.get(master, OTHER_MASTER), SUB_CATEGORY.get(sub, OTHER_SUB))
        worth = 0.7 if year < 2015 else 0.85 if year < 2018 else 1.0
        found[row] = worth * VND * np.array(ARTICLE_TYPE.get(article, both))
    return found


def simulate(columns: dict[str, list[str | None]]) -> np.ndarray:
    """The price of each row, in whole VND: float64 (N,)."""
    digests = (hashlib.blake2b(f"{SEED} {id}".encode(), digest_size=8).digest() for id in columns["id"])
    share = np.array([int.from_bytes(digest, "little") / 2**64 for digest in digests])
    low, high = ranges(columns).T
    return np.round(low + share * (high - low))


def expected(columns: dict[str, list[str | None]]) -> np.ndarray:
    """The best possible guess (N,) from a row's labels and year; its error is noise."""
    return ranges(columns).mean(1)
