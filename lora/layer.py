"""LoRA layers, after Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685)."""

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import lora_linear


class LowRank(nn.Module):
    """The trainable pair (A, B) that updates one frozen matrix: ΔW = scaling · B A, with scaling = alpha / rank.

    `lora_A` (rank, in) starts Kaiming-uniform and `lora_B` (out, rank) at zero, so that ΔW starts at zero. Both are on
    the matrix's device, in float32 or, where the matrix is, float64: small steps would be lost in lower precision.

    Args:
        weight: the matrix to update, (out, in); only its shape, device and dtype are used.
        rank: r in the paper and in PEFT.
        alpha: `lora_alpha` in PEFT.

    Raises:
        ValueError: `rank` is below 1 or `alpha` is not positive.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        out_features, in_features = weight.shape
        where = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **where))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **where))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank

    @property
    def scaled_B(self) -> Tensor:
        """scaling · B, (out, rank): the one place where the scaling is applied."""
        return self.scaling * self.lora_B

    def delta_weight(self) -> Tensor:
        """ΔW, (out, in)."""
        return self.scaled_B @ self.lora_A


class LoRALayer:
    """What both layers below share: a frozen `base_layer`, and `updates()`, the pairs for rows of its weight."""

    def _wrap(self, base_layer: nn.Linear, dropout: float) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.base_layer = base_layer.requires_grad_(False)
        self.dropout = dropout
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        rows, pairs = zip(*self.updates(), strict=True)
        return lora_linear(
            x,
            self.base_layer.weight,
            self.base_layer.bias,
            torch.cat([pair.lora_A for pair in pairs]),
            rows,
            [pair.scaled_B for pair in pairs],
            self.dropout if self.training else 0.0,
        )

    def reference_forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """What `forward` computes, in plain autograd, given which elements of `x` dropout keeps (1) and drops (0)."""
        dropped_out = x if keep is None else x * keep / (1 - self.dropout)
        return self.base_layer(x) + F.linear(dropped_out, self.delta_weight())

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A new linear layer of weight W₀ + ΔW, added in the adapter's precision and rounded once. Changes nothing."""
        base = self.base_layer.weight
        merged = nn.Parameter((base + self.delta_weight()).to(base.dtype), requires_grad=False)
        # deepcopy takes what its memo holds as already copied, so everything but the weight is copied
        return copy.deepcopy(self.base_layer, {id(base): merged})


class LoRALinear(LoRALayer, LowRank):
    """A frozen linear layer with a low-rank update.

        h = W₀ x + b + ΔW dropout(x),    ΔW = scaling · B A

    Args:
        base_layer: the layer to adapt; it is kept, by reference, and frozen.
        rank, alpha: as in `LowRank`.
        dropout: `lora_dropout` in PEFT: the probability that the update does not see an element of x, while training.

    Raises:
        ValueError: `rank` is below 1, `alpha` is not positive, or `dropout` is outside [0, 1).
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(base_layer.weight, rank, alpha)
        self._wrap(base_layer, dropout)

    def updates(self) -> list[tuple[slice, LowRank]]:
        return [(slice(None), self)]


class LoRAFusedLinear(LoRALayer, nn.Module):
    """A frozen projection that is several in one, with a low-rank update for each of those to adapt.

    The weight of, say, timm's `attn.qkv` is `num_blocks` = 3 equal row blocks: query, key, value. Each adapted block k
    has a pair of its own, the child module of its name, as if it were a layer of its own:

        h = W₀ x + b,    h[rows_k] += ΔW_k dropout(x),    ΔW_k = scaling · B_k A_k

    The base stays one matrix product, and so do all the A_k, which see one and the same dropout(x).

    Args:
        base_layer: the layer to adapt; it is kept, by reference, and frozen.
        blocks: name -> index of the row block, such as {"query": 0, "value": 2}.
        num_blocks: how many blocks the rows of `base_layer` are.
        rank, alpha: as in `LowRank`, for each block.
        dropout: as in `LoRALinear`.

    Raises:
        ValueError: as `LoRALinear`; or the rows are not `num_blocks` equal blocks, or there is no such block.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        blocks: Mapping[str, int],
        num_blocks: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
    ):
        super().__init__()
        size, rest = divmod(base_layer.out_features, num_blocks)
        if rest:
            raise ValueError(f"{base_layer.out_features} output rows are not {num_blocks} equal blocks")
        if not blocks or not set(blocks.values()) <= set(range(num_blocks)):
            raise ValueError(f"blocks must name some of the blocks 0 to {num_blocks - 1}, got {dict(blocks)}")
        self.rows = {name: slice(block * size, (block + 1) * size) for name, block in blocks.items()}
        for name, rows in self.rows.items():
            self.add_module(name, LowRank(base_layer.weight[rows], rank, alpha))
        self._wrap(base_layer, dropout)

    def updates(self) -> list[tuple[slice, LowRank]]:
        return [(rows, self.get_submodule(name)) for name, rows in self.rows.items()]

    def delta_weight(self) -> Tensor:
        """ΔW, (out, in); zero in the blocks that are not adapted."""
        wide = torch.promote_types(self.base_layer.weight.dtype, torch.float32)
        delta = torch.zeros_like(self.base_layer.weight, dtype=wide)
        for rows, pair in self.updates():
            delta[rows] += pair.delta_weight()
        return delta
