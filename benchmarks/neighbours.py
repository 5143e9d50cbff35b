"""What neighbours give, by how alike the nearest of them is, and how long looking them up takes.

    python benchmarks/neighbours.py --checkpoint RUN/best --weights FILE --data FASHION

The checkpoint has to be made by `refit.py --neighbours`. Accuracy is of validation rows, decoded along the known paths,
in quarters by how alike their nearest train picture is; the heads alone are the same model without votes. Times are for
images that are ready in memory, in turn.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import in_turn, machine, markdown, ratios, spread, trained

from errors import UserError, exits_cleanly
from evaluate import Evaluation, evaluate
from lora import keep_base_in, merge_lora
from refit import embed, nearest
from task import Task

BATCHES = (1, 64)
ROUNDS = 9


def alike_the_nearest(task: Task, rows: np.ndarray) -> Tensor:
    """(N,) how alike the nearest train picture is, the very same picture left out."""
    looked_up = copy.deepcopy(task.model.neighbours).cpu()
    return nearest(looked_up, embed(task, rows, 64, "val", True)).cosines.amax(1)


def right(task: Task, found: Evaluation) -> np.ndarray:
    """(N, A) whether each answer is right; NaN where the label is missing."""
    labels = task.labels[found.rows]
    return np.where(labels == -1, np.nan, found.answers.labels.numpy() == labels)


@exits_cleanly
@torch.no_grad()
def main() -> None:
    task = trained("What neighbours give, and what they cost.")
    model, device = task.model, task.device
    if model.neighbours is None:
        raise UserError("the checkpoint has no neighbours; make some with refit.py --neighbours")
    both = right(task, looking := evaluate(task, "val"))
    alike = alike_the_nearest(task, looking.rows)
    shares = model.neighbours.share.clone()
    model.neighbours.share.zero_()
    alone = right(task, evaluate(task, "val"))
    model.neighbours.share.copy_(shares)
    names, lines = list(task.classes), []
    for quarter in alike.argsort().tensor_split(4):
        by = [(np.nanmean(alone[quarter, i]), np.nanmean(both[quarter, i])) for i in range(len(names))]
        figures = [f"{a:.3f}, {b:.3f}" for a, b in [*by, np.mean(by, axis=0)]]
        lines.append([f"{alike[quarter].min():.2f} to {alike[quarter].max():.2f}", f"{len(quarter):,}", *figures])
    print(f"{len(model.neighbours.bank):,} train pictures; {machine(device)}\n")
    print(markdown(["nearest", "rows", *names, "mean"], lines) + "\n")

    ways = {"heads alone": merge_lora(model).eval(), "neighbours": merge_lora(model).eval()}
    ways["heads alone"].neighbours = None
    for way in ways.values():
        keep_base_in(way, torch.float32)
    for size in BATCHES:
        pixels = torch.from_numpy(np.asarray(task.store.pixels[looking.rows[:size]]))
        images = task.preprocess(pixels.to(device))
        seconds = in_turn({name: lambda way=way, x=images: way(x) for name, way in ways.items()}, ROUNDS, device)
        times = spread(ratios(seconds["neighbours"], seconds["heads alone"]))
        print(f"batch {size}: {1e3 * np.median(seconds['heads alone']):.1f} ms, with neighbours {times} times as long")


if __name__ == "__main__":
    sys.exit(main())
