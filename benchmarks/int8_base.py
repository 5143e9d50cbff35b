"""How close an 8-bit base is to the float one: each weight to the nearest, and rounded for train pictures.

    python benchmarks/int8_base.py --data FOLDER --backbone vit_tiny_patch16_224 --weights FILE [--limit 3000]

Takes the options of `train.py`. Errors are |y - y₀| / |y₀| over `SCORED` test pictures, y₀ from the float backbone: of
each linear layer's output for the float model's input, and of the whole embedding, CLS and the mean of the patches.
Memory is of the backbone's parameters and buffers. The run's adapters are merged away: untrained, they add nothing.
"""

import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import machine, markdown, training

from errors import exits_cleanly
from lora import merge_lora, quantize_base
from models.classifier import AttributeClassifier
from task import shrink

SCORED = 64


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def layer_errors(model: AttributeClassifier, other: AttributeClassifier, images: Tensor) -> dict[str, float]:
    """Of each linear layer of `other`'s backbone, given what the same layer of `model` is given."""
    errors, hooks = {}, []
    for path, layer in model.backbone.named_modules():
        if isinstance(layer, nn.Linear):

            def compare(_, x, y, path=path):
                errors[path] = relative(other.backbone.get_submodule(path)(x[0]), y)

            hooks.append(layer.register_forward_hook(compare))
    model.embed(images)
    for hook in hooks:
        hook.remove()
    return errors


def size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


@exits_cleanly
@torch.no_grad()
def main() -> None:
    with training([*sys.argv[1:], "--base", "float"]) as run:
        task, device, args = run.task, run.device, run.args
        model = merge_lora(task.model).eval().requires_grad_(False)
        rows = task.store.rows("test")[:SCORED]
        images = task.preprocess(torch.from_numpy(task.store.pixels[rows]).to(device))
        nearest, rounded = copy.deepcopy(model), copy.deepcopy(model)
        quantize_base(nearest.backbone)
        start = time.perf_counter()
        shrink(rounded, args.seed, task.preprocess, task.store, device)
        seconds = time.perf_counter() - start
    print(f"{args.backbone}, {len(rows)} test pictures, rounded in {seconds:.0f} s\n{machine(device)}\n")
    wanted, lines = model.embed(images), []
    for name, other in (("to the nearest", nearest), ("for train pictures", rounded)):
        errors = layer_errors(model, other, images)
        worst = max(errors, key=errors.get)
        parts = [relative(y, y0) for y, y0 in zip(other.embed(images), wanted, strict=True)]
        figures = [statistics.median(errors.values()), *parts]
        share = size(other.backbone) / size(model.backbone)
        lines.append([name, f"{errors[worst]:.2%} ({worst})", *(f"{error:.2%}" for error in figures), f"{share:.3f}"])
    head = ["rounded", "worst layer", "median layer", "CLS", "mean of patches", "memory, of fp32"]
    print(markdown(head, lines))


if __name__ == "__main__":
    main()
