"""Train LoRA adapters and hierarchical heads on a frozen timm ViT.

    python train.py --amp --accum 2

A *micro-batch* is one forward and backward; a *window* is `--accum` of them; a *step* is the optimizer update that ends
a window. The order of the rows, the flips, the dropout masks and the learning rate are functions of the seed and the
step alone, so a run that was stopped and resumed goes the way of one that never was.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from calibration import calibrate
from data.attributes import FASHION, class_counts, encode_labels, fit_label_maps, known_paths
from data.batches import epoch_batches, make_loader
from data.preprocess import Preprocess
from data.sources import load_source
from data.split import SPLITS
from data.store import common_size, open_store
from errors import UserError, exits_cleanly
from evaluate import Task, evaluate
from figures import label_sheet
from lora import get_adapter_params, keep_base_in, parameter_summary, quantize_base
from metrics import scores_table, trust_table
from models.backbone import create_backbone
from models.checkpoint import attach, load_tensors, read_config, save_checkpoint, trained_params
from models.classifier import attribute_losses
from options import choose_amp, choose_source, parse_args, warn_if_slow
from runs import Board, StopRequest, discard_run, open_run, optimizer_tensors, restore_optimizer

WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
WARMUP = 0.05  # share of all steps
LOG_EVERY = 10  # steps: reading a loss makes a GPU wait
LORA_OPTIONS = ("targets", "rank", "alpha", "dropout", "layers", "rslora", "dora", "pissa")  # as `lora_layers` has them
AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
INTERRUPTED = 130  # exit code, as a shell gives it for Ctrl-C


def setup(args: argparse.Namespace, device: torch.device) -> Task:
    """Pictures, labels, and the model on its device. `config` is all that rebuilds it, as checkpoints keep it."""
    catalogue = load_source(args.data, args.cache_dir, args.limit)
    backbone, fingerprint = create_backbone(args.backbone, args.weights, args.img_size)
    wants = timm.data.resolve_model_data_config(backbone)
    size = wants["input_size"][1:]
    preprocess = Preprocess(
        common_size(catalogue, max(size)), size, wants["interpolation"], wants["mean"], wants["std"]
    )
    store = open_store(catalogue, preprocess.canvas, args.cache_dir)
    store.write_skipped(args.out / "skipped.csv")
    counts = {split: len(store.rows(split)) for split in SPLITS}
    if not all(counts.values()):
        raise UserError(f"{catalogue.name} is too small: {counts} rows; every split needs some")
    maps = fit_label_maps(catalogue.columns, store.rows("train"), FASHION, args.min_brand_count)
    labels = encode_labels(catalogue.columns, maps, FASHION)
    sizes = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    print(f"{catalogue.name}: {sizes} rows, {len(store.skipped):,} skipped")
    print(f"decoded images: {store.path} ({store.nbytes / 1e6:,.0f} MB, {'new' if store.built else 'reused'})")
    print("classes:", ", ".join(f"{name} {len(m.labels)}" for name, m in maps.items()))

    counts = class_counts(labels[store.rows("train")], maps)
    config = {
        "backbone": {"name": args.backbone, "img_size": args.img_size, "fingerprint": fingerprint},
        "lora": {name: getattr(args, name) for name in LORA_OPTIONS},
        "attributes": [
            {"name": a.name, "level": a.level, **asdict(maps[a.name]), "counts": counts[a.name]} for a in FASHION
        ],
        "paths": known_paths(labels[store.rows("train")], FASHION),
        "preprocess": asdict(preprocess),
        "data": {"name": catalogue.name, "rows": len(catalogue), "fingerprint": catalogue.fingerprint},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "timm": timm.__version__},
    }
    model = attach(backbone, config)
    if args.base == "int8":
        quantize_base(model.backbone)
    model.to(device)
    if args.amp:
        keep_base_in(model, AMP[args.amp])
    heads = sum(p.numel() for p in model.heads.parameters())
    adapters = sum(p.numel() for p in get_adapter_params(model).values())
    print(f"LoRA {adapters:,} and heads {heads:,}: {parameter_summary(model)}")
    return Task(model, config, preprocess, catalogue, store, labels)


def parameter_groups(params: Mapping[str, nn.Parameter], lora_plus: float = 1.0) -> list[dict]:
    """Weight decay on matrices; none on biases, norms and DoRA's lengths.

    `lora_plus`, the ratio of B's learning rate to that of all others, is LoRA+ (Hayou et al. 2024, arXiv:2402.12354).
    """
    is_B = {name: name.endswith("lora_B") for name in params}
    return [
        {"params": [p for n, p in params.items() if is_B[n]], "weight_decay": WEIGHT_DECAY, "lr_ratio": lora_plus},
        {
            "params": [p for n, p in params.items() if p.ndim > 1 and not is_B[n]],
            "weight_decay": WEIGHT_DECAY,
            "lr_ratio": 1.0,
        },
        {"params": [p for p in params.values() if p.ndim <= 1], "weight_decay": 0.0, "lr_ratio": 1.0},
    ]


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero: a function of the step alone."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def steps_in_epoch(args: argparse.Namespace, task: Task) -> int:
    return math.ceil(math.ceil(len(task.store.rows("train")) / args.batch_size) / args.accum)


def windows(loader: Iterable, accum: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Micro-batches in groups of `accum`; the last group of an epoch may be shorter."""
    batches = iter(loader)
    while window := list(islice(batches, accum)):
        yield window


def train_step(
    model, window, optimizer, scaler, lr: float, amp: torch.dtype | None, preprocess
) -> tuple[Tensor, Tensor]:
    """One optimizer update over a window of micro-batches (pixels (B, H, W, 3) uint8, labels (B, A)).

    Returns:
        the window's loss of each attribute (A,) and the gradient norm before clipping, both still on the device.
    """
    device = next(model.parameters()).device
    # The mean is over the labels present in the whole window: gradients equal those of one big batch.
    known = sum((labels >= 0).sum(0) for _, labels in window).to(device)  # (A,)
    losses = torch.zeros(len(known), device=device)
    for pixels, labels in window:
        pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images = preprocess(pixels, flip=torch.rand(len(pixels), device=device) < 0.5)  # (B, 3, S, S)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = model(images)
        micro = attribute_losses(logits, labels, known)
        scaler.scale(micro.sum()).backward()
        losses += micro.detach()
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    scaler.unscale_(optimizer)  # before clipping: the norm is the true gradient's
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], MAX_GRAD_NORM)
    scaler.step(optimizer)  # not taken where fp16 overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return losses, norm


def train_epoch(
    args: argparse.Namespace, task: Task, optimizer, scaler, step: int, total: int, board: Board, stop: StopRequest
) -> int:
    """Train from `step` to the end of its epoch, or until a stop is asked for; returns the step reached."""
    rows = task.store.rows("train")
    epoch, done = divmod(step, steps_in_epoch(args, task))
    batches = epoch_batches(rows, args.batch_size, args.seed, epoch)[done * args.accum :]
    loader = make_loader(task.store, task.labels, batches, next(task.model.parameters()).device)
    task.model.train()
    with tqdm(total=len(rows), initial=len(rows) - sum(map(len, batches)), unit="img", smoothing=0.05) as bar:
        bar.set_description(f"epoch {epoch + 1}/{args.epochs}")
        for window in windows(loader, args.accum):
            torch.manual_seed(args.seed * 1_000_003 + step)  # flips and dropout
            lr = learning_rate(step, total, args.lr)
            losses, norm = train_step(task.model, window, optimizer, scaler, lr, AMP[args.amp], task.preprocess)
            bar.update(sum(len(pixels) for pixels, _ in window))
            if step % LOG_EVERY == 0:
                losses, speed = losses.tolist(), bar.format_dict["rate"] or 0
                if not math.isfinite(sum(losses)):
                    raise UserError(f"the loss is {sum(losses)} at step {step}; try a lower --lr than {args.lr}")
                bar.set_postfix(loss=f"{sum(losses):.3f}")
                scalars = {"learning_rate": lr, "gradient_norm": norm.item(), "images_per_second": speed}
                board.train(step, losses, loss=sum(losses), **scalars)
            step += 1
            if stop.made:
                break
    return step


def check_same(saved: dict, config: dict, out: Path) -> dict:
    """`saved`, the config a run was stopped with, if what it is now set up with is still the same.

    Raises:
        UserError: other base weights, labels, or rows.
    """
    now = json.loads(json.dumps(config))
    for what, found, wanted in (
        ("base weights are", now["backbone"]["fingerprint"], saved["backbone"]["fingerprint"]),
        ("catalogue has rows:", now["data"]["rows"], saved["data"]["rows"]),
    ):
        if found != wanted:
            raise UserError(f"--resume: the {what} {found}, but {out} was trained with {wanted}")
    for key in ("attributes", "paths", "preprocess"):
        if now[key] != saved[key]:
            raise UserError(f"--resume: the catalogue is not the one {out} was trained on: its {key} differ")
    return saved


def fit(args: argparse.Namespace, task: Task, device: torch.device) -> bool:
    """Train to the end, or until Ctrl-C (then False). Leaves `best/`, by mean validation accuracy, and `last/`."""
    total = steps_in_epoch(args, task) * args.epochs
    params = trained_params(task.model)
    optimizer = torch.optim.AdamW(parameter_groups(params, args.lora_plus), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    progress = {"step": 0, "best_accuracy": -1.0, "best_epoch": 0}
    if args.resume:
        progress = check_same(read_config(args.out / "last"), task.config, args.out)["progress"]
        load_tensors(args.out / "last", task.model)
        restore_optimizer(optimizer, params, load_file(args.out / "last" / "optimizer.safetensors"))
        scaler.load_state_dict(progress["scaler"])
        print(f"going on with {args.out} at step {progress['step']:,} of {total:,}")

    def save(name: str, **facts) -> None:
        progress["scaler"] = scaler.state_dict()
        extra = {"optimizer.safetensors": optimizer_tensors(optimizer, params)} if name == "last" else {}
        save_checkpoint(args.out / name, task.model, task.config | facts | {"progress": progress}, extra)

    board = Board(args.out, list(task.classes), progress["step"])
    with StopRequest() as stop:
        while progress["step"] < total:
            progress["step"] = train_epoch(args, task, optimizer, scaler, progress["step"], total, board, stop)
            if progress["step"] % steps_in_epoch(args, task) == 0:
                scores, rows, logits, answers = evaluate(task, "val", device)
                print(scores_table(scores))
                shown, said = rows[:12], answers.labels[:12].numpy()
                sheet = label_sheet(list(task.store.pixels[shown]), task.labels[shown], said, task.classes)
                board.validation(progress["step"] - 1, scores, sheet)  # the step that was just taken
                if scores["mean_accuracy"] > progress["best_accuracy"]:
                    epoch = progress["step"] // steps_in_epoch(args, task)
                    progress |= {"best_accuracy": scores["mean_accuracy"], "best_epoch": epoch}
                    save("best", calibration=calibrate(logits, task.labels[rows], task.config))
            save("last")
            if stop.made:
                return False

    # Only now the test rows, with the epoch that validation chose.
    load_tensors(args.out / "best", task.model)
    best = task._replace(config=read_config(args.out / "best"))  # with its calibration
    scores = evaluate(best, "test", device).scores
    (args.out / "metrics.json").write_text(json.dumps(scores, indent=1) + "\n")
    board.close(args, scores)
    print(f"\ntest, epoch {progress['best_epoch']} of {args.epochs} (best on validation):\n{scores_table(scores)}")
    print(trust_table(scores))
    return True


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not args.resume:
        choose_source(args)
        args.amp = choose_amp(device) if args.amp == "auto" else args.amp
    args = open_run(args)
    torch.manual_seed(args.seed)
    try:
        warn_if_slow(args.backbone, device)
        task = setup(args, device)
    except UserError:
        if not args.resume:
            discard_run(args.out)
        raise
    print(f"run {args.out}, in {args.amp or 'fp32'}; watch it: tensorboard --logdir {args.out.parent}")
    if not fit(args, task, device):
        print(f"stopped and saved in {args.out / 'last'}; go on with: python train.py --resume --out {args.out}")
        return INTERRUPTED
    print(f"\ntrained: {args.out / 'best'}; try: python infer.py IMAGE --checkpoint {args.out / 'best'}")
    return 0


if __name__ == "__main__":
    main()
