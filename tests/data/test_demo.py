import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import fashion

HIERARCHY = ["masterCategory", "subCategory", "articleType"]
COLUMNS = ["id", "gender", *HIERARCHY, "baseColour", "season", "year", "usage", "productDisplayName"]


@pytest.fixture(scope="module")
def drawn():
    return [fashion.draw(index) for index in range(400)]


def test_a_drawing_depends_on_seed_and_index_alone(drawn):
    row, image = fashion.draw(7)
    assert row == drawn[7][0]
    assert np.array_equal(image, drawn[7][1])
    assert not np.array_equal(image, fashion.draw(7, seed=1)[1])
    assert not np.array_equal(image, fashion.draw(8)[1])


def test_rows_have_the_real_schema(drawn):
    assert {tuple(row) for row, _ in drawn} == {tuple(COLUMNS)}
    assert {(image.size, image.mode) for _, image in drawn} == {((60, 80), "RGB")}
    assert len({row["id"] for row, _ in drawn}) == len(drawn)


def test_every_article_type_is_drawn_and_has_one_parent(drawn):
    paths = {tuple(row[level] for level in HIERARCHY) for row, _ in drawn}
    children = Counter(article for _, _, article in paths)
    assert len(children) == len(fashion.CATALOGUE)
    assert set(children.values()) == {1}
    assert set(Counter(sub for _, sub in {path[:2] for path in paths}).values()) == {1}


def test_titles_start_with_the_brand_and_the_gender(drawn):
    titled = [row for row, _ in drawn if row["productDisplayName"]]
    assert {row["productDisplayName"].split(f" {row['gender']} ")[0] for row in titled} == set(fashion.BRANDS)


def test_some_values_are_missing_and_some_pictures_appear_twice(drawn):
    missing = Counter(column for row, _ in drawn for column, value in row.items() if value is None)
    assert set(missing) == {"usage", "baseColour", "productDisplayName"}
    assert max(missing.values()) < 0.05 * len(drawn)
    copies = Counter(image.tobytes() for _, image in drawn)
    assert 0 < len(drawn) - len(copies) < 0.05 * len(drawn)


def test_the_command_writes_the_layout_of_the_kaggle_dataset(tmp_path):
    command = [sys.executable, "-m", "data.demo", "--out", str(tmp_path), "--rows", "3", "--seed", "5"]
    subprocess.run(command, check=True, cwd=Path(fashion.__file__).parents[1])
    again = subprocess.run(command, capture_output=True, text=True, cwd=Path(fashion.__file__).parents[1])
    assert again.returncode == 2
    assert again.stderr == f"error: --out {tmp_path} holds a catalogue already; name another folder\n"
    with open(tmp_path / "styles.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = [fashion.draw(index, seed=5)[0] for index in range(3)]
    assert rows == [{column: str(value or "") for column, value in row.items()} for row in expected]
    assert {Image.open(tmp_path / "images" / f"{row['id']}.jpg").size for row in rows} == {(60, 80)}
