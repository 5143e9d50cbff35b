"""What a LoRA layer computes again instead of keeping: the output of the GELU or the layer norm before it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora import LoRALinear
from lora.recompute import source_of

MAKERS = {
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU(approximate="tanh"),
    "norm": nn.LayerNorm(5),
    "norm without bias": nn.LayerNorm(5, bias=False),
    "norm without weight": nn.LayerNorm(5, elementwise_affine=False),
}


def make_pair(name, dropout=0.0):
    """The op that makes the layer's input, with parameters unlike their start, and the layer."""
    torch.manual_seed(0)
    maker, layer = MAKERS[name].double(), LoRALinear(nn.Linear(5, 4, dtype=torch.float64), 2, 3, dropout)
    for parameter in [*maker.parameters(), layer.lora_B]:
        nn.init.normal_(parameter)
    return maker.requires_grad_(False), layer


def gradients(y, *inputs):
    return torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
def test_gradients_are_those_of_plain_autograd(name, shape):
    maker, layer = make_pair(name)
    u = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x = maker(u)
    assert source_of(x) is not None
    make, tensors = source_of(x)
    torch.testing.assert_close(make(*tensors), x.detach(), rtol=1e-14, atol=1e-14)
    inputs = (u, layer.lora_A, layer.lora_B)
    torch.testing.assert_close(gradients(layer(x), *inputs), gradients(layer.reference_forward(x), *inputs))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", MAKERS)
def test_its_own_input_may_be_strided(name, dropout):
    """As the tokens of a ViT without a class token are."""
    maker, layer = make_pair(name, dropout)
    u = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    inputs = (u, layer.lora_A, layer.lora_B)
    found = []
    for strided in (u.transpose(1, 2), u.transpose(1, 2).contiguous()):
        torch.manual_seed(1)
        found.append(gradients(layer(maker(strided)), *inputs))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["gelu", "norm"])
def test_what_dropout_hid_is_hidden_from_the_input_made_again(name):
    maker, layer = make_pair(name, dropout=0.5)
    u = torch.randn(50, 5, dtype=torch.float64, requires_grad=True)
    inputs = (u, layer.lora_A, layer.lora_B)
    torch.manual_seed(1)
    again = gradients(layer(maker(u)), *inputs)
    torch.manual_seed(1)
    kept = gradients(layer(maker(u) * 1), *inputs)  # made by a product: it is kept
    torch.testing.assert_close(again, kept)


@pytest.mark.parametrize("name", MAKERS)
def test_the_input_is_not_kept(name):
    maker, layer = make_pair(name)
    u = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    x = maker(u)
    y = layer(x)  # while it is there, so is what was kept for it
    (function, _), *_ = y.grad_fn.next_functions
    kept = {t.data_ptr() for t in function.saved_tensors if t is not None}
    assert x.data_ptr() not in kept
    assert u.data_ptr() in kept


@pytest.mark.parametrize("name", ["gelu", "norm"])
def test_an_input_that_was_changed_in_place_is_kept_as_it_is(name):
    """As a hook does that switches some activations off."""
    maker, layer = make_pair(name)
    u = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    x = maker(u)
    with torch.no_grad():
        x.mul_(3)
    pair = layer.lora_A, layer.lora_B
    torch.testing.assert_close(gradients(layer(x), *pair), gradients(layer.reference_forward(x), *pair))


@pytest.mark.parametrize("name", MAKERS)
def test_an_input_whose_making_autograd_has_forgotten_is_kept(name):
    maker, layer = make_pair(name)
    x = maker(torch.randn(7, 5, dtype=torch.float64, requires_grad=True))
    layer(x).square().sum().backward()  # and with it the graph behind x is gone
    first = layer.lora_A.grad, layer.lora_B.grad
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.reference_forward(x))
    torch.testing.assert_close(gradients(layer(x), layer.lora_A, layer.lora_B), first)


def test_an_input_of_other_making_is_kept():
    _, layer = make_pair("gelu")
    u = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    for x in (u, u.relu(), u.detach()):
        assert source_of(x) is None
        y = layer(x)  # while it is there, so is what was kept for it
        (function, _), *_ = y.grad_fn.next_functions
        assert x.data_ptr() in {t.data_ptr() for t in function.saved_tensors if t is not None}


def test_a_checkpointed_block_is_computed_twice_and_no_more():
    maker, layer = make_pair("gelu")
    u = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    calls = []

    def block(u):
        calls.append(1)
        return layer(maker(u))

    expected = gradients(block(u), u, layer.lora_A)
    calls.clear()
    torch.testing.assert_close(gradients(checkpoint(block, u, use_reentrant=False), u, layer.lora_A), expected)
    assert len(calls) == 2
