"""A window of `step.py`: exact accumulation, schedule, what trains, precisions."""

import numpy as np
import pytest
import timm
import torch

from data.batches import Batch
from data.preprocess import Preprocess
from lora import apply_lora
from models.backbone import VIT_TARGETS
from models.checkpoint import trained_params
from models.classifier import AttributeClassifier
from models.heads import HierarchicalHeads
from step import learning_rate, parameter_groups, train_step, windows

PREPROCESS = Preprocess((32, 32), (32, 32), "bicubic", (0.5,) * 3, (0.5,) * 3)


def tiny_model(dropout: float = 0.0) -> AttributeClassifier:
    """A real timm ViT of 50k parameters in fp64, with LoRA and two levels of heads, B away from zero."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, embed_dim=32, num_heads=2, img_size=32)
    apply_lora(backbone, ["query", "value", "dense"], 4, 8, dropout, VIT_TARGETS)
    model = AttributeClassifier(backbone, HierarchicalHeads(64, 32, {"a": 1, "b": 2}, {"a": 3, "b": 5})).double()
    for name, p in trained_params(model).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    return model


def in_double(pixels: torch.Tensor) -> torch.Tensor:
    """The real preprocessing, not augmented, for a model in fp64."""
    return PREPROCESS(pixels).double()


def batch(rows: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    labels = torch.stack(
        [torch.randint(-1, 3, (rows,), generator=g), torch.randint(-1, 5, (rows,), generator=g)], dim=1
    )
    pixels = torch.randint(0, 256, (rows, 32, 32, 3), dtype=torch.uint8, generator=g)
    return Batch(pixels, labels, torch.empty(rows, 0), torch.empty(rows, 0, dtype=torch.int64))


def sgd(model) -> torch.optim.SGD:
    """Without weight decay, so that a step is the gradient alone; fused, so that `found_inf` skips a step."""
    return torch.optim.SGD([{"params": list(trained_params(model).values()), "lr_ratio": 1.0}], lr=1, fused=True)


def updated(model, micro_batches, scale: float | None = None) -> dict[str, torch.Tensor]:
    """What trains, after one step; with the loss scaled as for fp16 where `scale` is given."""
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    train_step(model, micro_batches, optimizer, scaler, 0.1, None, in_double)
    return {name: p.detach() for name, p in trained_params(model).items()}


@pytest.mark.parametrize("sizes", [(4, 4), (4, 1), (1, 3, 2), (6,)])
def test_a_window_steps_as_one_big_batch(sizes):
    """Also when it is short or uneven, and when labels are missing here and there."""
    parts = [batch(rows, seed) for seed, rows in enumerate(sizes)]
    big = Batch(*map(torch.cat, zip(*parts, strict=True)))
    one, many = updated(tiny_model(), [big]), updated(tiny_model(), parts)
    start = {name: p.detach() for name, p in trained_params(tiny_model()).items()}
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=0, atol=1e-7)  # the losses themselves are fp32
        assert not torch.equal(one[name], start[name]), f"{name} did not train"


def test_a_step_changes_adapters_and_heads_and_nothing_else():
    model, before = tiny_model(), tiny_model().state_dict()
    updated(model, [batch(8, 0)])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trained_params(model))
    pairs = ["attn.qkv.query", "attn.qkv.value", "attn.proj", "mlp.fc1", "mlp.fc2"]
    adapters = {f"backbone.blocks.{i}.{p}.lora_{m}" for i in (0, 1) for p in pairs for m in "AB"}
    heads = {
        f"heads.levels.{name}" for name in ("0.weight", "0.bias", "1.0.weight", "1.0.bias", "1.2.weight", "1.2.bias")
    }
    assert changed == adapters | heads


@pytest.mark.parametrize("magnitude", [1, 100])
def test_the_loss_scale_of_fp16_changes_no_update_clipped_or_not(magnitude):
    """It would if gradients were clipped before they are unscaled."""

    def model():
        grown = tiny_model()
        for p in grown.heads.parameters():
            p.data *= magnitude
        return grown

    plain, scaled = updated(model(), [batch(4, 0)]), updated(model(), [batch(4, 0)], scale=1024.0)
    for name in plain:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-6, atol=1e-9)


def test_an_overflow_under_fp16_takes_no_step_and_halves_the_scale():
    model = tiny_model()
    for p in model.heads.parameters():
        p.data *= 1e200  # the scaled loss is no longer finite
    before = {name: p.detach().clone() for name, p in trained_params(model).items()}
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    train_step(model, [batch(4, 0)], optimizer, scaler, 0.1, None, in_double)
    assert scaler.get_scale() == 2.0**15
    assert all(torch.equal(p, before[name]) for name, p in trained_params(model).items())


def test_a_loss_that_is_not_finite_takes_no_step_under_fp16_though_the_gradient_is():
    model, micro = tiny_model(), batch(4, 0)
    micro.labels[:, 1] = 2
    model.heads.levels[1][2].bias.data[2] = -torch.inf  # a probability of 0, whose slopes are those of another one
    before = {name: p.detach().clone() for name, p in trained_params(model).items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    figures = train_step(model, [micro], sgd(model), scaler, 0.1, None, in_double)
    assert not figures[1].isfinite()
    assert figures[-1].isfinite(), "the norm of the gradient"
    assert all(torch.equal(p, before[name]) for name, p in trained_params(model).items())


def test_a_window_without_any_label_changes_nothing_and_is_finite():
    unlabelled = batch(4, 0)
    unlabelled = unlabelled._replace(labels=torch.full_like(unlabelled.labels, -1))
    model = tiny_model()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    *losses, norm = train_step(model, [unlabelled], optimizer, scaler, 0.1, None, in_double)
    assert losses == [0, 0]
    assert norm == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny_model().parameters(), strict=True))


def test_the_gradient_is_clipped_to_norm_one():
    model = tiny_model()
    for p in model.heads.parameters():
        p.data *= 100
    before = {name: p.detach().clone() for name, p in trained_params(model).items()}
    optimizer = sgd(model)
    *_, norm = train_step(
        model, [batch(4, 0)], optimizer, torch.amp.GradScaler("cpu", enabled=False), 0.1, None, in_double
    )
    moved = torch.stack([(p - before[name]).norm() for name, p in trained_params(model).items()]).norm()
    assert norm > 1
    assert moved.item() == pytest.approx(0.1 * 1, rel=1e-4)  # learning rate times the clipped norm


def test_a_weight_scales_an_attributes_gradient_and_not_its_reported_loss():
    def figures(weights):
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        model = tiny_model()
        return train_step(model, [batch(8, 0)], sgd(model), scaler, 0.1, None, in_double, weights=weights)

    plain, doubled, first = figures(None), figures(torch.tensor([2.0, 2.0])), figures(torch.tensor([1.0, 0.0]))
    assert torch.equal(plain[:2], doubled[:2])
    assert torch.equal(plain[:2], first[:2])
    assert doubled[2].item() == pytest.approx(2 * plain[2].item(), rel=1e-5)
    assert 0 < first[2] < plain[2]


def test_windows_keep_the_short_tail():
    assert [len(w) for w in windows(range(7), 3)] == [3, 3, 1]


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 100, 1e-3) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3 / 5)
    assert max(rates) == pytest.approx(1e-3) == rates[4]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 1e-6
    assert learning_rate(0, 1, 1e-3) > 0


def test_biases_are_not_decayed():
    params = trained_params(tiny_model())
    *decayed, rest = parameter_groups(params)
    assert all(group["weight_decay"] > 0 for group in decayed)
    assert rest["weight_decay"] == 0
    assert {p.ndim for group in decayed for p in group["params"]} == {2}
    assert {p.ndim for p in rest["params"]} == {1}
    assert sum(len(group["params"]) for group in [*decayed, rest]) == len(params)


def test_what_pissa_starts_from_is_not_decayed():
    params = trained_params(tiny_model())
    decays = {
        id(p): group["weight_decay"] for group in parameter_groups(params, decay_lora=False) for p in group["params"]
    }
    pairs = {name for name in params if name.endswith(("lora_A", "lora_B"))}
    assert pairs
    for name, p in params.items():
        assert (decays[id(p)] > 0) == (p.ndim == 2 and name not in pairs), name


def test_lora_plus_is_the_learning_rate_of_b_alone():
    def moved(lora_plus):
        model = tiny_model()
        before = {name: p.detach().clone() for name, p in trained_params(model).items()}
        optimizer = torch.optim.SGD(
            parameter_groups(trained_params(model), lora_plus), lr=1, weight_decay=0, fused=True
        )
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train_step(model, [batch(4, 0)], optimizer, scaler, 1e-4, None, in_double)
        return {name: (p - before[name]).norm() for name, p in trained_params(model).items()}

    plain, plus = moved(1.0), moved(16.0)
    for name in plain:
        ratio = 16 if name.endswith("lora_B") else 1
        torch.testing.assert_close(plus[name], ratio * plain[name], rtol=1e-2, atol=1e-9)  # decay differs in part


def test_bf16_step_stays_close_to_fp32():
    steps = {}
    for amp in (None, torch.bfloat16):
        model = tiny_model().float()
        optimizer = sgd(model)
        *losses, norm = train_step(
            model, [batch(4, 0)], optimizer, torch.amp.GradScaler("cpu", enabled=False), 0.1, amp, PREPROCESS
        )
        steps[amp] = [loss.item() for loss in losses], norm.item()
    np.testing.assert_allclose(steps[torch.bfloat16][0], steps[None][0], rtol=0.05)
    np.testing.assert_allclose(steps[torch.bfloat16][1], steps[None][1], rtol=0.1)
