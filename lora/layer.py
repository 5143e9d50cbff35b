"""LoRA layers, after Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685)."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frozen import FrozenLinear, Prepared, cast, serves
from .functional import Frozen, autocast_dtype, lora_linear, pack, without_autocast
from .int8 import Int8Linear


class LowRank(nn.Module):
    """The trainable pair (A, B) that updates one frozen matrix: ΔW = scaling · B A, with scaling = alpha / rank.

    `lora_A` (rank, in) starts Kaiming-uniform and `lora_B` (out, rank) at zero, so that ΔW starts at zero. Both are on
    the matrix's device, in float32 (in float64 if the matrix is): a lower precision would lose small steps.

    Args:
        weight: the matrix to update, (out, in).
        rank: r in the paper and in PEFT.
        alpha: `lora_alpha` in PEFT.
        rslora: scaling = alpha / sqrt(rank), so that the update does not shrink as the rank grows (Kalajdzievski 2023,
            arXiv:2312.03732; `use_rslora` in PEFT).
        dora: also train the norm of each row of W₀ + ΔW: `lora_magnitude` (out,), which starts at the norms of W₀'s
            rows (Liu et al. 2024, arXiv:2402.09353; `use_dora` in PEFT). The paper says columns, as its W is (in, out).

    Raises:
        ValueError: `rank` is below 1 or `alpha` is not positive.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, *, rslora: bool = False, dora: bool = False):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        out_features, in_features = weight.shape
        like = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        norms = nn.Parameter(weight.detach().to(**like).norm(dim=1)) if dora else None
        self.register_parameter("lora_magnitude", norms)
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        for name in ("start_A", "start_B"):  # the initial A and B that PiSSA subtracts from the base
            self.register_buffer(name, None, persistent=False)

    @property
    def scaled_B(self) -> Tensor:
        """scaling · B, (out, rank): the one place where the scaling is applied."""
        return self.scaling * self.lora_B

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}, scaling={self.scaling:g}"

    @without_autocast  # which would round ΔW before it is merged or DoRA takes norms
    def delta_weight(self) -> Tensor:
        """ΔW, (out, in), in the precision of A and B."""
        return self.scaled_B @ self.lora_A

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the update relative to the original weight: with PiSSA, minus the part taken out of that weight."""
        if self.start_A is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)

    def row_scale(self, weight: Tensor) -> Tensor:
        """DoRA's m / |W₀ + ΔW| (out,), a factor for each output. The norm gets no gradient (its paper, section 4.3)."""
        with torch.no_grad():
            norms = (weight + self.delta_weight()).norm(dim=1)
        return self.lora_magnitude / norms.clamp(min=torch.finfo(norms.dtype).tiny)  # a row may be, and stay, all zeros


class LoRALayer(Prepared):
    """What both layers below share: a frozen `base_layer`, and low-rank pairs for rows of its weight."""

    def pairs(self) -> list[tuple[slice, LowRank]]:
        """Each pair, with the rows of the weight that it updates."""
        raise NotImplementedError

    def joint_pair(self) -> tuple[Tensor, Tensor]:
        """All pairs as one: A (sum of ranks, in), and B (out, sum of ranks) with the scaling in it."""
        raise NotImplementedError

    def _wrap(self, base_layer: nn.Linear, dropout: float) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.base_layer = base_layer.requires_grad_(False)
        self.dropout = dropout
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's dtype if it is on."""
        if any(p.requires_grad for p in self.base_layer.parameters()):
            raise RuntimeError("the base of a LoRA layer requires a gradient, which it would not get; freeze it")
        base, scale = self._frozen(), self._row_scale()
        y = lora_linear(
            x,
            base if scale is None else base._replace(bias=None),
            *self.joint_pair(),
            self.dropout if self.training else 0.0,
        )
        return y if scale is None else _rescale(y, scale, base.bias).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """W₀ + ΔW (out, in) in the wider of both precisions, for modules that read the weight instead of calling the
        layer, as `nn.MultiheadAttention` does; LoRA's dropout does not apply there."""
        weight, scale = self.base_layer.weight + self.delta_weight(), self._row_scale()
        return weight if scale is None else weight * scale[:, None]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def reference_forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """What `forward` computes, in plain autograd; `keep` is 1 for elements of `x` that dropout keeps, else 0."""
        base, scale = self.base_layer, self._row_scale()
        seen = x if keep is None else x * keep / (1 - self.dropout)
        y = F.linear(x, base.weight) + F.linear(seen, self.delta_weight())  # W₀ x + ΔW dropout(x)
        if scale is not None:
            y = y * scale  # DoRA
        return y if base.bias is None else y + base.bias

    @torch.no_grad()
    def merge(self) -> FrozenLinear:
        """A new linear layer with weight W₀ + ΔW, added in the adapter's precision and rounded once."""
        base, weight = self.base_layer, self.weight
        merged = FrozenLinear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        merged.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
        if base.bias is not None:
            merged.bias = nn.Parameter(base.bias.clone(), requires_grad=False)
        return merged.train(base.training)

    @torch.no_grad()
    def keep_base_in(self, dtype: torch.dtype) -> None:
        """Keep the base ready to compute with in `dtype`, autocast's or its own, instead of casting it at every call.

        This keeps one copy in that dtype, or two for oneDNN (see `pack`); torch.compile does not use them. Call it once
        the layer is on its device. Moving or copying the layer, or loading a state dict into it, discards the copies;
        after any other change of the base, call it again.
        """
        self.prepared = None
        self.prepared = pack(self._frozen(dtype), for_gradients=True)

    def _frozen(self, dtype: torch.dtype | None = None) -> Frozen:
        """The base in `dtype`; by default in the current compute dtype: autocast's if it is on, else its own."""
        base, lora_A = self.base_layer, self.pairs()[0][1].lora_A
        dtype = dtype or autocast_dtype(lora_A.device.type)
        if isinstance(base, Int8Linear):
            return base.frozen(dtype or lora_A.dtype)
        dtype = dtype or base.weight.dtype
        return self.prepared if serves(self.prepared, dtype) else cast(base, dtype)

    def _row_scale(self) -> Tensor | None:
        """DoRA's scale of every output (out,), 1 where no pair updates it; None without DoRA."""
        pairs, weight = self.pairs(), self.base_layer.weight
        if pairs[0][1].lora_magnitude is None:
            return None
        scale = pairs[0][1].lora_magnitude.new_ones(len(weight))
        for rows, pair in pairs:
            scale[rows] = pair.row_scale(weight[rows])
        return scale


def choose(setting: float | Mapping[str, float], name: str) -> float:
    """The value for `name` of a setting, which is one value for all names or {name: value}."""
    return setting[name] if isinstance(setting, Mapping) else setting


@without_autocast  # which would cast y and keep the cast
def _rescale(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """scale · y + b. DoRA scales W₀ x + ΔW x before adding b. The scale is not cast: bf16 would round it to 1."""
    return y * scale if bias is None else torch.addcmul(bias, y, scale)


class LoRALinear(LoRALayer, LowRank):
    """A frozen linear layer with a low-rank update.

        y = W₀ x + b + ΔW dropout(x),    ΔW = scaling · B A

    Args:
        base_layer: the layer to adapt; it is kept by reference and frozen.
        rank, alpha, rslora, dora: as in `LowRank`.
        dropout: the probability that the update does not see an element of x in training; `lora_dropout` in PEFT. With
            DoRA, W₀ x still sees all of x; PEFT hides elements from the part of it that DoRA's scale adds.

    Raises:
        ValueError: `rank` is below 1, `alpha` is not positive, or `dropout` is outside [0, 1).
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        dora: bool = False,
    ):
        super().__init__(base_layer.weight, rank, alpha, rslora=rslora, dora=dora)
        self._wrap(base_layer, dropout)

    def pairs(self) -> list[tuple[slice, LowRank]]:
        return [(slice(None), self)]

    def joint_pair(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.scaled_B


class LoRAFusedLinear(LoRALayer, nn.Module):
    """A frozen linear layer that fuses several projections, with a low-rank update for each adapted projection.

    The weight of timm's `attn.qkv`, for example, has `num_blocks` = 3 equal row blocks: query, key and value. Each
    adapted block k has its own pair, the child module with the block's name, as if it were a layer of its own:

        y = W₀ x + b,    y[rows_k] += ΔW_k dropout(x),    ΔW_k = scaling · B_k A_k

    The base stays one matrix product. All A_k are one product too, as they see the same dropout(x), and so are all B_k.

    Args:
        base_layer: the layer to adapt; it is kept by reference and frozen.
        blocks: name -> index of the row block, such as {"query": 0, "value": 2}.
        num_blocks: the number of blocks that the rows of `base_layer` are split into.
        rank, alpha: as in `LowRank`, one for all blocks or {name: ...}.
        rslora, dora: as in `LowRank`.
        dropout: as in `LoRALinear`.

    Raises:
        ValueError: as `LoRALinear`; `num_blocks` does not divide the rows; `blocks` is empty, repeats or out of range.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        blocks: Mapping[str, int],
        num_blocks: int,
        rank: int | Mapping[str, int],
        alpha: float | Mapping[str, float],
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        dora: bool = False,
    ):
        super().__init__()
        size, rest = divmod(base_layer.out_features, num_blocks)
        if rest:
            raise ValueError(f"{base_layer.out_features} output rows are not {num_blocks} equal blocks")
        if not blocks or not set(blocks.values()) <= set(range(num_blocks)):
            raise ValueError(f"blocks must name some of the blocks 0 to {num_blocks - 1}, got {dict(blocks)}")
        if len(set(blocks.values())) < len(blocks):
            raise ValueError(f"blocks must name each block once, got {dict(blocks)}")
        self.rows = {name: slice(block * size, (block + 1) * size) for name, block in blocks.items()}
        for name, rows in self.rows.items():
            weight, r = base_layer.weight[rows], choose(rank, name)
            self.add_module(name, LowRank(weight, r, choose(alpha, name), rslora=rslora, dora=dora))
        self._wrap(base_layer, dropout)

    def pairs(self) -> list[tuple[slice, LowRank]]:
        return [(rows, self.get_submodule(name)) for name, rows in self.rows.items()]

    def joint_pair(self) -> tuple[Tensor, Tensor]:
        lora_A = torch.cat([pair.lora_A for _, pair in self.pairs()])
        scaled_B, start = lora_A.new_zeros(self.base_layer.out_features, len(lora_A)), 0
        for rows, pair in self.pairs():
            stop = start + len(pair.lora_A)
            scaled_B[rows, start:stop] = pair.scaled_B  # the rest stays 0: other pairs do not update these rows
            start = stop
        return lora_A, scaled_B

    def delta_weight(self) -> Tensor:
        """ΔW, (out, in); zero in the blocks that are not adapted."""
        dtype = torch.promote_types(self.base_layer.weight.dtype, torch.float32)
        delta = torch.zeros_like(self.base_layer.weight, dtype=dtype)
        for rows, pair in self.pairs():
            delta[rows] += pair.delta_weight()
        return delta
