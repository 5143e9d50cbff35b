"""The backbone: by name, with weights that fit, and a fingerprint that names them."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from errors import UserError
from models.backbone import (
    DEMO,
    DEMO_BACKBONE,
    DEMO_WEIGHTS,
    bare_backbone,
    check_hf,
    create_backbone,
    weights_fingerprint,
)


def test_the_demos_weights_are_made_by_a_script(command, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain_demo.HELD_OUT", 8)
    done = command("pretrain_demo.py", "--scenes", 64, "--epochs", 1, "--out", tmp_path / "demo.safetensors")
    assert not done.returncode, done.stderr
    made, committed = (create_backbone("demo", weights)[0] for weights in (tmp_path / "demo.safetensors", None))
    assert not torch.equal(made.cls_token, committed.cls_token)


def test_demo_backbone_is_small_pretrained_and_loads():
    model, fingerprint = create_backbone(DEMO)
    assert DEMO_WEIGHTS.stat().st_size <= 4_000_000
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, model.num_features)
    assert fingerprint == create_backbone(DEMO)[1]
    assert fingerprint != weights_fingerprint(bare_backbone(DEMO))


def test_fingerprint_covers_names_and_bytes_not_the_file(tmp_path):
    """A file with a classifier and other metadata holds the same base as one without."""
    model = bare_backbone(DEMO)
    state = model.state_dict()
    save_file(state, tmp_path / "bare.safetensors")
    with_head = state | {"head.weight": torch.zeros(10, model.num_features), "head.bias": torch.zeros(10)}
    save_file(with_head, tmp_path / "head.safetensors", metadata={"format": "pt"})
    bare, head = (create_backbone(DEMO, tmp_path / f"{name}.safetensors")[1] for name in ("bare", "head"))
    assert bare == head == weights_fingerprint(model)
    state["norm.bias"] = state["norm.bias"] + 1e-6
    save_file(state, tmp_path / "other.safetensors")
    assert create_backbone(DEMO, tmp_path / "other.safetensors")[1] != bare


def test_img_size_resamples_the_position_embedding_and_is_what_the_data_config_says():
    model, fingerprint = create_backbone(DEMO, img_size=32)
    assert model.pos_embed.shape[1] == (32 // DEMO_BACKBONE["patch_size"]) ** 2 + 1
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, model.num_features)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    assert fingerprint == create_backbone(DEMO)[1], "the fingerprint is the base's, not the resampled model's"


@pytest.mark.parametrize(("name", "size"), [(DEMO, 64), ("vit_tiny_patch16_224", 224), ("vit_base_patch16_384", 384)])
def test_the_data_config_says_the_size_the_model_takes(name, size):
    with torch.device("meta"):
        model = bare_backbone(name)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, size, size)


def test_real_weights_load(shared):
    folder = shared / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model, _ = create_backbone("vit_tiny_patch16_224", folder / "model.safetensors", 112)
    assert model(torch.zeros(1, 3, 112, 112)).shape == (1, 192)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tinny_patch16_224", "near it: vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.imagenet", "unknown pretrained tag .* there are vit_tiny_patch16_224.augreg_in21k"),
        ("resnet18", "ResNet, not a timm VisionTransformer"),
    ],
)
def test_a_backbone_that_is_none(name, message):
    with pytest.raises(UserError, match=message):
        create_backbone(name)


def test_weights_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"no weights file at .*gone.safetensors; give its place with --weights"):
        create_backbone(DEMO, tmp_path / "gone.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(UserError, match="is not a safetensors file"):
        create_backbone(DEMO, tmp_path / "text.safetensors")
    state = bare_backbone(DEMO).state_dict()
    state.pop("norm.weight")
    save_file(state, tmp_path / "partial.safetensors")
    with pytest.raises(
        UserError, match=r"does not hold the weights of demo: 1 tensors differ, the first 'norm\.weight'"
    ):
        create_backbone(DEMO, tmp_path / "partial.safetensors")


def test_sizes_of_a_hybrid_go_by_its_grid(tmp_path):
    name = "vit_tiny_r_s16_p8_224"  # patches of 8 of a map of 56 x 56: of 32 pixels
    save_file(bare_backbone(name).state_dict(), weights := tmp_path / "random.safetensors")
    model, _ = create_backbone(name, weights, img_size=160)
    assert model.patch_embed.grid_size == (5, 5)
    with pytest.raises(UserError, match="144 pixels a side has no whole number of patches of 32"):
        create_backbone(name, weights, img_size=144)
    with pytest.raises(UserError, match="--patch-size 16: the patches of vit_tiny_r_s16_p8_224 are of a map"):
        create_backbone(name, weights, patch_size=16)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("vit_base_patch16_siglip_224", "has attn_pool"),
        ("vit_small_patch14_reg4_dinov2", "has blocks.N.ls1.gamma"),
        ("vit_medium_patch16_gap_240", "lacks blocks.N.attn.qkv.bias"),
    ],
)
def test_a_backbone_that_is_no_plain_vit_has_no_counterpart(name, what):
    for plain in (DEMO, "deit_small_patch16_224", "vit_base_patch16_224.mae"):
        check_hf(plain)
    with pytest.raises(UserError, match=f"{name} {what}.*, unlike Hugging Face's ViT"):
        check_hf(name)


def test_image_size_off_the_patch_grid():
    with pytest.raises(UserError, match="60 pixels a side has no whole number of patches of 8"):
        create_backbone(DEMO, img_size=60)
