"""The report of a real run on a catalogue with hostile titles and a conflict planted in it."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.attributes import MISSING, UNSEEN
from report.page import by_frequency, confusion, coverage_chart

ROOT = Path(__file__).parents[2]
SCRIPT = '<script>alert("x")</script><img src=http://x.example/y.png>'
FORMULA = '=HYPERLINK("http://x.example")'
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser would load and run, and whether every tag is closed in its turn."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.loads, self.open, self.ids, self.links = set(), [], [], set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.loads += [attributes[name] for name in ("src", "srcset", "data", "poster") if name in attributes]
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        assert not [name for name in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(command, demo_run, cache_dir, tmp_path_factory):
    """The folder of a report on 120 drawings, of which two are one picture under two article types."""
    shop = tmp_path_factory.mktemp("shop")
    subprocess.run(
        [sys.executable, "-m", "data.demo", "--out", shop, "--rows", "120", "--seed", "3"], cwd=ROOT, check=True
    )
    with open(shop / "styles.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    other = next(row for row in rows if row["articleType"] != first["articleType"])
    shutil.copy(shop / "images" / f"{first['id']}.jpg", shop / "images" / f"{other['id']}.jpg")
    first["productDisplayName"], other["productDisplayName"] = SCRIPT, FORMULA
    with open(shop / "styles.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    done = command(
        *("evaluate.py", "--checkpoint", demo_run / "best", "--data", shop, "--split", "all"),
        *("--cache-dir", cache_dir, "--report", shop / "report", "--json", shop / "scores.json"),
    )
    assert done.returncode == 0, done.stderr
    return shop / "report", first, other


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(report):
    text = (report[0] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert len(page.loads) > 20
    for uri in page.loads:
        kind, data = uri.split(",", 1)
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert max(picture.size) <= 120
    assert not re.search(r"url\(|@import", text)
    assert set(page.links) == {f"#{name}" for name in page.ids}
    assert len(text) < 1_000_000


def test_a_title_is_text_never_html(report):
    text = (report[0] / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text


def test_the_page_shows_the_scores(report):
    text = (report[0] / "report.html").read_text(encoding="utf-8")
    scores = json.loads((report[0].parent / "scores.json").read_text())
    for name, a in scores["attributes"].items():
        assert re.search(rf"<td>{name}</td><td>{a['accuracy']:.3f}</td>\s*<td>{a['macro_f1']:.3f}</td>", text)
    for name in ("joint", "independent"):
        assert f"<td>{scores[name]['path_accuracy']:.3f}</td>" in text
    assert scores["joint"]["valid_path_rate"] == 1.0
    assert f"{100 * scores['calibration']['accepted']:.1f}\N{NO-BREAK SPACE}%" in text


def test_identical_pictures_under_two_labels_are_found(report):
    folder, first, other = report
    with open(folder / "suspects.csv", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["why"] == "identical pictures"]
    types = {row["id"]: row["given"] for row in found if row["attribute"] == "articleType"}
    assert types == {row["id"]: row["articleType"] for row in (first, other)}
    assert {row["title"] for row in found} == {SCRIPT, "'" + FORMULA}


def test_an_uncalibrated_checkpoint_is_refused(command, demo_run, cache_dir, tmp_path):
    config = json.loads((demo_run / "best" / "config.json").read_text())
    del config["calibration"]
    shutil.copytree(demo_run / "best", tmp_path / "best")
    (tmp_path / "best" / "config.json").write_text(json.dumps(config))
    words = ("--checkpoint", tmp_path / "best", "--data", "demo", "--cache-dir", cache_dir, "--report", tmp_path / "r")
    done = command("evaluate.py", *words)
    assert done.returncode == 2
    assert "is not calibrated; do so first with --calibrate" in done.stderr.splitlines()[-1]


def test_accuracy_by_frequency_by_hand():
    counts = {"usage": [1500, 3, 60]}  # groups: none, 1 to 9, 10 to 49, 50 to 199, 200 to 999, 1000 or more
    given = np.array([[0], [0], [1], [2], [UNSEEN], [MISSING]])
    said = np.array([[0], [2], [1], [0], [0], [0]])
    groups = by_frequency(given, said, counts)["usage"]
    assert [g["rows"] for g in groups] == [1, 1, 0, 1, 0, 2]
    assert [g["accuracy"] for g in groups] == [0.0, 1.0, None, 0.0, None, 0.5]


def test_confusion_by_hand():
    given, said = np.array([0, 0, 0, 1, 1, MISSING, UNSEEN]), np.array([0, 1, 1, 1, 0, 2, 2])
    found = confusion(given, said, ["a", "b", "c"])
    assert found["classes"] == ["a", "b"], "c occurs in no row with a known label"
    assert found["cells"] == [[1, 2, 0], [1, 1, 0]]
    assert found["rows"] == [3, 2]
    assert found["pairs"] == [("a", "b", 2), ("b", "a", 1)]


def test_coverage_chart_ends_at_the_accuracy():
    chart = coverage_chart(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, True, True, False]), 0.7, 0.9)
    points = [tuple(map(float, point.split(","))) for point in chart["line"].split()]
    assert chart["floor"] == 0.7
    top, bottom = points[0][1], points[-1][1]
    assert (bottom - top) / (160 - top) == pytest.approx((1 - 0.75) / (1 - 0.7), abs=0.01)
    assert chart["accepted"] == points[2]
    empty = coverage_chart(np.array([]), np.array([], bool), None, 0.9)
    assert (empty["line"], empty["accepted"]) == ("", None)
