"""A second drawn catalogue, of furniture. Its columns and hierarchy (`data/furniture.toml`) differ from fashion's.

It shows that another catalogue needs nothing but a schema file:

    python -m data.demo --catalogue furniture --out shop --rows 1000
    python train.py --data shop --attributes data/furniture.toml --backbone demo
"""

import numpy as np
from PIL import Image

from data.pen import METAL, Pen, box, circle, mirrored, rounded

MATERIALS = {"Oak": (198, 158, 104), "Walnut": (98, 66, 46), "White": (240, 240, 238), "Black": (46, 46, 50)}
FABRICS = {"Blue": (58, 96, 168), "Green": (72, 128, 90), "Red": (186, 56, 54), "Grey": (146, 148, 154)}
PIECES = {  # piece: room, narrowest and widest in cm
    "Sofa": ("Living Room", 140, 260),
    "Armchair": ("Living Room", 65, 110),
    "Coffee Table": ("Living Room", 60, 140),
    "Bed": ("Bedroom", 90, 200),
    "Wardrobe": ("Bedroom", 80, 250),
    "Desk": ("Office", 100, 200),
    "Bookcase": ("Office", 60, 180),
}
MISSING = 0.02  # share of rows without a width, and share without a room


def sofa(pen: Pen, half: float):
    pen.fill(rounded(mirrored([(half - 2, -16), (half - 2, 8), (0, 8)])))
    pen.fill(rounded(mirrored([(half - 3, 2), (half - 3, 14), (0, 14)])), pen.light)
    pen.pair(pen.fill, rounded(box(half - 5, -4, half, 16)), pen.shade)
    pen.pair(pen.line, [(half - 3, 16), (half - 3, 20)], METAL, 2)


def table(pen: Pen, half: float, top: float):
    pen.fill(box(-half, top, half, top + 3))
    pen.pair(pen.line, [(half - 2, top + 3), (half - 1, 22)], pen.shade, 2.4)


def desk(pen: Pen, half: float):
    table(pen, half, -6)
    pen.fill(box(half - 10, -3, half - 1, 14), pen.light)
    pen.line([(half - 9, 5), (half - 2, 5)])
    for y in (1, 9):
        pen.fill(circle(half - 5.5, y, 0.8), METAL, False)


def bed(pen: Pen, half: float):
    pen.fill(rounded(mirrored([(half, -18), (half, 12), (0, 12)]), 1))
    pen.fill(mirrored([(half - 1, 0), (half + 1, 16), (0, 16)]), pen.light)
    pen.pair(pen.fill, rounded(box(1.5, -5, half - 2, 2)), (236, 234, 228))
    pen.pair(pen.line, [(half, 16), (half, 21)], pen.shade, 2)


def wardrobe(pen: Pen, half: float):
    pen.fill(box(-half, -32, half, 28))
    pen.line([(0, -31), (0, 27)])
    pen.pair(pen.line, [(2, -4), (2, 3)], METAL, 1.2)


def bookcase(pen: Pen, half: float):
    pen.fill(box(-half, -32, half, 28))
    for y in range(-30, 26, 14):
        pen.fill(box(-half + 2, y, half - 2, y + 11), pen.shade)
        for x in np.arange(-half + 3, half - 4, 2.4):
            pen.fill(box(x, y + pen.rng.uniform(2, 6), x + 1.8, y + 11), pen.light, False)


DRAWINGS = {
    "Sofa": sofa,
    "Armchair": sofa,
    "Coffee Table": lambda pen, half: table(pen, half, 6),
    "Bed": bed,
    "Wardrobe": wardrobe,
    "Desk": desk,
    "Bookcase": bookcase,
}


def draw(index: int, seed: int = 0) -> tuple[dict, Image.Image]:
    """Row `index` of the catalogue `seed`: its values and its picture, the same at every call."""
    rng = np.random.default_rng([seed, index, 1])
    piece = str(rng.choice([*PIECES]))
    room, narrow, wide = PIECES[piece]
    material = "Fabric" if piece in ("Sofa", "Armchair") else "Wood"
    finishes = FABRICS if material == "Fabric" else MATERIALS
    finish, width = str(rng.choice([*finishes])), int(rng.integers(narrow, wide + 1))
    row = {
        "id": 500 + index,
        "image": f"{piece.lower().replace(' ', '-')}-{500 + index}.png",
        "room": room,
        "piece": piece,
        "material": material,
        "finish": finish,
        "width_cm": width,
        "name": f"{finish} {piece.lower()}, {width} cm",
    }
    pen = Pen(rng, finishes[finish], 1.0)
    DRAWINGS[piece](pen, width / 10)  # 260 cm fill the picture
    for column in ("room", "width_cm"):
        if rng.random() < MISSING:
            row[column] = None
    return row, pen.finished()
