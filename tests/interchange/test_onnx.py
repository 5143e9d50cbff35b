"""The ONNX export, run by onnxruntime: the same logits, at any batch size."""

import json

import pytest
import torch

from data.schema import FASHION_FILE
from models.checkpoint import load_checkpoint

onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed: pip install -r benchmarks/requirements.txt"
)


@pytest.fixture(scope="module")
def run_on_half_the_patches(command, cache_dir, tmp_path_factory):
    """With an attribute that is called as torch calls a value within the graph."""
    out = tmp_path_factory.mktemp("runs") / "half"
    (own := out.with_name("own.toml")).write_text(f'{FASHION_FILE.read_text()}\n[attributes.cat]\ncolumn = "gender"\n')
    words = ("--data", "demo", "--limit", 200, "--epochs", 1, "--patch-size", 4, "--keep-patches", 0.5)
    words += ("--with-season-year", "--attributes", own, "--no-test")
    done = command("train.py", *words, "--cache-dir", cache_dir, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("run", ["demo_run", "run_on_half_the_patches", "run_on_half_the_patches with neighbours"])
def test_logits_are_the_same_at_any_batch_size(command, request, with_neighbours, tmp_path, run):
    best = request.getfixturevalue(run.split()[0]) / "best"
    best = with_neighbours(best) if "neighbours" in run else best
    done = command("export.py", "--checkpoint", best, "--to", "onnx", "--out", "m.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model, config = load_checkpoint(best)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == [attribute["name"] for attribute in config["attributes"]]
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, *config["preprocess"]["size"])
        images[:, :, : images.shape[2] * 5 // 8] = 2.0  # background: empty patches, of which some are kept
        with torch.inference_mode():
            expected = model(images)
        for name, logits in zip(names, session.run(None, {"images": images.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(logits), expected[name], rtol=1e-4, atol=1e-4)
    about = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    classes, numbers = ([a for a in config["attributes"] if a["kind"] == kind] for kind in ("class", "number"))
    assert about["labels"] == {a["name"]: a["labels"] for a in classes}
    assert about.get("numbers", {}) == {a["name"]: {"mean": a["mean"], "std": a["std"]} for a in numbers}
    assert (about["paths"], about["calibration"]) == (config["paths"], config["calibration"])
    assert about["preprocess"]["size"] == list(config["preprocess"]["size"])
