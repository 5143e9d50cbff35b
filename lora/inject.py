"""Putting LoRA into a model: which layers the targets mean, and the replacing of those layers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .layer import LoRAFusedLinear, LoRALayer, LoRALinear
from .state import get_adapter_params, set_trainable_params


@dataclass(frozen=True)
class Target:
    """The linear layers whose dotted name is or ends in `layer`; of each, row block `block` of `of` equal blocks.

    The query rows of timm's fused projection are `Target("attn.qkv", block=0, of=3)`.
    """

    layer: str
    block: int = 0
    of: int = 1


Table = Mapping[str, Target | Iterable[Target]]


def apply_lora(
    model: nn.Module,
    target_modules: Iterable[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    table: Table | None = None,
) -> nn.Module:
    """Put LoRA on the target layers of `model`, in place, and freeze all of it but the LoRA parameters.

    Args:
        model: any module.
        target_modules: names from `table`, or as in PEFT the last parts of dotted names of `nn.Linear` layers, so that
            "proj" is `blocks.0.attn.proj` but neither `blocks.0.attn.q_proj` nor a convolution called `proj`.
        rank, alpha, dropout: as in `LoRALinear`; `r`, `lora_alpha` and `lora_dropout` in PEFT.
        table: what target names mean in this model, where that is not one whole layer of that name.

    Returns:
        `model`.

    Raises:
        ValueError: there is no target, a target matches no layer or one that has LoRA already, or `rank`, `alpha` or
            `dropout` is out of range. The model is then unchanged.
    """
    adapted = {
        path: _adapt(model.get_submodule(path), blocks, rank, alpha, dropout)
        for path, blocks in _resolve(model, target_modules, table or {}).items()
    }
    for path, layer in adapted.items():
        model.set_submodule(path, layer)
    set_trainable_params(model, get_adapter_params(model))
    return model


def _resolve(model: nn.Module, target_modules: Iterable[str], table: Table) -> dict[str, dict[str, Target]]:
    """Path of each layer to adapt -> name of each target that it matches -> that target."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | LoRALayer)}
    plan = {}
    for name in target_modules:
        meaning = table.get(name, Target(name))
        for target in (meaning,) if isinstance(meaning, Target) else meaning:
            paths = [path for path in layers if f".{path}".endswith(f".{target.layer}")]
            if not paths:
                known = sorted({*table, *(path.rpartition(".")[2] for path in layers)})
                raise ValueError(f"target {name!r} matches no linear layer; this model has {', '.join(known)}")
            for path in paths:
                if isinstance(layers[path], LoRALayer):
                    raise ValueError(f"target {name!r} matches {path}, which has LoRA already")
                plan.setdefault(path, {})[name] = target
    if not plan:
        raise ValueError("target_modules is empty: name at least one layer to adapt")
    for path, targets in plan.items():
        if len({target.of for target in targets.values()}) > 1:
            raise ValueError(f"targets {', '.join(targets)} split {path} in different ways")
    return plan


def _adapt(base_layer: nn.Linear, targets: dict[str, Target], rank: int, alpha: float, dropout: float) -> LoRALayer:
    num_blocks = next(iter(targets.values())).of
    if num_blocks == 1:
        return LoRALinear(base_layer, rank, alpha, dropout)
    blocks = {name: target.block for name, target in targets.items()}
    return LoRAFusedLinear(base_layer, blocks, num_blocks, rank, alpha, dropout)
