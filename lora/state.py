"""Find a model's LoRA parameters, choose which parameters train, load trained ones, and merge LoRA into the model."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .frozen import FrozenLinear
from .layer import LoRALayer, LowRank


def get_adapter_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """All LoRA parameters by their names in `model`, found by structure: they are those of its `LowRank` modules."""
    return {
        name: parameter
        for path, module in model.named_modules()
        if isinstance(module, LowRank)
        for name, parameter in module.named_parameters(prefix=path, recurse=False)
    }


def set_trainable_params(model: nn.Module, names: Iterable[str]) -> None:
    """Make exactly the parameters called `names` trainable (a dict from `get_adapter_params` will do); freeze the rest.

    Raises:
        ValueError: the model has no parameter of such a name.
    """
    names = set(names)
    params = dict(model.named_parameters())
    if unknown := sorted(names - params.keys()):
        raise ValueError(f"no such parameters in the model: {', '.join(unknown)}")
    for name, parameter in params.items():
        parameter.requires_grad_(name in names)


def load_params(params: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `params` (such as `get_adapter_params(model)`); if their keys or shapes differ, change nothing.

    Raises:
        ValueError: they differ; the message names every missing or unexpected key and every tensor of another shape.
    """
    problems = [f"missing {name}" for name in params.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - params.keys()]
    problems += [
        f"misshaped {name}, {tuple(state[name].shape)} for {tuple(params[name].shape)}"
        for name in params.keys() & state.keys()
        if state[name].shape != params[name].shape
    ]
    if problems:
        raise ValueError(f"the state does not fit the model: {'; '.join(sorted(problems))}")
    with torch.no_grad():
        for name, parameter in params.items():
            parameter.copy_(state[name])


def keep_base_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen layers, with LoRA on them or merged in, ready to compute in `dtype` instead of casting each time."""
    for module in model.modules():
        if isinstance(module, LoRALayer | FrozenLinear):
            module.keep_base_in(dtype)


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy of `model` with each LoRA layer merged into a plain linear layer: its state dict fits the unadapted model.

    `model` itself is not changed.
    """
    # deepcopy treats what its memo holds as copied already, so no base weight is copied only to be replaced
    merged = {id(module): module.merge() for module in model.modules() if isinstance(module, LoRALayer)}
    return copy.deepcopy(model, merged)


def parameter_summary(model: nn.Module) -> str:
    """A line such as "trainable 2,654,208 / total 88,452,864 (3.00%)"."""
    quantised = (buffer for buffer in model.buffers() if buffer.dtype is torch.int8)
    total = sum(tensor.numel() for tensor in [*model.parameters(), *quantised])
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"trainable {trainable:,} / total {total:,} ({trainable / total:.2%})"
