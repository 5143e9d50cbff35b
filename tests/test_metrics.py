"""The metrics, against hand-worked cases."""

import numpy as np
import pytest

from data.attributes import MISSING, UNSEEN
from metrics import f1_scores, path_distance, score, score_number, scores_table, trust_table

NAMES = ["masterCategory", "subCategory", "articleType", "brand"]
# masterCategory 0 > subCategory 0 > articleType 0 and 1 > 1 > 1 are the paths of training.
PATHS = [{"attributes": NAMES[:3], "known": [[0, 0, 0], [1, 1, 1]]}]


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


def test_an_attribute_without_any_label():
    labels = np.array([[0, 0, 0, MISSING]])
    scores = score(labels, np.array([[0, 0, 0, 1]]), NAMES, PATHS)
    assert scores["attributes"]["brand"] == {"accuracy": None, "macro_f1": None, "weighted_f1": None, "rows": 0}
    assert scores["mean_accuracy"] == 1.0
    assert "no labels" in scores_table(scores)


def test_tables_say_which_figure_is_which():
    a = {"accuracy": 0.1, "macro_f1": 0.2, "weighted_f1": 0.3, "rows": 4}
    scores = {"attributes": {"a": a}, "mean_accuracy": 0.5, "path_accuracy": None, "valid_path_rate": None}
    assert " ".join(scores_table(scores | {"exact_match": 0.6}).split()) == (
        "attribute accuracy macro F1 weighted F1 rows a 0.100 0.200 0.300 4 mean_accuracy 0.500 exact_match 0.600"
    )
    c = {"ece_before": 0.1, "ece": 0.2, "accepted": 0.3, "precision": None}
    calibration = {"attributes": {"a": c}, "target_precision": 0.98, "accepted": 0.4, "precision": 0.7}
    calibration |= {"paths_accepted": 0.8, "rows_accepted": 0.9}
    said = trust_table({"joint": {"x": 0.5}, "independent": {"x": 0.6}, "calibration": calibration})
    assert " ".join(said.split()) == (
        "joint x 0.500 independent x 0.600 attribute ECE before after accepted precision a 0.100 0.200 0.300 – "
        "accepted at target precision 0.98: 0.400 of all labels, 0.700 of them right; 0.800 of all paths, "
        "0.900 of all rows in full"
    )


def test_path_distance_by_hand():
    # Columns as in NAMES; the brand plays no part.
    labels = np.array([[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, MISSING, 0]])
    predicted = np.array([[0, 0, 0, 1], [0, 0, 0, 0], [0, 2, 2, 0], [1, 1, 2, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    # right; wrong below the right subCategory; below the right masterCategory; not even that; right, parents or not
    assert path_distance(labels, predicted, [0, 1, 2]) == [2, 1, 1, 1]


def test_without_a_hierarchy_there_is_no_path_to_score():
    labels = np.array([[0, 1, 0, 2]])
    scores = score(labels, labels, NAMES, [])
    assert (scores["path_accuracy"], scores["valid_path_rate"], scores["exact_match"]) == (None, None, 1.0)
    assert "path_accuracy" not in scores_table(scores)


def test_two_hierarchies_must_both_be_right():
    paths = [{"attributes": NAMES[:2], "known": [[0, 0], [1, 1]]}, {"attributes": NAMES[2:], "known": [[0, 0], [1, 1]]}]
    labels = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    predicted = np.array([[0, 0, 1, 1], [1, 1, 0, 1], [0, 1, 0, 0]])
    scores = score(labels, predicted, NAMES, paths)
    assert scores["path_accuracy"] == scores["valid_path_rate"] == pytest.approx(1 / 3)


def test_numbers_by_hand():
    true, guesses = np.array([1.0, 3.0, np.nan, 8.0]), np.array([2.0, 3.0, 9.0, 5.0])
    found = score_number(true, guesses, 3.0, np.array([1.0, 3.0, 0.0, 7.0]))
    spread = 9 + 1 + 16  # around the mean, 4
    assert found == pytest.approx(
        {"mae": 4 / 3, "r2": 1 - 10 / spread, "rows": 3, "constant_mae": 7 / 3, "constant_r2": 1 - 29 / spread}
        | {"floor_mae": 1 / 3, "floor_r2": 1 - 1 / spread}
    )
    assert score_number(true[2:3], guesses[2:3], 3.0) == {"mae": None, "r2": None, "rows": 0}
    assert score_number(true[:1], guesses[:1], 3.0)["r2"] is None, "one value has no spread"
    assert score_number(np.full(3, 0.1), np.full(3, 0.2), 0.1)["r2"] is None, "nor have equal ones"
