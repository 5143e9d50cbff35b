"""What a product gains with oneDNN, and with the frozen weight kept in oneDNN's layout: `pack` of `lora/functional.py`.

    python benchmarks/packed_products.py [--rounds 31]

The layers of a ViT-B at 1,576 rows (8 pictures of 197 tokens), forward (x Wᵀ + b) and backward (dy W, added to what the
LoRA branch gave), in turn: as torch chooses, by oneDNN with the plain weight, and with the packed one.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import in_turn, machine, markdown, ratios

from lora import functional
from lora.functional import ONEDNN_BF16, Frozen, linear, pack

ROWS, CPU = 1576, torch.device("cpu")
WAYS = "torch", "plain", "packed"
LAYERS = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}  # (out, in)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    functional.ONEDNN = True  # also where products are left to torch
    table = []
    for dtype in [torch.float32, torch.bfloat16][: 1 + ONEDNN_BF16]:
        for name, (out, width) in LAYERS.items():
            weight, bias = torch.randn(out, width).to(dtype), torch.randn(out).to(dtype)
            x, dy, dx = (torch.randn(ROWS, size).to(dtype) for size in (width, out, width))
            packed = pack(Frozen(weight, bias), for_gradients=True)
            for way, calls in {
                "forward": [
                    partial(F.linear, x, weight, bias),
                    *(partial(linear, x, w, bias) for w in (weight, packed.weight)),
                ],
                "backward": [
                    partial(dx.addmm_, dy, weight),
                    *(partial(linear, dy, w, onto=dx) for w in (weight.T, packed.transposed)),
                ],
            }.items():
                seconds = in_turn(dict(zip(WAYS, calls, strict=True)), rounds, CPU)
                taken = [f"{statistics.median(times) * 1e3:.2f}" for times in seconds.values()]
                gains = [f"{statistics.median(ratios(seconds[way], seconds['packed'])):.2f}" for way in WAYS[:2]]
                table.append([f"{str(dtype).removeprefix('torch.')}, {name}, {way}", *taken, *gains])
    print(machine(CPU))
    print(markdown(["", *(f"{way}, ms" for way in WAYS), *(f"packed, times {way}" for way in WAYS[:2])], table))


if __name__ == "__main__":
    main()
