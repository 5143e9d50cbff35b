"""Heads and loss: every level sees those above, and only labels that are present count."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from models.classifier import AttributeClassifier, attribute_losses, known_targets
from models.heads import HierarchicalHeads

LEVELS = {"gender": 1, "usage": 1, "subCategory": 2, "articleType": 3, "baseColour": 4, "brand": 4}
CLASSES = {"gender": 5, "usage": 8, "subCategory": 45, "articleType": 142, "baseColour": 46, "brand": 9}


def test_shapes_and_declaration_order():
    logits = HierarchicalHeads(16, 8, LEVELS, CLASSES)(torch.randn(3, 16))
    assert list(logits) == list(CLASSES)
    assert {name: scores.shape[1] for name, scores in logits.items()} == CLASSES


def test_each_level_reads_the_embedding_and_all_logits_above():
    heads = HierarchicalHeads(16, 8, LEVELS, CLASSES)
    first = [level if level.__class__ is torch.nn.Linear else level[0] for level in heads.levels]
    assert [layer.in_features for layer in first] == [16, 16 + 13, 16 + 13 + 45, 16 + 13 + 45 + 142]


def test_a_deeper_loss_reaches_the_level_above_it():
    heads = HierarchicalHeads(16, 8, LEVELS, CLASSES)
    heads(torch.randn(3, 16))["articleType"].square().sum().backward()
    gradients = [sum(p.grad.abs().sum() for p in level.parameters() if p.grad is not None) for level in heads.levels]
    assert all(g > 0 for g in gradients[:3])
    assert gradients[3] == 0


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_the_heads_see_the_backbones_embedding_beside_the_mean_of_its_patches(pool):
    """ViTs without a CLS token too, such as SigLIP's."""
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 0}
    backbone = timm.create_model("vit_tiny_patch16_224", global_pool=pool, class_token=pool == "token", **small).eval()
    images = torch.randn(2, 3, 32, 32)
    embedding = AttributeClassifier(backbone, torch.nn.Identity())(images)
    own, patches = embedding.split(32, dim=1)
    tokens = backbone.forward_features(images)
    assert tokens.shape[1] == 4 + (pool == "token")
    torch.testing.assert_close(own, backbone(images))
    torch.testing.assert_close(patches, own if pool == "avg" else tokens[:, -4:].mean(1))


def test_statistics_of_a_frozen_stem_stay_as_they_are_in_training():
    """They would not be in the checkpoint."""
    backbone = timm.create_model("vit_base_mci_224", num_classes=0, depth=1)
    model = AttributeClassifier(backbone, HierarchicalHeads(2 * 768, 8, LEVELS, CLASSES))
    means = [m.running_mean.clone() for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    model.eval().train()
    assert model.training and backbone.blocks.training
    model(torch.randn(2, 3, 224, 224))
    assert len(means) == 2
    for module, mean in zip((m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)), means, strict=True):
        assert torch.equal(module.running_mean, mean)


def test_loss_is_the_mean_over_labels_present():
    logits = {"a": torch.randn(4, 3), "b": torch.randn(4, 2)}
    labels = torch.tensor([[0, 1], [-1, 0], [2, -1], [1, -2]])  # -1 missing, -2 never seen in training
    want_a = F.cross_entropy(logits["a"][[0, 2, 3]], torch.tensor([0, 2, 1]))
    want_b = F.cross_entropy(logits["b"][[0, 1]], torch.tensor([1, 0]))
    torch.testing.assert_close(attribute_losses(logits, labels), torch.stack([want_a, want_b]))


def test_smoothing_spreads_a_share_of_the_label_over_all_classes():
    scores, labels = torch.randn(4, 3), torch.tensor([[0], [2], [1], [-1]])
    target = 0.9 * F.one_hot(labels[:3, 0], 3) + 0.1 / 3
    want = -(target * scores[:3].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(attribute_losses({"a": scores}, labels, smoothing=0.1), want[None])


def test_an_attribute_without_labels_gives_zero_loss_and_zero_gradient():
    scores = torch.randn(4, 3, requires_grad=True)
    loss = attribute_losses({"a": scores}, torch.full((4, 1), -1))
    loss.sum().backward()
    assert loss.item() == 0
    assert scores.grad.abs().sum() == 0


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_micro_batches_with_the_windows_counts_add_up_to_the_big_batch(cut):
    torch.manual_seed(cut)
    scores = torch.randn(6, 3, dtype=torch.float64)
    labels = torch.tensor([[0], [-1], [2], [1], [-1], [0]])
    whole = attribute_losses({"a": scores}, labels)
    known = (labels >= 0).sum(0)
    parts = [attribute_losses({"a": scores[rows]}, labels[rows], known) for rows in (slice(0, cut), slice(cut, 6))]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-6)


def test_numbers_have_hubers_loss_over_those_present():
    """Behind the classes; micro-batches with the window's counts add up to the big batch, gradients too."""
    torch.manual_seed(0)
    outputs = {"a": torch.randn(4, 3, dtype=torch.float64), "n": torch.randn(4, 1, dtype=torch.float64)}
    outputs["n"].requires_grad_()
    labels, numbers = torch.tensor([[0], [-1], [2], [1]]), torch.tensor([[0.5], [float("nan")], [-3.0], [9.0]])
    known = known_targets(labels, numbers)
    assert known.tolist() == [3, 3]
    whole = attribute_losses(outputs, labels, numbers=numbers)
    want = F.huber_loss(outputs["n"][[0, 2, 3]], numbers[[0, 2, 3]].double())
    torch.testing.assert_close(whole[1].double(), want, rtol=1e-5, atol=1e-6)
    halves = [
        attribute_losses({k: v[rows] for k, v in outputs.items()}, labels[rows], known, numbers=numbers[rows])
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(halves), whole, rtol=0, atol=1e-6)
    whole[1].backward()
    assert outputs["n"].grad.isfinite().all()
    assert outputs["n"].grad[1] == 0
