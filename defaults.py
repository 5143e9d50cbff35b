"""What a run takes where nothing was said: source, backbone, precision."""

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
    """The hub's catalogue and ViT-B/16; the embedded demo where the hub is out of reach and nothing else was named."""
    if not (args.data or args.backbone or args.weights) and not hub.reachable():
        print(f"The hub ({hub.ENDPOINT}) cannot be reached: training on the embedded demo instead of {HUB_DATA}.")
        print("For files of your own: --data FOLDER --backbone NAME --weights FILE")
        args.data = DEMO
    args.backbone = args.backbone or (DEMO if args.data == DEMO else HUB_BACKBONE)
    args.data = hub.pinned(args.data or HUB_DATA)


def choose_amp(device: torch.device) -> str | None:
    """What `--amp` alone means: bf16 where the device has it, else fp16.

    A CPU without bf16 instructions is a hundred times slower in either than in fp32, so there it means fp32, None.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

    def seconds(dtype: torch.dtype) -> float:  # of a matrix product: no list of CPU flags is as sure
        square, times = torch.ones(256, 256, dtype=dtype), []
        for _ in range(8):  # the others of several processes start meanwhile
            start = time.perf_counter()
            square @ square
            times.append(time.perf_counter() - start)
        return min(times)

    if seconds(torch.bfloat16) <= seconds(torch.float32):
        return "bf16"
    print("--amp: this CPU has no fast bf16, so all stays in fp32 (--amp bf16 forces it)", file=sys.stderr)
    return None


def warn_if_slow(backbone: str, device: torch.device) -> None:
    """Say so before anything is downloaded or decoded."""
    with torch.device("meta"):
        size = sum(p.numel() for p in bare_backbone(backbone).parameters())
    if device.type == "cpu" and size > LARGE:
        print(f"hint: no GPU here, and {backbone} has {size / 1e6:.0f} M parameters: training takes many hours.")
        print("      --backbone vit_tiny_patch16_224 --img-size 112 suits a CPU.")
