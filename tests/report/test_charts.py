"""What the page shows, against hand-worked cases."""

import numpy as np
import pytest

from data.attributes import MISSING, UNSEEN
from report.charts import BOTTOM, TOP, by_frequency, confident_mistakes, confusion, coverage_chart, reliability_points


def test_accuracy_by_frequency_by_hand():
    counts = {"usage": [1500, 3, 60]}  # groups: none, 1 to 9, 10 to 49, 50 to 199, 200 to 999, 1000 or more
    given = np.array([[0], [0], [1], [2], [UNSEEN], [MISSING]])
    said = np.array([[0], [2], [1], [0], [0], [0]])
    groups = by_frequency(given, said, counts)["usage"]
    assert [g["rows"] for g in groups] == [1, 1, 0, 1, 0, 2]
    assert [g["accuracy"] for g in groups] == [0.0, 1.0, None, 0.0, None, 0.5]


def test_confusion_by_hand():
    given, said = np.array([0, 0, 0, 1, 1, MISSING, UNSEEN]), np.array([0, 1, 1, 1, 0, 2, 2])
    found = confusion(given, said, ["a", "b", "c"])
    assert found["classes"] == ["a", "b"], "c occurs in no row with a known label"
    assert found["cells"] == [[1, 2, 0], [1, 1, 0]]
    assert found["rows"] == [3, 2]
    assert found["pairs"] == [("a", "b", 2), ("b", "a", 1)]


def test_confusion_of_very_many_classes_and_of_no_mistakes():
    texts = [str(c) for c in range(100_000)]  # whose table would take 80 GB
    found = confusion(np.arange(100_000), np.arange(100_000) // 2 * 2, texts)
    assert found["pairs"][:2] == [("1", "0", 1), ("3", "2", 1)] and len(found["pairs"]) == 8
    assert found["classes"] == [str(c) for c in range(12)]
    assert found["cells"][1] == [1] + [0] * 12
    found = confusion(np.array([4, 4]), np.array([4, 4]), texts)
    assert (found["classes"], found["cells"], found["pairs"]) == (["4"], [[2, 0]], [])


def test_coverage_chart_ends_at_the_accuracy():
    chart = coverage_chart(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, True, True, False]), 0.7, 0.9)
    points = [tuple(map(float, point.split(","))) for point in chart["line"].split()]
    assert chart["floor"] == 0.7
    top, bottom = points[0][1], points[-1][1]
    assert (bottom - top) / (BOTTOM - TOP) == pytest.approx((1 - 0.75) / (1 - 0.7), abs=0.01)
    assert chart["accepted"] == points[2]
    low = coverage_chart(np.array([0.9, 0.8]), np.array([True, True]), None, 0.8)
    assert low["floor"] == 0.8 and low["target"] == BOTTOM, "the line of the target is inside"
    empty = coverage_chart(np.array([]), np.array([], bool), None, 0.9)
    assert (empty["line"], empty["accepted"]) == ("", None)


def test_reliability_points_lie_where_the_bins_are():
    (point,) = reliability_points(np.array([1.0, 1.0]), np.array([True, True]))
    assert (point["x"], point["y"], point["bin"].rows) == (234, TOP, 2)
    assert reliability_points(np.array([]), np.array([], bool)) == []


def test_confident_mistakes_by_hand():
    given, said = np.array([0, 1, UNSEEN, MISSING, 1]), np.array([0, 0, 1, 1, 0])
    confidence = np.array([1.0, 0.5, 0.6, 0.9, 0.7])
    found = confident_mistakes(np.arange(10, 15), given, said, confidence, ["a", "b"], 2)
    assert [(m["row"], m["given"], m["said"], m["confidence"]) for m in found] == [
        (14, "b", "a", 0.7),
        (12, "a label unknown to training", "b", 0.6),
    ]
