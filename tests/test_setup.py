"""What is fitted to a catalogue is fitted to its train rows: classes, counts, scales, paths and words."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.split import in_split
from data.store import open_store
from options import parse_args
from task import load_task, setup

ROOT = Path(__file__).parents[1]
GHOST = {"gender": "Ghost", "subCategory": "Ghost", "articleType": "Ghost", "baseColour": "Ghost", "usage": "Ghost"}
GHOST |= {"year": "1950", "season": "Ghost", "productDisplayName": "Ghostbrand Ghost ghostly"}


def fitted(folder: Path, tmp_path: Path):
    words = ("--data", folder, "--backbone", "demo", "--with-season-year", "--inputs", "image+title")
    args = parse_args([*map(str, words), "--min-brand-count", "1", "--cache-dir", str(tmp_path / "cache")])
    args.out, args.amp = tmp_path, None
    return setup(args, torch.device("cpu"))


def test_rows_of_validation_and_test_leave_no_trace(tmp_path):
    folder = tmp_path / "shop"
    words = [sys.executable, "-m", "data.demo", "--out", folder, "--rows", "150", "--seed", "3"]
    subprocess.run(list(map(str, words)), cwd=ROOT, check=True)
    before = fitted(folder, tmp_path)
    store = open_store(before.catalogue, before.preprocess.canvas, tmp_path / "cache")
    others = [before.catalogue.ids[row] for row in range(len(store.ok)) if not in_split(store.hashes, "train")[row]]
    assert len(others) > 20
    kept = next(id for id in others if id in {before.catalogue.ids[row] for row in store.rows("val")})

    with open(folder / "styles.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    changed = shutil.copytree(folder, tmp_path / "changed")
    with open(changed / "styles.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()  # one validation row keeps its labels, without which there is no training
        writer.writerows(row | GHOST if row["id"] in others and row["id"] != kept else row for row in rows)
    after = fitted(changed, tmp_path)
    assert (after.known.labels != before.known.labels).any(), "the rows themselves have changed"
    for part in ("attributes", "paths", "text"):
        assert after.config[part] == before.config[part], part


@pytest.mark.parametrize(("gigabytes", "kept"), [("0.00116", True), ("0.00115", False)])
def test_pictures_are_kept_up_to_as_many_gigabytes_as_asked_for(demo_run, cache_dir, tmp_path, gigabytes, kept):
    words = ("--data", "demo", "--backbone", "demo", "--limit", "100", "--store-gb", gigabytes)  # 100 of 64 x 60 x 3
    args = parse_args([*words, "--cache-dir", str(cache_dir)])
    args.out, args.amp = tmp_path, None
    cpu = torch.device("cpu")
    loaded = load_task(demo_run / "best", None, "demo", cache_dir, 100, cpu, args.store_gb)
    for task in (setup(args, cpu), loaded):
        assert bool(task.store.nbytes) == kept
