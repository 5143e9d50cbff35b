"""Self-attention for training: timm's `Attention` with less copying, and on a CPU without torch's fused kernel.

PyTorch's fused attention kernel for CPUs is written for long sequences. At a ViT's 50 to 600 tokens, its backward pass
takes several times as long in bf16 as batched matrix products over all heads of a few images, and it keeps the output
beside q, k and v. Without a backward pass, torch's kernel is used: with it, inference on 64 pictures in bf16 takes 9 %
less time on a machine with AMX (measured by hand).
"""

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora.functional import without_autocast

SCORES = 2**19  # scores computed at a time: they stay in the cache, and memory does not grow with the batch


class PackedAttention(Attention):
    """timm's `Attention` without its options. It computes with `packed_attention` in training on a CPU, elsewhere with
    torch's attention."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            return super().forward(x, attn_mask, is_causal)
        qkv = self.qkv(x)  # (B, N, 3 · heads · d)
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.proj(packed_attention(qkv, self.num_heads))
        # Views of qkv in its own layout, in which its gradient is then assembled; timm's way needs one more copy.
        q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def use_packed_attention(model: nn.Module) -> nn.Module:
    """Make every plain `Attention` of a model a `PackedAttention`, in place; those with norms, gate or dropout stay."""
    for module in model.modules():
        if type(module) is Attention and is_plain(module):
            module.__class__ = PackedAttention
    return model


def is_plain(attention: Attention) -> bool:
    inside = (attention.q_norm, attention.k_norm, attention.norm)
    dropouts = (attention.attn_drop, attention.proj_drop)
    return (
        all(isinstance(module, nn.Identity) for module in inside)
        and not any(dropout.p for dropout in dropouts)
        and attention.gate is None
    )


def packed_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v for each head.

    Args:
        qkv: (B, N, 3 · heads · d), the output of timm's `attn.qkv`.

    Returns:
        (B, N, heads · d)
    """
    return _PackedAttention.apply(qkv, num_heads)


class _PackedAttention(torch.autograd.Function):
    """Keeps only q, k and v; backward recomputes the probabilities p. With o = p v and p = softmax(q kᵀ / √d):

    dv = pᵀ do,    dp = do vᵀ,    ds = p ∘ (dp - rowsum(dp ∘ p)),    dq = ds k / √d,    dk = dsᵀ q / √d
    """

    @staticmethod
    def forward(ctx, qkv, num_heads):
        ctx.num_heads = num_heads
        packed = _pack(qkv, 3, num_heads)
        ctx.save_for_backward(packed)
        q, k, v = packed
        o = torch.empty_like(q)
        for some in _chunks(q):
            torch.bmm(_probabilities(q[some], k[some]), v[some], out=o[some])
        return _unpack(o[None], num_heads)

    @staticmethod
    @once_differentiable
    @without_autocast  # compute in the dtype of forward, even if backward runs under autocast
    def backward(ctx, dout):
        (packed,) = ctx.saved_tensors
        (q, k, v), (do,) = packed, _pack(dout, 1, ctx.num_heads)
        dq, dk, dv = dpacked = torch.empty_like(packed)
        scale = q.shape[-1] ** -0.5
        for some in _chunks(q):
            p = _probabilities(q[some], k[some])
            torch.bmm(p.mT, do[some], out=dv[some])
            ds = torch.ops.aten._softmax_backward_data(do[some] @ v[some].mT, p, -1, p.dtype)
            torch.baddbmm(dq[some], ds, k[some], beta=0, alpha=scale, out=dq[some])
            torch.baddbmm(dk[some], ds.mT, q[some], beta=0, alpha=scale, out=dk[some])
        return _unpack(dpacked, ctx.num_heads), None


def _pack(x: Tensor, parts: int, num_heads: int) -> Tensor:
    """(B, N, parts · heads · d) -> (parts, B · heads, N, d): batched products want each head in one piece."""
    return x.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous()


def _unpack(x: Tensor, num_heads: int) -> Tensor:
    """The inverse of `_pack`."""
    return x.unflatten(1, (-1, num_heads)).permute(1, 3, 0, 2, 4).flatten(2)


def _chunks(q: Tensor) -> list[slice]:
    """Slices of the heads, each of as many heads as have at most `SCORES` scores together, but at least one."""
    heads, tokens, _ = q.shape
    size = max(1, SCORES // tokens**2)
    return [slice(start, start + size) for start in range(0, heads, size)]


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / √d): (heads, N, N)."""
    return torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5).softmax(-1)
