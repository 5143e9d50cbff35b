"""What training runs came to, side by side: the levers of a recipe on validation rows, and its seeds' mean and spread.

    python benchmarks/quality.py --data FOLDER runs/A runs/B runs/C
    python benchmarks/quality.py --data FOLDER --split test runs/BEST-0 runs/BEST-1 runs/BEST-2

Takes folders of `train.py`, which leaves the test rows alone under `--no-test`. Runs that differ only in their seed
form one row, with the mean and, of several, the standard deviation. A row is named by the options that vary among the
runs given. Scores are of each run's `best`, decoded along the known paths. Minutes are from a run's start to its last
save, plus those of the run that it was started from (--init-from); they mean nothing for a run that was stopped in
between, or copied. Runs that differ only in the run they started from share a row.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import machine, markdown

from data.store import STORE_GB
from errors import Parser, UserError, exits_cleanly
from evaluate import evaluate
from models.checkpoint import read_config
from task import load_task

NO_LEVERS = ("seed", "cache_dir", "store_gb", "save_every", "no_test")


def read_options(run: Path) -> dict:
    try:
        return json.loads((run / "options.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is no run of train.py: {error}") from None


def levers(run: Path, options: dict) -> dict:
    """The options of a run that define its recipe, with the weights of the attributes' losses."""
    weights = {f"loss of {a['name']}": a["weight"] for a in read_config(run / "best")["attributes"]}
    recipe = options | {"init_from": "a run" if options["init_from"] else None}
    return {name.replace("_", "-"): v for name, v in recipe.items() if name not in NO_LEVERS} | weights


def minutes(run: Path, options: dict) -> float:
    start, end = ((run / name).stat().st_mtime for name in ("options.json", "last/config.json"))
    taken = (end - start) / 60
    before = Path(options["init_from"]).parent if options["init_from"] else None  # of RUN/best the run, if it is one
    return taken + minutes(before, read_options(before)) if before and (before / "last").is_dir() else taken


def figures(run: Path, options: dict, data: str, split: str, device: torch.device) -> dict[str, float]:
    task = load_task(run / "best", None, data, Path(options["cache_dir"]), options["limit"], device, STORE_GB)
    scores = evaluate(task, split).scores
    found = {name: a.get("accuracy") for name, a in scores["attributes"].items()}
    found |= {"mean": scores["mean_accuracy"], "path": scores["path_accuracy"], "minutes": minutes(run, options)}
    return {name: value for name, value in found.items() if value is not None}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: {what varies: the figures of each seed} -> a row each."""
    names = list(dict.fromkeys(name for seeds in rows.values() for seed in seeds for name in seed))
    lines = [
        [what, str(len(seeds)), *(cell(name, [s[name] for s in seeds if name in s]) for name in names)]
        for what, seeds in rows.items()
    ]
    return markdown(["", "seeds", *names], lines)


def cell(name: str, values: list[float]) -> str:
    if not values:
        return "–"
    if name == "minutes":
        return f"{np.mean(values):.0f}"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


@exits_cleanly
def main() -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of train.py")
    parser.add_argument("--data", required=True, help="the catalogue they were trained on")
    parser.add_argument("--split", choices=["val", "test"], default="val", help="rows to score (default: val)")
    args = parser.parse_args()
    asked = {run: read_options(run) for run in args.runs}
    recipes = {run: levers(run, options) for run, options in asked.items()}
    names = dict.fromkeys(name for recipe in recipes.values() for name in recipe)
    varying = [name for name in names if len({str(recipe.get(name)) for recipe in recipes.values()}) > 1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: dict[str, list[dict[str, float]]] = {}
    for run, options in tqdm(asked.items(), unit="run"):
        what = ", ".join(f"{name} {recipes[run].get(name)}" for name in varying) or "as given"
        rows.setdefault(what, []).append(figures(run, options, args.data, args.split, device))
    print(f"{args.split} rows; {machine(device)}\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
