"""evaluate.py as a user runs it, on a run of train.py."""

import csv
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from durable import claim
from evaluate import choice

ROOT = Path(__file__).parents[1]


def test_evaluate_gives_the_figures_train_gave(command, demo_run, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 1000, "--cache-dir", cache_dir, "--json", tmp_path / "scores.json")
    done = command("evaluate.py", "--checkpoint", demo_run / "best", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads((demo_run / "metrics.json").read_text())


def test_paths_are_valid_by_construction_and_both_decodings_are_reported(demo_run):
    scores = json.loads((demo_run / "metrics.json").read_text())
    assert scores["decoding"] == "joint"
    assert scores["joint"] == {key: scores[key] for key in scores["joint"]}
    assert scores["joint"]["valid_path_rate"] == 1.0 > scores["independent"]["valid_path_rate"]


def test_the_switch_scores_independent_arg_maxes(command, demo_run, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 1000, "--cache-dir", cache_dir, "--json", tmp_path / "scores.json")
    assert command("evaluate.py", "--checkpoint", demo_run / "best", *words, "--independent").returncode == 0
    scores, trained = (json.loads(p.read_text()) for p in (tmp_path / "scores.json", demo_run / "metrics.json"))
    assert scores["decoding"] == "independent"
    assert scores["independent"] == trained["independent"] == {key: scores[key] for key in scores["independent"]}
    assert scores["joint"] == trained["joint"]


def test_a_run_ends_calibrated_and_calibrating_again_changes_nothing_but_the_target(
    command, demo_run, cache_dir, tmp_path
):
    shutil.copytree(demo_run / "best", tmp_path / "best")
    fitted = json.loads((tmp_path / "best" / "config.json").read_text())["calibration"]
    assert fitted["target_precision"] == 0.98
    assert all(0.05 <= t <= 20 for t in fitted["temperature"].values())
    words = ("--data", "demo", "--limit", 1000, "--cache-dir", cache_dir, "--calibrate", "--json", tmp_path / "scores")
    found = {}
    for target in (0.98, 0.7):
        done = command("evaluate.py", "--checkpoint", tmp_path / "best", *words, "--target-precision", target)
        assert done.returncode == 0, done.stderr
        scores = json.loads((tmp_path / "scores").read_text())
        assert scores["split"] == "val", "thresholds are fitted on rows that were not trained on"
        for name, a in scores["calibration"]["attributes"].items():
            assert a["precision"] is None or a["precision"] >= target, name
        found[target] = json.loads((tmp_path / "best" / "config.json").read_text())["calibration"]
    assert found[0.98] == fitted
    assert found[0.7]["temperature"] == fitted["temperature"]
    assert found[0.7]["threshold"] != fitted["threshold"]
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"config.json", "adapter.safetensors"}


def test_calibrating_on_rows_without_labels_changes_nothing_of_theirs(command, demo_run, tmp_path):
    best, shop = shutil.copytree(demo_run / "best", tmp_path / "best"), tmp_path / "shop"
    before = json.loads((best / "config.json").read_text())
    draw = (sys.executable, "-m", "data.demo", "--out", shop, "--rows", "40")
    subprocess.run(draw, cwd=ROOT, check=True, capture_output=True)
    words = ("--checkpoint", best, "--data", shop, "--cache-dir", tmp_path, "--calibrate", "--split", "all")
    table = next(shop.glob("*.csv"))
    header, *rows = csv.reader(table.open(encoding="utf-8"))

    def blank(columns):
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(["" if c in columns else v for c, v in zip(header, row, strict=True)] for row in rows)

    blank(set(header) - {"id"})
    done = command("evaluate.py", *words)
    assert (done.returncode, "has a label" in done.stderr.splitlines()[-1]) == (2, True), done.stderr
    assert json.loads((best / "config.json").read_text()) == before
    blank({"usage"})
    done = command("evaluate.py", *words)
    assert done.returncode == 0, done.stderr
    assert "no row has a known label of usage, so the temperature there stays as it was" in done.stdout
    assert "hint" not in done.stdout
    after = json.loads((best / "config.json").read_text())["calibration"]
    assert after["rows"] == 40
    assert after["temperature"]["usage"] == before["calibration"]["temperature"]["usage"]
    assert after["threshold"]["joint"]["usage"] == before["calibration"]["threshold"]["joint"]["usage"]
    demo = shop.rename(tmp_path / "demo")  # as a catalogue is called that has grown since it was trained on
    done = command("evaluate.py", *words[:3], demo, *words[4:])
    assert f"hint: {best} was trained on a demo too" in done.stdout


def test_a_run_in_progress_is_not_calibrated(command, demo_run, cache_dir, tmp_path):
    """Its next save could put other weights under these thresholds."""
    shutil.copytree(demo_run, tmp_path / "run")
    before = (tmp_path / "run" / "best" / "config.json").read_bytes()
    words = ("--checkpoint", tmp_path / "run" / "best", "--data", "demo", "--limit", 1000, "--cache-dir", cache_dir)
    with claim(tmp_path / "run" / ".lock"):
        done = command("evaluate.py", *words, "--calibrate", "--target-precision", 0.7)
        assert done.returncode == 2
        assert f"{tmp_path / 'run'} is a run that has not ended" in done.stderr.splitlines()[-1]
        assert command("evaluate.py", *words).returncode == 0, "it may be looked at"
    assert (tmp_path / "run" / "best" / "config.json").read_bytes() == before


def test_the_error_before_calibration_knows_no_temperature(command, demo_run, cache_dir, with_config, tmp_path):
    def heat(config):
        config["calibration"]["temperature"] = dict.fromkeys(config["calibration"]["temperature"], 5.0)

    folder = with_config(demo_run / "best", heat)
    words = ("--data", "demo", "--limit", 1000, "--cache-dir", cache_dir, "--json", tmp_path / "scores")
    assert command("evaluate.py", "--checkpoint", folder, *words).returncode == 0
    hot, fitted = (json.loads(p.read_text())["calibration"] for p in (tmp_path / "scores", demo_run / "metrics.json"))
    for name, a in fitted["attributes"].items():
        assert hot["attributes"][name]["ece_before"] == a["ece_before"]
        assert hot["attributes"][name]["ece"] != a["ece"]


def test_errors(command, demo_run, cache_dir, tmp_path):
    done = command("evaluate.py", "--checkpoint", tmp_path, "--data", "demo")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"no checkpoint at {tmp_path}" in done.stderr
    done = command(
        "evaluate.py", "--checkpoint", demo_run / "best", "--data", tmp_path / "gone", "--cache-dir", cache_dir
    )
    assert done.returncode == 2
    assert "no such data" in done.stderr
    for words, message in (
        (("--target-precision", "0.9"), "--target-precision goes with --calibrate"),
        (("--calibrate", "--split", "train"), "--calibrate --split train: fit on val"),
        (("--calibrate", "--split", "all", "--limit", "500", "--cache-dir", cache_dir), "demo is what"),
        (("--calibrate", "--checkpoint", tmp_path / "gone"), f"no checkpoint at {tmp_path / 'gone'}"),
        (("--calibrate", "--target-precision", "98"), "--target-precision: 98 is not a number between 0 and 1"),
        (("--report", demo_run / "metrics.json"), f"cannot write --report {demo_run / 'metrics.json'}: File exists"),
    ):
        done = command("evaluate.py", "--checkpoint", demo_run / "best", "--data", "demo", *words)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_labels_that_training_never_had_are_named(command, demo_run, cache_dir, tmp_path):
    subprocess.run([sys.executable, "-m", "data.demo", "--out", tmp_path, "--rows", "60"], cwd=ROOT, check=True)
    with open(tmp_path / "styles.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, usage in zip(rows, ["Moonwalk"] * 3 + ["Siesta"], strict=False):
        row["usage"] = usage
    with open(tmp_path / "styles.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    words = ("--data", tmp_path, "--split", "all", "--cache-dir", cache_dir)
    done = command("evaluate.py", "--checkpoint", demo_run / "best", *words)
    assert done.returncode == 0, done.stderr
    assert "usage: wrong in 4 rows for a label that training never had, as 'Moonwalk' (3), 'Siesta' (1)" in done.stdout


def test_scores_replace_nothing_that_is_read(command, demo_run):
    for file in ("best/config.json", "options.json"):
        words = ("--checkpoint", demo_run / "best", "--data", "demo", "--json", demo_run / file)
        done = command("evaluate.py", *words)
        assert done.returncode == 2
        assert f"--json {demo_run / file} would replace what is read" in done.stderr.splitlines()[-1]


def test_a_full_disk_is_one_line(command, demo_run, cache_dir):
    words = ("--checkpoint", demo_run / "best", "--data", "demo", "--limit", 200, "--cache-dir", cache_dir)
    done = command("evaluate.py", *words, "--json", "/dev/full")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: cannot write the results: No space left on device; make room"


def test_a_full_disk_leaves_the_scores_of_before(command, demo_run, cache_dir, tmp_path):
    (tmp_path / "scores.json").write_text("of before")
    words = ("--checkpoint", demo_run / "best", "--data", "demo", "--limit", 200, "--cache-dir", cache_dir)
    assert command("evaluate.py", *words).returncode == 0  # so that pictures are decoded
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        done = command("evaluate.py", *words, "--json", tmp_path / "scores.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.stderr.splitlines()[-1] == "error: cannot write the results: File too large; make room"
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
    assert (tmp_path / "scores.json").read_text() == "of before"


def test_of_many_rows_those_with_labels_are_chosen_unseen_ones_too():
    labels = np.array([[-1, -1]] * 6 + [[-2, -1]] * 2 + [[0, -1]] * 2)
    known = SimpleNamespace(numbers=np.full((10, 1), np.nan))
    task = SimpleNamespace(store=SimpleNamespace(rows=lambda split: np.arange(10)), labels=labels, known=known)
    assert choice(task, "val", 10).tolist() == list(range(10))
    assert choice(task, "val", 8).tolist() == [6, 7, 8, 9]
    assert set(choice(task, "val", 3)) < {6, 7, 8, 9}
    known.numbers[:5] = 0.5
    assert choice(task, "val", 9).tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert set(choice(task, "val", 6)) > {6, 7, 8, 9}, "rows with a number alone do not crowd them out"
    assert set(choice(task, "val", 4)) == {6, 7, 8, 9}
    task.labels = np.full((10, 2), -1)
    assert choice(task, "val", 8).tolist() == [0, 1, 2, 3, 4]
    known.numbers[:] = np.nan
    assert len(choice(task, "val", 3)) == 3
