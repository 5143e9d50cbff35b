"""Train a checkpoint's heads once more, on whole pictures; the adapters stay as they are.

    python refit.py --data FOLDER

In training the heads see pictures that are moved about and of which patches may be missing; answers come from whole
ones. Here the backbone, adapters merged, embeds each train picture once as it is, and the heads go on learning from
those embeddings alone (after classifier re-training, Kang et al. 2020, arXiv:1910.09217), which takes seconds an epoch.
Where mean accuracy on validation rows does not rise, or clearly fewer labels are accepted, nothing is changed. It is
also what to run once labels were corrected; the classes, and the paths that they may form, stay those of training.
"""

import startup  # noqa: F401

# isort: split
import argparse
import copy
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from arguments import add_catalogue_options, add_checkpoint_options
from calibration import TARGET_PRECISION, calibrate
from data.batches import Rows, epoch_batches, make_loader
from data.split import some
from durable import at_rest
from errors import Parser, UserError, check_writable, exits_cleanly
from evaluate import SCORED, choice, judge, predict
from lora import merge_lora
from models.checkpoint import find_checkpoint, previous_of, read_config, save_checkpoint
from models.classifier import attribute_losses
from step import MAX_GRAD_NORM, learning_rate, parameter_groups
from task import Task, load_task

EPOCHS, BATCH_SIZE, LEARNING_RATE = 7, 256, 1e-3
SMOOTHING = 0.1  # of labels, see `attribute_losses`
DROPOUT = 0.3  # of an embedding: without it the surest answers get worse, as heads alone soon learn by heart
DRAWS = 4  # of the order and of what is dropped: one by itself is better or worse by luck
MOST = 100_000  # train pictures: of a larger catalogue a choice, whose embeddings fit in memory
FEWER = 0.02  # of all labels may be accepted than before: more accuracy is not worth more looking


class Unread(nn.Module):
    """In the place of heads: embeddings (B, D) as they come."""

    def forward(self, embedding: Tensor) -> dict[str, Tensor]:
        return {"embedding": embedding}


def embed(task: Task, rows: np.ndarray, batch_size: int, what: str) -> Tensor:
    """What the heads are given of rows of the store, (N, D), on the CPU."""
    model, device = merge_lora(task.model), next(task.model.parameters()).device
    model.heads = Unread()
    loader = make_loader(task.store, task.known, epoch_batches(rows, batch_size), device)
    return predict(model, loader, task.preprocess, device, what)["embedding"].clone()  # for autograd too


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


def refit(task: Task, rows: np.ndarray, batch_size: int) -> tuple[dict, dict, dict]:
    """Train the heads of the task's model on rows of the store; they are left on the CPU.

    Returns:
        the scores of validation rows before and after, and the calibration that belongs to the heads as they are now.
    """
    val, heads = choice(task, "val", SCORED), task.model.heads
    of_val, of_train = embed(task, val, batch_size, "val"), embed(task, rows, batch_size, "train")
    heads.cpu()
    target = task.config.get("calibration", {}).get("target_precision", TARGET_PRECISION)
    uncalibrated = task.config | {"calibration": None}  # no threshold of the heads of before holds for these

    def judged(calibration: dict | None = None) -> tuple[dict, dict]:
        with torch.inference_mode():
            logits = heads(of_val)
        calibration = calibration or calibrate(logits, task.labels[val], uncalibrated, target)
        calibrated = task._replace(config=task.config | {"calibration": calibration})
        return judge(calibrated, "val", val, logits, joint=True).scores, calibration

    before, _ = judged(task.config.get("calibration"))  # as it is in use, perhaps fitted on many more rows than these
    train_heads(heads, of_train, Rows(*(array[rows] for array in task.known)))
    return before, *judged()


def known_rows(task: Task, split: str) -> np.ndarray:
    """The rows of a split of which anything is known that the model is to predict; of too many a fixed choice."""
    rows = task.store.rows(split)
    labels, numbers, _ = (array[rows] for array in task.known)
    rows = rows[(labels >= 0).any(1) | np.isfinite(numbers).any(1)]
    return some(rows, MOST)


def comparison(before: dict, after: dict) -> str:
    """Accuracy and the share accepted of each class, and the error of each number, as text."""
    lines = [f"{'val':<16}{'accuracy':>9}{'after':>8}{'accepted':>10}{'after':>8}"]
    for name, a in after["attributes"].items():
        was = before["attributes"][name]
        if not a["rows"]:
            continue
        if "mae" in a:
            lines.append(f"{name:<16}{'MAE':>9} {was['mae']:,.4g}, after {a['mae']:,.4g}")
            continue
        accepted = [scores["calibration"]["attributes"][name]["accepted"] for scores in (before, after)]
        lines.append(f"{name:<16}{was['accuracy']:>9.3f}{a['accuracy']:>8.3f}{accepted[0]:>10.3f}{accepted[1]:>8.3f}")
    return "\n".join(lines)


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Train the heads of a checkpoint once more, on whole pictures.")
    add_checkpoint_options(parser)
    add_catalogue_options(parser)
    args = parser.parse_args(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("refit.py is one process: start it with python, not with torchrun")
    folder = find_checkpoint(args.checkpoint).resolve()
    if others := sorted({path.name for path in folder.glob("*")} - set(read_config(folder)["sha256"])):
        raise UserError(f"{folder} also holds {', '.join(others)}: copy its checkpoint into a folder of its own first")
    check_writable(folder.parent / "file", "--checkpoint")
    with at_rest(folder.parent):
        run(args, folder)
    return 0


def run(args: argparse.Namespace, folder: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = load_task(folder, args.weights, args.data, args.cache_dir, args.limit, device, args.store_gb)
    rows, labelled = known_rows(task, "train"), (task.labels[task.store.rows("val")] >= 0).any(1).sum()
    print(f"checkpoint {folder}\n{task.catalogue.name}: {len(rows):,} train and {labelled:,} val rows with labels")
    if not len(rows) or not labelled:
        raise UserError(f"{args.data} has {len(rows):,} train and {labelled:,} val rows with labels; both are needed")
    before, after, fitted = refit(task, rows, args.batch_size)
    print(comparison(before, after))
    (was, accepted_was), (now, accepted) = (
        (scores["mean_accuracy"], scores["calibration"]["accepted"]) for scores in (before, after)
    )
    change = f"mean accuracy {was:.4f} before, {now:.4f} after; accepted {accepted_was:.3f}, {accepted:.3f}"
    if now <= was or accepted < accepted_was - FEWER:
        print(f"{change}: {folder} stays as it was")
        return
    data = task.config["data"] | {"heads_fingerprint": task.catalogue.fingerprint}
    save_checkpoint(folder, task.model, task.config | {"calibration": fitted, "data": data})
    print(
        f"{change}: kept, and calibrated anew. The heads of before are in {previous_of(folder)}; "
        "scores of before, such as metrics.json, are of those"
    )


if __name__ == "__main__":
    main()
