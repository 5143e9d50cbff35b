import copy

import pytest
import torch
from torch import nn

from lora import LoRAFusedLinear, LoRALinear, apply_lora, merge_lora


def set_(parameter, values):
    with torch.no_grad():
        parameter.copy_(torch.tensor(values))


def test_by_hand():
    layer = LoRALinear(nn.Linear(3, 2), rank=1, alpha=2)
    set_(layer.base_layer.weight, [[1, 2, 3], [4, 5, 6]])
    set_(layer.base_layer.bias, [10, 20])
    set_(layer.lora_A, [[1, 0, -1]])
    set_(layer.lora_B, [[1], [3]])
    assert layer.scaling == 2.0
    assert layer.delta_weight().tolist() == [[2, 0, -2], [6, 0, -6]]
    assert layer(torch.tensor([1.0, 1.0, 2.0])).tolist() == [17, 35]  # (19, 41) of the base, less (2, 6)
    plain = nn.Linear(3, 2)
    plain.load_state_dict(layer.merge().state_dict(), strict=True)
    assert plain.weight.tolist() == [[3, 2, 1], [10, 5, 0]]
    assert plain(torch.tensor([1.0, 1.0, 2.0])).tolist() == [17, 35]


def test_fused_by_hand():
    layer = LoRAFusedLinear(nn.Linear(2, 6, bias=False), {"query": 0, "value": 2}, num_blocks=3, rank=1, alpha=3)
    set_(layer.base_layer.weight, [[1, 1]] * 6)
    set_(layer.query.lora_A, [[1, 2]])
    set_(layer.query.lora_B, [[1], [0]])
    set_(layer.value.lora_A, [[0, 1]])
    set_(layer.value.lora_B, [[1], [-1]])
    merged = layer.merge()
    assert merged.weight.tolist() == [[4, 7], [1, 1], [1, 1], [1, 1], [1, 4], [1, -2]]
    assert layer(torch.tensor([1.0, 10.0])).tolist() == [74, 11, 11, 11, 41, -19]
    pairs = {f"{block}.lora_{m}" for block in ("query", "value") for m in "AB"}
    assert set(layer.state_dict()) == {"base_layer.weight", *pairs}


def test_starts_as_the_base_layer():
    base = nn.Linear(6, 4)
    layer = LoRALinear(base, rank=2, alpha=4)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), base(x))
    A = LoRALinear(nn.Linear(400, 4), rank=50, alpha=1).lora_A
    assert 0.98 < 20 * A.abs().max() <= 1, "uniform, of PEFT's width"
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_merge_is_pure():
    layer = LoRALinear(nn.Linear(6, 4), rank=2, alpha=4, dropout=0.1)
    nn.init.normal_(layer.lora_B)
    before, generator = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    first, second = layer.merge(), layer.merge()
    assert isinstance(first, nn.Linear)
    assert torch.equal(first.weight, second.weight)
    assert first.bias.data_ptr() != layer.base_layer.bias.data_ptr()
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision(base, adapter):
    for layer in (
        LoRALinear(nn.Linear(6, 6, dtype=base), rank=2, alpha=4),
        LoRAFusedLinear(nn.Linear(6, 6, dtype=base), {"key": 1}, num_blocks=2, rank=2, alpha=4),
    ):
        for _, pair in layer.pairs():
            nn.init.normal_(pair.lora_B)
            assert pair.lora_A.dtype == pair.lora_B.dtype == adapter
        merged = layer.merge().weight
        assert merged.dtype == base
        rounded_once = (layer.base_layer.weight.to(adapter) + layer.delta_weight()).to(base)
        assert torch.equal(merged, rounded_once)
        assert layer(torch.randn(3, 6, dtype=base)).dtype == base


def test_autocast_does_not_round_what_is_merged():
    layer = LoRALinear(nn.Linear(64, 64), rank=2, alpha=4, dora=True)
    nn.init.normal_(layer.lora_B)
    with torch.autocast("cpu", torch.bfloat16):
        merged = layer.merge().weight
    assert torch.equal(merged, layer.merge().weight)


def test_a_base_that_is_to_be_trained_is_an_error():
    """It would get no gradient, and nobody would notice."""
    layer = LoRALinear(nn.Linear(3, 3), rank=1, alpha=1)
    layer.base_layer.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match="freeze it"):
        layer(torch.randn(2, 3))


@pytest.mark.parametrize("variant", [{}, {"dora": True}])
def test_modules_that_read_the_weight_get_the_sum(variant):
    """As the fast path of a `TransformerEncoderLayer`, and the output projection of its attention, do."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain, x = copy.deepcopy(block), torch.randn(3, 5, 8)
    apply_lora(block, ["linear1", "linear2", "out_proj"], 2, 4, **variant)
    for layer in (block.linear1, block.linear2, block.self_attn.out_proj):
        nn.init.normal_(layer.lora_B)
    y = block.train()(x)
    assert (y - plain.train()(x)).norm() > 0.1
    assert torch.autograd.grad(y.pow(3).sum(), block.self_attn.out_proj.lora_A, retain_graph=True)[0].norm() > 0
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x), y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merge_lora(block)(x), y, rtol=1e-4, atol=1e-5)


def test_new_layers_take_the_mode_of_the_base():
    assert not LoRALinear(nn.Linear(3, 3).eval(), rank=1, alpha=1, dropout=0.5).training


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_is_checked(rank):
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        LoRALinear(nn.Linear(3, 3), rank=rank, alpha=1)


@pytest.mark.parametrize("alpha", [0, -2.5, float("nan")])
def test_alpha_is_checked(alpha):
    with pytest.raises(ValueError, match=f"alpha must be positive, got {alpha}"):
        LoRALinear(nn.Linear(3, 3), rank=1, alpha=alpha)


@pytest.mark.parametrize("dropout", [-0.1, 1, float("nan")])
def test_dropout_is_checked(dropout):
    base = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got {dropout}"):
        LoRALinear(base, rank=1, alpha=1, dropout=dropout)
    assert base.weight.requires_grad, "a refused layer is left as it was"


def test_blocks_are_checked():
    with pytest.raises(ValueError, match="7 output rows are not 3 equal blocks"):
        LoRAFusedLinear(nn.Linear(3, 7), {"query": 0}, num_blocks=3, rank=1, alpha=1)
    with pytest.raises(ValueError, match=r"blocks 0 to 2, got \{'query': 3\}"):
        LoRAFusedLinear(nn.Linear(3, 6), {"query": 3}, num_blocks=3, rank=1, alpha=1)
    with pytest.raises(ValueError, match=r"blocks 0 to 2, got \{\}"):
        LoRAFusedLinear(nn.Linear(3, 6), {}, num_blocks=3, rank=1, alpha=1)
