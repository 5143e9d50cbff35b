"""Put LoRA into a model: find the layers that the targets name, and replace them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .frozen import FrozenLinear
from .layer import LoRAFusedLinear, LoRALayer, LoRALinear, choose
from .pissa import start_at_principal
from .state import get_adapter_params, set_trainable_params


@dataclass(frozen=True)
class Target:
    """Row block `block`, out of `of` equal blocks, of each linear layer whose dotted name is `layer` or ends in it.

    The query rows of timm's fused projection are `Target("attn.qkv", block=0, of=3)`.
    """

    layer: str
    block: int = 0
    of: int = 1


Table = Mapping[str, Target | Iterable[Target]]


def apply_lora(model: nn.Module, target_modules: Iterable[str], *settings, **options) -> nn.Module:
    """Put LoRA on the target layers of `model`, in place, and freeze everything but the LoRA parameters.

    Takes the arguments of `lora_layers` and raises its errors; after an error no layer is replaced. Returns `model`.
    """
    for path, layer in lora_layers(model, target_modules, *settings, **options).items():
        model.set_submodule(path, layer)
    set_trainable_params(model, get_adapter_params(model))
    return model


def lora_layers(
    model: nn.Module,
    target_modules: Iterable[str],
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float],
    dropout: float = 0.0,
    table: Table | None = None,
    *,
    layers: Iterable[int] | None = None,
    rslora: bool = False,
    dora: bool = False,
    pissa: bool = False,
) -> dict[str, LoRALayer]:
    """LoRA layers over the target layers of `model`, by dotted name; the model keeps its own layers, now frozen.

    Args:
        model: any module.
        target_modules: names from `table`, or, as in PEFT, the last parts of dotted names of `nn.Linear` layers: "proj"
            matches `blocks.0.attn.proj`, but neither `blocks.0.attn.q_proj` nor a convolution called `proj`.
        rank, alpha: as in `LoRALinear`, one for all targets or {target: ...}; `r` and `lora_alpha` in PEFT, which calls
            the dictionaries `rank_pattern` and `alpha_pattern`.
        dropout: as in `LoRALinear`; `lora_dropout` in PEFT.
        table: the meaning of those target names that are not simply the names of whole layers in this model.
        layers: adapt only these blocks (the first number in a layer's dotted name); `layers_to_transform` in PEFT.
        rslora, dora: as in `LowRank`.
        pissa: start at the principal part of each weight, see `start_at_principal`.

    Raises:
        ValueError: there is no target; a target matches no layer, or a layer that has LoRA already or its own forward
            or hooks; no target layer is in a given block; `rank`, `alpha` or `dropout` is missing or out of range.
    """
    target_modules = list(target_modules)
    for what, setting in (("rank", rank), ("alpha", alpha)):
        if isinstance(setting, Mapping) and (missing := [name for name in target_modules if name not in setting]):
            raise ValueError(f"no {what} for target {missing[0]!r}; {what} has {', '.join(setting)}")
        if isinstance(setting, Mapping) and (idle := [name for name in setting if name not in target_modules]):
            raise ValueError(f"{what} of {idle[0]!r}, which is no target; there are {', '.join(target_modules)}")
    plan = _resolve(model, target_modules, table or {})
    if layers is not None:
        plan = _only(plan, set(layers))
    variant = {"rslora": rslora, "dora": dora}
    adapted = {
        path: _adapt(model.get_submodule(path), targets, rank, alpha, dropout, variant)
        for path, targets in plan.items()
    }
    if pissa:
        for layer in adapted.values():
            start_at_principal(layer)
    return adapted


def _resolve(model: nn.Module, target_modules: Iterable[str], table: Table) -> dict[str, dict[str, Target]]:
    """{path of each layer to adapt: {name of each target that matches it: that target}}."""
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
                if not is_plain(layers[path]):
                    raise ValueError(f"target {name!r} matches {path}, which has a forward or hooks of its own")
                if plan.setdefault(path, {}).setdefault(name, target) != target:
                    raise ValueError(f"target {name!r} means several parts of {path}; give each a name of its own")
    if not plan:
        raise ValueError("target_modules is empty: name at least one layer to adapt")
    for path, targets in plan.items():
        if len({target.of for target in targets.values()}) > 1:
            raise ValueError(f"targets {', '.join(targets)} split {path} in different ways")
    return plan


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer computes W x + b and nothing else: LoRA would skip a custom forward and hooks."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    own = "forward" in vars(layer)  # as accelerate's hooks set it
    return not (hooked or own) and type(layer).forward in (nn.Linear.forward, FrozenLinear.forward)


def _only(plan: dict[str, dict[str, Target]], layers: set[int]) -> dict[str, dict[str, Target]]:
    """The part of the plan whose layers are in the blocks with these numbers."""
    numbers = {path: next((int(part) for part in path.split(".") if part.isdecimal()), None) for path in plan}
    if unknown := layers - set(numbers.values()):
        known = sorted({number for number in numbers.values() if number is not None})
        raise ValueError(f"no target layer is in block {min(unknown)}; there are blocks {known}")
    if not layers:
        raise ValueError("layers is empty: name at least one block, or None for all")
    return {path: targets for path, targets in plan.items() if numbers[path] in layers}


def _adapt(base_layer: nn.Linear, targets: dict[str, Target], rank, alpha, dropout: float, variant: dict) -> LoRALayer:
    num_blocks = next(iter(targets.values())).of
    if num_blocks == 1:
        name = next(iter(targets))
        if len({(choose(rank, target), choose(alpha, target)) for target in targets}) > 1:
            raise ValueError(f"targets {', '.join(targets)} are one layer, of different rank or alpha")
        return LoRALinear(base_layer, choose(rank, name), choose(alpha, name), dropout, **variant)
    blocks = {name: target.block for name, target in targets.items()}
    return LoRAFusedLinear(base_layer, blocks, num_blocks, rank, alpha, dropout, **variant)
