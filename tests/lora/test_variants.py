"""rsLoRA, DoRA, PiSSA, ranks of each target, chosen blocks: by hand, and against plain autograd."""

import copy
import math

import pytest
import torch
from torch import nn

from lora import (
    Int8Linear,
    LoRAFusedLinear,
    LoRALinear,
    apply_lora,
    draw_dropped,
    get_adapter_params,
    merge_lora,
    start_at_principal,
)


def set_(parameter, values):
    with torch.no_grad():
        parameter.copy_(torch.tensor(values))


def test_rslora_by_hand():
    layer = LoRALinear(nn.Linear(2, 1, bias=False), rank=4, alpha=6, rslora=True)
    assert layer.scaling == 3.0  # 6 / √4, where LoRA has 6 / 4
    set_(layer.base_layer.weight, [[1, 2]])
    set_(layer.lora_A, [[1, 0], [0, 1], [0, 0], [0, 0]])
    set_(layer.lora_B, [[2, -1, 5, 5]])
    assert layer.merge().weight.tolist() == [[7, -1]]
    assert layer(torch.tensor([1.0, 10.0])).tolist() == [-3]


def test_dora_by_hand():
    base = nn.Linear(2, 2)
    set_(base.weight, [[3, 4], [0, 2]])
    set_(base.bias, [100, 200])
    layer = LoRALinear(base, rank=1, alpha=1, dora=True)
    assert layer.lora_magnitude.tolist() == [5, 2]
    set_(layer.lora_A, [[3, 4]])
    set_(layer.lora_B, [[1], [0]])  # W₀ + ΔW = [[6, 8], [0, 2]], of lengths 10 and 2
    assert layer.merge().weight.tolist() == [[3, 4], [0, 2]]
    assert layer(torch.tensor([1.0, 1.0])).tolist() == [107, 202]
    set_(layer.lora_magnitude, [20, 1])
    assert layer.merge().weight.tolist() == [[12, 16], [0, 1]]
    assert layer(torch.tensor([1.0, 1.0])).tolist() == [128, 201]


def test_dora_of_a_row_of_zeros_is_finite():
    base = nn.Linear(2, 2, bias=False)
    set_(base.weight, [[3, 4], [0, 0]])
    layer = LoRALinear(base, rank=1, alpha=1, dora=True)
    assert layer.merge().weight.tolist() == [[3, 4], [0, 0]]
    layer(torch.ones(1, 2)).sum().backward()
    assert all(p.grad.isfinite().all() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude))
    set_(layer.lora_A, [[3, 4]])
    set_(layer.lora_B, [[0], [1]])
    set_(layer.lora_magnitude, [5, 10])
    assert layer.merge().weight.tolist() == [[3, 4], [6, 8]]


def test_dora_leaves_the_blocks_without_it_as_they_are():
    base = nn.Linear(2, 6, bias=False)
    layer = LoRAFusedLinear(base, {"key": 1}, num_blocks=3, rank=1, alpha=1, dora=True)
    set_(layer.key.lora_magnitude, [2, 2])
    set_(layer.key.lora_B, [[1], [1]])
    merged = layer.merge().weight
    assert torch.equal(merged[[0, 1, 4, 5]], base.weight[[0, 1, 4, 5]])
    torch.testing.assert_close(merged[2:4].norm(dim=1), torch.tensor([2.0, 2.0]))
    assert set(dict(layer.key.named_parameters())) == {"lora_A", "lora_B", "lora_magnitude"}


@pytest.mark.parametrize("bias", [True, False])
def test_dora_scales_by_less_than_bf16_can_tell_from_1(bias):
    layer = LoRALinear(nn.Linear(16, 8, bias=bias), rank=2, alpha=math.pi, dora=True)
    if bias:
        nn.init.zeros_(layer.bias)
    x = torch.randn(4000, 16)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x).float()
        with torch.no_grad():
            layer.lora_magnitude.mul_(1.003)  # bf16 has 1 and 1.0078
        y = layer(x)
    assert y.dtype == torch.bfloat16
    ratio = (y.float() * before).sum() / before.square().sum()
    assert abs(ratio - 1.003) < 1e-3


@pytest.mark.parametrize("kind", ["plain", "two blocks"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_dora_are_those_of_plain_autograd(kind, dropout, bias):
    torch.manual_seed(0)
    base = nn.Linear(5, 12, bias=bias, dtype=torch.float64)
    if kind == "plain":
        layer = LoRALinear(base, 2, 3, dropout, dora=True)
    else:
        layer = LoRAFusedLinear(base, {"value": 2, "query": 0}, 3, 2, 3, dropout, dora=True)
    for p in layer.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    state, keep = torch.get_rng_state(), torch.ones_like(x)
    if dropout:
        keep.view(-1)[draw_dropped(x.numel(), dropout, x.device).long()] = 0
    torch.set_rng_state(state)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(wanted) == (4 if kind == "plain" else 7)
    y, expected = layer(x), layer.reference_forward(x, keep if dropout else None)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    actual, exact = (torch.autograd.grad(out.pow(3).sum(), wanted) for out in (y, expected))
    torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)


def test_pissa_has_no_more_ranks_than_the_weight():
    with pytest.raises(ValueError, match="PiSSA: rank 5 is above 4"):
        apply_lora(nn.Sequential(nn.Linear(6, 4)), ["0"], 5, 1, pissa=True)


@pytest.mark.parametrize("dora", [False, True])
def test_shapes_can_be_asked_of_layers_without_numbers(dora):
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(6, 4), 2, 1, dora=dora)
        assert layer(torch.empty(3, 6)).shape == (3, 4)
        assert Int8Linear(nn.Linear(6, 4))(torch.empty(3, 6)).shape == (3, 4)


def test_what_pissa_started_at_goes_where_the_layer_goes():
    model = apply_lora(nn.Sequential(nn.Linear(6, 4)), ["0"], 2, 1, pissa=True)
    names = list(model.state_dict())
    assert not [name for name in names if "start" in name], "a checkpoint needs A and B alone"
    A, B = model.to("meta")[0].factors()
    assert (A.device.type, A.shape, B.shape) == ("meta", (4, 6), (4, 4))
    assert model(torch.empty(3, 6, device="meta")).shape == (3, 4)


def test_pissa_by_hand():
    base = nn.Linear(3, 3, bias=False)
    set_(base.weight, [[0, 3, 0], [5, 0, 0], [0, 0, 1]])
    layer = LoRALinear(base, rank=1, alpha=2)
    start_at_principal(layer)
    torch.testing.assert_close(layer.delta_weight(), torch.tensor([[0.0, 0, 0], [5, 0, 0], [0, 0, 0]]))
    torch.testing.assert_close(layer.base_layer.weight, torch.tensor([[0.0, 3, 0], [0, 0, 0], [0, 0, 1]]))
    assert base.weight.tolist() == [[0, 3, 0], [5, 0, 0], [0, 0, 1]], "the base it was given is not touched"
    torch.testing.assert_close(layer.merge().weight, base.weight)
    torch.testing.assert_close(layer.lora_A.norm(), layer.lora_B.norm())


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}])
@pytest.mark.parametrize("pissa", [False, True])
def test_every_variant_starts_as_the_base_and_merges_exactly(make_vit, table, variant, pissa):
    model = make_vit().double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    before = model.eval()(x)
    adapted = apply_lora(copy.deepcopy(model), table, 4, 8, table=table, pissa=pissa, **variant)
    torch.testing.assert_close(adapted(x), before, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for p in get_adapter_params(adapted).values():
            p += 0.1 * torch.randn_like(p)
    after = adapted(x)
    assert (after - before).abs().max() > 1e-3
    merged = merge_lora(adapted)
    torch.testing.assert_close(merged(x), after, rtol=1e-12, atol=1e-12)
    model.load_state_dict(merged.state_dict(), strict=True)
    torch.testing.assert_close(model(x), after, rtol=1e-12, atol=1e-12)


def test_rank_and_alpha_of_each_block_by_hand():
    base = nn.Linear(2, 6, bias=False)
    set_(base.weight, [[1, 0], [0, 1], [0, 0], [0, 0], [1, 1], [2, 0]])
    ranks, alphas = {"query": 1, "value": 2}, {"query": 3, "value": 4}
    layer = LoRAFusedLinear(base, {"query": 0, "value": 2}, 3, ranks, alphas)
    set_(layer.query.lora_A, [[1, 2]])
    set_(layer.query.lora_B, [[1], [0]])  # times 3 / 1
    set_(layer.value.lora_A, [[1, 0], [0, 1]])
    set_(layer.value.lora_B, [[1, 0], [0, -1]])  # times 4 / 2
    assert layer.merge().weight.tolist() == [[4, 6], [0, 1], [0, 0], [0, 0], [3, 1], [2, -2]]
    assert layer(torch.tensor([1.0, 10.0])).tolist() == [64, 10, 0, 0, 13, -18]


def test_rank_and_alpha_of_each_target(make_vit, table):
    rank, alpha = {"query": 2, "value": 3, "dense": 5}, {"query": 2, "value": 6, "dense": 5}
    model = apply_lora(make_vit(), ["query", "value", "dense"], rank, alpha, table=table)
    qkv, fc1 = model.blocks[1].attn.qkv, model.blocks[0].mlp.fc1
    assert [qkv.query.lora_A.shape[0], qkv.value.lora_B.shape[1], fc1.lora_A.shape[0]] == [2, 3, 5]
    assert [qkv.query.scaling, qkv.value.scaling, fc1.scaling] == [1, 2, 1]
    with pytest.raises(ValueError, match="no rank for target 'key'; rank has query, value, dense"):
        apply_lora(make_vit(), ["query", "key"], rank, 1, table=table)


def test_only_some_blocks(make_vit, table):
    model = apply_lora(make_vit(), ["query", "dense"], 2, 2, table=table, layers=[1])
    adapted = {name.rsplit(".", 1)[0] for name in get_adapter_params(model)}
    paths = ("attn.qkv.query", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert adapted == {f"blocks.1.{path}" for path in paths}
    with pytest.raises(ValueError, match=r"no target layer is in block 7; there are blocks \[0, 1\]"):
        apply_lora(make_vit(), ["query"], 2, 2, table=table, layers=[0, 7])
    with pytest.raises(ValueError, match="layers is empty"):
        apply_lora(make_vit(), ["query"], 2, 2, table=table, layers=[])


def test_the_base_cast_once_gives_the_same_as_cast_at_every_call():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 8), rank=2, alpha=math.pi)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 16, requires_grad=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return y, *torch.autograd.grad(y.float().square().sum(), [x, layer.lora_A, layer.lora_B])

    before, in_fp32 = run(), layer(x)
    layer.keep_base_in(torch.bfloat16)
    kept = layer.prepared.weight
    assert all(map(torch.equal, run(), before))
    assert layer.prepared.weight is kept
    assert torch.equal(layer(x), in_fp32), "outside autocast the base is used as it is"
    assert "prepared" not in "".join(layer.state_dict())
    assert copy.deepcopy(layer).prepared is None
    assert layer.prepared.weight is kept


@pytest.mark.parametrize("how", ["load", "to", "pissa"])
def test_a_base_that_changes_is_not_computed_with_as_it_was(how):
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(16, 8), rank=2, alpha=math.pi), torch.randn(4, 16)
    layer.keep_base_in(torch.float32)
    if how == "load":
        layer.load_state_dict({name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()})
    elif how == "to":
        layer.double()
        x = x.double()
    else:
        with torch.no_grad():
            start_at_principal(layer)
    assert layer.prepared is None
    torch.testing.assert_close(layer(x), layer.reference_forward(x))


@pytest.mark.parametrize("small", [0, 2**25])
def test_a_merged_layer_says_the_same_whoever_computes_it(small, monkeypatch):
    monkeypatch.setattr("lora.frozen.SMALL", small)
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 8), rank=2, alpha=math.pi).merge()
    layer.keep_base_in(torch.float32)
    x = torch.randn(4, 16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.to(torch.bfloat16).keep_base_in(torch.bfloat16)
    x = x.bfloat16()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("small", [0, 2**25])
def test_a_merged_layer_that_is_made_to_train_does_so(small, monkeypatch):
    monkeypatch.setattr("lora.frozen.SMALL", small)
    layer = LoRALinear(nn.Linear(16, 8), rank=2, alpha=math.pi).merge()
    layer.keep_base_in(torch.float32)
    layer.bias.requires_grad_(True)
    layer(torch.ones(1, 16)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.ones(8)) and layer.weight.grad is None
    layer.requires_grad_(True)
    layer(torch.ones(1, 16)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(8, 16))


def test_hooks_on_saved_tensors_see_plain_tensors_alone():
    layer = LoRALinear(nn.Linear(16, 8), rank=2, alpha=math.pi)
    layer.keep_base_in(torch.float32)
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy(), torch.from_numpy):
        y = layer(x)
    y.sum().backward()
    assert x.grad.isfinite().all()
