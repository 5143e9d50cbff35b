"""Temperatures, calibration error and thresholds, against a grid, a hand-worked case and every threshold tried."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calibration import (
    BINS,
    calibrate,
    calibration_error,
    calibration_scores,
    coverage_curve,
    fit_temperature,
    one_of_each,
    precision_threshold,
    reliability,
)
from data.attributes import MISSING, UNSEEN
from models.decode import Decoder


def drawn(temperature: float, rows: int = 4000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from `softmax(logits / temperature)`: the T to be found, up to chance."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, 6, generator=g)
    return logits, torch.multinomial((logits / temperature).softmax(-1), 1, generator=g).squeeze(1)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_temperature_is_the_best_of_a_grid(temperature):
    logits, labels = drawn(temperature)
    grid = np.geomspace(0.2, 5, 2001)
    losses = [F.cross_entropy(logits.double() / t, labels, label_smoothing=1 / 4001).item() for t in grid]
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)
    assert found == pytest.approx(temperature, rel=0.1)


def test_temperature_leaves_labels_out_that_are_no_class():
    logits, labels = drawn(2.0)
    holes = labels.clone()
    holes[::3], holes[1::3] = MISSING, UNSEEN
    assert fit_temperature(logits, holes) == pytest.approx(fit_temperature(logits[2::3], labels[2::3]))
    assert fit_temperature(logits, torch.full_like(labels, MISSING)) == 1.0


def test_temperature_claims_no_certainty_where_nothing_is_wrong_and_is_bounded_where_all_is():
    logits = torch.eye(4) * 5
    # Smoothed by 1/5, a label is 0.8 + 0.2 / 4 = 0.85, which exp(5 / T) / (exp(5 / T) + 3) is at T = 5 / log 17.
    assert fit_temperature(logits, torch.arange(4)) == pytest.approx(5 / math.log(17), rel=1e-5)
    assert fit_temperature(logits, torch.arange(4).roll(1)) == pytest.approx(20, rel=1e-4)


def test_calibration_error_by_hand():
    # Two bins of 1/15: three rows near 0.9, one of them wrong; one row of 0.3, right.
    confidence, right = np.array([0.90, 0.91, 0.92, 0.30]), np.array([True, True, False, True])
    bins = reliability(confidence, right)
    assert [(b.rows, round(b.confidence, 9), b.accuracy) for b in bins] == [(1, 0.3, 1.0), (3, 0.91, 2 / 3)]
    assert calibration_error(bins) == pytest.approx(3 / 4 * abs(0.91 - 2 / 3) + 1 / 4 * abs(0.3 - 1))
    assert reliability(np.array([1.0]), np.array([True]))[0].rows == 1, "a confidence of 1 is in the last bin"
    assert calibration_error([]) is None
    assert len(reliability(np.linspace(0, 1, 1000), np.ones(1000, bool))) == BINS


def test_coverage_curve_by_hand():
    thresholds, rows, hits = coverage_curve(np.array([0.5, 0.9, 0.7, 0.7]), np.array([False, True, True, False]))
    assert thresholds.tolist() == [0.9, 0.7, 0.5]
    assert rows.tolist() == [1, 3, 4], "equal confidences stand or fall together"
    assert hits.tolist() == [1, 2, 2]


@pytest.mark.parametrize("target", [0.8, 0.9, 0.95])
def test_threshold_is_the_lowest_of_all_that_keep_the_promise(target):
    g = np.random.default_rng(0)
    confidence = g.random(1000).round(2)
    right = g.random(1000) < confidence**0.1
    passing = []
    for threshold in np.unique(confidence):
        n, k = (confidence >= threshold).sum(), right[confidence >= threshold].sum()
        m = n * (1 - target)
        lucky = sum(math.exp(-m + j * math.log(m) - math.lgamma(j + 1)) for j in range(n - k + 1))
        if threshold > 0.5 and lucky <= 0.05:
            passing.append(threshold)
    assert passing, "the case is of some use"
    assert precision_threshold(confidence, right, target) == passing[0]


def test_no_threshold_where_rows_are_few_or_wrong():
    assert precision_threshold(np.full(20, 0.99), np.ones(20, bool), 0.98) is None, "20 right ones prove too little"
    assert precision_threshold(np.full(200, 0.99), np.ones(200, bool), 0.98) == 0.99
    assert precision_threshold(np.linspace(0, 1, 500), np.zeros(500, bool), 0.5) is None
    assert precision_threshold(np.array([]), np.array([], bool), 0.5) is None


def accepts(rows: int, mistakes: int, target: float) -> bool:
    return precision_threshold(np.full(rows, 0.99), np.arange(rows) >= mistakes, target) is not None


def test_without_a_mistake_a_promise_of_98_percent_takes_150_rows():
    assert not accepts(149, 0, 0.98) and accepts(150, 0, 0.98), "exp(-150 * 0.02) is the first below 0.05"


@pytest.mark.parametrize(("target", "wasted"), [(0.6, 0.5), (0.9, 0.06), (0.98, 0.01)])
@pytest.mark.parametrize("mistakes", [0, 1, 2, 5, 10, 20])
def test_fewest_rows_keep_the_promise_by_the_exact_distribution_of_mistakes(target, wasted, mistakes):
    def exact(rows: int) -> float:  # chance of no more mistakes than these where each row is right `target` of the time
        chances = (math.comb(rows, j) * (1 - target) ** j * target ** (rows - j) for j in range(mistakes + 1))
        return sum(chances)

    fewest = next(rows for rows in range(mistakes + 1, 4000) if accepts(rows, mistakes, target))
    assert exact(fewest) <= 0.05
    needed = next(rows for rows in range(mistakes + 1, 4000) if exact(rows) <= 0.05)
    assert fewest <= needed * (1 + wasted) + 1


def test_what_is_more_likely_wrong_than_right_is_never_accepted():
    confidence = np.array([0.1, 0.5, 0.51] + [0.99] * 500)
    assert precision_threshold(confidence, np.ones(503, bool), 0.98) == 0.51


@pytest.mark.parametrize(
    ("precision", "most"),
    [(lambda c: c**0.2, 0.05), (lambda c: 0.93 + 0.03 * c, 0.06), (lambda c: np.full(len(c), 0.949), 0.2)],
)
def test_how_often_a_promise_is_broken(precision, most):
    """Seldom where precision falls as confidence does; more often where it is everywhere just too low."""
    g, broken = np.random.default_rng(0), 0
    for _ in range(300):
        confidence = 0.5 + g.random(2000) / 2
        chance = precision(2 * confidence - 1)
        threshold = precision_threshold(confidence, g.random(2000) < chance, 0.95)
        broken += threshold is not None and chance[confidence >= threshold].mean() < 0.95
    assert broken / 300 <= most + 3 * math.sqrt(most * (1 - most) / 300), "three standard errors"


def test_an_attribute_without_labels_keeps_what_was_fitted_before():
    config = {"attributes": [{"name": name, "kind": "class", "labels": list("abcd")} for name in ("room", "wood")]}
    config["paths"] = []
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (3000, 2), generator=g)
    logits = {
        name: 3 * F.one_hot(truth[:, i], 4) + torch.randn(3000, 4, generator=g)
        for i, name in ((0, "room"), (1, "wood"))
    }
    labels = truth.numpy()
    config["calibration"] = before = calibrate(logits, labels, np.arange(len(labels)), config, 0.9)
    halved = labels.copy()
    halved[:, 1] = MISSING
    halved[::2, 0] = UNSEEN
    after = calibrate(logits, halved, np.arange(len(labels)), config, 0.9)
    assert after["temperature"]["wood"] == before["temperature"]["wood"] != 1
    assert after["temperature"]["room"] != before["temperature"]["room"]
    halved[:, 0] = UNSEEN
    unknown = calibrate(logits, halved, np.arange(len(labels)), config, 0.9)
    assert unknown["temperature"] == before["temperature"]
    assert unknown["threshold"]["joint"]["room"] is None, "no answer can have been right"
    for how in ("joint", "independent"):
        assert after["threshold"][how]["wood"] == before["threshold"][how]["wood"] is not None
        stricter = calibrate(logits, halved, np.arange(len(labels)), config, 0.95)
        assert stricter["threshold"][how]["wood"] is None, "it was for another target"


def test_photos_of_an_article_count_once_towards_a_promise():
    config = {"attributes": [{"name": "wood", "kind": "class", "labels": list("ab")}], "paths": []}
    labels = np.arange(1000)[:, None] % 2
    logits = {"wood": 9.0 * F.one_hot(torch.from_numpy(labels[:, 0]), 2)}
    for articles, enough in ((1000, True), (150, True), (149, False), (1, False)):
        fitted = calibrate(logits, labels, np.arange(1000) % articles, config, 0.98)
        assert (fitted["threshold"]["joint"]["wood"] is not None) is enough


def test_of_an_articles_photos_a_labelled_one_counts():
    config = {"attributes": [{"name": "wood", "kind": "class", "labels": list("ab")}], "paths": []}
    labels = np.arange(800)[:, None] // 4 % 2
    logits = {"wood": 9.0 * F.one_hot(torch.from_numpy(labels[:, 0]), 2)}
    labels[np.arange(800) % 4 > 0] = MISSING
    fitted = calibrate(logits, labels, np.arange(800) // 4, config, 0.98)
    assert fitted["threshold"]["joint"]["wood"] is not None, "of 200 articles"


def test_the_photo_that_counts_is_any_of_its_articles():
    keys = np.repeat(np.arange(300), 4)  # photos lie together, and the first may be the best one
    rows = one_of_each(keys)
    assert (keys[rows] == np.arange(300)).all()
    assert np.bincount(rows % 4).min() > 50
    assert (one_of_each(keys) == rows).all()


def test_calibrating_answers_that_are_decoded_jointly():
    names, classes = ("gender", "room", "piece", "wood"), 4
    paths = [[c, c, c] for c in range(classes)]
    config = {"attributes": [{"name": name, "kind": "class", "labels": list("abcd")} for name in names]}
    config["paths"] = [{"attributes": list(names[1:]), "known": paths}]
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(0, classes, (3000,), generator=g)
    logits = {name: 6 * F.one_hot(truth, classes) + 3 * torch.randn(3000, classes, generator=g) for name in names}
    labels = truth.numpy()[:, None].repeat(4, 1)
    labels[:5, 0], labels[5:9, 0] = MISSING, UNSEEN
    config["calibration"] = calibrate(logits, labels, np.arange(len(labels)), config, 0.9)
    assert config["calibration"]["rows"] == 3000
    for how in ("joint", "independent"):
        answers = Decoder(config, how == "joint")(logits)
        raw = Decoder(config | {"calibration": None}, how == "joint")(logits)
        scores = calibration_scores(answers, raw, labels, list(names), config["paths"])
        for column, name in enumerate(names):
            accepted = answers.accepted[:, column].numpy()
            judged = accepted & (labels[:, column] != MISSING)
            right = (answers.labels[:, column].numpy() == labels[:, column])[judged]
            got = scores["attributes"][name]
            assert (got["accepted"], got["precision"]) == (accepted.mean(), right.mean())
            assert right.mean() >= 0.9
            assert how == "joint" or got["ece"] < got["ece_before"]
        whole = answers.accepted.numpy().all(1)
        assert scores["rows_accepted"] == whole.mean()
        assert scores["paths_accepted"] == answers.accepted[:, 1:].numpy().all(1).mean() > whole.mean()
    shares = [Decoder(config, joint)(logits).accepted[:, 3].float().mean() for joint in (True, False)]
    assert shares[0] > shares[1], "thresholds are those of each decoding, and the paths know more"
