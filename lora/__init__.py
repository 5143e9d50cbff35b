"""A hand-written LoRA for any frozen PyTorch model; it needs nothing but torch.

Read `layer` for what LoRA is, `functional` for its forward and backward passes, `dropout` for dropout on a LoRA layer's
input, `recompute` for activations that need not be kept, `frozen` for layers that do not train, `inject` for putting
LoRA into a model, and `state` for the parameters that are then trained, saved and merged. `pissa`, `int8`, `quantize`,
`adapters` and `peft_format` are extras.
"""

from .adapters import Adapters
from .dropout import draw_dropped
from .functional import Frozen, lora_linear
from .inject import Target, apply_lora, lora_layers
from .int8 import Int8Linear
from .layer import LoRAFusedLinear, LoRALayer, LoRALinear, LowRank
from .peft_format import from_peft, to_peft
from .pissa import start_at_principal
from .quantize import quantize_base
from .state import (
    get_adapter_params,
    keep_base_in,
    load_params,
    merge_lora,
    parameter_summary,
    set_trainable_params,
)

__all__ = [
    "Adapters",
    "Frozen",
    "Int8Linear",
    "LoRAFusedLinear",
    "LoRALayer",
    "LoRALinear",
    "LowRank",
    "Target",
    "apply_lora",
    "draw_dropped",
    "from_peft",
    "get_adapter_params",
    "keep_base_in",
    "load_params",
    "lora_layers",
    "lora_linear",
    "merge_lora",
    "parameter_summary",
    "quantize_base",
    "set_trainable_params",
    "start_at_principal",
    "to_peft",
]
