import copy
import re
from itertools import chain, combinations

import pytest
import torch
from torch import nn

from lora import get_adapter_params, load_params, merge_lora, parameter_summary, set_trainable_params

TARGETS = ("query", "key", "value", "dense")
SUBSETS = list(chain.from_iterable(combinations(TARGETS, n) for n in range(1, 5)))


def images(dtype=torch.float32):
    return torch.randn(2, 3, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(1))


def train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(steps):
        model(images(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def snapshot(model):
    return copy.deepcopy(model.state_dict())


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("targets", SUBSETS, ids="-".join)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@torch.no_grad()
def test_merged_is_unmerged(make_vit, make_adapted, targets, dtype, tolerance):
    model = make_adapted(targets, dtype=dtype).eval()
    plain = make_vit().to(dtype).eval()
    unadapted = plain(images(dtype))
    plain.load_state_dict(merge_lora(model).state_dict(), strict=True)
    expected = model(images(dtype))
    assert (expected - unadapted).abs().max() > 0.01, "the adapters do something"
    torch.testing.assert_close(plain(images(dtype)), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_is_unmerged_after_training(make_adapted, dtype, tolerance):
    model = train(make_adapted(dropout=0.1, dtype=dtype))
    merged = merge_lora(model)
    torch.testing.assert_close(merged(images(dtype)), model(images(dtype)), rtol=tolerance, atol=tolerance)


def test_training_changes_the_adapters_and_nothing_else(make_adapted):
    model = make_adapted(dropout=0.1)
    before = snapshot(model)
    train(model, steps=1)
    assert changed(model, before) == set(get_adapter_params(model))


def test_train_and_eval_never_change_a_weight(make_adapted):
    model = make_adapted(dropout=0.1)
    before = snapshot(model)
    for mode in (False, True, False, False):
        model.train(mode)
        assert list(model.state_dict()) == list(before)
        assert not changed(model, before)


def test_merge_leaves_the_model_alone(make_adapted):
    model = make_adapted()
    before, trainable = snapshot(model), [p.requires_grad for p in model.parameters()]
    merged = merge_lora(model)
    nn.init.zeros_(merged.blocks[0].attn.qkv.weight)
    nn.init.zeros_(merged.norm.weight)
    assert list(model.state_dict()) == list(before)
    assert not changed(model, before)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not get_adapter_params(merged)


def test_set_trainable_params(make_adapted):
    model = make_adapted(["query"])
    set_trainable_params(model, ["norm.bias", "cls_token"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"norm.bias", "cls_token"}
    with pytest.raises(ValueError, match=r"no such parameters in the model: head\.bias, heads"):
        set_trainable_params(model, ["heads", "norm.bias", "head.bias"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"norm.bias", "cls_token"}


def test_adapters_round_trip(make_adapted):
    trained = train(make_adapted())
    fresh = make_adapted().eval()
    assert not torch.equal(fresh(images()), trained(images()))
    load_params(get_adapter_params(fresh), get_adapter_params(trained))
    assert torch.equal(fresh(images()), trained(images()))
    assert all(p.is_leaf and p.requires_grad for p in get_adapter_params(fresh).values())


def test_loading_names_all_that_does_not_fit(make_adapted):
    model = make_adapted(["fc1"])
    before = snapshot(model)
    state = {name: torch.zeros_like(p) for name, p in get_adapter_params(model).items()}
    del state["blocks.0.mlp.fc1.lora_A"]
    state["blocks.0.mlp.fc9.lora_A"] = torch.zeros(1)
    state["blocks.1.mlp.fc1.lora_A"] = torch.zeros(2, 32)
    message = (
        "the state does not fit the model: misshaped blocks.1.mlp.fc1.lora_A, (2, 32) for (4, 32); "
        "missing blocks.0.mlp.fc1.lora_A; unexpected blocks.0.mlp.fc9.lora_A"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_params(get_adapter_params(model), state)
    assert not changed(model, before)


def test_parameter_summary():
    model = nn.Sequential(nn.Linear(99, 10), nn.Linear(100, 10).requires_grad_(False))
    assert parameter_summary(model) == "trainable 1,000 / total 2,010 (49.75%)"
