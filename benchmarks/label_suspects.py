"""How well label suspects are found: labels flipped on purpose, and identical pictures whose labels conflict.

    python benchmarks/label_suspects.py --checkpoint adapters/vit_tiny_fashion --weights FILE --data FASHION

Flips: 1 % of the articleTypes of validation rows, which the model was not trained on, changed to any other type or to
one of the same subCategory. Contradictions that no flip explains count as false, though the catalogue has wrong labels
of its own; the last lines name them. Identical pictures are sought among validation and training rows, and each group
and attribute is a case of its own; the truth is the SHA-256 of the decoded pixels. "By the model alone" means without
knowing which pictures are identical: a conflict is found if the model contradicts one of the group's labels. The test
rows are not touched.
"""

import hashlib
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import trained

from data.images import decode
from errors import exits_cleanly
from evaluate import Evaluation, Task, evaluate
from models.decode import Decoder
from report.suspects import conflicting, contradicted

SEEDS, SHARE = 20, 0.01


def flip(labels: np.ndarray, siblings: list[np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) with `SHARE` of them changed to one of `siblings[label]`, and which those are, bool (N,)."""
    random = np.random.default_rng(seed)
    could = np.flatnonzero([label >= 0 and len(siblings[label]) > 0 for label in labels])
    chosen = random.choice(could, round(SHARE * len(could)), replace=False)
    flipped, changed = labels.copy(), np.zeros(len(labels), bool)
    changed[chosen] = True
    for row in chosen:
        flipped[row] = random.choice(siblings[labels[row]])
    return flipped, changed


def average_precision(scores: np.ndarray, wanted: np.ndarray) -> float:
    found = wanted[np.argsort(-scores, kind="stable")]
    return float((found.cumsum() / np.arange(1, len(found) + 1))[found].mean())


def probabilities(task: Task, found: Evaluation) -> dict[str, np.ndarray]:
    """{attribute: (N, classes)}, calibrated."""
    return {name: p.numpy() for name, p in Decoder(task.config).probabilities(found.logits).items()}


def flips(task: Task, found: Evaluation) -> None:
    """Print precision and recall of finding flips, and how two ways of ranking compare."""
    names = list(task.classes)
    column, given, said = names.index("articleType"), task.labels[found.rows], found.answers.labels.numpy()
    numbers = probabilities(task, found)
    p, confidence = numbers["articleType"], found.answers.confidence[:, column].numpy()
    types = np.arange(p.shape[1])
    train = task.labels[task.store.rows("train")][:, [column, names.index("subCategory")]]
    counts = np.zeros((len(types), len(task.classes["subCategory"])), dtype=int)
    np.add.at(counts, tuple(train[(train >= 0).all(1)].T), 1)
    parent = counts.argmax(1)  # where most of a type are: some have been seen elsewhere too
    others = {
        "any type": [types[types != t] for t in types],
        "same subCategory": [types[(parent == parent[t]) & (types != t)] for t in types],
    }
    print(f"mean and spread of {SEEDS} seeds".ljust(44) + "average precision, ranked by")
    print(f"{'flipped to':<18}{'flips':>6}{'precision':>11}{'recall':>8}{'given improbable':>20}{'answer sure':>15}")
    for name, siblings in others.items():
        results = []
        for seed in range(SEEDS):
            labels, changed = flip(given[:, column], siblings, seed)
            suspects = contradicted(found.rows, labels[:, None], said[:, [column]], {"articleType": p})
            hits = changed[np.searchsorted(found.rows, [s.row for s in suspects])]
            differs = (labels >= 0) & (labels != said[:, column])
            improbable = -p[np.arange(len(p)), labels.clip(min=0)] - ~differs  # what does not differ comes last
            aps = (average_precision(scores, changed) for scores in (improbable, confidence * differs))
            results.append((hits.mean(), hits.sum() / changed.sum(), *aps))
        for how, shown in ((np.mean, name), (np.std, "")):
            precision, recall, *aps = how(results, axis=0)
            flipped = f"{changed.sum():>6}" if shown else " " * 6
            print(f"{shown:<18}{flipped}{precision:>11.3f}{recall:>8.3f}{aps[0]:>20.3f}{aps[1]:>15.3f}")

    print(f"\ncontradicted without any flip, of {len(given):,} rows, least probable first:")
    natural = contradicted(found.rows, given, said, numbers)
    for name in names:
        ids = [task.catalogue.ids[s.row] for s in natural if s.attribute == name]
        print(f"  {name:<16}{len(ids):>4}  {' '.join(ids[:16])}")


def same_pictures(task: Task, rows: np.ndarray) -> list[tuple[int, ...]]:
    """Groups of rows whose pictures agree in every pixel."""
    groups = defaultdict(list)
    for row in rows.tolist():
        image = decode(task.catalogue.read(row))
        groups[hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()].append(row)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def conflicts(task: Task, evaluations: list[Evaluation]) -> None:
    """Print precision and recall of finding conflicts, cases (a group of rows, an attribute)."""
    truth, reported, doubted, groups = set(), set(), set(), 0
    for found in evaluations:
        given, said = task.labels[found.rows], found.answers.labels.numpy()
        p = probabilities(task, found)
        for suspects in conflicting(found.rows, task.store.hashes[found.rows], given, said, p):
            reported.add((frozenset(s.row for s in suspects), suspects[0].attribute))
        alone = {(s.row, s.attribute) for s in contradicted(found.rows, given, said, p)}
        for group in same_pictures(task, found.rows):
            groups += 1
            for column, name in enumerate(task.classes):
                known = frozenset(row for row in group if task.labels[row, column] >= 0)
                if len({task.labels[row, column] for row in known}) > 1:
                    truth.add((known, name))
                if any((row, name) in alone for row in group):
                    doubted.add((known, name))
    print(f"\n{groups} groups of identical pictures; by the report, and by the model alone:")
    print(f"{'attribute':<16}{'conflicts':>10}" + f"{'precision':>12}{'recall':>8}" * 2)
    for name in [*task.classes, "all"]:
        wanted, *ways = ({case for case in cases if name in ("all", case[1])} for cases in (truth, reported, doubted))
        line = f"{name:<16}{len(wanted):>10}"
        for cases in ways:
            shares = (len(cases & wanted) / len(of) if of else None for of in (cases, wanted))
            precision, recall = ("–" if share is None else f"{share:.3f}" for share in shares)
            line += f"{precision:>12}{recall:>8}"
        print(line)


@exits_cleanly
def main() -> int:
    task = trained(__doc__.splitlines()[0])
    val = evaluate(task, "val")
    flips(task, val)
    conflicts(task, [val, evaluate(task, "train")])
    return 0


if __name__ == "__main__":
    main()
