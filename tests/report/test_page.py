"""The report of a real run on a catalogue with hostile titles and a conflict planted in it."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from report.page import chains

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
def checkpoint(command, demo_run, cache_dir, tmp_path_factory) -> Path:
    """With thresholds low enough for so short a run to have labels accepted."""
    folder = shutil.copytree(demo_run / "best", tmp_path_factory.mktemp("lenient") / "best")
    words = ("--data", "demo", "--limit", 1000, "--cache-dir", cache_dir, "--calibrate", "--target-precision", 0.7)
    assert command("evaluate.py", "--checkpoint", folder, *words).returncode == 0
    return folder


@pytest.fixture(scope="module")
def report(command, checkpoint, cache_dir, tmp_path_factory):
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
        *("evaluate.py", "--checkpoint", checkpoint, "--data", shop, "--split", "all"),
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


@pytest.fixture(scope="module")
def sections(report) -> dict[str, str]:
    """The page by its headings."""
    _, *parts = re.split(r'<h2 id="(\w+)">', (report[0] / "report.html").read_text(encoding="utf-8"))
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.fixture(scope="module")
def judged(command, checkpoint, report) -> dict[str, list[tuple]]:
    """(id, given or empty, said, confidence, accepted) of each row, as `infer.py` answers it, of what has a column."""
    table = report[0].parent / "styles.csv"
    done = command("infer.py", "--checkpoint", checkpoint, table, "--json")
    assert done.returncode == 0, done.stderr
    answers = {line["image"]: line["attributes"] for line in map(json.loads, done.stdout.splitlines())}
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        name: [
            (row["id"], row[name], a["label"], a["confidence"], a["decision"] == "accept")
            for row in rows
            for a in [answers[row["id"]][name]]
        ]
        for name in ("gender", "masterCategory", "subCategory", "articleType", "baseColour")
    }


def cells(text: str, first: str) -> list[list[str]]:
    """The words of each other cell of the table's row that begins with `first`."""
    row = re.search(rf"<tr><t[hd]>{first}</t[hd]>(.*?)</tr>", text, re.DOTALL)
    return [re.sub(r"<.*?>", " ", cell).split() for cell in re.findall(r"<td.*?>(.*?)</td>", row[1], re.DOTALL)]


def part(text: str, attribute: str) -> str:
    """What is folded away under an attribute's name."""
    return re.search(rf"<summary>{attribute}</summary>(.*?)</details>", text, re.DOTALL)[1]


def test_what_needs_no_person_is_what_is_accepted(sections, judged):
    for name, rows in judged.items():
        _, share, precision = (" ".join(cell) for cell in cells(sections["trust"], name))
        right = [said == given for _, given, said, _, sure in rows if sure and given]
        assert share == f"{100 * sum(sure for *_, sure in rows) / len(rows):.1f} %"
        assert precision == (f"{100 * sum(right) / len(right):.2f} %" if right else "–")
    assert len(re.findall(r'<polyline class="curve" points="[\d., ]+"/>', sections["trust"])) == 7 - 1  # usage has none
    assert any(sure for rows in judged.values() for *_, sure in rows), "nothing is shown of it if nothing is accepted"


def test_reliability_counts_each_row_once(sections, judged):
    for name, rows in judged.items():
        panel = re.search(rf"<h3>{name} <span.*?</svg>", sections["calibration"], re.DOTALL)[0]
        for kind in ("before", "after"):
            points = re.findall(rf"<title>{kind}: (\d+) rows, confidence ([\d.]+), accuracy ([\d.]+)<", panel)
            counts, confidences, accuracies = (list(map(float, column)) for column in zip(*points, strict=True))
            assert sum(counts) == sum(bool(given) for _, given, *_ in rows)
        hits, total = (sum(map(float.__mul__, counts, column)) for column in (accuracies, confidences))  # after
        assert hits == pytest.approx(sum(said == given for _, given, said, *_ in rows), abs=0.1)
        assert total == pytest.approx(sum(confidence for _, given, _, confidence, _ in rows if given), abs=0.2)


def test_how_far_off_mistakes_are(sections, judged):
    """Along masterCategory > subCategory > articleType."""
    chain = [judged[name] for name in ("articleType", "subCategory", "masterCategory")]
    wrong = [[said != given for _, given, said, *_ in rows] for rows in zip(*chain, strict=True)]
    distances = [sum(row[: k + 1] == [True] * (k + 1) and not any(row[k + 1 :]) for row in wrong) for k in range(3)]
    for first, distance in (("within its subCategory", 1), ("within its masterCategory", 2)):
        assert cells(sections["paths"], first)[:2] == [[str(distance)], [str(distances[distance - 1])]]
    path = sum(not any(row) for row in wrong) / len(wrong)
    assert cells(sections["paths"], "jointly")[:2] == [[f"{path:.3f}"], ["1.000"]]
    assert sum(map(any, wrong)), "a model without mistakes shows none"


def test_each_attribute_above_no_other_ends_a_chain():
    parents = {"maker": [], "room": [], "piece": ["room", "maker"], "colour": ["piece"], "material": ["piece"], "x": []}
    config = {"attributes": [{"name": name, "parents": above} for name, above in parents.items()]}
    config["paths"] = [{"attributes": ["maker", "room", "piece", "colour", "material"]}]
    task = SimpleNamespace(config=config, classes=parents)
    given, said = np.zeros((2, 6), int), np.array([[0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert chains(task, given, said) == [
        (["room", "piece", "colour"], [0, 1, 0, 1]), (["room", "piece", "material"], [1, 0, 0, 1])
    ]  # fmt: skip


def test_rare_classes_confusions_and_the_most_confident_mistakes(sections, judged):
    for name, every in judged.items():
        rows = [row for row in every if row[1]]
        groups = [cell for cell in cells(sections["rare"], name) if len(cell) == 2]
        assert sum(int(count) for _, count in groups) == len(rows)
        hits = sum(float(accuracy) * int(count) for accuracy, count in groups)
        assert hits == pytest.approx(sum(said == given for _, given, said, *_ in rows), abs=0.2)

        wrong = sorted((row for row in rows if row[1] != row[2]), key=lambda row: -row[3])
        matrix = part(sections["confusions"], name)
        (given, said), count = Counter(row[1:3] for row in wrong).most_common(1)[0]
        assert int(re.search(r"</span>, (\d+)</li>", matrix)[1]) == count
        assert f'title="{count} of {sum(row[1] == given for row in rows)}"' in matrix
        assert f'<span class="given">{given}</span> → <span class="said">{said}</span>, {count}<' in matrix

        shown = re.findall(r'alt="Picture of article (\d+)"', part(sections["mistakes"], name))
        assert shown[0] == wrong[0][0]
        assert set(shown) <= {row[0] for row in wrong}
        assert len(shown) == min(12, len(wrong))


def test_suspects_are_shown_as_the_table_has_them(sections, report):
    with open(report[0] / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    single = dict.fromkeys(row["id"] for row in rows if row["why"] != "identical pictures")
    assert re.findall(r'alt="Picture of article (\d+)"', sections["suspects"]) == list(single)[:60]
    for row in (row for row in rows if row["why"] == "identical pictures"):
        assert re.search(
            rf"<li>{row['given']} <span class=\"said\">[\d.]+</span> .*{row['id']} ", sections["identical"]
        )
    assert single


def test_identical_pictures_under_two_labels_are_found(report):
    folder, first, other = report
    with open(folder / "suspects.csv", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["why"] == "identical pictures"]
    types = {row["id"]: row["given"] for row in found if row["attribute"] == "articleType"}
    assert types == {row["id"]: row["articleType"] for row in (first, other)}
    assert {row["title"] for row in found} == {SCRIPT, "'" + FORMULA}


def test_independent_answers_are_reported_as_such(command, checkpoint, cache_dir, report, tmp_path):
    words = ("--data", report[0].parent, "--split", "all", "--cache-dir", cache_dir, "--report", tmp_path)
    done = command("evaluate.py", "--checkpoint", checkpoint, *words, "--independent")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Each attribute is its own most probable class" in text
    assert text != (report[0] / "report.html").read_text(encoding="utf-8")


def test_the_page_is_the_same_where_no_pictures_are_kept(command, checkpoint, cache_dir, report, tmp_path):
    words = ("--checkpoint", checkpoint, "--data", report[0].parent, "--split", "all", "--cache-dir", cache_dir)
    done = command("evaluate.py", *words, "--no-store", "--report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").read_bytes() == (report[0] / "report.html").read_bytes()


def test_a_folder_name_that_is_no_text_is_shown_as_far_as_it_is(command, checkpoint, cache_dir, report, tmp_path):
    shop = shutil.copytree(report[0].parent, tmp_path / "caf\udce9")
    words = ("--checkpoint", checkpoint, "--data", shop, "--split", "all", "--cache-dir", cache_dir)
    done = command("evaluate.py", *words, "--report", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert "caf\ufffd" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_an_uncalibrated_checkpoint_is_refused(command, checkpoint, cache_dir, with_config, tmp_path):
    folder = with_config(checkpoint, lambda config: config.pop("calibration"))
    words = ("--checkpoint", folder, "--data", "demo", "--cache-dir", cache_dir, "--report", tmp_path / "r")
    done = command("evaluate.py", *words)
    assert done.returncode == 2
    assert "is not calibrated; do so first with --calibrate" in done.stderr.splitlines()[-1]
