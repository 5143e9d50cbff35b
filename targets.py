"""What is known of a catalogue's rows, as a model is trained and scored on it: classes, numbers, tokens of titles."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np

import distributed
from data.attributes import (
    LabelMap,
    Scale,
    class_counts,
    encode_labels,
    encode_numbers,
    far_off,
    fit_label_maps,
    fit_scales,
    nearly_alike,
)
from data.batches import Rows
from data.catalogue import Catalogue
from data.columns import Chosen
from data.schema import Attribute
from data.titles import SPECIAL, TitleReader, choose_vocabulary, read_vocabulary
from durable import replace_file
from errors import UserError
from models.checkpoint import read_config

VOCAB = "vocab.txt"  # in a run's folder, where titles are read


def columns_of(attributes: Iterable[Attribute], *others: str | None) -> list[str]:
    """The columns that a catalogue must have for these attributes, and others that are not None."""
    return list(dict.fromkeys([*(column for a in attributes for column in a.needs), *filter(None, others)]))


def fit_targets(
    catalogue: Catalogue,
    numbers: dict[str, np.ndarray],
    train_rows: np.ndarray,
    attributes: Sequence[Attribute],
    min_brand_count: int,
) -> tuple[list[dict], Rows]:
    """A checkpoint's `attributes`, fitted on train rows, and what is known of all rows in their classes and scales."""
    maps = fit_label_maps(catalogue.columns, train_rows, attributes, min_brand_count)
    scales = fit_scales(numbers, train_rows, attributes)
    known = encode(catalogue, numbers, attributes, maps, scales)
    print("classes:", ", ".join(f"{name} {len(m.labels)}" for name, m in maps.items()))
    counts = class_counts(known.labels, train_rows, maps)
    lacking = {name: len(train_rows) - sum(some) for name, some in counts.items()}  # none is unseen here
    if any(lacking.values()):
        rows = ", ".join(f"{name} {rows:,}" for name, rows in lacking.items() if rows)
        print(f"train rows without a label: {rows}; an answer is given there too, so where none applies label that")
    for name, rows in lacking.items():
        if rows > len(train_rows) / 2:
            few = f"{len(train_rows) - rows:,} of {len(train_rows):,}"
            print(f"hint: {name} has a label in {few} train rows; fill cells down if they were meant for more rows")
    for name, m in maps.items():
        for alike in nearly_alike(m.labels):
            print(f"hint: {name} has {' and '.join(map(repr, alike))}, as classes of their own; are they one?")
    for a in (a for a in attributes if a.kind == "number"):
        simulated = " (simulated)" if a.derive == "price" else ""
        print(f"number: {a.name}{simulated}, mean {scales[a.name].mean:,.6g}, std {scales[a.name].std:,.4g}")
        if len(far := far_off(numbers[a.name], scales[a.name])):
            first = f"{float(numbers[a.name][far[0]])!r} (id {catalogue.ids[far[0]]})"
            print(f"hint: of {a.name} {len(far):,} are far from all others, such as {first}; meant so?")
    fitted = {name: asdict(m) | {"counts": counts[name]} for name, m in maps.items()}
    fitted |= {name: asdict(scale) for name, scale in scales.items()}
    return [asdict(a) | fitted[a.name] for a in attributes], known


def encode(
    catalogue: Catalogue,
    numbers: dict[str, np.ndarray],
    attributes: Sequence[Attribute],
    maps: dict[str, LabelMap],
    scales: dict[str, Scale],
) -> Rows:
    """All that is known of the rows, in the classes and scales that were fitted."""
    return Rows(
        encode_labels(catalogue.columns, maps, attributes),
        encode_numbers(numbers, scales, len(catalogue)),
        np.empty((len(catalogue), 0), dtype=np.int32),
    )


def named_vocabulary(args: argparse.Namespace) -> tuple[list[str], str] | None:
    """The vocabulary of titles and where it is from; None if it is still to be chosen for the titles."""
    if args.resume or not distributed.first():
        return read_vocabulary(args.out / VOCAB), VOCAB  # kept by a new run's first process, for all others
    if args.vocab:
        return read_vocabulary(args.vocab), args.vocab.name
    if args.init_from and (text := read_config(args.init_from)["text"]):
        return text["vocab"], f"that of {args.init_from}"
    return None


def fit_text(
    args: argparse.Namespace,
    config: dict,
    column: Sequence[str | None],
    train_rows: Sequence[int],
    vocab: tuple[list[str], str] | None,
) -> dict:
    """How titles are read: a checkpoint's `text`; without `vocab`, the vocabulary is chosen for the titles of train
    rows."""
    titles = list(Chosen(column, train_rows))
    if not titles:
        raise UserError(f"--inputs {args.inputs}: no train row has a title (column {config['title']})")
    text = {"vocab": list(SPECIAL), "length": args.title_length, "mask": args.mask_title_leaks}
    text["vocab"], origin = vocab or choose_vocabulary(TitleReader(config | {"text": text}).cleaned(titles))
    if distributed.first() and not args.resume:
        replace_file(args.out / VOCAB, "".join(f"{token}\n" for token in text["vocab"]).encode())
    _, cut = TitleReader(config | {"text": text})(titles)
    leaks = "masked" if args.mask_title_leaks else "left in"
    print(f"titles: words that give labels away {leaks}; vocabulary of {len(text['vocab']):,}, {origin}")
    without = len(train_rows) - len(titles)
    print(f"titles: {cut:.1%} cut at {args.title_length} tokens, {without:,} train rows without a title")
    return text


def read_titles(config: dict, catalogue: Catalogue) -> np.ndarray:
    """(N, T) tokens of all rows; of a row without a title, those of an empty one."""
    return TitleReader(config)(catalogue.columns[config["title"]])[0]
