"""Score a trained checkpoint on any labelled catalogue.

    python evaluate.py --data ../catalogue --split test --json scores.json

`evaluate` and `scores_table` are also what `train.py` uses after each epoch and at the end.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.attributes import FASHION, MISSING, PATH, LabelMap, encode_labels
from data.batches import epoch_batches, make_loader
from data.preprocess import Preprocess
from data.sources import load_source
from data.split import SPLITS
from data.store import ImageStore, default_cache_dir, open_store
from errors import Parser, UserError, check_writable, exits_cleanly, positive_int
from lora import merge_lora
from models.checkpoint import find_checkpoint, load_checkpoint
from models.classifier import AttributeClassifier


class Task(NamedTuple):
    """A model and the labelled pictures that it is trained or scored on.

    Attributes:
        config: what a checkpoint's `config.json` says: attributes and their labels, known paths, preprocessing.
        labels: (N, A) class indices, a row for each picture of the store.
    """

    model: AttributeClassifier
    config: dict
    preprocess: Preprocess
    store: ImageStore
    labels: np.ndarray

    @property
    def classes(self) -> dict[str, list[str]]:
        """Attribute -> its labels, in the order of the label columns."""
        return {attribute["name"]: attribute["labels"] for attribute in self.config["attributes"]}


def evaluate(task: Task, split: str, device: torch.device, batch_size: int = 64) -> tuple[dict, np.ndarray]:
    """Score the model on one split, with LoRA merged away: the same answers, sooner.

    Returns:
        the metrics as `metrics.json` holds them, and the predicted classes (N, A) of the split's rows in order.
    """
    rows = task.store.rows(split)
    loader = make_loader(task.store, task.labels, epoch_batches(rows, batch_size), device)
    predicted = predict(merge_lora(task.model), loader, task.preprocess, device, split)
    return {"split": split} | score(task.labels[rows], predicted, list(task.classes), task.config["paths"]), predicted


@torch.inference_mode()
def predict(
    model: nn.Module, loader: DataLoader, preprocess: Preprocess, device: torch.device, what: str
) -> np.ndarray:
    """Predicted classes (N, A) of a loader's rows, in order, columns as in the attribute declaration."""
    model.eval()
    predicted = []
    for pixels, _ in tqdm(loader, desc=what, unit="batch", leave=False):
        logits = model(preprocess(pixels.to(device, non_blocking=True)))
        predicted.append(torch.stack([scores.argmax(-1) for scores in logits.values()], dim=1))  # (B, A)
    return torch.cat(predicted).cpu().numpy()


def average(values) -> float | None:
    return float(np.mean(values)) if len(values) else None


def f1_scores(true: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Macro and weighted F1 over the classes that occur as truth or as prediction, as scikit-learn counts them.

    All labels never seen in training are one class here, which nobody can predict.
    """
    classes, codes = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    true, predicted = codes[: len(true)], codes[len(true) :]
    hits = np.bincount(true[true == predicted], minlength=len(classes))
    support = np.bincount(true, minlength=len(classes))
    f1 = 2 * hits / (support + np.bincount(predicted, minlength=len(classes)))
    return float(f1.mean()), float((f1 * support).sum() / support.sum())


def score(labels: np.ndarray, predicted: np.ndarray, names: list[str], valid_paths: list[list[int]]) -> dict:
    """All metrics of predictions (N, A) against labels (N, A).

    A missing label is left out and `rows` says how many there were; a label never seen in training is wrong whatever
    was predicted. `path_accuracy` is over rows whose whole masterCategory > subCategory > articleType path is labelled;
    `valid_path_rate` is the share of predicted paths that occur in training; `exact_match` is the share of rows with
    labels that has them all right; `mean_accuracy`, the mean over attributes, is what the best epoch is chosen by.
    """
    present, right = labels != MISSING, labels == predicted
    attributes = {}
    for column, name in enumerate(names):
        rows = present[:, column]
        if not rows.any():
            attributes[name] = {"accuracy": None, "macro_f1": None, "weighted_f1": None, "rows": 0}
            continue
        macro, weighted = f1_scores(labels[rows, column], predicted[rows, column])
        accuracy = float(right[rows, column].mean())
        attributes[name] = {"accuracy": accuracy, "macro_f1": macro, "weighted_f1": weighted, "rows": int(rows.sum())}

    path = [names.index(name) for name in PATH]
    whole = present[:, path].all(1)
    valid = set(map(tuple, valid_paths))
    return {
        "rows": len(labels),
        "attributes": attributes,
        "mean_accuracy": average([a["accuracy"] for a in attributes.values() if a["rows"]]),
        "path_accuracy": average(right[whole][:, path].all(1)),
        "valid_path_rate": average([tuple(row) in valid for row in predicted[:, path].tolist()]),
        "exact_match": average((right | ~present)[present.any(1)].all(1)),
    }


def scores_table(scores: dict) -> str:
    """The metrics as text, a line per attribute."""
    lines = [f"{'attribute':<16}{'accuracy':>9}{'macro F1':>10}{'weighted F1':>13}{'rows':>8}"]
    for name, a in scores["attributes"].items():
        figures = (
            f"{a['accuracy']:>9.3f}{a['macro_f1']:>10.3f}{a['weighted_f1']:>13.3f}"
            if a["rows"]
            else f"{'no labels':>32}"
        )
        lines.append(f"{name:<16}{figures}{a['rows']:>8,}")
    whole = [(key, scores[key]) for key in ("mean_accuracy", "path_accuracy", "valid_path_rate", "exact_match")]
    lines.append("  ".join(f"{key} {value:.3f}" for key, value in whole if value is not None))
    return "\n".join(lines)


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Score a trained checkpoint on a labelled catalogue.")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the newest run's best)")
    parser.add_argument("--weights", type=Path, help="the backbone's base weights, a safetensors file")
    parser.add_argument("--data", required=True, help="hub id, parquet folder, Kaggle folder, or demo")
    parser.add_argument(
        "--split", choices=[*SPLITS, "all"], default="test", help="rows to score (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument("--limit", type=positive_int, help="use only this many rows of the catalogue")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where decoded images are kept")
    parser.add_argument("--json", type=Path, help="also write the scores here")
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json, "--json")

    folder = find_checkpoint(args.checkpoint)
    model, config = load_checkpoint(folder, args.weights)
    print(f"checkpoint {folder}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preprocess = Preprocess(**config["preprocess"])
    catalogue = load_source(args.data, args.cache_dir, args.limit)
    store = open_store(catalogue, preprocess.canvas, args.cache_dir)
    maps = {a["name"]: LabelMap(a["labels"], a["aliases"]) for a in config["attributes"]}
    declared = {attribute.name: attribute for attribute in FASHION}
    if unknown := maps.keys() - declared.keys():
        raise UserError(f"{folder} predicts {', '.join(unknown)}, which data/attributes.py does not declare")
    labels = encode_labels(catalogue.columns, maps, [declared[name] for name in maps])
    if not len(store.rows(args.split)):
        raise UserError(f"{args.data} has no readable row in the {args.split} split")
    model.to(device)
    scores, _ = evaluate(Task(model, config, preprocess, store, labels), args.split, device, args.batch_size)
    print(f"{catalogue.name}, {args.split}: {scores['rows']:,} rows; {len(store.skipped):,} of the catalogue skipped")
    print(scores_table(scores))
    if args.json:
        args.json.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    main()
