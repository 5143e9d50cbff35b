"""The embedded demo: a small catalogue of garments, shoes, bags and watches, drawn in the real dataset's schema.

Every label can be seen: the article in its shape, its colour, the brand in the mark printed on it, the gender in the
cut (straight or curved) and the size (children's articles are small), the usage in stripes, creases, long sleeves, a
metal bracelet or a golden hem. The brands are invented. `python -m data.demo` draws fresh ones.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from data.pen import DARK, GOLD, METAL, PALE, Pen, box, circle, mirrored, rounded

ROWS = 4000
MISSING = 0.01  # share of rows without a usage, without a colour, without a title
DUPLICATES = 0.01  # share of rows that show an earlier row's picture

COLOURS = {
    "Black": (42, 42, 46),
    "White": (244, 244, 242),
    "Grey": (150, 152, 156),
    "Blue": (48, 98, 190),
    "Red": (204, 42, 48),
    "Green": (52, 142, 74),
    "Yellow": (242, 198, 48),
    "Pink": (240, 140, 178),
    "Brown": (128, 82, 50),
}
BRANDS = {  # each one's mark, as outlines within the unit circle
    "Solvane": [circle(0, 0, 1)],
    "Ida Quill": [np.vstack([circle(0, 0, 1.1), circle(0, 0, 1.1)[:1], circle(0, 0, 0.55), circle(0, 0, 0.55)[:1]])],
    "Northkite": [[(0, -1.3), (1, 0), (0, 1.3), (-1, 0)]],
    "Vexley": [[(-1.1, 0.3), (0, -0.8), (1.1, 0.3), (1.1, 1), (0, -0.1), (-1.1, 1)]],
    "Brackenby": [box(-1.1, -0.32, 1.1, 0.32), box(-0.32, -1.1, 0.32, 1.1)],
    "Tide and Tern": [box(-1, y - 0.22, 1, y + 0.22) for y in (-0.8, 0, 0.8)],
}


class Tailor(Pen):
    """A pen that knows what a row's gender, usage and brand look like."""

    def __init__(self, rng: np.random.Generator, row: dict, brand: str):
        child = row["gender"] in ("Boys", "Girls")
        super().__init__(rng, COLOURS[row["baseColour"]], rng.uniform(0.64, 0.72) if child else rng.uniform(0.94, 1.06))
        self.curved, self.usage, self.brand = row["gender"] in ("Women", "Girls"), row["usage"], brand

    def cloth(self, points):
        """The article's main part in its cloth, which may be printed where the usage is casual."""
        self.fill(points)
        kind = self.rng.choice(["plain", "plain", "hoops", "checks", "dots"])
        if self.usage == "Casual" and kind != "plain":
            self.pattern(points, kind)
            self.line([*points, points[0]], self.shade)

    def mark(self, x: float, y: float, colour=None):
        """The brand's mark, as large on a small article as on a large one."""
        for outline in BRANDS[self.brand]:
            self.fill(np.add(np.multiply(outline, 5 / self.scale), (x, y)), colour or self.contrast, False)

    def stripes(self, *paths):
        """Sports: each path twice, side by side."""
        for path in paths if self.usage == "Sports" else []:
            for shift in (0, 3):
                self.line([(x - np.sign(x) * shift, y) for x, y in path], self.contrast, 1.3)

    def hem(self, y: float, half_width: float):
        """Ethnic: a golden border with beads."""
        if self.usage == "Ethnic":
            self.line([(-half_width, y - 3), (0, y - 1.5), (half_width, y - 3)], GOLD, 1.6)
            for x in np.linspace(-half_width, half_width, 12):
                self.fill(circle(x, y + 1.5 - 1.5 * abs(x) / half_width, 1.1)[::3], GOLD, False)


class Article(NamedTuple):
    names: str  # articleType / its noun in a title
    parents: str  # masterCategory / subCategory
    genders: str
    usages: str
    draw: object


CATALOGUE = []


def article(*declared: str):
    """Decorate a drawing of an article: adds it to the catalogue."""
    return lambda draw: CATALOGUE.append(Article(*declared, draw)) or draw


@article("Tshirts/T-shirt", "Apparel/Topwear", "Men Women Boys Girls", "Casual Sports")
def tshirt(pen):
    waist, hem, cuff, neck = (10, 13, -16, -19) if pen.curved else (15, 15.5, -10, -25)
    half = [(6, -29), (13, -27), (26, cuff - 3), (20, cuff + 4), (14, -13), (waist, 4), (hem, 27), (0, 28)]
    pen.cloth(mirrored(half))
    pen.fill(rounded(mirrored([(0, -29), (6.5, -29.5), (4.5, neck), (0, neck)])), pen.shade)
    pen.pair(pen.stripes, [(24.5, cuff - 4), (12, -26)])
    pen.pair(pen.stripes, [(waist - 0.5, -4), (hem - 0.5, 26)])
    pen.mark(0, -9)


@article("Shirts/Shirt", "Apparel/Topwear", "Men Women Boys", "Casual Formal")
def shirt(pen):
    waist, (x, y) = 10.5 if pen.curved else 15, (27, 20) if pen.usage == "Formal" else (25, -7)  # long sleeves
    half = [(5, -29), (14, -26), (x, y), (x - 6, y + 1), (14, -11), (waist, 4), (14.5, 24), (6, 29), (0, 27)]
    pen.cloth(mirrored(half))
    pen.line([(0, -26), (0, 27)])
    for y in range(-16, 26, 7):
        pen.fill(circle(1.3, y, 0.8)[::3], pen.contrast, False)
    pen.fill([(-4, -29), (4, -29), (0, -22)], pen.shade)
    pen.pair(pen.fill, [(4, -31), (7, -28), (5, -20), (0, -23)], pen.light)
    pen.mark(-7, -10)


def legs(pen) -> list:
    half = [(11, -34), (12.5, -18), (14, 34), (5, 34), (0, -13)]
    if pen.curved:
        half = [(9.5, -34), (13.5, -18), (11.5, 8), (9.5, 34), (3.5, 34), (2.5, 8), (0, -13)]
    pen.fill(mirrored(half))
    pen.line([(-11, -31), (11, -31)])
    pen.line([(0, -33), (0, -13)])
    return mirrored(half)


@article("Jeans/Jeans", "Apparel/Bottomwear", "Men Women Boys Girls", "Casual")
def jeans(pen):
    thread = (206, 142, 66)
    with pen.inside(legs(pen)):
        pen.pair(pen.fill, circle(7, 3, 2.4, 11), pen.light, False)  # washed out
        pen.pair(pen.line, [(5, -31), (7, -24), (14, -23)], thread)
        pen.pair(pen.line, [(12, -20), (12.8, 34)] if not pen.curved else [(12, -16), (8, 34)], thread, 0.6)
        pen.line([(-12, -31), (12, -31)], thread)
    pen.mark(6.5, -15)


@article("Trousers/Trousers", "Apparel/Bottomwear", "Men Women", "Casual Formal")
def trousers(pen):
    legs(pen)
    pen.pair(pen.line, [(10, -30), (12, -21)])
    if pen.usage == "Formal":
        pen.pair(pen.line, [(6, -24), (7.5, 8), (7, 33)], pen.light, 1.2)  # creases
    else:
        pen.pair(pen.fill, box(4, 0, 11.5, 9), pen.shade)  # pockets
    pen.mark(6.5, -17)


@article("Skirts/Skirt", "Apparel/Bottomwear", "Women Girls", "Casual Ethnic")
def skirt(pen):
    pen.cloth(mirrored([(9, -25), (12, -16), (23, 22), (12, 25), (0, 26)]))
    for x in (-6, 0, 6):
        pen.line([(x, -19), (x * 2.3, 25)])
    pen.fill(mirrored([(9.5, -26), (10.5, -20)]), pen.shade)
    pen.hem(22, 20)
    pen.mark(6, -6)


@article("Dresses/Dress", "Apparel/Dress", "Women Girls", "Casual Ethnic")
def dress(pen):
    bodice = [(0, -25), (4, -27), (5, -35), (8, -34), (8.5, -26), (11, -19), (8.5, -4)]
    pen.cloth(mirrored([*bodice, (21, 30), (10, 33), (0, 34)]))
    pen.fill(box(-9, -6, 9, -2), pen.shade)
    pen.pair(pen.line, [(3, 0), (10, 32)])
    pen.hem(30, 18)
    pen.mark(0, -15)


@article("Sports Shoes/Sports Shoes", "Footwear/Shoes", "Men Boys", "Sports")
def sports_shoe(pen):
    upper = [(-26, 14), (-26, -13), (-21, -17), (-9, -8), (-2, -19), (3, -16), (12, -4), (26, -1), (28, 14)]
    pen.fill(rounded(upper))
    pen.stripes([(-2, 9), (4, -8)], [(8, 9), (12, -3)])
    pen.fill(rounded([(-26, 5), (0, 8), (29, 5), (29, 13), (0, 13), (-27, 13)], 1), pen.contrast)
    for x, y in ((0, -12), (3, -9), (6, -6)):
        pen.line([(x - 2, y + 3), (x + 3, y - 1)], pen.contrast, 1.2)
    pen.mark(-16, -2)


@article("Heels/Heels", "Footwear/Shoes", "Women", "Casual")
def heel(pen):
    pen.fill([(-24, -4), (-16, 0), (-20, 16), (-23, 16)], pen.shade)
    top = [(-25, -17), (-16, -16), (-8, -5), (2, 5), (14, 4)]
    pen.fill(rounded([*top, (30, 15), (10, 15), (-3, 11), (-13, 2), (-25, 0)]))
    pen.line([(-5, 9.5), (4, 14), (26, 14.5)], DARK, 1)
    pen.mark(-18, -7)


@article("Flip Flops/Flip Flops", "Footwear/Flip Flops", "Men Women Boys Girls", "Casual")
def flip_flops(pen):
    wide = 8.5 if pen.curved else 11
    sole = rounded(mirrored([(wide, -25), (wide - 3.5, 3), (wide - 1.5, 27)]))
    for x in (-12.5, 12.5):
        pen.fill(np.add(sole, (x, 0)))
        pen.line([(x + 3 - wide, 1), (x, -15), (x + wide - 3, 1)], pen.contrast, 2)
        pen.mark(x, 13)


@article("Handbags/Handbag", "Accessories/Bags", "Women", "Casual Ethnic")
def handbag(pen):
    pen.pair(pen.line, [(0, -29), (8, -27), (12, -8)], pen.shade, 2.2)
    pen.cloth(rounded(mirrored([(18, -11), (24, 24), (0, 24)])))
    pen.fill(rounded(mirrored([(17, -10), (19, 2), (0, 7)]), 1), pen.shade)
    pen.fill(circle(0, 4, 1.7), GOLD)
    pen.hem(20, 19)
    pen.mark(0, 11)


@article("Backpacks/Backpack", "Accessories/Bags", "Unisex Boys Girls", "Casual Sports")
def backpack(pen):
    rounds = 3 if pen.curved else 1
    pen.line([(-5, -26), (-4, -32), (4, -32), (5, -26)], pen.shade, 2)
    pen.pair(pen.line, [(15, -18), (21, 0), (17, 22)], pen.shade, 3)
    pen.cloth(rounded(mirrored([(10, -28), (17, -18), (18, 26), (0, 27)]), rounds))
    pen.pair(pen.line, [(0, -17), (13, -14), (14, -6)])
    pen.pair(pen.stripes, [(15, -17), (14, 24)])
    pen.fill(rounded(mirrored([(11, 4), (12, 22), (0, 23)]), rounds), pen.shade)
    pen.line([(-9, 8), (9, 8)], METAL)
    pen.mark(0, -5)


@article("Watches/Watch", "Accessories/Watches", "Men Women", "Casual Sports Formal")
def watch(pen):
    strap, radius = (4.5, 11) if pen.curved else (8, 15)
    pen.fill(mirrored([(strap, -36), (strap + 1, 0), (strap, 36)]))
    pen.stripes([(strap, -35), (strap, 35)])
    for y in range(-34, 36, 4) if pen.usage == "Formal" else []:  # a metal bracelet
        pen.line([(-strap, y), (strap, y)], METAL, 1.4)
    pen.fill(circle(radius + 1, 0, 2), METAL)
    pen.fill(circle(0, 0, radius + 1.5), METAL)
    pen.fill(circle(0, 0, radius))
    for x, y in circle(0, 0, radius - 2)[::2]:
        pen.fill(circle(x, y, 0.6)[::4], pen.contrast, False)
    pen.line([(radius * 0.4, radius * 0.55), (0, 0.2 * radius), (-radius * 0.6, radius * 0.5)], pen.contrast, 1)
    pen.mark(0, -4)


@article("Caps/Cap", "Accessories/Headwear", "Unisex Boys", "Casual Sports")
def cap(pen):
    pen.cloth(rounded([(-23, 11), (-22, -8), (-10, -19), (8, -19), (19, -8), (20, 11), (0, 8)]))
    pen.fill(rounded([(-2, 7), (16, 7), (27, 10), (29, 15), (10, 12)]), pen.shade)
    pen.line([(-1, -17), (6, -6), (6, 8)])
    pen.fill(circle(-1, -17.5, 2, 1.2), pen.shade)
    pen.stripes([(-20, 6), (-17, -9)])
    pen.mark(-4, -3)


@article("Sunglasses/Sunglasses", "Accessories/Eyewear", "Men Women", "Casual")
def sunglasses(pen):
    lens, rounds = [(26, -8), (25, 8), (6, 8), (3, -8)], 1
    if pen.curved:
        lens, rounds = [(25, -11), (28, -15), (25, 6), (13, 10), (3, 4), (3, -8)], 2
    pen.pair(pen.line, [(24, -6), (28, -10)], pen.shade, 2.5)
    pen.pair(pen.fill, rounded(lens, rounds))
    pen.pair(pen.fill, rounded(np.add(np.multiply(lens, 0.7), (4.5, -0.3)), rounds), (62, 60, 72))
    pen.line([(-5, -5), (0, -6.5), (5, -5)], pen.colour, 3)
    pen.line([(10, 4), (14, -4)], (118, 118, 132), 1.6)  # a reflection
    pen.mark(-15, 0, PALE)


def draw(index: int, seed: int = 0) -> tuple[dict, Image.Image]:
    """Row `index` of the catalogue `seed`: its values and its picture, the same at every call."""
    rng = np.random.default_rng([seed, index])
    if index and rng.random() < DUPLICATES:  # the same photo listed twice, as in the real catalogue
        row, image = draw(int(rng.integers(index)), seed)
        return row | {"id": 10000 + index}, image
    names, parents, genders, usages, drawn = CATALOGUE[rng.integers(len(CATALOGUE))]
    choice = {"gender": genders.split(), "usage": usages.split(), "baseColour": [*COLOURS], "brand": [*BRANDS]}
    choice["season"] = ["Spring", "Summer", "Fall", "Winter"]
    chosen = {column: str(rng.choice(values)) for column, values in choice.items()}
    row = {
        "id": 10000 + index,
        "gender": chosen["gender"],
        "masterCategory": parents.split("/")[0],
        "subCategory": parents.split("/")[1],
        "articleType": names.split("/")[0],
        "baseColour": chosen["baseColour"],
        "season": chosen["season"],
        "year": int(rng.integers(2011, 2019)),
        "usage": chosen["usage"],
        "productDisplayName": "{brand} {gender} {baseColour} ".format(**chosen) + names.split("/")[1],
    }
    pen = Tailor(rng, row, chosen["brand"])
    drawn(pen)
    for column in ("baseColour", "usage", "productDisplayName"):
        if rng.random() < MISSING:
            row[column] = None
    return row, pen.finished()
