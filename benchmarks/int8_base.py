"""How close an 8-bit base is to the float one: each weight to the nearest, and rounded for train pictures.

    python benchmarks/int8_base.py --data FOLDER --backbone vit_tiny_patch16_224 --weights FILE [--limit 3000]

Takes the options of `train.py`; with --init-from CHECKPOINT the adapters and heads are trained ones. Errors are
|y - y₀| / |y₀| over `SCORED` test pictures, y₀ on the float base: of each linear layer's output for the float model's
input, of the whole embedding, CLS and the mean of the patches, and of the answers, the logits of all attributes at once
and of the worst one. Memory is of the backbone's parameters and buffers.
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
from lora import LoRALayer, get_adapter_params, quantize_base
from models.classifier import AttributeClassifier
from task import shrink

SCORED = 64


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def layer_errors(model: AttributeClassifier, other: AttributeClassifier, images: Tensor) -> dict[str, float]:
    """The error of each linear layer of `other`'s backbone, with LoRA or not, on the input of the same layer of
    `model`."""
    errors, hooks = {}, []
    for path, layer in model.backbone.named_modules():
        if isinstance(layer, (LoRALayer, nn.Linear)):

            def compare(_, x, y, path=path):
                errors[path] = relative(other.backbone.get_submodule(path)(x[0]), y)

            hooks.append(layer.register_forward_hook(compare))
    model.embed(images)
    for hook in hooks:
        hook.remove()
    return errors


def base_size(module: nn.Module) -> int:
    adapters = {id(parameter) for parameter in get_adapter_params(module).values()}
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()] if id(t) not in adapters)


def worst(errors: dict[str, float]) -> str:
    name = max(errors, key=errors.get)
    return f"{errors[name]:.2%} ({name})"


@exits_cleanly
@torch.no_grad()
def main() -> None:
    with training([*sys.argv[1:], "--base", "float"]) as run:
        task, device, args = run.task, run.device, run.args
        model = task.model.eval()
        rows = task.store.rows("test")[:SCORED]
        images = task.preprocess(torch.from_numpy(task.store.pixels[rows]).to(device))
        nearest, rounded = copy.deepcopy(model), copy.deepcopy(model)
        quantize_base(nearest.backbone)
        start = time.perf_counter()
        shrink(rounded, args.seed, task.preprocess, task.store, device)
        seconds = time.perf_counter() - start
    print(f"{args.backbone}, {len(rows)} test pictures, rounded in {seconds:.0f} s\n{machine(device)}\n")
    embedding, answers, base, lines = model.embed(images), model(images), base_size(model.backbone), []
    for name, other in (("to the nearest", nearest), ("for train pictures", rounded)):
        layers = layer_errors(model, other, images)
        found = other(images)
        of_attributes = {attribute: relative(y, answers[attribute]) for attribute, y in found.items()}
        logits = relative(*(torch.cat(list(outputs.values()), dim=1) for outputs in (found, answers)))
        parts = [relative(y, y0) for y, y0 in zip(other.embed(images), embedding, strict=True)]
        errors = [f"{error:.2%}" for error in (statistics.median(layers.values()), *parts, logits)]
        share = f"{base_size(other.backbone) / base:.3f}"
        lines.append([name, worst(layers), *errors, worst(of_attributes), share])
    head = ["rounded", "worst layer", "median layer", "CLS", "mean of patches", "all logits", "worst attribute's"]
    print(markdown([*head, "memory, of fp32"], lines))


if __name__ == "__main__":
    main()
