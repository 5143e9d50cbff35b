"""The simulated price: the table by hand, and a draw that depends on the row's id alone."""

import numpy as np
import pytest

from data.price import expected, ranges, simulate
from errors import UserError


def rows(*values, ids=None):
    names = ("masterCategory", "subCategory", "articleType", "year")
    columns = {name: list(column) for name, column in zip(names, zip(*values, strict=True), strict=True)}
    return columns | {"id": ids or [str(i) for i in range(len(values))]}


@pytest.mark.parametrize(
    ("row", "low", "high"),
    [
        (("Apparel", "Topwear", "Shirts", "2018"), 15, 70),  # the article type decides alone
        (("Apparel", "Topwear", "Tshirts", "2018"), 10 + 5, 20 + 50),
        (("Accessories", "Wallets", "Wallets", "2019"), 5, 100),  # no range of the subcategory
        (("Toys", "Bags", None, None), 10 + 10, 100 + 70),  # unknown category, unknown year
        (("Footwear", "Shoes", "Sports Shoes", "2017"), 0.85 * 40, 0.85 * 200),
        (("Footwear", "Shoes", "Sports Shoes", "2015"), 0.85 * 40, 0.85 * 200),
        (("Footwear", "Shoes", "Heels", "2014"), 0.7 * 40, 0.7 * 300),
    ],
)
def test_ranges_of_the_table(row, low, high):
    assert ranges(rows(row))[0] == pytest.approx([2500 * low, 2500 * high])
    assert expected(rows(row))[0] == pytest.approx(1250 * (low + high))


def test_a_price_depends_on_the_id_alone_never_on_the_order():
    ids, row = [str(i) for i in range(2000)], ("Apparel", "Topwear", "Shirts", "2018")
    prices = simulate(rows(*[row] * 2000, ids=ids))
    assert (simulate(rows(*[row] * 2000, ids=ids[::-1]))[::-1] == prices).all()
    assert simulate(rows(row, ids=["77"]))[0] == prices[77]
    assert (prices == np.round(prices)).all()
    assert prices.min() >= 37_500
    assert prices.max() <= 175_000
    share = np.sort((prices - 37_500) / 137_500)
    assert np.abs(share - np.linspace(0, 1, 2000)).max() < 0.04, "evenly: Kolmogorov and Smirnov's distance"
    assert simulate(rows(row, ids=["15970"]))[0] == 72_741, "and never changes"


def test_a_year_that_is_no_number_is_named():
    with pytest.raises(UserError, match=r"column year has a cell that is no number: 'soon' \(id 0\); write"):
        simulate(rows(("Apparel", "Topwear", "Shirts", "soon")))
