"""Leaving out empty patches: which ones, that positions go with the kept ones, and what a checkpoint remembers."""

import pytest
import timm
import torch

from errors import UserError
from models.backbone import DEMO, create_backbone
from models.classifier import AttributeClassifier
from models.patches import by_contrast, forward_features


def test_fullest_patches_come_first_and_ties_in_order():
    images = torch.zeros(1, 3, 32, 32)
    images[0, 1, 8:16, 24:32] = torch.linspace(0, 5, 64).view(8, 8)  # row 1, column 3 of 4 x 4
    images[0, 2, 24:32, 0:8] = torch.linspace(0, -3, 64).view(8, 8)  # row 3, column 0
    images[0, :, 0:8, 8:16] = 9.0  # flat, however bright
    assert by_contrast(images, (4, 4))[0].tolist() == [7, 12, *(i for i in range(16) if i not in (7, 12))]


@torch.no_grad()
def test_kept_tokens_are_those_of_a_model_that_masks_the_others():
    """The same as attention over all tokens with the left-out ones masked away."""
    model, images = create_backbone(DEMO)[0].eval(), torch.randn(2, 3, 64, 64)
    found = forward_features(model, images, 0.25)
    kept = by_contrast(images, (8, 8))[:, :16]
    seen = torch.zeros(2, 65, dtype=torch.bool)
    seen[:, 0] = True
    seen.scatter_(1, kept + 1, True)
    masked = model.forward_features(images, attn_mask=seen[:, None, None, :].expand(2, 1, 65, 65))
    assert found.shape == (2, 17, model.num_features)
    torch.testing.assert_close(found[:, 0], masked[:, 0])
    torch.testing.assert_close(found[:, 1:], masked[:, 1:].gather(1, kept[..., None].expand(-1, -1, found.shape[-1])))


@torch.no_grad()
def test_the_patches_of_a_hybrid_are_those_of_its_grid():
    model = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=0).eval()  # patches of 8, of a map of 28 x 28 pixels
    assert forward_features(model, torch.randn(1, 3, 224, 224), 0.5).shape == (1, 1 + 24, model.num_features)


@torch.no_grad()
def test_the_fullest_are_chosen_before_pictures_are_rounded():
    """In bf16 levels near white are lost, and with them which patch has more contrast."""
    model, images = create_backbone(DEMO)[0].eval().bfloat16(), 2 + torch.rand(2, 3, 64, 64) / 32
    rounded = images.bfloat16()
    assert not torch.equal(by_contrast(images, (8, 8))[:, :16], by_contrast(rounded.float(), (8, 8))[:, :16])
    found, of_rounded = (forward_features(model, some, 0.25) for some in (images, rounded))
    assert found.dtype == torch.bfloat16
    assert not torch.equal(found, of_rounded)


@torch.no_grad()
def test_keeping_all_is_timms_own():
    model, images = create_backbone(DEMO)[0].eval(), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(forward_features(model, images), model.forward_features(images), rtol=0, atol=0)


@torch.no_grad()
def test_patches_are_dropped_evenly_from_the_kept_ones_and_in_training_alone():
    backbone, images = create_backbone(DEMO)[0], torch.randn(64, 3, 64, 64)
    seen, attend = [], backbone.blocks.forward
    backbone.blocks.forward = lambda x: seen.append(x) or attend(x)
    torch.manual_seed(0)
    for keep, kept in ((0.5, by_contrast(images, (8, 8))[:, :32]), (1.0, torch.arange(64).expand(64, -1))):
        forward_features(backbone, images, keep, 0.25)
        tokens = backbone._pos_embed(backbone.patch_embed(images))[:, 1:]
        patches = seen.pop()[:, 1:]
        assert patches.shape[1] == 0.75 * kept.shape[1]
        index = torch.cdist(patches, tokens).argmin(dim=2)  # which patches they are
        chosen = (kept[:, :, None] == index[:, None, :]).sum(2)  # how often each of the kept, the fullest first
        assert (chosen.sum(1) == patches.shape[1]).all() and chosen.max() == 1
        assert (chosen.double().mean(0) - 0.75).abs().max() < 5 * (0.75 * 0.25 / 64) ** 0.5, "of each rank evenly many"
        assert len(chosen.unique(dim=0)) == 64, "each picture loses others"

    model = AttributeClassifier(backbone, torch.nn.Flatten(), keep_patches=0.5)
    model.drop_patches = 0.25
    assert not torch.equal(model.train().embed(images)[0], model.embed(images)[0])
    assert torch.equal(model.eval().embed(images)[0], backbone.forward_head(forward_features(backbone, images, 0.5)))


@torch.no_grad()
def test_a_smaller_patch_sees_a_shrunk_picture_as_the_own_one_saw_the_large():
    """Patches of 8 over 112 pixels give nearly the embedding of patches of 16 over the same picture at 224."""
    images = torch.nn.functional.interpolate(torch.randn(2, 3, 16, 16), 112, mode="bilinear")
    large = torch.nn.functional.interpolate(images, 64, mode="bilinear")
    native, fingerprint = create_backbone(DEMO)
    small, same = create_backbone(DEMO, img_size=32, patch_size=4)
    shrunk = torch.nn.functional.interpolate(images, 32, mode="bilinear")
    assert fingerprint == same and small.patch_embed.grid_size == native.patch_embed.grid_size == (8, 8)
    a, b = native.patch_embed(large), small.patch_embed(shrunk)
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() > 0.95


def test_patches_that_do_not_fill_the_picture_are_refused():
    with pytest.raises(UserError, match=r"64 pixels .* patches of 7"):
        create_backbone(DEMO, patch_size=7)
