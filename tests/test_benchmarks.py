"""Benchmarks that change or repeat parts of training still run with it: short, on the demo. What they say is not looked
at but for being there; speed has no place in a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *words) -> str:
    command = [sys.executable, BENCHMARKS / script, *words]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_feeding_beside_the_bare_step(cache_dir):
    said = run("train_throughput.py", "--data", "demo", "--limit", 300, "--with-price", "--cache-dir", cache_dir)
    assert "bare step" in said and "ratio" in said


def test_a_lever(cache_dir, tmp_path):
    words = ("--only", "weights averaged", "--results", tmp_path, "--data", "demo", "--limit", 300, "--epochs", 1)
    assert "weights averaged" in run("levers.py", *words, "--cache-dir", cache_dir)
    assert json.loads((tmp_path / "weights averaged-0.json").read_text())["mean"] > 0


def test_a_way_of_the_recipe(cache_dir, tmp_path):
    words = ("--way", "linear probe", "--results", tmp_path, "--data", "demo", "--limit", 300, "--epochs", 1)
    run("recipe.py", *words, "--cache-dir", cache_dir)
    assert json.loads((tmp_path / "linear probe.json").read_text())["images_per_second"] > 0


def test_what_neighbours_give(with_neighbours, demo_run, cache_dir):
    folder = with_neighbours(demo_run / "best")
    said = run("neighbours.py", "--checkpoint", folder, "--data", "demo", "--limit", 1000, "--cache-dir", cache_dir)
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| ") and " to " in line]
    assert len(rows) == 4 and sum(int(row[1]) for row in rows) > 50
    cells = [cell.removesuffix(" |").split(", ") for row in rows for cell in row[2:]]
    assert any(alone != both for alone, both in cells), "noise that counts by half changes answers"
    assert "batch 1: " in said and "batch 64: " in said


def test_a_large_catalogue_in_small(shared):
    said = run("large_catalogue.py", "--rows", 300, "--data", shared / "data" / "fashion-product-images-small")
    assert "| 300 |" in said
