"""Catalogues and attributes of one's own, trained, scored, asked and added to with no Python changed."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from data.sources import load_source
from data.split import SPLITS
from data.store import open_store
from models.checkpoint import read_config
from models.neighbours import FILE
from models.schema import learnt_from
from task import load_task
from tests.conftest import with_fresh_heads

ROOT = Path(__file__).parents[1]
FURNITURE = ROOT / "data" / "furniture.toml"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "shop"
    words = [sys.executable, "-m", "data.demo", "--catalogue", "furniture", "--out", str(folder), "--rows", "500"]
    subprocess.run(words, cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def furniture_run(command, shop, cache_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "furniture"
    done = command(
        *("train.py", "--data", shop, "--attributes", FURNITURE, "--backbone", "demo", "--epochs", 4),
        *("--out", out, "--cache-dir", cache_dir),
    )
    assert done.returncode == 0, done.stderr
    return out


def test_another_catalogue_trains(furniture_run):
    scores = json.loads((furniture_run / "metrics.json").read_text())
    assert list(scores["attributes"]) == ["room", "piece", "material", "finish", "width"]
    assert scores["mean_accuracy"] > 0.85
    width = scores["attributes"]["width"]
    assert set(width) == {"mae", "r2", "constant_mae", "constant_r2", "rows"}
    assert width["mae"] < width["constant_mae"] / 2
    assert width["r2"] > 0.7
    assert scores["joint"]["valid_path_rate"] == 1.0
    config = read_config(furniture_run / "best")
    assert [path["attributes"] for path in config["paths"]] == [["room", "piece"], ["material", "finish"]]


def test_it_is_scored_from_the_checkpoint_alone_as_parquet_too(command, furniture_run, shop, cache_dir, tmp_path):
    """The report as well; the schema file is not asked for."""
    words = ("--cache-dir", cache_dir, "--checkpoint", shutil.copytree(furniture_run / "best", tmp_path / "best"))
    done = command("evaluate.py", "--data", shop, *words, "--json", tmp_path / "csv", "--report", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "csv").read_text() == (furniture_run / "metrics.json").read_text()
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "room &gt; piece; material &gt; finish" in page
    assert "<th>finish wrong</th>" in page
    assert "<tr><td>width</td>" in page

    with open(shop / "items.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    pictures = [{"bytes": (shop / "images" / row.pop("image")).read_bytes(), "path": None} for row in rows]
    table = {name: [row[name] for row in rows] for name in rows[0]} | {"image": pictures}
    (tmp_path / "flat").mkdir()
    pq.write_table(pa.table(table), tmp_path / "flat" / "items.parquet")
    done = command("evaluate.py", "--data", tmp_path / "flat", *words, "--json", tmp_path / "parquet")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "parquet").read_text() == (tmp_path / "csv").read_text()


def test_it_answers_for_pictures(command, furniture_run, shop, tmp_path):
    done = command(
        *("infer.py", shop / "images", "--out", tmp_path / "a.parquet", "--plot", tmp_path / "a.png"),
        *("--checkpoint", furniture_run / "best"),
    )
    assert done.returncode == 0, done.stderr
    answers = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert {"room", "piece_decision", "finish_confidence", "width"} < answers[0].keys()
    with open(shop / "items.csv", newline="") as file:
        true = {row["image"]: row for row in csv.DictReader(file)}
    asked = [(answer, true[Path(answer["image"]).name]) for answer in answers]
    assert sum(answer["piece"] == row["piece"] for answer, row in asked) > 0.8 * len(asked)
    missed = [abs(answer["width"] - float(row["width_cm"])) for answer, row in asked if row["width_cm"]]
    assert sum(missed) / len(missed) < 25
    image = next((shop / "images").iterdir())
    shown = command("infer.py", image, "--checkpoint", furniture_run / "best").stdout.splitlines()
    (said,) = json.loads(command("infer.py", image, "--json", "--checkpoint", furniture_run / "best").stdout)[
        "attributes"
    ]["width"].values()
    assert shown[-2].split() == ["width", f"{said:g}"]


def test_neighbours_tell_numbers_too(command, furniture_run, shop, cache_dir, tmp_path):
    """One typing mistake among the train rows and one among those of validation spoil nothing."""
    with_fresh_heads(furniture_run / "best", best := tmp_path / "run" / "best")
    with open(shop / "items.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    store = open_store(load_source(str(shop), cache_dir), (80, 60), cache_dir)
    for split in ("train", "val"):
        rows[store.rows(split)[0]]["width_cm"] = "8901234567894"
    mistaken = shutil.copytree(shop, tmp_path / "shop")
    with open(mistaken / "items.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    words = ("--data", mistaken, "--checkpoint", best, "--cache-dir", cache_dir)
    done = command("refit.py", *words, "--neighbours")
    assert ": kept, " in done.stdout, done.stderr
    assert float(re.search(r"(\S+) of width", done.stdout)[1]) > 0.05
    values = load_file(best / FILE)["values"]
    assert values[0].isnan() and 1 < values.nan_to_num().abs().max() < 5
    words = ("--data", shop, *words[2:], "--split", "val", "--json", tmp_path / "scores.json")
    assert command("evaluate.py", *words).returncode == 0
    width = json.loads((tmp_path / "scores.json").read_text())["attributes"]["width"]
    assert width["mae"] < width["constant_mae"] / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [row.pop("finish") for row in rows], "shop lacks the column finish; it has id, image, room"),
        (lambda rows: [row.update(Finish=row.pop("finish")) for row in rows], "the column finish; nearest: Finish; it"),
        (lambda rows: [row.update(room="Hall") for row in rows], "room is 'Hall' in every train row (column room)"),
        (
            lambda rows: rows[7].update(width_cm="80 cm"),
            "width_cm has a cell that is no number: '80 cm' (id 507);",
        ),
        (lambda rows: [row.update(width_cm="") for row in rows], "no train row has a value of width (column width_cm)"),
    ],
)
def test_a_catalogue_that_does_not_fit_is_one_line(command, shop, cache_dir, tmp_path, change, message):
    with open(shop / "items.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "images").symlink_to(shop / "images")
    with open(tmp_path / "shop" / "items.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    words = ("--attributes", FURNITURE, "--backbone", "demo", "--cache-dir", cache_dir, "--out", tmp_path / "run")
    done = command("train.py", "--data", tmp_path / "shop", *words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_photos_of_an_article_are_never_in_two_splits(command, shop, cache_dir, tmp_path):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "images").symlink_to(shop / "images")
    head, *lines = (shop / "items.csv").read_text().splitlines()
    lines = [f"{line},A{i % 150}" for i, line in enumerate(lines)]
    (tmp_path / "shop" / "items.csv").write_text("\n".join([f"{head},sku", *lines]))
    (tmp_path / "own.toml").write_text(f'article = "sku"\n{FURNITURE.read_text()}')
    words = ("train.py", "--data", tmp_path / "shop", "--backbone", "demo", "--epochs", 1, "--cache-dir", cache_dir)
    done = command(*words, "--attributes", tmp_path / "own.toml", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    best = tmp_path / "run" / "best"
    task = load_task(best, None, str(tmp_path / "shop"), cache_dir, None, torch.device("cpu"), 1.0)
    found = [{task.catalogue.columns["sku"][row] for row in task.store.rows(split)} for split in SPLITS]
    assert sum(map(len, found)) == len(set().union(*found)) == 150
    counts = ", ".join(f"{len(task.store.rows(split)):,} {split}" for split in SPLITS)
    assert f"shop: {counts} rows" in done.stdout, "training split them so too"

    done = command(*words, "--attributes", FURNITURE, "--init-from", best, "--out", tmp_path / "more")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        'was trained with article = "sku" in its file: have the same, or start anew'
    )
    words = ("--checkpoint", best, "--cache-dir", cache_dir)
    done = command("evaluate.py", "--data", shop, *words)
    assert (done.returncode, "shop lacks the column sku, by which" in done.stderr) == (2, True), done.stderr
    (tmp_path / "shop" / "items.csv").write_text("\n".join([head, *(line.rsplit(",", 1)[0] for line in lines[1:])]))
    done = command("evaluate.py", "--data", tmp_path / "shop", *words)
    assert done.returncode == 0, done.stderr
    assert "shop lacks the column sku: pictures of one article may be in several splits" in done.stdout
    done = command("refit.py", "--data", tmp_path / "shop", *words)
    assert (done.returncode, "lacks the column sku, by which" in done.stderr) == (2, True), done.stderr


def test_a_value_far_from_all_others_is_named(command, shop, cache_dir, tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "images").symlink_to(shop / "images")
    lines = (shop / "items.csv").read_text().splitlines()
    column = lines[0].split(",").index("width_cm")
    cells = lines[8].split(",")
    cells[column] = "4006381333931"
    (folder / "items.csv").write_text("\n".join([*lines[:8], ",".join(cells), *lines[9:]]) + "\n")
    words = ("--attributes", FURNITURE, "--backbone", "demo", "--epochs", 1, "--cache-dir", cache_dir)
    done = command("train.py", "--data", folder, *words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    said = "hint: of width 1 are far from all others, such as 4006381333931.0 (id 507); meant so?"
    assert said in done.stdout.splitlines()


def test_a_number_is_said_as_exactly_as_its_spread_asks_for(command, furniture_run, shop, with_config):
    """Such as a date, of eight digits that differ in the last ones."""

    def dated(config):
        width = next(a for a in config["attributes"] if a["name"] == "width")
        width |= {"mean": 20240115.0, "std": 0.5}

    checkpoint = with_config(furniture_run / "best", dated)
    done = command("infer.py", shop / "images", "--checkpoint", checkpoint, "--json")
    values = [json.loads(line)["attributes"]["width"]["value"] for line in done.stdout.splitlines()]
    assert len(set(values)) > 100
    assert all(abs(value - 20240115) < 5 and round(value, 5) == value for value in values)


@pytest.mark.parametrize("lacking", ["val", "test"])
def test_a_split_without_any_label(command, cache_dir, tmp_path, lacking):
    folder, schema = tmp_path / "shop", tmp_path / "kind.toml"
    words = [sys.executable, "-m", "data.demo", "--out", str(folder), "--rows", "120", "--seed", "4"]
    subprocess.run(words, cwd=ROOT, check=True)
    schema.write_text("[attributes.masterCategory]\n")
    catalogue = load_source(str(folder), cache_dir)
    store = open_store(catalogue, (64, 64), cache_dir)
    unlabelled = {catalogue.ids[row]: "" for row in store.rows(lacking)}
    unlabelled |= {catalogue.ids[row]: "NA" for row in store.rows("train")[:3]}
    with open(folder / "styles.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["masterCategory"] = unlabelled.get(row["id"], row["masterCategory"])
    with open(folder / "styles.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    done = command(
        *("train.py", "--data", folder, "--attributes", schema, "--backbone", "demo", "--epochs", 1),
        *("--out", tmp_path / "run", "--cache-dir", cache_dir),
    )
    if lacking == "test":
        assert done.returncode == 0, done.stderr
        assert "\ntrain rows without a label: masterCategory 3; an answer is given there too" in done.stdout
        assert json.loads((tmp_path / "run" / "metrics.json").read_text())["mean_accuracy"] is None
    else:
        assert done.returncode == 2
        assert "shop: no row of the val split has a label of a class" in done.stderr.splitlines()[-1]
        assert not (tmp_path / "run").exists()


def test_an_attribute_is_added_to_a_trained_run(command, demo_run, cache_dir, tmp_path):
    """At a learning rate of next to nothing what was kept answers as it did; `season` is new."""
    words = ("train.py", "--data", "demo", "--limit", 1000, "--epochs", 1, "--cache-dir", cache_dir, "--lr", 1e-12)
    done = command(*words, "--with-season-year", "--init-from", demo_run / "best", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("from "))
    assert line == (
        f"from {demo_run / 'best'}: kept the adapters, the heads of gender, masterCategory, usage, subCategory, "
        "articleType, baseColour, brand; new: season, year"
    )
    before, after = (json.loads((run / "metrics.json").read_text()) for run in (demo_run, tmp_path / "run"))
    for name, scores in before["attributes"].items():
        assert after["attributes"][name]["accuracy"] == pytest.approx(scores["accuracy"], abs=0.02), name
    assert {"season", "year"} < after["attributes"].keys()
    config, began = (read_config(run / "best") for run in (tmp_path / "run", demo_run))
    assert learnt_from(config) == [config["data"]["fingerprint"], began["data"]["fingerprint"]]
    adapters = [load_file(run / "best" / "adapter.safetensors") for run in (demo_run, tmp_path / "run")]
    for name in (name for name in adapters[0] if name.startswith("backbone.")):
        torch.testing.assert_close(adapters[1][name], adapters[0][name], rtol=0, atol=1e-6)


def test_the_simulated_price_is_reported_beside_its_own_noise(command, demo_run, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 300, "--epochs", 1, "--cache-dir", cache_dir, "--out", tmp_path / "run")
    done = command("train.py", *words, "--with-price")
    assert done.returncode == 0, done.stderr
    assert "number: price_in_vnd (simulated), mean" in done.stdout
    assert "simulated: its noise alone" in done.stdout
    price = json.loads((tmp_path / "run" / "metrics.json").read_text())["attributes"]["price_in_vnd"]
    assert 0 < price["floor_mae"] < price["constant_mae"]
    assert price["constant_r2"] <= 0 < price["floor_r2"] < 1


def test_three_attributes_of_the_real_catalogue(command, shared, cache_dir, tmp_path):
    schema = tmp_path / "three.toml"
    schema.write_text(
        '[attributes.masterCategory]\n[attributes.articleType]\nparents = ["masterCategory"]\n[attributes.gender]\n'
    )
    done = command(
        *("train.py", "--data", shared / "data" / "fashion-product-images-small", "--attributes", schema),
        *("--backbone", "vit_tiny_patch16_224", "--img-size", 32, "--batch-size", 32, "--limit", 1500, "--epochs", 1),
        *("--weights", shared / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k" / "model.safetensors"),
        *("--cache-dir", cache_dir, "--out", tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(scores["attributes"]) == ["masterCategory", "articleType", "gender"]
    assert scores["attributes"]["masterCategory"]["accuracy"] > 0.6
    assert scores["valid_path_rate"] == 1.0
