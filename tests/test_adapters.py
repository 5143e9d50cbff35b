"""The adapters that come with the repo: they load without training, say no path, and still know the catalogue."""

import json
from pathlib import Path

from models.checkpoint import read_config

ADAPTERS = Path(__file__).parents[1] / "adapters" / "vit_tiny_fashion"


def test_files_are_small_and_hold_no_path_of_a_machine():
    assert {path.name for path in ADAPTERS.iterdir()} == {"README.md", "adapter.safetensors", "config.json"}
    assert sum(path.stat().st_size for path in ADAPTERS.iterdir()) < 8_000_000
    texts, values = [], [json.loads((ADAPTERS / "config.json").read_text(encoding="utf-8"))]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str):
            texts.append(value)
    assert not [text for text in texts if text.startswith(("/", "~", ".."))]
    assert read_config(ADAPTERS)["backbone"]["name"] == "vit_tiny_patch16_224", "sealed, and of this format"


def test_they_know_the_real_catalogue(shared, command, cache_dir, tmp_path):
    done = command(
        *("evaluate.py", "--checkpoint", ADAPTERS, "--data", shared / "data" / "fashion-product-images-small"),
        *("--weights", shared / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k" / "model.safetensors"),
        *("--limit", 3000, "--split", "val", "--cache-dir", cache_dir, "--json", tmp_path / "scores.json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["valid_path_rate"] == 1.0
    assert found["calibration"]["accepted"] > 0.5
    assert found["calibration"]["precision"] > 0.97
    scores = found["attributes"]
    floors = {"gender": 0.85, "masterCategory": 0.97, "usage": 0.85, "subCategory": 0.9, "articleType": 0.8}
    assert {name: floor for name, floor in floors.items() if scores[name]["accuracy"] < floor} == {}
