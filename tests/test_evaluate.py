"""The metrics, against hand-worked cases."""

import json
import shutil

import numpy as np
import pytest

from data.attributes import MISSING, UNSEEN
from metrics import f1_scores, score, scores_table

NAMES = ["masterCategory", "subCategory", "articleType", "brand"]
# masterCategory 0 > subCategory 0 > articleType 0 and 1 > 1 > 1 are the paths of training.
PATHS = [[0, 0, 0], [1, 1, 1]]


def test_f1_by_hand():
    true, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    # class 0: 2 hits, 3 true, 2 predicted: 4/5; class 1: 1, 2, 2: 2/4; class 2: 1, 1, 2: 2/3
    macro, weighted = f1_scores(true, predicted)
    assert macro == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    assert weighted == pytest.approx((3 * 4 / 5 + 2 * 1 / 2 + 1 * 2 / 3) / 6)


def test_a_class_that_is_only_predicted_lowers_macro_f1():
    assert f1_scores(np.array([0, 0]), np.array([0, 1]))[0] == pytest.approx((2 / 3 + 0) / 2)


def test_scores_by_hand():
    labels = np.array([[0, 0, 0, 5], [1, 1, 1, MISSING], [0, 0, MISSING, UNSEEN], [1, 1, 1, 2]])
    predicted = np.array([[0, 0, 0, 5], [1, 1, 1, 3], [0, 1, 1, 5], [1, 1, 0, 2]])
    scores = score(labels, predicted, NAMES, PATHS)
    by_name = scores["attributes"]
    assert by_name["masterCategory"]["accuracy"] == 1.0
    assert by_name["subCategory"]["accuracy"] == 3 / 4
    assert (by_name["articleType"]["accuracy"], by_name["articleType"]["rows"]) == (2 / 3, 3), (
        "a missing label is left out"
    )
    assert (by_name["brand"]["accuracy"], by_name["brand"]["rows"]) == (2 / 3, 3), "an unseen label is wrong"
    assert scores["mean_accuracy"] == pytest.approx((1 + 3 / 4 + 2 / 3 + 2 / 3) / 4)
    assert scores["path_accuracy"] == 2 / 3  # rows 0, 1, 3 are labelled in full; row 3 misses articleType
    assert scores["valid_path_rate"] == 2 / 4  # 0>1>1 and 1>1>0 never occur in training
    assert scores["exact_match"] == 2 / 4  # rows 0 and 1: what is labelled is right
    assert "articleType" in scores_table(scores)


def test_an_attribute_without_any_label():
    labels = np.array([[0, 0, 0, MISSING]])
    scores = score(labels, np.array([[0, 0, 0, 1]]), NAMES, PATHS)
    assert scores["attributes"]["brand"] == {"accuracy": None, "macro_f1": None, "weighted_f1": None, "rows": 0}
    assert scores["mean_accuracy"] == 1.0
    assert "no labels" in scores_table(scores)


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
        (("--calibrate", "--target-precision", "98"), "--target-precision: 98 is not a number between 0 and 1"),
        (("--report", demo_run / "metrics.json"), f"cannot write --report {demo_run / 'metrics.json'}: File exists"),
    ):
        done = command("evaluate.py", "--checkpoint", demo_run / "best", "--data", "demo", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr
