import pytest

from data import brand

TRAIN = (
    ["Nike Men Blue Shoes"] * 300
    + ["Nike Fragrances Men Deo"] * 12
    + ["Lee Men Jeans"] * 30
    + ["Lee Cooper Men Jeans"] * 12
    + ["Gini and Jony Boys Red Shirt"] * 100
    + ["Gini & Jony Girls Top"] * 3
    + ["Giny and Jony Girls Top"]
    + ["United Colors of Benetton Women Top"] * 20
    + ["United colors of benetton Men Shirt"] * 2
    + ["Undercolors of Benetton Women Vest"] * 11
    + ["Levis Men Jeans"] * 40
    + ["Levi's Men Jeans"] * 15
    + ["Vishudh Women Kurta"] * 200
    + ["Visudh Women Kurta"] * 12
    + ["U.S. Polo Assn. Men Shirt"] * 12
    + ["U.S.Polo Assn Men Shirt"] * 2
    + ["Red Tape Men Brown Shoes"] * 12
    + ["Lino Perros Women Bag"] * 12
    + ["SDL by Sweet Dreams Women Night suit"] * 12
    + ["Gliders Men Sandals"] * 12
    + ["Mr.Men Men's Cool T-shirt"] * 12
    + ["Kids Ville Girls Top"] * 12
    + ["Basics Men Shirt"] * 295
    + ["Asics Men Shoes"] * 15
    + ["Nyk Women Bag"] * 12
    + ["AND Women Dress"] * 12
    + ["Lakme Nine to Five Compact"] * 12
    + ["Women Red Dress"] * 15
    + ["Rare Men Shirt"] * 9
)
ALIASES = brand.fit(TRAIN, min_count=10)


@pytest.mark.parametrize(
    ("title", "label"),
    [
        ("NIKE MEN Running Shoes", "Nike"),
        ("Nike Baby Pink Shoes", "Nike"),  # no gender word: the known beginning
        ("Nike Fragrances Men Deo", "Nike"),  # a product line, though frequent
        ("Lee Cooper Men Jeans", "Lee Cooper"),  # a brand of its own
        ("Lee Men Jeans", "Lee"),
        ("Levi's Men's Jeans", "Levis"),
        ("Gini & Jony Girl's Top", "Gini and Jony"),
        ("Giny and Jony Girls Top", "Gini and Jony"),
        ("united colors of BENETTON Unisex Cap", "United Colors of Benetton"),
        ("United Colors of Benetton Red Cap", "United Colors of Benetton"),
        ("Undercolors of Benetton Women Vest", "Undercolors of Benetton"),
        ("Visudh Women Kurta", "Vishudh"),
        ("U.S.Polo Assn. Mens Shirt", "U.S. Polo Assn."),
        ("Red Tape Brown Formal Shoes", "Red Tape"),
        ("Lino Perros Black Women Bag", "Lino Perros"),
        ("SDL by Sweet Dreams Men Pyjama", "SDL"),
        ("Gliders by Liberty Men Flip Flops", "Gliders"),
        ("Mr. Men Little Miss Girls White Top", "Mr.Men"),
        ("Mr. Men Blue T-shirt", "Mr.Men"),
        ("Kids Ville Kids-Boys Blue Flip Flops", "Kids Ville"),
        ("Asics Men Shoes", "Asics"),
        ("Nyk Women Bag", "Nyk"),
        ("AND Women Top", "AND"),
        ("Lakme Absolute Lipstick", "Lakme"),
        ("Women Red Dress", None),  # a title that names no brand, however often it occurs
        ("Men", None),
        ("Unheard Of Men Shirt", None),
        ("Rare Men Shirt", None),
        ("Babyhug Boys Romper", None),
        ("", None),
        (" -- & ", None),
    ],
)
def test_the_brand_of_a_title(title, label):
    assert brand.find(title, ALIASES) == label


def test_no_letters_are_cut_out_of_words():
    assert brand.phrase("Baby by Bybel Men Shirt") == (["Baby"], True)
    assert brand.phrase("Ruby Bybel Womens Top") == (["Ruby", "Bybel"], True)
    assert brand.phrase("Playboy Men Deo") == (["Playboy"], True)


@pytest.mark.parametrize(
    ("a", "b", "slip"),
    [
        ("visudh", "vishudh", True),
        ("ginyjony", "ginijony", True),
        ("provouge", "provogue", True),
        ("lifetsyle", "lifestyle", True),
        ("levisi", "levis", True),
        ("lee", "levi", False),
        ("nyk", "nike", False),
        ("asics", "basics", False),
        ("madagascar3", "madagascar", False),
        ("madagascar3", "madagascar2", False),
        ("enamor", "enroute", False),
        ("reebok", "rebook", False),
        ("carlton", "carolnt", False),
    ],
)
def test_one_slip(a, b, slip):
    assert brand._one_slip(a, b) is slip
    assert brand._one_slip(b, a) is slip


def test_two_frequent_spellings_are_two_brands():
    aliases = brand.fit(["Carrera Men Watch"] * 30 + ["Carreta Men Watch"] * 20, min_count=10)
    assert set(aliases.values()) == {"Carrera", "Carreta"}
