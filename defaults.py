"""A run's defaults that depend on the machine: source, backbone, precision."""

import argparse
import sys
import time

import torch

import hub
from models.backbone import DEMO, bare_backbone

HUB_DATA, HUB_BACKBONE = "ashraq/fashion-product-images-small", "vit_base_patch16_224"
AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGE = 40e6  # parameters from which training on a CPU takes many hours


def choose_source(args: argparse.Namespace) -> None:
    """Choose the hub's catalogue and ViT-B/16, or the demo if the hub is out of reach and nothing else was named."""
    if not (args.data or args.backbone or args.weights) and not hub.reachable():
        print(f"The hub ({hub.ENDPOINT}) cannot be reached: training on the embedded demo instead of {HUB_DATA}.")
        print("For files of your own: --data FOLDER --backbone NAME --weights FILE")
        args.data = DEMO
    args.backbone = args.backbone or (DEMO if args.data == DEMO else HUB_BACKBONE)
    args.data = hub.pinned(args.data or HUB_DATA)


def choose_amp(device: torch.device) -> str | None:
    """The precision that `--amp` alone stands for; None is fp32.

    A GPU gets bf16 if it has it, else fp16. A CPU gets bf16 only if a matrix product is at least as fast in it as in
    fp32, else fp32: on an Intel Xeon without AMX bf16 took 1.4 to 2.5 times as long (`benchmarks/training.md`).
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

    def seconds(dtype: torch.dtype) -> float:  # of a matrix product: surer than any list of CPU flags
        square, times = torch.ones(256, 256, dtype=dtype), []
        for _ in range(8):  # some may be slowed by other processes that start
            start = time.perf_counter()
            square @ square
            times.append(time.perf_counter() - start)
        return min(times)

    if seconds(torch.bfloat16) <= seconds(torch.float32):
        return "bf16"
    print("--amp: this CPU has no fast bf16, so all stays in fp32 (--amp bf16 forces it)", file=sys.stderr)
    return None


def warn_if_slow(backbone: str, device: torch.device) -> None:
    """Warn that training takes many hours, before anything is downloaded or decoded."""
    with torch.device("meta"):
        size = sum(p.numel() for p in bare_backbone(backbone).parameters())
    if device.type == "cpu" and size > LARGE:
        print(f"hint: no GPU here, and {backbone} has {size / 1e6:.0f} M parameters: training takes many hours.")
        print("      --backbone vit_tiny_patch16_224 --img-size 112 suits a CPU.")
