"""Score a trained checkpoint on any labelled catalogue.

    python evaluate.py --data ../catalogue --split test --json scores.json --report checked

`evaluate` is also what `train.py` uses after each epoch and at the end.
"""

import startup  # noqa: F401

# isort: split
import argparse
import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import distributed
import hub
from arguments import add_catalogue_options, add_checkpoint_options
from calibration import TARGET_PRECISION, calibrate, calibration_scores
from data import price
from data.attributes import MISSING, UNSEEN
from data.batches import Batch, epoch_batches, make_loader
from data.catalogue import skipped_why
from data.columns import Chosen
from data.split import SPLITS, at_most
from durable import at_rest, replace_file
from errors import Parser, UserError, check_writable, exits_cleanly, fraction, make_folder
from lora import merge_lora
from memory import in_parts
from metrics import score, score_number, scores_table, trust_table
from models.checkpoint import amend_config, find_checkpoint, read_config
from models.decode import Answers, Decoder
from models.schema import learnt_on
from report.page import write_report
from task import Task, agree_on, load_task

NAMED = 3  # labels unknown to the checkpoint, of each attribute
SCORED = 50_000  # rows of a split, at most, that training and refitting score: outputs must fit in memory


class Evaluation(NamedTuple):
    """What a checkpoint makes of a split.

    Attributes:
        scores: the metrics, as `metrics.json` holds them.
        rows: (N,) the rows of the store that were scored.
        logits: {attribute: (N, classes)}, for a number (N, 1), standardised; fp32, on the CPU.
        answers: the decoded answers that were scored.
    """

    scores: dict
    rows: np.ndarray
    logits: dict[str, Tensor]
    answers: Answers


def evaluate(task: Task, split: str, batch_size: int = 64, joint: bool = True, most: int | None = None) -> Evaluation:
    """Score the model on one split, with LoRA merged, which gives the same answers faster. Processes share the rows,
    and each gets the whole result.

    Args:
        most: how many rows to score at most, chosen by `choice`; default: all.
    """
    rows = task.store.rows(split) if most is None else choice(task, split, most)
    padded = np.resize(rows, math.ceil(len(rows) / distributed.world()) * distributed.world())  # equally many for each
    logits = predict(merge_lora(task.model), task, distributed.share(padded), batch_size, split)
    logits = {name: distributed.unshared(part, len(rows)) for name, part in logits.items()}  # and none counts twice
    return judge(task, split, rows, logits, joint)


def choice(task: Task, split: str, most: int) -> np.ndarray:
    """The rows of a split. If there are more than `most`, so many of those with anything to score: first those with the
    label of a class, then those with only a number."""
    rows = task.store.rows(split)
    if len(rows) <= most:
        return rows
    labelled, numbered = (task.labels[rows] != MISSING).any(1), np.isfinite(task.known.numbers[rows]).any(1)
    first, then = rows[labelled], rows[numbered & ~labelled]
    if not len(first) + len(then):
        return at_most(rows, most)
    return np.sort(np.concatenate([at_most(first, most), at_most(then, max(0, most - len(first)))]))


def judge(task: Task, split: str, rows: np.ndarray, logits: dict[str, Tensor], joint: bool) -> Evaluation:
    """Decode the logits of rows of a split and score them: with and without the paths, before and after calibration."""
    config, names, labels = task.config, list(task.classes), task.labels[rows]
    decoded = {how: Decoder(config, how == "joint")(logits) for how in ("joint", "independent")}
    by_decoding = {how: score(labels, said.labels.numpy(), names, config["paths"]) for how, said in decoded.items()}
    used = "joint" if joint else "independent"
    scores = {"split": split, "inputs": inputs_of(config)} | by_decoding[used] | {"decoding": used}
    scores["attributes"] |= score_numbers(task, rows, logits)
    for how, figures in by_decoding.items():
        scores[how] = {key: figures[key] for key in ("path_accuracy", "valid_path_rate", "exact_match")}
    if "calibration" in config:
        raw = Decoder(config | {"calibration": None}, joint)(logits)
        scores["calibration"] = {"target_precision": config["calibration"]["target_precision"]}
        scores["calibration"] |= calibration_scores(decoded[used], raw, labels, names, config["paths"])
    return Evaluation(scores, rows, logits, decoded[used])


def inputs_of(config: dict) -> str:
    """What the model is given: scores from pictures alone and from titles, which leak labels, must never be mixed."""
    leaks = {None: "", True: ", leaks masked", False: ", leaks and all"}[config["text"] and config["text"]["mask"]]
    return config["inputs"] + leaks


def score_numbers(task: Task, rows: np.ndarray, outputs: dict[str, Tensor]) -> dict[str, dict]:
    """{number: its scores} over rows of the store, in the number's own unit."""
    scores, scaled = {}, task.known.numbers[rows].astype(float)
    for column, a in enumerate(a for a in task.config["attributes"] if a["kind"] == "number"):
        true, said = (a["mean"] + a["std"] * z for z in (scaled[:, column], outputs[a["name"]][:, 0].double().numpy()))
        floor, columns = None, task.catalogue.columns
        if a["derive"] == "price":
            floor = price.expected({name: [columns[name][row] for row in rows] for name in ("id", *price.COLUMNS)})
        scores[a["name"]] = score_number(true, said, a["median"], floor)
    return scores


@torch.inference_mode()
def predict(model: nn.Module, task: Task, rows: np.ndarray, batch_size: int, what: str) -> dict[str, Tensor]:
    """A model's outputs {name: (N, ·)} for rows of the task's store, in order, fp32 on the CPU."""
    loader = make_loader(task.store, task.known, epoch_batches(rows, batch_size), task.device)
    model.eval()

    def said(batch: Batch, part: slice) -> dict[str, Tensor]:
        outputs = model(task.preprocess(batch.pixels[part]), batch.tokens[part])
        together = torch.cat([*outputs.values()], dim=1).float().cpu()  # one copy, as each waits for the GPU
        return dict(zip(outputs, together.split([output.shape[1] for output in outputs.values()], dim=1), strict=True))

    found, most = [], None
    for batch in tqdm(loader, desc=what, unit="batch", leave=False, disable=not distributed.first()):
        parts, most = in_parts(partial(said, batch.to(task.device)), len(batch.pixels), most)
        found += parts
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def unknown_labels(task: Task, rows: np.ndarray) -> Iterator[str]:
    """A line for each attribute for which these rows have labels that training never had. Attributes found inside a
    longer text, such as brands, are left out."""
    for column, a in enumerate(a for a in task.config["attributes"] if a["kind"] == "class"):
        if a["derive"] is None and len(unseen := rows[task.labels[rows, column] == UNSEEN]):
            labels = Counter(Chosen(task.catalogue.columns[a["column"]], unseen))
            said = ", ".join(f"{label!r} ({count:,})" for label, count in labels.most_common(NAMED))
            yield f"{a['name']}: wrong in {labels.total():,} rows for a label that training never had, as {said}"


def score_checkpoint(args: argparse.Namespace, split: str, device: torch.device) -> None:
    """What the command does, in each of the processes that share the rows."""
    args.data, folder = distributed.decided(lambda: (hub.pinned(args.data), args.checkpoint))
    calibrated, joint = "calibration" in read_config(folder), not args.independent  # raises without one
    if args.report and not args.calibrate and not calibrated:
        raise UserError(f"--report: {folder} is not calibrated; do so first with --calibrate, on validation rows")
    if args.calibrate:
        check_writable(folder / "config.json.new", "--calibrate")
    task = distributed.in_turn(
        lambda: load_task(folder, args.weights, args.data, args.cache_dir, args.limit, device, args.store_gb)
    )
    distributed.agree(task.config["sha256"], "checkpoint")
    agree_on(task)
    print(f"checkpoint {folder}")
    name, rows = task.catalogue.name, task.store.rows(split)
    if args.calibrate and split == "all" and learnt_on(task.config, task.catalogue.fingerprint, args.limit):
        raise UserError(f"--calibrate --split all: {name} is what {folder} was trained on; leave out --split")
    if not len(rows):
        raise UserError(f"{args.data} has no readable row in the {split} split")
    found = evaluate(task, split, args.batch_size, joint)
    if args.calibrate:
        target, labelled = args.target_precision or TARGET_PRECISION, (task.labels[rows] != MISSING).any(0)
        if not labelled.any():
            raise UserError(f"--calibrate: none of the {len(rows):,} {split} rows of {args.data} has a label")
        fitted = calibrate(found.logits, task.labels[rows], task.store.keys[rows], task.config, target)
        if distributed.first():
            amend_config(folder, calibration=fitted)
        apart = len(np.unique(task.store.keys[rows]))
        several = f" ({apart:,} different pictures or articles)" if apart < len(rows) else ""
        print(f"calibrated on {len(rows):,} rows{several} of {name}, {split}; kept in {folder / 'config.json'}")
        if split == "all" and task.config["data"].get("name") == name:  # in other files, or it had been refused
            print(f"hint: {folder} was trained on a {name} too; if on some of these rows, thresholds promise too much")
        known = (task.labels[rows] >= 0).any(0)
        if untouched := [a for a, some in zip(task.classes, known, strict=True) if not some]:
            print(f"no row has a known label of {', '.join(untouched)}, so the temperature there stays as it was")
        task = task._replace(config=task.config | {"calibration": fitted})
        found = judge(task, split, rows, found.logits, joint)
    print(f"{name}, {split}: {len(rows):,} rows; of the catalogue {skipped_why(task.store.skipped)}")
    print(f"answers from {found.scores['inputs']}")
    for line in unknown_labels(task, rows):
        print(line)
    print(scores_table(found.scores))
    print(trust_table(found.scores))
    if args.json and distributed.first():
        replace_file(args.json, (json.dumps(found.scores, indent=1) + "\n").encode())
    if args.report and distributed.first():
        write_report(args.report, str(folder), task, found)
        print(f"report: {args.report / 'report.html'}")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Score a trained checkpoint on a labelled catalogue.")
    add_checkpoint_options(parser)
    add_catalogue_options(parser)
    parser.add_argument(
        "--split", choices=[*SPLITS, "all"], help="rows to score (default: test; with --calibrate: val)"
    )
    parser.add_argument("--independent", action="store_true", help="each attribute's most probable class, paths or not")
    parser.add_argument(
        "--calibrate", action="store_true", help="fit temperatures and thresholds on these rows, into the checkpoint"
    )
    parser.add_argument(
        "--target-precision",
        type=fraction,
        metavar="P",
        help=f"with --calibrate: share of accepted answers that must be right (default: {TARGET_PRECISION})",
    )
    parser.add_argument("--json", type=Path, help="also write the scores here")
    parser.add_argument("--report", type=Path, metavar="DIR", help="also make DIR/report.html and DIR/suspects.csv")
    args = parser.parse_args(argv)
    if args.target_precision and not args.calibrate:
        raise UserError("--target-precision goes with --calibrate, which keeps the thresholds for it in the checkpoint")
    split = args.split or ("val" if args.calibrate else "test")
    if args.calibrate and split not in ("val", "all"):
        raise UserError(f"--calibrate --split {split}: fit on val, or on all of a catalogue new to the checkpoint")
    args.checkpoint = find_checkpoint(args.checkpoint)  # once: a run that goes on may make another one the newest
    if args.json:
        data = Path(args.data)
        files = data.rglob("*") if data.is_dir() and args.json.exists() else [data]
        run = args.checkpoint.resolve().parent
        check_writable(args.json, "--json", [args.weights, *files, run / "options.json", *run.glob("*/*")])
    if args.report:
        make_folder(args.report, "--report")

    with distributed.joined() as device, contextlib.ExitStack() as held:
        if args.calibrate and distributed.first():
            held.enter_context(at_rest(args.checkpoint.resolve().parent))
        score_checkpoint(args, split, device)
    return 0


if __name__ == "__main__":
    main()
