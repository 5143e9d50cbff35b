"""A training step of LoRA on a ViT: this project beside PEFT, full fine-tuning, and the least any LoRA step must do.

    pip install -r benchmarks/requirements.txt
    python benchmarks/lora_step.py [--amp bf16] [--batch-size 4] [--ways NAME …] [--compile [NAME …]] [--plot FILE.png]

A step is forward, backward and AdamW on pictures in memory, ViT-B/16 at 224 px, rank 16 on query, key, value and dense,
dropout 0.05, random weights (the numbers do not depend on them). The ways take turns in one process, one step at a
time, or ten on a GPU; speeds are ratios to PEFT on Hugging Face's ViT, medians over rounds. *floor* is two passes of
timm's frozen forward without gradients, plus 5 % for the low-rank products; *floor, base ready* is the same with
weights kept ready to compute with, as in this project's step but not in timm's. *kept* is the memory held between
forward and backward beside the model itself, *peak* the most at any time of a step. For all ways glibc keeps what a
step frees (`memory.py`).
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import timm
import torch
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import in_turn, machine, peak_memory, ratios

from lora import apply_lora, keep_base_in, merge_lora
from models.attention import use_packed_attention
from models.backbone import VIT_TARGETS

RANK, ALPHA, CLASSES = 16, 32, 100
BLOCKS = ("Block", "ViTLayer")  # of timm and of transformers
HF_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class OfViT(nn.Module):
    """The CLS token of Hugging Face's ViT, as timm's ViT gives it."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, images):
        return self.vit(pixel_values=images).last_hidden_state[:, 0]


def timm_vit(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=0)


def peft_config(targets, dropout: float) -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=targets)


def ours(name: str, dropout: float) -> nn.Module:
    return apply_lora(use_packed_attention(timm_vit(name)), VIT_TARGETS, RANK, ALPHA, dropout, VIT_TARGETS)


def hf_vit(vit: nn.Module) -> transformers.ViTModel:
    """Hugging Face's ViT of the size of a timm ViT, with random weights."""
    config = transformers.ViTConfig(
        hidden_size=vit.embed_dim,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=vit.blocks[0].attn.num_heads,
        intermediate_size=vit.blocks[0].mlp.fc1.out_features,
        image_size=vit.patch_embed.img_size[0],
        patch_size=vit.patch_embed.patch_size[0],
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def peft_hf(name: str, dropout: float) -> nn.Module:
    return OfViT(peft.get_peft_model(hf_vit(timm_vit(name)), peft_config(HF_TARGETS, dropout)))


def peft_timm(name: str, dropout: float) -> nn.Module:
    return peft.get_peft_model(timm_vit(name), peft_config(["qkv", "attn.proj", "fc1", "fc2"], dropout))


def frozen(name: str, dropout: float) -> nn.Module:
    return timm_vit(name).requires_grad_(False)


def ready(name: str, dropout: float) -> nn.Module:
    return merge_lora(ours(name, dropout))  # of layers whose base `keep_base_in` keeps; untrained LoRA adds nothing


WAYS = {
    "PEFT on HF ViT": (peft_hf, 0.05),
    "PEFT on HF ViT, dropout 0": (peft_hf, 0.0),
    "PEFT on timm": (peft_timm, 0.05),
    "this project": (ours, 0.05),
    "this project, dropout 0": (ours, 0.0),
    "full fine-tuning": (lambda name, dropout: timm_vit(name), 0.0),
    "linear probe": (frozen, 0.0),
    "linear probe, base ready": (ready, 0.0),
}
FIRST, OURS = next(iter(WAYS)), "this project"
FLOORS = {"floor": "linear probe", "floor, base ready": "linear probe, base ready"}  # what passes twice


class Step:
    """One way of training, with what it needs to take a step."""

    def __init__(self, make, dropout: float, args: argparse.Namespace, device: torch.device, compiled: bool = False):
        torch.manual_seed(0)
        backbone = make(args.backbone, dropout).to(device)
        if compiled:  # block by block, as `train.py --compile` does
            for block in (module for module in backbone.modules() if type(module).__name__ in BLOCKS):
                block.compile(dynamic=False)
        else:
            keep_base_in(backbone, AMP[args.amp] or torch.float32)  # of our LoRA layers, which the rivals do not have
        width = timm.create_model(args.backbone, num_classes=0).num_features
        self.model = nn.Sequential(backbone, nn.Linear(width, CLASSES, device=device)).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.autocast = torch.autocast(device.type, AMP[args.amp], enabled=AMP[args.amp] is not None)

    def loss(self, images, labels):
        with self.autocast:
            return F.cross_entropy(self.model(images).float(), labels)

    def __call__(self, images, labels):
        self.scaler.scale(self.loss(images, labels)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def kept(self, images, labels) -> int:
        """Bytes more in memory after the forward pass than before it: what is kept for the backward pass."""
        if images.is_cuda:
            before = torch.cuda.memory_allocated()
            loss = self.loss(images, labels)
            return torch.cuda.memory_allocated() - before
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = self.loss(images, labels)
        del loss
        return sum(event.self_cpu_memory_usage for event in profile.key_averages())

    @torch.no_grad()
    def twice_forward(self, images, labels):
        for _ in range(2):
            self.loss(images, labels)


def in_a_row(step: Callable[[], object], count: int) -> None:
    for _ in range(count):
        step()


def draw(speeds: dict[str, float], kept: dict[str, int], title: str, path: Path) -> None:
    figure = Figure(figsize=(9, 1 + 0.3 * len(speeds)), layout="constrained")
    names = list(reversed(speeds))
    panels = figure.subplots(1, 2, sharey=True)
    values = [speeds, {name: kept.get(name, 0) / 1e9 for name in names}]
    for axes, value, label in zip(panels, values, ("speed, PEFT on HF ViT = 1", "kept for backward, GB"), strict=True):
        colours = ["#1f6feb" if name.startswith("this project") else "#c3c9d0" for name in names]
        bars = axes.barh(names, [value[name] for name in names], color=colours)
        axes.bar_label(bars, [f"{value[name]:.2f}" if value[name] else "" for name in names], padding=3, fontsize=8)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--amp", choices=AMP, default="fp32")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)", metavar="NAME")
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=WAYS,
        help=f"these ways also with their blocks by torch.compile, and the floor (default: {OURS})",
        metavar="NAME",
    )
    parser.add_argument("--plot", type=Path, help="draw the table here")
    parser.add_argument(
        "--profile", action="store_true", help="also say where this project's step and the floor spend time"
    )
    args = parser.parse_args()
    if args.profile and OURS not in args.ways:
        parser.error(f"--profile is of {OURS!r}; name it among --ways")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch._dynamo.config.recompile_limit = 64  # ways share their blocks' code, which is not compiled past this limit
    also = () if args.compile is None else args.compile or [OURS]
    steps = {name: Step(*WAYS[name], args, device) for name in [FIRST, *args.ways]}
    steps |= {f"{name}, compiled": Step(*WAYS[name], args, device, compiled=True) for name in also}
    size = timm.data.resolve_model_data_config(timm.create_model(args.backbone))["input_size"]
    batch = (
        torch.randn(args.batch_size, *size, device=device),
        torch.randint(CLASSES, (args.batch_size,), device=device),
    )
    kept = {name: step.kept(*batch) for name, step in steps.items()}
    floors = {name: (steps.get(of) or Step(*WAYS[of], args, device)).twice_forward for name, of in FLOORS.items()}
    if also:  # with torch.compile no base is kept ready
        name, of = next(iter(FLOORS.items()))
        floors[f"{name}, compiled"] = Step(*WAYS[of], args, device, compiled=True).twice_forward
    ways = steps | floors
    count = 10 if device.type == "cuda" else 1  # on a GPU, kernels are launched while the last step's still run
    turns = {name: partial(in_a_row, partial(way, *batch), count) for name, way in ways.items()}
    seconds = {name: [s / count for s in times] for name, times in in_turn(turns, args.rounds, device).items()}
    peak = {name: peak_memory(partial(step, *batch), device) for name, step in steps.items()}
    seconds |= {name: [1.05 * s for s in seconds[name]] for name in floors}
    times_first = {name: ratios(seconds[FIRST], times) for name, times in seconds.items()}

    title = f"{args.backbone}, {args.amp}, batch {args.batch_size}\n{machine(device, peft, transformers)}"
    print(title)
    print(f"{'':<36}{'images/s':>9}{'ratio':>7}{'rounds':>15}{'kept, GB':>10}{'ratio':>7}{'peak, GB':>10}{'ratio':>7}")
    for name, times in seconds.items():
        speed, ratio = args.batch_size / statistics.median(times), statistics.median(times_first[name])
        spread = f"{min(times_first[name]):.2f} to {max(times_first[name]):.2f}"
        bytes_ = [of for of in (kept, peak) if name in of]
        memory = "".join(f"{of[name] / 1e9:>10.2f}{of[name] / of[FIRST]:>7.2f}" for of in bytes_)
        print(f"{name:<36}{speed:>9.2f}{ratio:>7.2f}{spread:>15}{memory}")
    if args.profile:
        for name in [*floors, OURS, *({f"{OURS}, compiled"} & steps.keys())]:
            with torch.profiler.profile() as profile:
                ways[name](*batch)
            key = f"self_{device.type}_time_total"
            print(f"\n{name}\n{profile.key_averages().table(sort_by=key, row_limit=14, max_name_column_width=44)}")
    if args.plot:
        draw({name: statistics.median(r) for name, r in times_first.items()}, kept, title, args.plot)


if __name__ == "__main__":
    main()
