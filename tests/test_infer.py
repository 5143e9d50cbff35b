"""infer.py as a user runs it: every input answered once, in every format."""

import csv
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from figures import QUIET, contact_sheet
from models.checkpoint import newest_checkpoint
from output import labelled_in, number_text

ROOT = Path(__file__).parents[1]
PATH = ["masterCategory", "subCategory", "articleType"]
ATTRIBUTES = ["gender", "masterCategory", "usage", "subCategory", "articleType", "baseColour", "brand"]


def test_table_of_one_image(demo_run, photos):
    words = [sys.executable, ROOT / "infer.py", photos / "0.png", "--checkpoint", demo_run / "best"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert lines[0] == str(photos / "0.png")
    assert [line.split()[0] for line in lines[1:8]] == ATTRIBUTES


def test_a_name_that_the_locale_has_no_letters_for(demo_run, photos, tmp_path):
    """It could not be printed, which ended the answers; and the JSON on standard output is UTF-8 everywhere."""
    shutil.copy(photos / "0.png", tmp_path / "caf\u00e9.png")
    words = [sys.executable, ROOT / "infer.py", tmp_path / "caf\u00e9.png", "--checkpoint", demo_run / "best", "--json"]
    surrounding = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(list(map(str, words)), capture_output=True, timeout=120, env=surrounding)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("utf-8"))["image"] == str(tmp_path / "caf\u00e9.png")


def test_numbers_are_written_to_be_read():
    numbers = {
        2012.0: "2012",
        2011.07: "2011.07",
        9999.5: "9999.5",
        1e4: "10,000",
        1234567.0: "1,234,567",
        -0.5: "-0.5",
    }
    assert {value: number_text(value) for value in numbers} == numbers


def test_json_of_a_folder_answers_each_image_once_and_goes_on_after_bad_ones(command, demo_run, photos):
    done = command("infer.py", photos, "--json", "--top-k", 2, "--batch-size", 3, "--checkpoint", demo_run / "best")
    assert done.returncode == 1, "some images could not be read"
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["0.png", "1.png", "2.png", "cut.png", "more/3.png", "more/4.png", "page.jpg"]
    assert [a["image"] for a in answers] == [str(photos / name) for name in names]
    assert [set(a) for a in answers if a["image"].endswith(("cut.png", "page.jpg"))] == [{"image", "error"}] * 2
    for answer in answers:
        for name, said in answer.get("attributes", {}).items():
            assert name in ATTRIBUTES
            assert said["top"][0] == [said["label"], said["confidence"]]
            assert all(0 <= p <= 1 for _, p in said["top"])
            assert len({label for label, _ in said["top"]}) == 2
            assert said["decision"] in ("accept", "review")


def test_formats_hold_the_same_rows(command, demo_run, photos, tmp_path):
    for kind in ("csv", "jsonl", "parquet"):
        done = command("infer.py", photos, "--out", tmp_path / f"labels.{kind}", "--checkpoint", demo_run / "best")
        assert done.returncode == 1
        assert not done.stdout, "answers go to the file"
    with open(tmp_path / "labels.csv", newline="") as lines:
        from_csv = list(csv.DictReader(lines))
    from_parquet = pq.read_table(tmp_path / "labels.parquet").to_pylist()
    from_json = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert len(from_csv) == len(from_parquet) == len(from_json) == 7
    for a, b, c in zip(from_csv, from_parquet, from_json, strict=True):
        assert a["image"] == b["image"] == c["image"]
        assert a["error"] == (b["error"] or "") == c.get("error", "")
        for name in ATTRIBUTES:
            said = c.get("attributes", {}).get(name, {"label": None, "confidence": None, "decision": None})
            assert a[name] == (b[name] or "") == (said["label"] or "")
            assert a[f"{name}_decision"] == (b[f"{name}_decision"] or "") == (said["decision"] or "")
            assert b[f"{name}_confidence"] == pytest.approx(said["confidence"]) if said["label"] else a[name] == ""


def test_batch_size_changes_no_answer(command, demo_run, photos):
    answers = []
    for size in (1, 64):
        done = command(
            "infer.py",
            photos / "*.png",
            photos / "more",
            "--json",
            "--batch-size",
            size,
            "--checkpoint",
            demo_run / "best",
        )
        assert done.returncode == 1, "one picture cannot be read"
        answers.append([json.loads(line) for line in done.stdout.splitlines()])
    assert len(answers[0]) > 2
    for one, many in zip(*answers, strict=True):
        assert one["image"] == many["image"]
        for name, said in one.get("attributes", {}).items():
            assert said["label"] == many["attributes"][name]["label"]
            assert said["confidence"] == pytest.approx(many["attributes"][name]["confidence"], abs=2e-4)


def test_labels_fit_together_and_decisions_are_those_of_the_thresholds(command, demo_run, photos, with_config):
    """Thresholds are put where some of the answers reach them: those a short run earns may all lie out of reach."""
    joint = dict.fromkeys(ATTRIBUTES, 0.8) | {"gender": 0.0, "brand": None}
    independent = dict.fromkeys(ATTRIBUTES, 1.1)
    thresholds = {"joint": joint, "independent": independent}
    folder = with_config(demo_run / "best", lambda config: config["calibration"].update(threshold=thresholds))
    config = json.loads((folder / "config.json").read_text())
    words = ("infer.py", photos / "*.png", photos / "more", "--json", "--top-k", 50, "--checkpoint", folder)
    answers = [json.loads(line) for line in command(*words).stdout.splitlines()]
    alone = [json.loads(line) for line in command(*words, "--independent").stdout.splitlines()]
    labels = {a["name"]: a["labels"] for a in config["attributes"]}
    decisions = set()
    for answer, other in zip(answers, alone, strict=True):
        if "error" in answer:
            continue
        said = answer["attributes"]
        path = [labels[name].index(said[name]["label"]) for name in PATH]
        assert path in config["paths"][0]["known"]
        for name, a in said.items():
            sure = joint[name] is not None and a["confidence"] >= joint[name]
            assert a["decision"] == ("accept" if sure else "review")
            decisions |= {(name in PATH, a["decision"])}
            by_p = sorted(a["top"], key=lambda guess: -guess[1])
            assert by_p[0] == other["attributes"][name]["top"][0], "with the switch, the most probable"
            assert [p for label, p in by_p if label != a["label"]] == [p for _, p in a["top"][1:]]
            assert other["attributes"][name]["decision"] == "review", "the switch has thresholds of its own"
    assert decisions >= {(True, "accept"), (True, "review")}


def test_an_uncalibrated_checkpoint_leaves_all_for_review_and_says_so(command, demo_run, photos, with_config):
    folder = with_config(demo_run / "best", lambda config: config.pop("calibration"))
    done = command("infer.py", photos / "0.png", "--json", "--checkpoint", folder)
    assert "not calibrated, so all is for review" in done.stderr
    assert {a["decision"] for a in json.loads(done.stdout)["attributes"].values()} == {"review"}


def test_plot(command, demo_run, photos, tmp_path):
    done = command("infer.py", photos / "more", "--plot", tmp_path / "sheet.png", "--checkpoint", demo_run / "best")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 200
        assert len(sheet.convert("L").getcolors()) > 50, "something is drawn"


def test_a_label_is_text_never_a_formula(tmp_path):
    captions = [[("band: $25 (9% off) [$10 (5% off)]", QUIET)]]
    contact_sheet([np.zeros((8, 8, 3), np.uint8)], captions).savefig(tmp_path / "sheet.png")


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("infer.py", ["0.png"], "checkpoint runs/new/best"),
        ("evaluate.py", ["--data", "demo", "--limit", 300], "checkpoint runs/new/best"),
        ("export.py", ["--to", "timm", "--out", "merged.safetensors"], "checkpoint runs/new/best"),
        ("refit.py", ["--data", "demo", "--limit", 1000], "runs/new/best"),
        ("train.py", ["--resume"], "going on with runs/new at step"),
    ],
)
def test_newest_run_is_taken_and_named(command, demo_run, photos, cache_dir, tmp_path, script, words, said):
    shutil.copy(photos / "0.png", tmp_path)
    words = [*words, "--cache-dir", cache_dir] if "--data" in words else words
    done = command(script, *words, cwd=tmp_path)
    assert done.returncode == 2 and "no run under runs/ has a" in done.stderr
    for name, trained in (("new", 2), ("old", 1), ("older", 0)):
        shutil.copytree(demo_run, tmp_path / "runs" / name)
        for which in ("best", "last"):
            os.utime(tmp_path / "runs" / name / which / "adapter.safetensors", (trained, trained))
    done = command(script, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout + done.stderr


def test_calibrating_makes_no_run_the_newest(demo_run, tmp_path):
    for run, trained, calibrated in (("old", 1, 4), ("new", 2, 3)):
        best = shutil.copytree(demo_run / "best", tmp_path / run / "best")
        os.utime(best / "adapter.safetensors", (trained, trained))
        os.utime(best / "config.json", (calibrated, calibrated))
    assert newest_checkpoint(tmp_path, "best") == tmp_path / "new" / "best"


def test_a_run_whose_last_checkpoint_was_damaged_is_still_the_newest(demo_run, tmp_path):
    for run, which, trained in (("old", "last.previous", 1), ("middle", "last", 2), ("new", "last.previous", 3)):
        last = shutil.copytree(demo_run / "last", tmp_path / run / which)
        os.utime(last / "adapter.safetensors", (trained, trained))
    assert newest_checkpoint(tmp_path, "last") == tmp_path / "new" / "last"
    shutil.rmtree(tmp_path / "new")
    assert newest_checkpoint(tmp_path, "last") == tmp_path / "middle" / "last"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_says_the_same_with_about_the_same_confidence(command, demo_run, photos, tmp_path, precision):
    for name, extra in (("full", ()), ("half", ("--amp", precision))):
        words = (photos, "--checkpoint", demo_run / "best", "--out", tmp_path / f"{name}.jsonl", *extra)
        assert command("infer.py", *words).returncode == 1, "one picture cannot be read"
    full, half = (
        [json.loads(line).get("attributes") for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("full", "half")
    )
    pairs = [(a[name], b[name]) for a, b in zip(full, half, strict=True) if a for name in a]
    assert max(abs(a["confidence"] - b["confidence"]) for a, b in pairs if a["label"] == b["label"]) < 0.1
    assert sum(a["label"] == b["label"] for a, b in pairs) >= 0.9 * len(pairs)
    assert full != half


@pytest.mark.parametrize("result", ["labels.csv", "labels.jsonl", "labels.parquet", "=shop/labels"])
def test_what_an_earlier_result_has_labels_for_is_left_out(command, demo_run, photos, tmp_path, result):
    """What was an error then is tried again. A job's folder may lie among the pictures, and is still no picture."""
    shop, out, words = tmp_path / "=shop", tmp_path / result, ("--checkpoint", demo_run / "best")
    shutil.copytree(photos, shop)  # in the table a name with an apostrophe before it
    run = functools.partial(command, "infer.py", "=shop", *words, cwd=tmp_path)
    assert run("--out", out).returncode == 1
    Image.open(shop / "0.png").save(shop / "page.jpg")
    shutil.copy(shop / "0.png", shop / "new.png")
    done = run("--skip", out, "--json")
    assert "left out, as they have labels: 5 of 8" in done.stderr
    names = [Path(json.loads(line)["image"]).name for line in done.stdout.splitlines()]
    assert names == ["cut.png", "new.png", "page.jpg"]
    assert run("--skip", out, "--out", tmp_path / "more").returncode == 1
    shutil.copy(shop / "0.png", shop / "cut.png")
    third = tmp_path / "third.csv"
    assert run("--skip", out, "--skip", tmp_path / "more", "--out", third).returncode == 0
    assert [row["image"] for row in csv.DictReader(third.open())] == ["'=shop/cut.png"]
    for fourth in tmp_path / "fourth.csv", tmp_path / "fourth":
        done = run("--skip", out, "--skip", tmp_path / "more", "--skip", third, "--out", fourth)
        assert done.returncode == 0, done.stderr
        assert "left out, as they have labels: 8 of 8" in done.stderr
        assert "0 rows" in done.stderr
    assert labelled_in(tmp_path / "fourth") == set(), "a job that found nothing new"
    done = run("--skip", tmp_path, "--out", third)
    assert (done.returncode, "would replace what is read" in done.stderr) == (2, True)
    done = command("infer.py", shop, *words, "--skip", out, cwd=tmp_path)
    assert "left out, as they have labels: 0 of 8" in done.stderr, "names are as they were given"


def test_what_has_labels_is_left_out_of_parquet(command, demo_run, photos, tmp_path):
    pictures = [{"bytes": (photos / f"{i}.png").read_bytes(), "path": None} for i in range(3)]
    pq.write_table(pa.table({"id": ["a", "b", "c"], "image": pictures}), tmp_path / "shop.parquet")
    (tmp_path / "old.jsonl").write_text('{"image": "b", "attributes": {}}\n{"image": "c", "error": "cut"}\n')
    words = ("--checkpoint", demo_run / "best", "--skip", tmp_path / "old.jsonl")
    done = command("infer.py", tmp_path / "shop.parquet", *words, "--json")
    assert [json.loads(line)["image"] for line in done.stdout.splitlines()] == ["a", "c"]
    done = command("infer.py", tmp_path / "shop.parquet", *words, "--out", tmp_path / "job", "--shard-rows", 2)
    assert done.returncode == 0, done.stderr
    assert [pq.read_table(f)["image"].to_pylist() for f in sorted((tmp_path / "job" / "labels").iterdir())] == [
        ["a"],
        ["c"],
    ]
    again = command("infer.py", tmp_path / "shop.parquet", *words, "--out", tmp_path / "job", "--shard-rows", 2)
    assert again.returncode == 0, "the same job, which is done"
