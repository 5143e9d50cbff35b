"""A model that starts from a checkpoint with other attributes: what both have answers as before, exactly."""

import pytest
import torch

from errors import UserError
from models.backbone import DEMO, create_backbone
from models.checkpoint import adapt, attach, read_config, save_checkpoint, trained_params
from models.inherit import inherit
from options import parse_args
from tests.conftest import OWN_PATCHES
from tests.models.test_checkpoint import IMAGES, PLAIN, PREPROCESS

OLD = {"gender": (1, "ab"), "category": (1, "xyz"), "piece": (2, "mnop"), "colour": (4, "rgb")}


def described(attributes: dict, rank: int = 4) -> dict:
    made = []
    for name, (level, labels) in attributes.items():
        about = PLAIN | {"name": name, "level": level}
        number = {"kind": "number", "mean": 1.0, "std": 2.0, "median": 1.0}
        given = {"labels": list(labels), "counts": [1] * len(labels), "aliases": None}
        made.append(about | (given if labels else number))
    _, fingerprint = create_backbone(DEMO)
    return {
        "backbone": {"name": DEMO, **OWN_PATCHES, "fingerprint": fingerprint},
        "lora": {"targets": ["query", "dense"], "rank": rank, "alpha": 8, "dropout": 0.0},
        "attributes": made,
        "paths": [],
        "title": None,
        "inputs": "image",
        "text": None,
        "preprocess": PREPROCESS,
        "data": {"fingerprint": "x"},
    }


def fresh(config: dict, seed: int):
    torch.manual_seed(seed)
    model = attach(adapt(create_backbone(DEMO)[0], config), config).eval()
    for name, p in trained_params(model).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture
def folder(tmp_path):
    config = described(OLD)
    save_checkpoint(tmp_path / "best", fresh(config, 0), config)
    return tmp_path / "best"


@torch.inference_mode()
def outputs(model):
    return model(IMAGES)


@pytest.mark.parametrize(
    "added",
    [
        {},
        {"season": (4, "sw")},  # beside colour
        {"season": (1, "sw")},  # above all others, which read it from now on
        {"season": (3, "sw")},  # a level of its own, in between
        {"price": (4, "")},
        {"season": (2, "sw"), "price": (1, ""), "usage": (5, "cf")},
    ],
)
def test_all_that_is_kept_answers_as_before(folder, added):
    before = outputs(fresh(described(OLD), 0))
    config = described(OLD | added)
    model = fresh(config, 1)
    said = inherit(model, config, folder)
    after = outputs(model)
    for name in OLD:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5)
    kept, _, new = said.partition("; new: ")
    assert kept.endswith(": kept the adapters, the heads of gender, category, piece, colour")
    assert set(new.split(", ")) == (set(added) or {""})
    assert all(after[name].abs().sum() > 0 for name in added), "what is new starts at random, not at zero"


def test_what_is_new_still_learns_from_what_is_kept(folder):
    config = described(OLD | {"season": (5, "sw")})
    model = fresh(config, 1)
    inherit(model, config, folder)
    model(IMAGES)["season"].square().sum().backward()
    assert all(p.grad is not None for level in model.heads.levels for p in level.parameters())


def test_labels_are_matched_by_text(folder):
    before = outputs(fresh(described(OLD), 0))
    changed = OLD | {"gender": (1, "cba"), "piece": (2, "pm")}
    changed.pop("colour")
    config = described(changed)
    model = fresh(config, 1)
    said = inherit(model, config, folder)
    after = outputs(model)
    torch.testing.assert_close(after["gender"][:, [2, 1]], before["gender"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after["piece"], before["piece"][:, [3, 0]], rtol=1e-5, atol=1e-5)
    assert "kept the adapters, the heads of category, piece, 2 of 3 labels of gender; left out: colour" in said


def test_what_was_there_but_does_not_fit_is_not_called_new(folder):
    config = described(OLD | {"piece": (1, "mnop"), "colour": (4, "xy"), "season": (4, "sw")})
    said = inherit(fresh(config, 1), config, folder)
    assert said.endswith(
        "kept the adapters, the heads of gender, category; new: season; "
        "of another kind of level or other labels, so begun anew: piece, colour"
    )


@pytest.mark.parametrize("level", [1, 2, 5])
def test_a_number_answers_as_before_though_its_scale_is_another(tmp_path, level):
    """In its own unit; and so do the attributes below, which read it."""
    old = described(OLD | {"price": (level, "")})
    save_checkpoint(tmp_path / "best", fresh(old, 0), old)
    before = outputs(fresh(old, 0))
    config = described(OLD | {"price": (level, ""), "season": (4, "sw")})
    (price,) = (a for a in config["attributes"] if a["name"] == "price")
    price |= {"mean": -3.0, "std": 0.5}
    model = fresh(config, 1)
    kept, _, new = inherit(model, config, tmp_path / "best").partition("; new: ")
    assert "price" in kept
    assert new == "season"
    after = outputs(model)
    torch.testing.assert_close(-3.0 + 0.5 * after["price"], 1.0 + 2.0 * before["price"], rtol=1e-5, atol=1e-5)
    for name in OLD:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5)


def test_another_backbone_or_other_adapters_are_refused(folder):
    config = described(OLD, rank=8)
    with pytest.raises(UserError, match=r"--init-from .* has --rank 4, not 8"):
        inherit(fresh(config, 1), config, folder)
    config = read_config(folder)
    config["backbone"]["fingerprint"] = "0" * 16
    with pytest.raises(UserError, match=r"has the base weights \w{16}, not 0000000000000000"):
        inherit(fresh(described(OLD), 1), config, folder)


def test_dropout_may_be_another(folder):
    config = described(OLD)
    config["lora"]["dropout"] = 0.5
    inherit(fresh(config, 1), config, folder)


def test_what_makes_the_model_is_taken_over_unless_it_is_given(tmp_path):
    config = described(OLD)
    config["backbone"] |= {"img_size": 64, "patch_size": 8, "keep_patches": 0.5}
    save_checkpoint(tmp_path / "best", fresh(config, 0), config)
    (tmp_path / "options.json").write_text('{"weights": "/there/model.safetensors"}')
    own = ["--init-from", str(tmp_path / "best"), "--data", "demo"]
    args = parse_args(own)
    assert (args.backbone, args.img_size, args.patch_size, args.keep_patches) == (DEMO, 64, 8, 0.5)
    assert (args.targets, args.rank, args.alpha, args.dropout) == (["query", "dense"], 4, 8, 0.0)
    assert str(args.weights) == "/there/model.safetensors"
    args = parse_args([*own, "--keep-patches", "1", "--rank", "16", "--weights", "mine"])
    assert (args.keep_patches, args.img_size, args.rank, args.weights.name) == (1.0, 64, 16, "mine")
    assert parse_args([*own, "--backbone", "another"]).weights is None, "those are the weights of its own backbone"
