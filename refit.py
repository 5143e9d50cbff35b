"""Train a checkpoint's heads once more, on whole pictures; the adapters stay as they are.

    python refit.py --data FOLDER
    python refit.py --data FOLDER --neighbours    and keep the train pictures, whose labels then count too

In training, the heads see augmented pictures, of which patches may be missing; in use they see whole ones. Here the
backbone, adapters merged, embeds each train picture once as it is, and the heads go on learning from those embeddings
alone (after classifier re-training, Kang et al. 2020, arXiv:1910.09217), which takes seconds an epoch. With neighbours,
each answer also depends on the most similar train pictures (`models.neighbours`). Where mean accuracy on validation
rows does not rise (numbers do not count), or clearly fewer labels are accepted, nothing is changed, unless neighbours
are to be removed. Run it also after correcting labels; classes and known paths stay those of training.
"""

import startup  # noqa: F401

# isort: split
import argparse
import copy
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from arguments import add_catalogue_options, add_checkpoint_options
from calibration import TARGET_PRECISION, calibrate, fit_temperature
from data.attributes import HARDLY_MEANT
from data.batches import Rows, epoch_batches
from data.catalogue import skipped_why
from data.split import at_most
from durable import at_rest
from errors import Parser, UserError, check_writable, exits_cleanly
from evaluate import SCORED, choice, judge, predict, unknown_labels
from lora import merge_lora
from models.checkpoint import find_checkpoint, previous_of, read_config, save_checkpoint
from models.classifier import AttributeClassifier, attribute_losses
from models.hog import hog
from models.neighbours import FILE, Alike, Neighbours
from models.schema import learnt_from
from step import MAX_GRAD_NORM, learning_rate, parameter_groups
from task import Task, load_task

EPOCHS, BATCH_SIZE, LEARNING_RATE = 7, 256, 1e-3
SMOOTHING = 0.1  # of labels, see `attribute_losses`
DROPOUT = 0.3  # of an embedding: without it the surest answers get worse, as heads alone soon overfit
DRAWS = 4  # runs with an order and dropout of their own: a single one is better or worse by luck
MOST = 100_000  # train pictures, of larger catalogues a choice, so that their embeddings fit in memory
AT_ONCE = 256  # pictures that are compared with all those that are kept
ROUNDS = 100  # of fitting a share: enough for two digits of it
FEWER = 0.02  # acceptance may fall by this share of all labels: more accuracy is not worth more review


class Seen(NamedTuple):
    """What heads and neighbours take as input, for N pictures: their edges (N, n) and embeddings (N, D)."""

    hog: Tensor
    embedding: Tensor


class Looking(nn.Module):
    """A model that outputs what its heads and neighbours take as input; edges are left empty unless `look`."""

    def __init__(self, model: AttributeClassifier, look: bool):
        super().__init__()
        self.model, self.look = model, look

    def forward(self, images: Tensor, tokens: Tensor | None) -> dict[str, Tensor]:
        embedding = self.model.embedding(images, tokens)
        return {"hog": hog(images) if self.look else embedding[:, :0], "embedding": embedding}


def embed(task: Task, rows: np.ndarray, batch_size: int, what: str, look: bool) -> Seen:
    """The input of heads and neighbours for rows of the store, on the CPU; edges are left empty unless `look`."""
    seen = predict(Looking(merge_lora(task.model), look), task, rows, batch_size, what)
    return Seen(*(tensor.clone() for tensor in seen.values()))  # outside of inference mode, for autograd


def train_heads(heads: nn.Module, embeddings: Tensor, known: Rows) -> None:
    """Continue to train heads, in place, on embeddings (N, D) whose labels and numbers are `known`.

    The result is the mean of the weights that `DRAWS` runs from the same start end with, which lie close enough
    together to be averaged (model soups, Wortsman et al. 2022, arXiv:2203.05482).
    """
    ways = [copy.deepcopy(heads) for _ in range(DRAWS)]
    for seed, way in enumerate(ways):
        train_once(way, embeddings, known, seed)
    with torch.no_grad():
        for p, *ends in zip(heads.parameters(), *(way.parameters() for way in ways), strict=True):
            p.copy_(torch.stack(ends).mean(0))


def train_once(heads: nn.Module, embeddings: Tensor, known: Rows, seed: int) -> None:
    """Train heads, in place. All attributes have equal weight: here none can pull adapters away from another."""
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


@torch.inference_mode()
def answers(model: AttributeClassifier, seen: Seen) -> dict[str, Tensor]:
    """{attribute: logits (N, ·)} of pictures that were embedded."""
    logits = model.heads(seen.embedding)
    return logits if model.neighbours is None else model.neighbours(nearest(model.neighbours, seen), logits)


def nearest(neighbours: Neighbours, seen: Seen) -> Alike:
    """The most similar train pictures, for `AT_ONCE` pictures at a time: comparing them with all takes memory."""
    pieces = zip(*(tensor.split(AT_ONCE) for tensor in seen), strict=True)
    found = [neighbours.nearest(*piece) for piece in pieces]
    return Alike(*map(torch.cat, zip(*found, strict=True)))


@torch.inference_mode()
def look_up(task: Task, rows: np.ndarray, of_train: Seen, val: np.ndarray, of_val: Seen) -> Neighbours:
    """Make neighbours of train pictures (rows of the store), with the shares that suit validation rows best."""

    def known(which: np.ndarray) -> dict[str, Tensor]:
        labels, numbers = task.labels[which].astype(np.int64), task.known.numbers[which]
        numbers = np.where(abs(numbers) < HARDLY_MEANT, numbers, np.nan)  # one would outweigh all others, in any mean
        return {"labels": torch.from_numpy(labels), "values": torch.from_numpy(numbers)}

    classes, ids = {name: len(texts) for name, texts in task.classes.items()}, [task.catalogue.ids[row] for row in rows]
    hashes = torch.from_numpy(task.store.hashes[rows].view(np.int64))
    neighbours = Neighbours.of(classes, task.names[len(classes) :], *of_train, ids, known(rows) | {"hashes": hashes})
    logits, true = task.model.heads(of_val.embedding), known(val)
    for i, name in enumerate(classes):
        neighbours.temperature[i] = fit_temperature(logits[name], true["labels"][:, i])
    truths = [*true["labels"].unbind(1), *true["values"].unbind(1)]
    heard = neighbours.heard(nearest(neighbours, of_val), logits).values()
    for i, (truth, pair) in enumerate(zip(truths, heard, strict=True)):
        fit = fit_share if i < len(classes) else fit_share_of_number
        neighbours.share[i] = fit(*held_against(truth, pair))
    return neighbours


def held_against(truth: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    """How heads and neighbours do where the truth (V,) is known, (2, ·): the probabilities they give the true labels,
    or their errors of numbers."""
    if truth.is_floating_point():
        return torch.stack([said[:, 0] - truth for said in pair])[:, truth.isfinite()]
    return torch.stack([p.gather(1, truth.clamp(min=0)[:, None])[:, 0] for p in pair])[:, truth >= 0]


def fit_share(heads: Tensor, votes: Tensor) -> float:
    """The share of votes that makes the true labels most probable, by expectation maximisation, as for any mixture's
    weight; (V,) are the probabilities that heads and votes give these labels."""
    share = 0.5 if len(heads) else 0.0
    for _ in range(ROUNDS if len(heads) else 0):
        share = (share * votes / ((1 - share) * heads + share * votes).clamp(min=1e-12)).mean().item()
    return share


def fit_share_of_number(heads: Tensor, votes: Tensor) -> float:
    """The share of votes that gives the least squared error; (V,) are the errors of heads and of votes."""
    apart = heads - votes
    return (heads * apart).sum().div(apart.square().sum().clamp(min=1e-12)).clamp(0, 1).item()


def refit(task: Task, rows: np.ndarray, batch_size: int, look: bool) -> tuple[dict, dict, dict]:
    """Train the heads of the task's model on rows of the store, and keep these rows as neighbours if `look`. The model
    is left on the CPU.

    Returns:
        the scores of validation rows before and after, and the calibration that belongs to the model as it is now.
    """
    val, model = choice(task, "val", SCORED), task.model
    looks = look or model.neighbours is not None
    of_val, of_train = embed(task, val, batch_size, "val", looks), embed(task, rows, batch_size, "train", look)
    model.cpu()
    target = task.config.get("calibration", {}).get("target_precision", TARGET_PRECISION)
    uncalibrated = task.config | {"calibration": None}  # thresholds of the earlier heads do not hold for these

    def judged(calibration: dict | None = None) -> tuple[dict, dict]:
        logits = answers(model, of_val)
        calibration = calibration or calibrate(logits, task.labels[val], task.store.keys[val], uncalibrated, target)
        calibrated = task._replace(config=task.config | {"calibration": calibration})
        return judge(calibrated, "val", val, logits, joint=True).scores, calibration

    before, _ = judged(task.config.get("calibration"))  # the one in use, perhaps fitted on many more rows
    train_heads(model.heads, of_train.embedding, Rows(*(array[rows] for array in task.known)))
    model.neighbours = look_up(task, rows, of_train, val, of_val) if look else None
    return before, *judged()


def known_rows(task: Task, split: str) -> np.ndarray:
    """The rows of a split with a label or number that the model predicts; of too many a fixed choice."""
    rows = task.store.rows(split)
    labels, numbers, _ = (array[rows] for array in task.known)
    rows = rows[(labels >= 0).any(1) | np.isfinite(numbers).any(1)]
    return at_most(rows, MOST)


def comparison(before: dict, after: dict) -> str:
    """Accuracy and the share accepted of each class, and the error of each number, as text."""
    lines = [f"{'val':<16}{'accuracy':>9}{'after':>8}{'accepted':>10}{'after':>8}"]
    for name, a in after["attributes"].items():
        was = before["attributes"][name]
        if not a["rows"]:
            if "accuracy" in a:
                lines.append(f"{name:<16}no labels here: if this is kept, none of it is accepted")
            continue
        if "mae" in a:
            lines.append(f"{name:<16}{'MAE':>9} {was['mae']:,.4g}, after {a['mae']:,.4g}")
            continue
        accepted = [scores["calibration"]["attributes"][name]["accepted"] for scores in (before, after)]
        lines.append(f"{name:<16}{was['accuracy']:>9.3f}{a['accuracy']:>8.3f}{accepted[0]:>10.3f}{accepted[1]:>8.3f}")
    return "\n".join(lines)


def share_accepted(scores: dict) -> float:
    """The share of labels accepted, over the attributes that any validation row has a label of."""
    names = [name for name, a in scores["attributes"].items() if a["rows"] and "accuracy" in a]
    return float(np.mean([scores["calibration"]["attributes"][name]["accepted"] for name in names]))


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Train the heads of a checkpoint once more, on whole pictures.")
    add_checkpoint_options(parser)
    add_catalogue_options(parser)
    parser.add_argument(
        "--neighbours",
        action=argparse.BooleanOptionalAction,
        help="keep descriptions, ids, labels, numbers and hashes of the train pictures, and look at those most "
        "alike, or none any more (default: if it has some already)",
    )
    args = parser.parse_args(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("refit.py is one process: start it with python, not with torchrun")
    folder = find_checkpoint(args.checkpoint).resolve()
    config = read_config(folder)
    if args.neighbours and config["inputs"] == "title":
        raise UserError(f"--neighbours looks at pictures, which {folder} does not")
    if "resume" in config:
        raise UserError(f"{folder} is where a run goes on from; name {folder.with_name('best')}")
    there = {path.name for path in folder.glob("[!.]*")}  # without what a file manager hides there
    if others := sorted(there - set(config["sha256"])):
        raise UserError(f"{folder} also holds {', '.join(others)}: copy its checkpoint into a folder of its own first")
    check_writable(folder.parent / "file", "--checkpoint")
    with at_rest(folder.parent):
        run(args, folder)
    return 0


def run(args: argparse.Namespace, folder: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = load_task(folder, args.weights, args.data, args.cache_dir, args.limit, device, args.store_gb)
    if (article := task.config.get("article")) and article not in task.catalogue.columns:
        raise UserError(f"{args.data} lacks the column {article}, by which {folder} splits rows into train and val")
    rows, labelled = known_rows(task, "train"), (task.labels[task.store.rows("val")] >= 0).any(1).sum()
    with_labels, skipped = f"{len(rows):,} train and {labelled:,} val rows with labels", skipped_why(task.store.skipped)
    print(f"checkpoint {folder}\n{task.catalogue.name}: {with_labels}; {skipped}")
    for line in unknown_labels(task, task.store.rows("val")):
        print(f"{line}; new classes need train.py --init-from")
    if not len(rows) or not labelled:
        raise UserError(f"{args.data} has {with_labels}; both are needed")
    had = task.model.neighbours is not None
    look = had if args.neighbours is None else args.neighbours
    before, after, fitted = refit(task, rows, args.batch_size, look)
    print(comparison(before, after))
    if look:
        shares = zip(task.names, task.model.neighbours.share.tolist(), strict=True)
        print("neighbours count for", ", ".join(f"{share:.2f} of {name}" for name, share in shares))
    was, now = (scores["mean_accuracy"] for scores in (before, after))
    accepted_was, accepted = map(share_accepted, (before, after))
    change = f"mean accuracy {was:.4f} before, {now:.4f} after; accepted {accepted_was:.3f}, {accepted:.3f}"
    if (now <= was or accepted < accepted_was - FEWER) and (look or not had):
        print(f"{change}: {folder} stays as it was")
        return
    _, *earlier = learnt_from(task.config)
    seen = dict.fromkeys([*earlier, task.catalogue.fingerprint])  # each once, in order
    data = task.config["data"] | {"heads_fingerprint": " ".join(seen)}
    kept = {FILE: task.model.neighbours.tensors()} if look else {}
    save_checkpoint(folder, task.model, task.config | {"calibration": fitted, "data": data}, kept)
    print(
        f"{change}: kept, and calibrated anew. The heads of before are in {previous_of(folder)}; "
        "scores of before, such as metrics.json, are of those"
    )


if __name__ == "__main__":
    main()
