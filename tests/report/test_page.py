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

import pytest
from PIL import Image

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
    for row in rows:
        row["usage"] = ""  # a catalogue may lack an attribute altogether
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
    assert scores["attributes"].pop("usage")["rows"] == 0
    assert "<td>usage</td><td>–</td>" in text
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


def test_independent_answers_are_reported_as_such(command, demo_run, cache_dir, report, tmp_path):
    words = ("--data", report[0].parent, "--split", "all", "--cache-dir", cache_dir, "--report", tmp_path)
    done = command("evaluate.py", "--checkpoint", demo_run / "best", *words, "--independent")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Each attribute is its own most probable class" in text
    assert text != (report[0] / "report.html").read_text(encoding="utf-8")


def test_the_page_is_the_same_where_no_pictures_are_kept(command, demo_run, cache_dir, report, tmp_path):
    words = ("--checkpoint", demo_run / "best", "--data", report[0].parent, "--split", "all", "--cache-dir", cache_dir)
    done = command("evaluate.py", *words, "--no-store", "--report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").read_bytes() == (report[0] / "report.html").read_bytes()


def test_a_folder_name_that_is_no_text_is_shown_as_far_as_it_is(command, demo_run, cache_dir, report, tmp_path):
    shop = shutil.copytree(report[0].parent, tmp_path / "caf\udce9")
    words = ("--checkpoint", demo_run / "best", "--data", shop, "--split", "all", "--cache-dir", cache_dir)
    done = command("evaluate.py", *words, "--report", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert "caf?" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_an_uncalibrated_checkpoint_is_refused(command, demo_run, cache_dir, with_config, tmp_path):
    folder = with_config(demo_run / "best", lambda config: config.pop("calibration"))
    words = ("--checkpoint", folder, "--data", "demo", "--cache-dir", cache_dir, "--report", tmp_path / "r")
    done = command("evaluate.py", *words)
    assert done.returncode == 2
    assert "is not calibrated; do so first with --calibrate" in done.stderr.splitlines()[-1]
