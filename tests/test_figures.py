"""Sheets of pictures with what was said of them."""

import numpy as np

from figures import RIGHT, WRONG, label_sheet


def test_what_was_missed_is_said_and_in_another_colour():
    pictures, labels, said = [np.zeros((4, 3, 3), np.uint8)] * 2, np.array([[0], [-1]]), np.array([[1], [1]])
    texts = label_sheet(pictures, labels, said, {"gender": ["Men", "Women"]}).texts
    assert [(text.get_text(), text.get_color()) for text in texts] == [
        ("gender: Women [Men]", WRONG), ("gender: Women", RIGHT)
    ]  # fmt: skip
