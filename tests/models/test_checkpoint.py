"""Checkpoints: what was trained comes back exactly, onto the right base only, and merges into plain timm."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from errors import UserError
from lora import merge_lora, parameter_summary
from models.backbone import DEMO, bare_backbone, create_backbone
from models.checkpoint import (
    FORMAT,
    LOOKING,
    adapt,
    amend_config,
    attach,
    load_checkpoint,
    load_tensors,
    read_config,
    save_checkpoint,
    sealed,
    trained_params,
)
from tests.conftest import OWN_PATCHES

PLAIN = {"column": "x", "derive": None, "kind": "class", "weight": 1.0, "parents": [], "aliases": None}
NAMES = {"gender": (1, 5), "masterCategory": (1, 7), "subCategory": (2, 9), "articleType": (3, 20), "brand": (4, 4)}
SIDES = {"canvas": [64, 64], "size": [64, 64]}
PREPROCESS = SIDES | {"interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trained(tmp_path):
    """A saved checkpoint of an adapted demo backbone whose B is not zero, and the model it was saved from."""
    torch.manual_seed(0)
    backbone, fingerprint = create_backbone(DEMO)
    config = {
        "backbone": {"name": DEMO, **OWN_PATCHES, "fingerprint": fingerprint},
        "lora": {"targets": ["query", "value", "dense"], "rank": 4, "alpha": 8, "dropout": 0.1},
        "attributes": [
            PLAIN | {"name": name, "level": level, "labels": [str(i) for i in range(classes)], "counts": [1] * classes}
            for name, (level, classes) in NAMES.items()
        ],
        "paths": [],
        "title": None,
        "inputs": "image",
        "text": None,
        "preprocess": PREPROCESS,
        "data": {"fingerprint": "x"},
    }
    model = attach(adapt(backbone, config), config).eval()
    for name, p in trained_params(model).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    save_checkpoint(tmp_path / "best", model, config)
    return tmp_path / "best", model


def test_round_trip(trained):
    folder, model = trained
    again, config = load_checkpoint(folder)
    assert [a["name"] for a in config["attributes"]] == list(NAMES)
    with torch.inference_mode():
        want, got = model(IMAGES), again(IMAGES)
    assert all(torch.equal(want[name], got[name]) for name in NAMES)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(trained_params(again))


def test_files_hold_adapters_and_heads_alone(trained):
    folder, model = trained
    assert {path.name for path in folder.iterdir()} == {"config.json", "adapter.safetensors"}
    assert set(load_file(folder / "adapter.safetensors")) == set(trained_params(model))


def test_saving_again_replaces_the_whole_folder(trained):
    folder, model = trained
    config = json.loads((folder / "config.json").read_text())
    save_checkpoint(folder, model, config, {"optimizer.safetensors": {"x": torch.zeros(1)}})
    save_checkpoint(folder, model, config)
    assert not (folder / "optimizer.safetensors").exists()
    beside = {path.name for path in folder.parent.iterdir()}
    assert beside == {"best", "best.previous"}, "the one before is kept, and nothing half-written"
    assert (folder.parent / "best.previous" / "optimizer.safetensors").exists()


def test_amending_the_config_adds_facts_and_leaves_the_rest(trained):
    folder, _ = trained
    before, tensors = read_config(folder), (folder / "adapter.safetensors").read_bytes()
    fitted = {"target_precision": 0.9, "rows": 7, "temperature": dict.fromkeys(NAMES, 1.5)}
    fitted["threshold"] = {how: dict.fromkeys(NAMES) for how in ("joint", "independent")}
    amend_config(folder, calibration=fitted)
    after = read_config(folder)
    assert after.pop("sha256") != before.pop("sha256"), "sealed anew"
    assert after == before | {"calibration": fitted}
    assert (folder / "adapter.safetensors").read_bytes() == tensors
    assert {path.name for path in folder.iterdir()} == {"config.json", "adapter.safetensors"}


def test_merged_backbone_loads_strictly_into_plain_timm(trained):
    _, model = trained
    merged = merge_lora(model)
    plain = bare_backbone(DEMO).eval()
    plain.load_state_dict(merged.backbone.state_dict(), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(plain(IMAGES), model.backbone(IMAGES), rtol=1e-4, atol=1e-4)


def test_another_base_is_refused_by_fingerprint(trained, tmp_path):
    folder, _ = trained
    torch.manual_seed(1)
    save_file(bare_backbone(DEMO).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"was trained on demo weights \w{16}, but .*other.safetensors holds \w{16}"):
        load_checkpoint(folder, tmp_path / "other.safetensors")


def test_tensors_of_another_save_are_not_taken(trained):
    folder, model = trained
    config = read_config(folder)
    save_checkpoint(folder, model, config | {"inputs": "image"})
    load_tensors(folder, model, config)  # the same tensors
    with torch.no_grad():
        next(iter(trained_params(model).values())).add_(1)
    save_checkpoint(folder, model, config)
    with pytest.raises(UserError, match="was replaced while it was read"):
        load_tensors(folder, model, config)


def test_the_run_remembers_its_weights_and_says_when_they_moved(trained, tmp_path):
    folder, _ = trained
    save_file(create_backbone(DEMO)[0].state_dict(), tmp_path / "base.safetensors")
    (folder.parent / "options.json").write_text(json.dumps({"weights": str(tmp_path / "base.safetensors")}))
    load_checkpoint(folder)
    (tmp_path / "base.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"no weights file at .*base.safetensors; give its place with --weights"):
        load_checkpoint(folder)
    load_checkpoint(folder, tmp_path / "moved.safetensors")
    (folder.parent / "options.json").write_text('{"port": 8080}')  # of another program
    load_checkpoint(folder)
    (folder.parent / "options.json").write_text("[")
    with pytest.raises(UserError, match=r"options.json is damaged; name the backbone's weights with --weights"):
        load_checkpoint(folder)


def test_damaged_checkpoints(trained, tmp_path):
    folder, _ = trained

    def copy(name):
        return shutil.copytree(folder, tmp_path / name)

    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nowhere")
    text = copy("text")
    (text / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_checkpoint(text)
    newer = copy("newer")
    (newer / "config.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match=rf"is of format 99, not {FORMAT} or {LOOKING}, .* newer version"):
        load_checkpoint(newer)
    cut = copy("cut")
    (cut / "adapter.safetensors").write_bytes((folder / "adapter.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged: its checksum differs"):
        load_checkpoint(cut)
    other = copy("other")
    tensors = load_file(other / "adapter.safetensors")
    tensors["heads.extra"] = tensors.pop("heads.levels.0.bias")
    data = save(tensors)
    (other / "adapter.safetensors").write_bytes(data)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_bytes(sealed(config, {"adapter.safetensors": data}))
    with pytest.raises(UserError, match=r"missing heads\.levels\.0\.bias; unexpected heads\.extra"):
        load_checkpoint(other)


@pytest.mark.parametrize(
    "variant",
    [
        {"rslora": True, "dora": True},
        {"pissa": True},
        {"rank": {"query": 2, "value": 3, "dense": 5}, "layers": [1, 2]},
    ],
)
def test_variants_round_trip(tmp_path, variant):
    torch.manual_seed(0)
    backbone, fingerprint = create_backbone(DEMO)
    config = {
        "backbone": {"name": DEMO, **OWN_PATCHES, "fingerprint": fingerprint},
        "lora": {"targets": ["query", "value", "dense"], "rank": 4, "alpha": 8, "dropout": 0.1} | variant,
        "attributes": [PLAIN | {"name": "gender", "level": 1, "labels": ["a", "b"], "counts": [1, 1]}],
        "paths": [],
        "title": None,
        "inputs": "image",
        "text": None,
        "preprocess": PREPROCESS,
        "data": {"fingerprint": "x"},
    }
    model = attach(adapt(backbone, config), config).eval()
    with torch.no_grad():
        for p in trained_params(model).values():
            p += 0.05 * torch.randn_like(p)
    save_checkpoint(tmp_path / "best", model, config)
    loaded, _ = load_checkpoint(tmp_path / "best")
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


def test_vit_b_has_the_recipes_2654208_lora_parameters():
    with torch.device("meta"):
        backbone = bare_backbone("vit_base_patch16_224")
        lora = {"targets": ["query", "key", "value", "dense"], "rank": 16, "alpha": 32, "dropout": 0.05}
        rest = {"attributes": [], "inputs": "image", "text": None, "backbone": OWN_PATCHES}
        config = {"lora": lora} | rest
        model = attach(adapt(backbone, config), config)
    assert sum(p.numel() for p in trained_params(model).values()) == 2_654_208
    assert parameter_summary(model).startswith("trainable 2,654,208 / total 88,45")
