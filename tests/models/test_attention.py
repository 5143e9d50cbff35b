"""Attention for a CPU: timm's answers and gradients, whatever is taken at a time."""

import copy

import pytest
import timm
import torch
from timm.layers import Attention

from models.attention import SCORES, PackedAttention, packed_attention, use_packed_attention
from models.backbone import DEMO, create_backbone


def test_gradcheck():
    qkv = torch.randn(2, 5, 3 * 2 * 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda qkv: packed_attention(qkv, 2), qkv)


def test_the_backward_pass_may_be_under_another_autocast_than_the_forward_pass():
    qkv = torch.randn(2, 5, 3 * 2 * 4, requires_grad=True)
    expected = torch.autograd.grad(packed_attention(qkv, 2).pow(3).sum(), qkv)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = packed_attention(qkv, 2).pow(3).sum()
        torch.testing.assert_close(torch.autograd.grad(y, qkv), expected)


def test_no_pictures_have_no_answers():
    attention = use_packed_attention(Attention(8, num_heads=2))
    assert attention(torch.empty(0, 5, 8)).shape == (0, 5, 8)


@pytest.mark.parametrize(("batch", "tokens"), [(2, 7), (90, 50), (2, 800)])
@pytest.mark.parametrize("compiling", [False, True])
def test_is_timm_s_attention(batch, tokens, compiling, monkeypatch):
    """Of the shapes one is all its heads at a time, one several chunks of heads, one a head at a time.

    For the compiler, as on a GPU, torch's own is left to work.
    """
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    packed = use_packed_attention(Attention(24, num_heads=3, qkv_bias=True))
    plain = copy.deepcopy(packed)
    plain.__class__ = Attention
    x = torch.randn(batch, tokens, 24, requires_grad=True)
    assert (batch * 3 * tokens**2 > SCORES) == (batch * tokens > 1000)

    def results(attention, dtype=None):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = attention(x)
        weight = torch.linspace(-1, 1, y.numel()).view_as(y)
        return [y.float(), *torch.autograd.grad((y * weight).sum(), [x, *attention.parameters()])]

    def errors(actual):
        return torch.stack([(a - e).norm() for a, e in zip(actual, exact, strict=True)])

    exact = results(plain)
    assert (errors(results(packed)) < 1e-5 * torch.stack([e.norm() for e in exact])).all()
    # In bf16 every kernel rounds elsewhere: it may be as far off as timm's.
    assert (errors(results(packed, torch.bfloat16)) < 1.5 * errors(results(plain, torch.bfloat16))).all()


def test_a_mask_is_left_to_timm():
    torch.manual_seed(0)
    attention = use_packed_attention(Attention(24, num_heads=3))
    x, mask = torch.randn(2, 7, 24), torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(x, attn_mask=mask), attention(x, is_causal=True))
    assert not torch.allclose(attention(x), attention(x, is_causal=True))


def test_every_attention_of_a_backbone_is_packed():
    model, _ = create_backbone(DEMO)
    kinds = {type(module) for module in model.modules() if isinstance(module, Attention)}
    assert kinds == {PackedAttention}


@pytest.mark.parametrize("option", [{"qk_norm": True}, {"attn_drop_rate": 0.1}, {"proj_drop_rate": 0.1}])
def test_attention_with_options_stays_as_it_is(option):
    size = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32, "num_classes": 0}
    model = use_packed_attention(timm.create_model("vit_tiny_patch16_224", **size, **option))
    assert type(model.blocks[0].attn) is Attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gradient_it_is_timms(dtype):
    torch.manual_seed(0)
    attention = use_packed_attention(Attention(24, num_heads=3)).to(dtype)
    x = torch.randn(8, 50, 24, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(attention(x), Attention.forward(attention, x))
