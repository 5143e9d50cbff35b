"""What a title adds to a picture: the picture alone, the title alone and both, with and without the words that leak.

    python benchmarks/inputs.py --amp --data FOLDER --backbone vit_tiny_patch16_224 --weights FILE --img-size 112

Takes the options of `train.py`, which it runs five times with price, season and year beside the seven attributes. The
scores are the test rows', of the epoch that validation chose. What is finished in --results is not run again.

    --jobs N         runs at a time, each on its share of the cores (default: 1)
    --results DIR    (default: runs/inputs)
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import in_processes, markdown

from metrics import rounded

ROOT = Path(__file__).parents[1]
OPEN = "--no-mask-title-leaks"
WAYS = {
    "image": ["image"],
    "title-masked": ["title"],
    "both-masked": ["image+title"],
    "title-open": ["title", OPEN],
    "both-open": ["image+title", OPEN],
}


def table(found: dict[str, dict]) -> str:
    """Markdown, a column for each way: accuracies; for a number R² and MAE, with those of the best constant and of
    noise."""
    attributes = found["image"]["attributes"]
    lines = []
    for name, a in attributes.items():
        key = "accuracy" if "accuracy" in a else "r2"
        lines.append([f"{name}{'' if key == 'accuracy' else ', R²'}", *(score(m, name, key) for m in found.values())])
        if key == "r2":
            noise = f", noise alone {rounded(a['floor_mae'])} and R² {a['floor_r2']:.3f}" if "floor_mae" in a else ""
            bounds = f"MAE (best constant {rounded(a['constant_mae'])}{noise})"
            lines.append([f"{name}, {bounds}", *(rounded(m["attributes"][name]["mae"]) for m in found.values())])
    lines.append(["path", *(f"{m['path_accuracy']:.3f}" for m in found.values())])
    return markdown(["", *found], lines)


def score(metrics: dict, name: str, key: str) -> str:
    return f"{metrics['attributes'][name][key]:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "inputs")
    own, words = parser.parse_known_args()
    words += ["--with-price", "--with-season-year"]
    commands = {
        own.results / way / "metrics.json": [ROOT / "train.py", *words, "--inputs", *inputs, "--out", own.results / way]
        for way, inputs in WAYS.items()
    }
    in_processes(commands, own.jobs, "ways")
    print(table({way: json.loads(file.read_text(encoding="utf-8")) for way, file in zip(WAYS, commands, strict=True)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
