"""Contact sheets: pictures with their answers, for `infer.py --plot` and for TensorBoard."""

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.use("Agg")  # draw to files; a server has no screen

RIGHT, WRONG, QUIET = "#1a7f37", "#c0392b", "#57606a"


def contact_sheet(pictures: list[np.ndarray], captions: list[list[tuple[str, str]]], columns: int = 6) -> Figure:
    """A grid of pictures, each with lines of text below it.

    Args:
        pictures: uint8 arrays (H, W, 3), of any sizes.
        captions: for each picture its lines, (text, colour).
        columns: at most so many pictures side by side.
    """
    rows = math.ceil(len(pictures) / columns)
    columns = math.ceil(len(pictures) / rows)  # no more than it takes: eight pictures are two rows of four
    lines = max(map(len, captions))
    height = 2.2 + 0.17 * lines
    figure = Figure(figsize=(2.3 * columns, height * rows), dpi=110)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(number, columns)
        left, top = column / columns, 1 - row / rows
        axes = figure.add_axes(
            (left + 0.04 / columns, top - 2.1 / (height * rows), 0.92 / columns, 2.0 / (height * rows))
        )
        axes.imshow(picture, interpolation="lanczos")
        axes.axis("off")
        for line, (text, colour) in enumerate(caption):
            y = top - (2.2 + 0.17 * line) / (height * rows)
            plain = {"fontsize": 7.5, "va": "center", "parse_math": False}  # a label may hold a $
            figure.text(left + 0.06 / columns, y, text, color=colour, **plain)
    return figure


def label_sheet(
    pictures: list[np.ndarray], labels: np.ndarray, predicted: np.ndarray, classes: dict[str, list[str]]
) -> Figure:
    """Pictures with the label that the model gives for each attribute and, where that is wrong, the true one in
    brackets.

    Args:
        labels, predicted: (N, A) class indices; a negative label is unknown.
        classes: {attribute: its labels}.
    """
    captions = []
    for truths, guesses in zip(labels, predicted, strict=True):
        lines = []
        for (name, texts), truth, guess in zip(classes.items(), truths, guesses, strict=True):
            missed = truth >= 0 and truth != guess
            text = f"{name}: {texts[guess]}" + (f" [{texts[truth]}]" if missed else "")
            lines.append((text[:36], WRONG if missed else RIGHT))
        captions.append(lines)
    return contact_sheet(pictures, captions)
