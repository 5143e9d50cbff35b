"""Decoding against every path tried by hand, and confidence that is the label's own probability."""

import itertools
import math

import pytest
import torch

import calibration
from models import decode
from models.decode import Decoder
from models.schema import contradiction

PATH = ("masterCategory", "subCategory", "articleType")
CLASSES = {"gender": 3, "masterCategory": 3, "subCategory": 5, "articleType": 9}
TEMPERATURE = {"gender": 0.7, "masterCategory": 1.5, "subCategory": 2.0, "articleType": 0.5}


def config(paths, threshold=None) -> dict:
    attributes = [
        {"name": name, "kind": "class", "labels": list(map(str, range(size))), "counts": [1] * size, "parents": []}
        for name, size in CLASSES.items()
    ]
    made = {"attributes": attributes, "paths": [{"attributes": list(PATH), "known": paths}]}
    made |= {"inputs": "image", "text": None, "backbone": {"img_size": None, "patch_size": None}}
    if threshold is not None:
        made["calibration"] = {"temperature": TEMPERATURE, "threshold": threshold}
    return made


def logits(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: 3 * torch.randn(rows, classes, generator=g) for name, classes in CLASSES.items()}


@pytest.fixture
def paths() -> list[list[int]]:
    """14 of the 135 paths there could be; articleTypes 0 and 1 have two parents."""
    tree = [[article % 3, article % 5, article] for article in range(9)]
    return [*tree, [1, 1, 0], [2, 4, 0], [0, 0, 1], [2, 2, 2], [1, 3, 3]]


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_best_path_is_that_of_trying_all(paths, calibrated):
    thresholds = {"joint": dict.fromkeys(CLASSES), "independent": dict.fromkeys(CLASSES)}
    z = logits(300)
    found = Decoder(config(paths, thresholds if calibrated else None))(z)
    overruled = 0
    for row in range(300):
        log_p = {
            name: torch.log_softmax(z[name][row].double() / (TEMPERATURE[name] if calibrated else 1.0), 0).tolist()
            for name in CLASSES
        }
        best = max(paths, key=lambda path: sum(log_p[name][c] for name, c in zip(PATH, path, strict=True)))
        best = [log_p["gender"].index(max(log_p["gender"])), *best]
        assert found.labels[row].tolist() == best
        for name, label, confidence in zip(CLASSES, best, found.confidence[row].tolist(), strict=True):
            assert confidence == pytest.approx(math.exp(log_p[name][label]), rel=1e-4)
        overruled += best[1:] != [int(z[name][row].argmax()) for name in PATH]
    assert 100 < overruled < 300, "the paths decide in many rows, and not in all"


def test_with_every_path_known_both_decodings_agree():
    everything = [list(path) for path in itertools.product(*(range(CLASSES[name]) for name in PATH))]
    z = logits(200)
    assert torch.equal(Decoder(config(everything))(z).labels, Decoder(config([]))(z).labels)


def test_the_switch_gives_each_attributes_own_arg_max(paths):
    z = logits(50)
    want = torch.stack([scores.argmax(-1) for scores in z.values()], dim=1)
    assert torch.equal(Decoder(config(paths), joint=False)(z).labels, want)
    assert not torch.equal(Decoder(config(paths))(z).labels, want)


def test_accepted_from_the_threshold_of_the_decoding_in_use(paths):
    z = logits(50)
    confidence = Decoder(config(paths, {"joint": {}, "independent": {}}))(z).confidence
    joint = {"gender": 0.0, "masterCategory": float(confidence[7, 1]), "subCategory": None, "articleType": 1.1}
    thresholds = {"joint": joint, "independent": dict.fromkeys(CLASSES, 0.0)}
    accepted = Decoder(config(paths, thresholds))(z).accepted
    assert accepted[:, 0].all()
    assert torch.equal(accepted[:, 1], confidence[:, 1] >= confidence[7, 1])
    assert accepted[7, 1], "the threshold itself is enough"
    assert not accepted[:, 2:].any()
    assert Decoder(config(paths, thresholds), joint=False)(z).accepted.all()


def test_nothing_is_accepted_before_calibration(paths):
    assert not Decoder(config(paths))(logits(50)).accepted.any()


@pytest.mark.parametrize("path", [[0, 0], [0, 0, 0, 0], [0, 0, 9], [0, -1, 0], [3, 0, 0]])
def test_a_path_to_a_class_that_is_not_there_is_an_error(path):
    assert contradiction(config([path])) == "a path names a class that no label has"


def test_temperatures_of_other_attributes_are_an_error(paths):
    made = config(paths, {"joint": {}})
    made["calibration"]["temperature"] = {"gender": 1.0}
    assert contradiction(made) == "its temperatures or thresholds are of other attributes"


def test_rows_in_pieces_are_decoded_and_calibrated_as_all_at_once(paths, monkeypatch):
    whole, many = Decoder(config(paths)), logits(50)
    wanted, labels = whole(many), torch.arange(50) % 9 - 1
    temperature = calibration.fit_temperature(many["articleType"], labels)
    for module in (decode, calibration):
        monkeypatch.setattr(module, "AT_ONCE", 7)
    for scores in (decode.SCORES, 1):
        monkeypatch.setattr(decode, "SCORES", scores)
        for one, other in zip(whole(many), wanted, strict=True):
            assert torch.equal(one, other)
    assert calibration.fit_temperature(many["articleType"], labels) == temperature
