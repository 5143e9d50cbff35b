"""The recipe's claims, tested: LoRA by rank and targets beside a linear probe and full fine-tuning; seven tasks in one.

    python benchmarks/recipe.py --amp --data FOLDER --backbone vit_tiny_patch16_224 --weights FILE --img-size 112

Takes the options of `train.py`; each way trains with all of them but its own. Scores are of the validation rows after
the last epoch, each attribute's most probable class; test rows are left alone. Every way runs in a process of its own,
so that its peak memory is its own, and leaves a file in --results: what is there is not run again.

    --jobs N         ways at a time, each on its share of the cores (default: 1)
    --results DIR    (default: benchmarks/results)
    --full-lr LR     learning rate of full fine-tuning (default: a tenth of --lr)
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import in_processes, markdown

import train
from data.schema import FASHION
from defaults import choose_amp, choose_source
from errors import Parser, exits_cleanly, positive_int
from evaluate import evaluate
from lora import keep_base_in, merge_lora
from models.checkpoint import save_checkpoint, trained_params
from options import parse_args
from runs import Board
from state import TrainingState
from step import parameter_groups
from task import AMP, setup

LORA = {f"LoRA, rank {rank}": ["--rank", str(rank), "--alpha", str(2 * rank)] for rank in (4, 8, 16, 32)}
LORA["LoRA, rank 16, query and value"] = ["--rank", "16", "--alpha", "32", "--targets", "query", "value"]
PROBE, FULL, MULTI = "linear probe", "full fine-tuning", "LoRA, rank 16"
SINGLE = {f"{a.name} alone": a.name for a in FASHION}
WAYS = [PROBE, *LORA, FULL, *SINGLE]


def split_options(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's own options, and those of `train.py`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=positive_int, default=1)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--full-lr", type=float)
    parser.add_argument("--way", choices=WAYS, help="run this one, here")
    return parser.parse_known_args(words)


def run(way: str, words: list[str], full_lr: float | None, folder: Path) -> dict:
    """Train one way and score it; folder: for what training leaves."""
    words = words + LORA.get(way, LORA[MULTI])
    if way in SINGLE:
        (folder / "alone.toml").write_text(alone(SINGLE[way]), encoding="utf-8")
        words += ["--attributes", str(folder / "alone.toml")]
    args = parse_args(words)
    choose_source(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    amp = choose_amp(device) if args.amp == "auto" else args.amp
    args.out, args.amp = folder, None if way == FULL else amp  # weights that learn stay in fp32
    torch.manual_seed(args.seed)
    task = setup(args, device)
    args.amp = amp
    if way in (PROBE, FULL):  # an untrained adapter adds nothing: what is left is the backbone as it was
        task = task._replace(model=merge_lora(task.model))
    if way == PROBE:  # as `setup` did for the layers with LoRA
        keep_base_in(task.model, AMP[amp] or torch.float32)
    if way == FULL:
        task.model.requires_grad_(True)
        args.lr = full_lr or args.lr / 10

    params = trained_params(task.model)
    optimizer = torch.optim.AdamW(parameter_groups(params), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = TrainingState(folder, task.model, task.config, optimizer, scaler)
    board, going = Board(folder, task.names, {}, 0), SimpleNamespace(made=False)
    epoch_steps, seconds = train.steps_in_epoch(args, task), 0.0
    for _ in range(args.epochs):
        start = time.perf_counter()
        train.train_epoch(args, task, state, epoch_steps * args.epochs, board, going)
        seconds += time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    scores = evaluate(task, "val", joint=False).scores
    save_checkpoint(folder / "best", task.model, task.config)
    return {
        "lr": args.lr,
        "epochs": args.epochs,
        "trainable": sum(p.numel() for p in params.values()),
        "bytes": (folder / "best" / "adapter.safetensors").stat().st_size,
        "images_per_second": args.epochs * len(task.store.rows("train")) / seconds,
        "peak_memory": peak,
        "accuracy": {name: scores["attributes"][name]["accuracy"] for name in task.classes},
    }


def alone(name: str) -> str:
    """The schema of one attribute, as the built-in one declares it; a weight means nothing to one that is alone."""
    attribute = next(a for a in FASHION if a.name == name)
    derive = f'derive = "{attribute.derive}"\n' if attribute.derive else ""
    return f'[attributes.{name}]\nlevel = {attribute.level}\ncolumn = "{attribute.column}"\n{derive}'


def peak_memory() -> int:
    """Bytes of this process, images and all. Linux counts in kilobytes, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seven(found: dict[str, dict]) -> dict:
    """The figures of seven models of one attribute each, trained one after the other, taken together."""
    models = [found[way] for way in SINGLE]
    return {
        "trainable": sum(m["trainable"] for m in models),
        "bytes": sum(m["bytes"] for m in models),
        "images_per_second": 1 / sum(1 / m["images_per_second"] for m in models),
        "peak_memory": max(m["peak_memory"] for m in models),
        "accuracy": {name: found[way]["accuracy"][name] for way, name in SINGLE.items()},
    }


def table(found: dict[str, dict]) -> str:
    """Markdown, a row each way."""
    names = [a.name for a in FASHION]
    head = ["", "trained", "file, MB", "images/s", "peak, MB", *names, "mean"]
    lines = []
    shown = {way: found[way] for way in WAYS if way not in SINGLE} | {"seven models, rank 16": seven(found)}
    for way, m in shown.items():
        accuracy = [m["accuracy"][name] for name in names]
        figures = [f"{m['trainable']:,}", f"{m['bytes'] / 1e6:.1f}", f"{m['images_per_second']:.0f}"]
        figures += [f"{m['peak_memory'] / 1e6:,.0f}", *(f"{a:.3f}" for a in accuracy)]
        lines.append([way, *figures, f"{sum(accuracy) / len(accuracy):.3f}"])
    return markdown(head, lines)


@exits_cleanly
def main() -> int:
    own, words = split_options(sys.argv[1:])
    if own.way:
        with tempfile.TemporaryDirectory() as folder:
            figures = run(own.way, words, own.full_lr, Path(folder))
        (own.results / f"{own.way}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        return 0
    parse_args(words)  # a mistake is better found now
    own.results.mkdir(parents=True, exist_ok=True)
    files = {way: own.results / f"{way}.json" for way in WAYS}
    in_processes({file: [__file__, *sys.argv[1:], "--way", way] for way, file in files.items()}, own.jobs, "ways")
    print(f"{own.jobs} at a time on {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(table({way: json.loads(file.read_text(encoding="utf-8")) for way, file in files.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
