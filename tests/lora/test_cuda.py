"""The same layers on a GPU. Scripts choose one by themselves, so there most other tests run on it as well."""

import pytest
import torch
from torch import nn

from lora import LoRAFusedLinear, LoRALinear, draw_dropped, functional, keep_base_in, quantize_base

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
AMP = [torch.bfloat16, torch.float16]


def make_layer(kind, dropout=0.0, dtype=torch.float32, **variant):
    torch.manual_seed(0)
    base = nn.Linear(64, 96, dtype=dtype)
    blocks = {"value": 2, "query": 0}
    layer = {
        "plain": lambda: LoRALinear(base, 4, 8, dropout, **variant),
        "fused": lambda: LoRAFusedLinear(base, blocks, 3, 4, 8, dropout, **variant),
    }[kind]()
    for _, pair in layer.pairs():
        nn.init.normal_(pair.lora_B, std=0.1)
    return layer.to(GPU)


def fixed_marks(x):
    return tuple(torch.arange(n, dtype=torch.int32, device=x.device) * 0x6C8E9CF5 for n in x.shape)


def inputs(dtype=torch.float32):
    return torch.randn(6, 7, 64, dtype=dtype, device=GPU, requires_grad=True)


def gradients(y, layer, x):
    trainable = [p for p in layer.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return torch.autograd.grad((y * weights).sum(), [x, *trainable])


@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("variant", [{}, {"dora": True}])
def test_output_and_gradients_are_those_of_plain_autograd(kind, dropout, variant):
    layer, x = make_layer(kind, dropout, torch.float64, **variant), inputs(torch.float64)
    state = torch.cuda.get_rng_state()
    keep = (~draw_dropped(x.numel(), dropout, GPU)).view_as(x).double() if dropout else None
    torch.cuda.set_rng_state(state)
    y, expected = layer(x), layer.reference_forward(x, keep)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(y, layer, x), gradients(expected, layer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("dtype", AMP)
@pytest.mark.parametrize("kept", [False, True])
def test_autocast(kind, dtype, kept):
    layer, x = make_layer(kind), inputs()
    expected = layer.reference_forward(x)
    if kept:
        keep_base_in(layer, dtype)
    with torch.autocast("cuda", dtype):
        y = layer(x)
    assert y.dtype == dtype
    for actual, exact in zip(
        (y.float(), *gradients(y.float(), layer, x)), (expected, *gradients(expected, layer, x)), strict=True
    ):
        assert actual.dtype == torch.float32
        assert (actual - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("made", ["gelu", "norm"])
@pytest.mark.parametrize("dtype", AMP)
def test_an_input_made_again(made, dtype):
    layer, u = make_layer("plain", 0.3), inputs()
    maker = {"gelu": nn.GELU(), "norm": nn.LayerNorm(64, device=GPU).requires_grad_(False)}[made]
    found = []
    for keep in (lambda x: x, lambda x: x * 1):  # the second is kept
        torch.manual_seed(1)
        with torch.autocast("cuda", dtype):
            found.append(gradients(layer(keep(maker(u))).float(), layer, u))
    for again, kept in zip(*found, strict=True):
        assert (again - kept).norm() < 0.02 * kept.norm()


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_share_of_dropped_elements(p):
    torch.manual_seed(0)
    sigma = (p * (1 - p) / 4e6) ** 0.5
    assert abs(draw_dropped(4 * 10**6, p, GPU).double().mean().item() - p) < 4 * sigma
    seen = torch.ones(2000, 2000, device=GPU)
    hidden = functional.hide(seen, functional.draw_marks(seen), p)
    assert abs(1 - hidden.double().mean().item() - p) < 4 * sigma


@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_torch_compile(kind, dropout, dtype, monkeypatch):
    layer, x = make_layer(kind, dropout), inputs()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    found = []
    for run in (compiled, layer):
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            monkeypatch.setattr(functional, "draw_marks", fixed_marks)  # the compiler would draw its own
            if run is layer:
                monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
            y = run(x).float()
            found.append((y, *gradients(y, layer, x)))
    for actual, expected in zip(*found, strict=True):
        assert (actual - expected).norm() < (0.02 if dtype else 1e-3) * expected.norm()


@pytest.mark.parametrize("dtype", [None, *AMP])
def test_a_base_in_8_bits(dtype):
    model, x = nn.Sequential(make_layer("fused", 0.0)), inputs()
    expected = model(x)
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        y = quantize_base(model, lambda: model(x))(x).float()
    assert (y - expected).norm() < 0.02 * expected.norm()
    assert all(gradient.isfinite().all() for gradient in gradients(y, model[0], x))
