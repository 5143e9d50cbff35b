"""PiSSA: initialise LoRA with the principal part of the frozen weight, and train that part."""

import torch
from torch import nn

from .layer import LoRALayer


@torch.no_grad()
def start_at_principal(layer: LoRALayer) -> None:
    """Start each pair at the principal part of its weight and freeze the rest (Meng et al. 2024, arXiv:2404.02948).

        W₀ = U S Vᵀ;    B = U_r √S_r,  A = √S_r V_rᵀ (both over √scaling);    base = W₀ - ΔW

    so that the layer's initial output is unchanged. Dropout before A would drop parts of W₀. PEFT calls it
    `init_lora_weights="pissa"`. The layer gets a new base layer; the one that it was given is not changed. The same
    weight gives the same rest, up to rounding, so a checkpoint needs only A and B.

    Raises:
        ValueError: a pair's rank is above the smaller dimension of its weight.
    """
    base = layer.base_layer
    for rows, pair in layer.pairs():
        # In double: where singular values are close, fp32 would not find the same part again on another machine.
        u, s, vt = torch.linalg.svd(base.weight[rows].double(), full_matrices=False)
        rank = len(pair.lora_A)
        if rank > len(s):
            raise ValueError(f"PiSSA: rank {rank} is above {len(s)}, the smaller side of a weight to adapt")
        root = (s[:rank] / pair.scaling).sqrt()
        pair.lora_B.copy_(u[:, :rank] * root)
        pair.lora_A.copy_(root[:, None] * vt[:rank])
        pair.start_A, pair.start_B = pair.lora_A.clone(), pair.lora_B.clone()
    rest = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    rest.weight = nn.Parameter((base.weight - layer.delta_weight()).to(base.weight.dtype), requires_grad=False)
    rest.bias = base.bias
    layer.base_layer, layer.prepared = rest.train(base.training), None
