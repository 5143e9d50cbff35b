"""What a product gains where the frozen weight stays in oneDNN's layout: `pack` of `lora/functional.py`, on a CPU.

    python benchmarks/packed_products.py [--rounds 31]

The layers of a ViT-B at 1,576 rows (8 pictures of 197 tokens), forward (x Wᵀ + b) and backward (dy W, added to what the
LoRA branch gave), the plain weight and the packed one in turn.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import in_turn, machine, markdown, ratios

from lora.functional import Frozen, linear, pack

ROWS, CPU = 1576, torch.device("cpu")
LAYERS = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}  # (out, in)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    table = []
    for dtype in torch.float32, torch.bfloat16:
        for name, (out, width) in LAYERS.items():
            weight, bias = torch.randn(out, width).to(dtype), torch.randn(out).to(dtype)
            x, dy, dx = (torch.randn(ROWS, size).to(dtype) for size in (width, out, width))
            packed = pack(Frozen(weight, bias), for_gradients=True)
            for way, calls in {
                "forward": [partial(linear, x, w, bias) for w in (weight, packed.weight)],
                "backward": [partial(linear, dy, w, onto=dx) for w in (weight.T, packed.transposed)],
            }.items():
                seconds = in_turn(dict(zip(("plain", "packed"), calls, strict=True)), rounds, CPU)
                plain, kept = (f"{statistics.median(times) * 1e3:.2f}" for times in seconds.values())
                gain = f"{statistics.median(ratios(*seconds.values())):.2f}"
                table.append([f"{str(dtype).removeprefix('torch.')}, {name}, {way}", plain, kept, gain])
    print(machine(CPU))
    print(markdown(["", "plain, ms", "packed, ms", "times as fast"], table))


if __name__ == "__main__":
    main()
