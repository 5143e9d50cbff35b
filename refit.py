"""Train a checkpoint's heads once more, on whole pictures; the adapters stay as they are.

    python refit.py --data FOLDER

In training the heads see pictures that are moved about and of which patches may be missing; answers come from whole
ones. Here the backbone, adapters merged, embeds each train picture once as it is, and the heads go on learning from
those embeddings alone (after classifier re-training, Kang et al. 2020, arXiv:1910.09217), which takes seconds an epoch.
Validation rows say whether that helped; if not, nothing is changed. It is also what to run once labels were corrected.
"""

import startup  # noqa: F401

# isort: split
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from calibration import TARGET_PRECISION, calibrate
from data.batches import Rows, epoch_batches, make_loader
from errors import Parser, UserError, check_writable, exits_cleanly
from evaluate import judge, predict
from lora import merge_lora
from models.checkpoint import find_checkpoint, previous_of, read_config, save_checkpoint
from models.classifier import AttributeClassifier, attribute_losses
from options import add_catalogue_options, add_checkpoint_options
from step import MAX_GRAD_NORM, learning_rate, parameter_groups
from task import Task, load_task

EPOCHS, BATCH_SIZE, LEARNING_RATE = 7, 256, 1e-3
SMOOTHING = 0.1  # of labels, see `attribute_losses`
DROPOUT = 0.3  # of an embedding: without it the surest answers get worse, as heads alone soon learn by heart
DRAWS = 4  # of the order and of what is dropped: one by itself is better or worse by luck
MOST = 100_000  # train pictures: of a larger catalogue a choice, whose embeddings fit in memory


def embed(
    task: Task, model: AttributeClassifier, rows: np.ndarray, batch_size: int, what: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the heads are given of rows of the store, (N, D), and the logits that they make of it; on the CPU."""
    seen, device = [], next(model.parameters()).device
    hook = model.heads.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu()))
    loader = make_loader(task.store, task.known, epoch_batches(rows, batch_size), device)
    with hook:
        logits = predict(model, loader, task.preprocess, device, what)
    return torch.cat(seen), logits


def train_heads(heads: nn.Module, embeddings: Tensor, known: Rows) -> None:
    """Go on training heads, in place, on embeddings (N, D) whose labels and numbers are `known`.

    What is left is the mean of `DRAWS` ways on from the same start, which lie close enough together for their weights
    to be averaged (model soups, Wortsman et al. 2022, arXiv:2203.05482).
    """
    ways = [copy.deepcopy(heads) for _ in range(DRAWS)]
    for seed, way in enumerate(ways):
        train_once(way, embeddings, known, seed)
    with torch.no_grad():
        for p, *ends in zip(heads.parameters(), *(way.parameters() for way in ways), strict=True):
            p.copy_(torch.stack(ends).mean(0))


def train_once(heads: nn.Module, embeddings: Tensor, known: Rows, seed: int) -> None:
    """All attributes count alike: there are no adapters here for one to pull away from another."""
    torch.manual_seed(seed)
    labels, numbers = torch.from_numpy(known.labels.astype(np.int64)), torch.from_numpy(known.numbers)
    optimizer = torch.optim.AdamW(parameter_groups(dict(heads.named_parameters())), fused=True)
    epochs = [epoch_batches(np.arange(len(embeddings)), BATCH_SIZE, seed, epoch) for epoch in range(EPOCHS)]
    batches = [torch.from_numpy(batch) for batches in epochs for batch in batches]
    for step, rows in enumerate(tqdm(batches, desc=f"heads {seed + 1}/{DRAWS}", unit="step", leave=False)):
        said = heads(F.dropout(embeddings[rows], DROPOUT))
        losses = attribute_losses(said, labels[rows], smoothing=SMOOTHING, numbers=numbers[rows])
        losses.sum().backward()
        nn.utils.clip_grad_norm_(heads.parameters(), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), LEARNING_RATE)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def refit(task: Task, batch_size: int) -> tuple[dict, dict, dict]:
    """Train the heads of the task's model, which are left on the CPU.

    Returns:
        the scores of validation rows before and after, and the calibration that belongs to the heads as they are now.
    """
    rows, val = task.store.rows("train"), task.store.rows("val")
    if len(rows) > MOST:
        rows = np.sort(np.random.default_rng(0).choice(rows, MOST, replace=False))
    target = task.config.get("calibration", {}).get("target_precision", TARGET_PRECISION)

    def judged(logits: dict[str, Tensor]) -> tuple[dict, dict]:
        fitted = calibrate(logits, task.labels[val], task.config, target)
        calibrated = task._replace(config=task.config | {"calibration": fitted})
        return judge(calibrated, "val", logits, joint=True).scores, fitted

    merged, heads = merge_lora(task.model), task.model.heads
    of_val, logits = embed(task, merged, val, batch_size, "val")
    before, _ = judged(logits)
    of_train, _ = embed(task, merged, rows, batch_size, "train")
    train_heads(heads.cpu(), of_train, Rows(*(array[rows] for array in task.known)))
    with torch.inference_mode():
        after, fitted = judged(heads(of_val))
    return before, after, fitted


def comparison(before: dict, after: dict) -> str:
    """Accuracy and the share accepted of each class attribute, as text."""
    lines = [f"{'val':<16}{'accuracy':>9}{'after':>8}{'accepted':>10}{'after':>8}"]
    for name in after["calibration"]["attributes"]:
        accuracy = [scores["attributes"][name]["accuracy"] for scores in (before, after)]
        accepted = [scores["calibration"]["attributes"][name]["accepted"] for scores in (before, after)]
        if after["attributes"][name]["rows"]:
            lines.append(f"{name:<16}{accuracy[0]:>9.3f}{accuracy[1]:>8.3f}{accepted[0]:>10.3f}{accepted[1]:>8.3f}")
    return "\n".join(lines)


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Train the heads of a checkpoint once more, on whole pictures.")
    add_checkpoint_options(parser)
    add_catalogue_options(parser)
    args = parser.parse_args(argv)
    folder = find_checkpoint(args.checkpoint)
    if others := sorted({path.name for path in folder.glob("*")} - set(read_config(folder)["sha256"])):
        raise UserError(f"{folder} also holds {', '.join(others)}: copy its checkpoint into a folder of its own first")
    check_writable(folder.with_name(folder.name + ".new"), "--checkpoint")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = load_task(folder, args.weights, args.data, args.cache_dir, args.limit, device, args.store_gb)
    name, rows = task.catalogue.name, {split: len(task.store.rows(split)) for split in ("train", "val")}
    if not all(rows.values()):
        raise UserError(f"{args.data} has {rows['train']:,} train and {rows['val']:,} val rows; both are needed")
    if not (task.labels[task.store.rows("val")] >= 0).any():
        raise UserError(f"{args.data}: no row of the val split has a label of a class; label more of its rows")
    print(f"checkpoint {folder}\n{name}: {rows['train']:,} train and {rows['val']:,} val rows")
    before, after, fitted = refit(task, args.batch_size)
    print(comparison(before, after))
    change = f"mean accuracy {before['mean_accuracy']:.4f} before, {after['mean_accuracy']:.4f} after"
    if after["mean_accuracy"] <= before["mean_accuracy"]:
        print(f"{change}: {folder} stays as it was")
        return 0
    save_checkpoint(folder, task.model, task.config | {"calibration": fitted})
    print(f"{change}: kept, and calibrated anew; the heads of before are in {previous_of(folder)}")
    return 0


if __name__ == "__main__":
    main()
