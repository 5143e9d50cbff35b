"""Train over a frozen base in 8 bits, which takes a quarter of the memory. To merge, load the trained adapter onto the
original weights: `merge_lora` on the quantised model would merge into the rounded weights.
"""

from collections.abc import Callable

import torch
from torch import nn

from .inject import is_plain
from .int8 import Int8Linear
from .layer import LoRALayer


@torch.no_grad()
def quantize_base(model: nn.Module, run: Callable[[], object] | None = None) -> nn.Module:
    """Quantise every frozen linear layer of `model` in place, with or without LoRA on it; returns `model`. Layers with
    a custom forward or hooks stay as they are.

    Args:
        run: makes one forward pass of the model over typical inputs, for which the weights are then rounded (see
            `round_for`); layers that the pass does not reach, and by default all layers, are rounded to nearest. Each
            layer's inputs come from the float model: those of the quantised model gave no smaller error.
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
            @torch.inference_mode(False)  # else the buffers made here could not be loaded into later
            def make(_, inputs):
                made[path] = Int8Linear(layer, inputs[0])

            return over.get(id(layer), layer).register_forward_pre_hook(make)  # LoRA never calls its base layer

        hooks = [hook(path, layer) for path, layer in layers.items()]
        try:
            run()
        finally:
            for handle in hooks:
                handle.remove()
    for path, layer in layers.items():
        model.set_submodule(path, made.get(path) or Int8Linear(layer))
    return model
