"""A frozen base in 8 bits: a quarter of its memory, for training. What was trained is merged onto the original weights
once it is loaded there: `merge_lora` here would merge onto the rounded ones.
"""

from collections.abc import Callable

import torch
from torch import nn

from .inject import is_plain
from .int8 import Int8Linear
from .layer import LoRALayer


@torch.no_grad()
def quantize_base(model: nn.Module, run: Callable[[], object] | None = None) -> nn.Module:
    """Quantise every frozen linear layer of `model`, in place, LoRA on it or not; returns `model`. Layers that have a
    forward or hooks of their own stay as they are.

    Args:
        run: makes one forward pass of the model over some typical inputs, for which the weights are then rounded (see
            `round_for`), those of a layer that it does not reach to the nearest; default: all of them to the nearest.
            A layer's own inputs are those of the float model: those of the quantised one gave no smaller error.
    """
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_plain(module) and not any(p.requires_grad for p in module.parameters())
    }
    made = {}
    if run is not None:
        over = {id(module.base_layer): module for module in model.modules() if isinstance(module, LoRALayer)}

        def hook(path: str, layer: nn.Linear):
            def make(_, inputs):
                made[path] = Int8Linear(layer, inputs[0])

            return over.get(id(layer), layer).register_forward_pre_hook(make)  # LoRA computes its base layer itself

        hooks = [hook(path, layer) for path, layer in layers.items()]
        try:
            run()
        finally:
            for handle in hooks:
                handle.remove()
    for path, layer in layers.items():
        model.set_submodule(path, made.get(path) or Int8Linear(layer))
    return model
