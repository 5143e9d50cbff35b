"""An int8 base: small, close, trainable."""

import copy

import pytest
import timm
import torch
from torch import nn

from lora import Int8Linear, LoRALinear, apply_lora, get_adapter_params, int8, quantize_base


def test_by_hand():
    linear = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[127.0, -63.6, 0.4], [0, 0, 0]]))
    quantised = Int8Linear(linear)
    assert quantised.quantised.tolist() == [[127, -64, 0], [0, 0, 0]]
    assert quantised.weight.tolist() == [[127, -64, 0], [0, 0, 0]]
    assert quantised(torch.tensor([1.0, 1.0, 9.0])).tolist() == [63, 0]


def test_the_weight_is_the_same_in_every_dtype():
    layer = Int8Linear(nn.Linear(64, 8))
    narrow, wide = (layer.frozen(dtype) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(narrow.scale.float(), wide.scale)
    assert torch.equal(narrow.weight, wide.weight)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_however_the_model_is_run_it_is_rounded_the_same_and_can_be_loaded_into(mode):
    torch.manual_seed(0)
    x = torch.randn(999, 2) @ torch.randn(2, 64)  # strongly correlated: rounding their moments would show
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    quantize_base(plain, lambda: plain(x))

    def run():
        with mode():
            other(x)

    quantize_base(other, run)
    assert torch.equal(other[0].quantised, plain[0].quantised)
    other.load_state_dict(plain.state_dict())


def test_steps_do_not_overflow_fp16_where_the_outputs_do_not():
    linear = nn.Linear(1024, 1, bias=False)
    nn.init.constant_(linear.weight, 127 / 2048)  # 127 steps each: 1,024 of those are twice what fp16 holds
    x = torch.ones(1, 1024, dtype=torch.float16)
    torch.testing.assert_close(Int8Linear(linear)(x).item(), 63.5, rtol=2e-3, atol=0)
    layer = LoRALinear(Int8Linear(linear), 1, 1)
    x.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        (layer(x) * 50_000).backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 50_000 * 127 / 2048), rtol=2e-3, atol=0)


def test_errors_are_passed_on_by_hand():
    """Two inputs that are nearly always equal: what the second weight lacks the first makes up for."""
    linear = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[10.3, 20.4, 127]]))
    x = torch.tensor([[3.0, 3.1, 0], [2.0, 2.0, 0], [0, 0, 1]])
    # Input 1 is the largest, so it comes first: 20.4 becomes 20 and leaves 0.4. To input 0 that is worth 0.4 times
    # x₀x₁ / x₀² = 13.3 / 13 (13.09 damped), and 10.3 + 0.406 rounds to 11.
    assert Int8Linear(linear).quantised.tolist() == [[10, 20, 127]]
    assert Int8Linear(linear, x).quantised.tolist() == [[11, 20, 127]]


def test_a_layer_with_a_forward_or_hooks_of_its_own_stays_as_it_is():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Doubling(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    model[1].register_forward_hook(lambda module, inputs, output: -output)
    x = torch.randn(4, 8)
    before = model(x)
    assert [type(layer) for layer in quantize_base(model)] == [Doubling, nn.Linear, Int8Linear]
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)


def test_inputs_without_correlation_round_to_the_nearest():
    torch.manual_seed(0)
    linear = nn.Linear(300, 40)  # three blocks
    assert torch.equal(Int8Linear(linear, torch.eye(300)).quantised, Int8Linear(linear).quantised)
    assert torch.equal(Int8Linear(linear, torch.zeros(5, 300)).quantised, Int8Linear(linear).quantised)


def test_blocks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 8), torch.randn(100, 40) @ torch.randn(40, 40)
    whole = Int8Linear(linear, x)
    monkeypatch.setattr(int8, "BLOCK", 7)
    assert torch.equal(Int8Linear(linear, x).quantised, whole.quantised)
    error, nearest = ((layer(x) - linear(x)).norm() for layer in (whole, Int8Linear(linear)))
    assert error < 0.75 * nearest


def test_layers_that_the_run_does_not_reach_round_to_the_nearest(make_vit, table):
    model = apply_lora(make_vit(), ["query", "dense"], 4, 8, table=table).eval()
    model.spare = nn.Linear(32, 32).requires_grad_(False)
    nearest = quantize_base(copy.deepcopy(model)).state_dict()
    quantize_base(model, lambda: model(torch.randn(4, 3, 32, 32)))
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, nearest[n])}
    every = {n for n in nearest if n.endswith("quantised")}
    assert len(every) == 9
    assert changed == every - {"spare.quantised"}
    assert all(buffer.is_contiguous() for buffer in model.buffers()), "or NCCL could not send them"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_output_and_gradients_are_those_of_the_widened_weight():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 8), rank=2, alpha=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 16, requires_grad=True)
    exact = layer(x)
    quantize_base(layer)
    assert isinstance(layer.base_layer, Int8Linear)
    wanted = [x, layer.lora_A, layer.lora_B]
    y, reference = layer(x), layer.reference_forward(x)
    torch.testing.assert_close(y, reference)
    actual, expected = (torch.autograd.grad(out.square().sum(), wanted) for out in (y, reference))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (y - exact).norm() < 0.01 * exact.norm()
    torch.testing.assert_close(layer.merge()(x), y)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_layer_without_lora_keeps_no_wider_weight_for_its_gradient(bf16):
    torch.manual_seed(0)
    linear = nn.Linear(16, 8).requires_grad_(False)
    layer, x, kept = Int8Linear(linear), torch.randn(5, 3, 16, requires_grad=True), []
    watch = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t)
    with watch, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert not kept
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == torch.float32
    tolerance = {"rtol": 0.02, "atol": 0.02} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(y.float(), torch.nn.functional.linear(x, layer.weight, layer.bias), **tolerance)
    torch.testing.assert_close(dx, dy.float() @ layer.weight, **tolerance)


@pytest.mark.parametrize("targets", [["query", "key", "value", "dense"], ["query"]])
def test_base_of_a_vit_b_is_a_quarter(table, targets):
    with torch.device("meta"):  # sizes alone
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
        whole = sum(p.nbytes for p in model.parameters())
        quantize_base(apply_lora(model, targets, 4, 4, table=table))
    adapters = {id(p) for p in get_adapter_params(model).values()}
    base = sum(t.nbytes for t in [*model.parameters(), *model.buffers()] if id(t) not in adapters)
    assert base <= 0.27 * whole
    assert not [path for path, module in model.named_modules() if type(module) is nn.Linear]


def test_outputs_of_every_layer_are_within_a_hundredth(make_vit):
    model = make_vit().eval()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, x, y, name=name: seen.update({name: (module, x[0], y)}))
    model(torch.randn(4, 3, 32, 32))
    assert len(seen) == 8
    for name, (module, x, y) in seen.items():
        error = Int8Linear(module)(x) - y
        assert error.norm() < 0.01 * y.norm(), name


def test_training_works(make_vit, table):
    model = quantize_base(apply_lora(make_vit(), table, 4, 8, table=table))
    params = list(get_adapter_params(model).values())
    optimizer = torch.optim.AdamW(params, 1e-2)
    images, targets = torch.randn(8, 3, 32, 32), torch.randn(8, 32)
    losses = []
    for _ in range(20):
        loss = (model(images) - targets).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
