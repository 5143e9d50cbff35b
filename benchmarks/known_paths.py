"""What rare paths are worth: answers decoded over all paths of training, over those seen often, and without odd ones.

    python benchmarks/known_paths.py --checkpoint adapters/vit_tiny_fashion --weights FILE --data FASHION

A path is odd if its last label occurs at least so many times as often in another path, such as belts among the tops.
Scores are of validation rows, with the temperatures that were fitted over all paths. The odd paths are named last, for
a person to look at.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import trained

from errors import exits_cleanly
from evaluate import evaluate
from metrics import score
from models.decode import Decoder

OFTEN, TIMES = (2, 3, 5, 10), (100, 20, 10, 2)


@exits_cleanly
def main() -> int:
    task = trained(__doc__.splitlines()[0])
    found, names = evaluate(task, "val"), list(task.classes)
    (paths,) = task.config["paths"]
    columns = [names.index(name) for name in paths["attributes"]]
    labels = task.labels[task.store.rows("train")][:, columns]
    counts = Counter(map(tuple, labels[(labels >= 0).all(1)].tolist()))
    commonest = Counter()  # last label -> rows of its commonest path
    for path, count in counts.items():
        commonest[path[-1]] = max(commonest[path[-1]], count)

    kept = {"all": list(counts)} | {f"seen {n} times or more": [p for p in counts if counts[p] >= n] for n in OFTEN}
    for times in TIMES:
        kept[f"odd by {times} left out"] = [p for p in counts if counts[p] * times > commonest[p[-1]]]
    print(f"{'paths':<24}{'':>5}" + "".join(f"{name:>16}" for name in (*paths["attributes"], "path")))
    for what, known in kept.items():
        config = task.config | {"paths": [paths | {"known": sorted(map(list, known))}]}
        said = Decoder(config)(found.logits).labels.numpy()
        scores = score(task.labels[found.rows], said, names, task.config["paths"])
        figures = [scores["attributes"][name]["accuracy"] for name in paths["attributes"]]
        print(f"{what:<24}{len(known):>5}" + "".join(f"{x:>16.4f}" for x in (*figures, scores["path_accuracy"])))
    print(f"\nodd by {TIMES[1]}:")
    for path in sorted(set(counts) - set(kept[f"odd by {TIMES[1]} left out"])):
        text = " > ".join(task.classes[name][label] for name, label in zip(paths["attributes"], path, strict=True))
        print(f"{counts[path]:>4} {text} (elsewhere {commonest[path[-1]]:,})")
    return 0


if __name__ == "__main__":
    main()
