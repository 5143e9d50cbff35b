"""LoRA by hand, for any frozen PyTorch model; needs torch alone.

Read `layer` for what LoRA is, `functional` for how it is computed and differentiated, `inject` for how it gets into a
model, and `state` for what is then trained, saved and merged.
"""

from .functional import draw_dropped, lora_linear
from .inject import Target, apply_lora
from .layer import LoRAFusedLinear, LoRALayer, LoRALinear, LowRank
from .state import get_adapter_params, load_params, merge_lora, parameter_summary, set_trainable_params

__all__ = [
    "LoRAFusedLinear",
    "LoRALayer",
    "LoRALinear",
    "LowRank",
    "Target",
    "apply_lora",
    "draw_dropped",
    "get_adapter_params",
    "load_params",
    "lora_linear",
    "merge_lora",
    "parameter_summary",
    "set_trainable_params",
]
