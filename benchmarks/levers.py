"""What each lever of a recipe gives on validation rows: `train.py`'s own run with one thing changed at a time.

    python benchmarks/levers.py --jobs 2 --amp bf16 --data FOLDER --backbone vit_tiny_patch16_224 --weights FILE \\
        --img-size 112 --batch-size 64 --epochs 3 --drop-patches 0.5 --warp 0.1 --label-smoothing 0.1

Takes the options of `train.py`. The row `as given` has these options unchanged and three seeds: what differs from it by
less than its spread is no finding. All other rows have one seed. Scores are of the best epoch, decoded along the known
paths; test rows are left alone. What is finished in --results is not run again.

    --jobs N         runs at a time, each on its share of the cores (default: 1)
    --results DIR    (default: runs/levers)
    --only NAME ...  these levers alone
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import in_processes, machine
from quality import table

import step
import train
from data.schema import FASHION_FILE
from errors import Parser, UserError, exits_cleanly, positive_int
from evaluate import Evaluation
from metrics import average
from models.checkpoint import trained_params
from models.classifier import AttributeClassifier
from models.heads import HierarchicalHeads
from models.patches import forward_features
from options import parse_args
from task import Task

COLOURS = 4  # cells a side of the colour path
AVERAGED = 0.998  # share of the average that stays at each step: it is over about 500 of them
OVERLAP = 0.999  # beta of Cui et al.: a class's rows beyond about 1000 bring little that is new


class Lever(NamedTuple):
    """Attributes:
    change: what is done once a run is set up; each run has a process of its own, so modules may be changed.
    words: further options of `train.py`.
    """

    change: Callable[[Task], None] = lambda task: None
    words: tuple[str, ...] = ()


def hand_down(of: Callable[[Tensor], Tensor]) -> Callable[[Task], None]:
    """Let a level see `of(logits)` of each attribute above instead of its logits (B, classes)."""

    def forward(heads: HierarchicalHeads, embedding: Tensor) -> dict[str, Tensor]:
        seen, logits = embedding, {}
        for names, level in zip(heads.by_level, heads.levels, strict=True):
            parts = level(seen).split([heads.classes[name] for name in names], dim=-1)
            logits |= zip(names, parts, strict=True)
            seen = torch.cat([seen, *map(of, parts)], dim=-1)
        return {name: logits[name] for name in heads.classes}

    return lambda task: setattr(HierarchicalHeads, "forward", forward)


def embedding(of: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Callable[[Task], None]:
    """Let the heads see what `of` makes of CLS, the mean of the patches (both (B, d)) and the images."""

    def change(task: Task) -> None:
        given = AttributeClassifier.embed
        AttributeClassifier.embed = lambda model, images: of(*given(model, images), images)

    return change


def attention_pooling(task: Task) -> None:
    """Replace the plain mean of the patches by one that is weighted by what they hold."""
    task.model.heads.weigh = nn.Linear(task.model.backbone.num_features, 1)
    nn.init.zeros_(task.model.heads.weigh.weight)  # the plain one to start with

    def embed(model: AttributeClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
        drop = model.drop_patches if model.training else 0.0
        tokens = forward_features(model.backbone, images, model.keep_patches, drop)
        patches = tokens[:, model.backbone.num_prefix_tokens :]
        return model.backbone.forward_head(tokens), (model.heads.weigh(patches).softmax(dim=1) * patches).sum(1)

    AttributeClassifier.embed = embed


def colour_path(task: Task) -> None:
    """Also give the heads the picture's own colours in a grid of cells, past the backbone."""
    for level in task.model.heads.levels:
        first = level if isinstance(level, nn.Linear) else level[0]
        first.weight = nn.Parameter(F.pad(first.weight.detach(), (3 * COLOURS**2, 0)))  # new columns start at 0
    embedding(lambda cls, mean, images: (F.adaptive_avg_pool2d(images, COLOURS).flatten(1), cls, mean))(task)


def uncertainty(task: Task) -> None:
    """Weight each loss L by exp(-s), and add s, which is learnt, as its price (Kendall et al. 2018,
    arXiv:1705.07115)."""
    s = task.model.heads.log_variance = nn.Parameter(torch.zeros(len(task.names)))
    given = step.attribute_losses
    step.attribute_losses = lambda *args: (-s).exp() * given(*args) + s


def class_counts(task: Task) -> dict[str, Tensor]:
    """How many train rows each class has, (classes,) of each attribute."""
    device = task.device
    return {a["name"]: torch.tensor(a["counts"], dtype=torch.float, device=device) for a in task.config["attributes"]}


def logit_adjustment(task: Task) -> None:
    """Add the log of a class's share to the logits that training sees (Menon et al. 2021, arXiv:2007.07314)."""
    prior = {name: (n.clamp(min=1) / n.sum()).log() for name, n in class_counts(task).items()}
    given = step.attribute_losses
    step.attribute_losses = lambda outputs, *args: given({n: out + prior[n] for n, out in outputs.items()}, *args)


def class_balanced(task: Task) -> None:
    """Weight a row by how few train rows its class has, 1 on average (Cui et al. 2019, arXiv:1901.05555)."""
    weights = {}
    for name, n in class_counts(task).items():
        weight = 1 / (1 - OVERLAP ** n.clamp(min=1))
        weights[name] = weight * n.sum() / (weight @ n)

    def losses(outputs: dict[str, Tensor], labels: Tensor, known: Tensor, smoothing: float, *_) -> Tensor:
        sums = []
        for (name, logits), target in zip(outputs.items(), labels.clamp(min=-1).unbind(1), strict=True):
            asked = {"ignore_index": -1, "label_smoothing": smoothing, "reduction": "none"}
            loss = F.cross_entropy(logits.float(), target, **asked)  # (B,), 0 where the label is missing
            sums.append(loss @ weights[name][target.clamp(min=0)])
        return torch.stack(sums) / known.clamp(min=1)

    step.attribute_losses = losses


def heads_rate(ratio: float) -> Callable[[Task], None]:
    """Set the ratio of the heads' learning rate to that of all others."""
    given = train.parameter_groups

    def groups(params: dict[str, nn.Parameter], *args, **options) -> list[dict]:
        heads = {name: p for name, p in params.items() if name.startswith("heads.")}
        rest = {name: p for name, p in params.items() if name not in heads}
        return [group | {"lr_ratio": ratio} for group in given(heads, *args, **options)] + given(rest, *args, **options)

    return lambda task: setattr(train, "parameter_groups", groups)


def averaged(task: Task) -> None:
    """Score a running mean of the weights instead of the weights (Polyak and Juditsky 1992)."""
    params = list(trained_params(task.model).values())
    mean = [p.detach().clone() for p in params]
    take_step, evaluate, taken = train.train_step, train.evaluate, [0]

    def averaging_step(*args, **options) -> Tensor | None:
        figures = take_step(*args, **options)
        taken[0] += 1
        stays = min(AVERAGED, taken[0] / (taken[0] + 9))  # a start that is soon forgotten
        torch._foreach_lerp_(mean, [p.detach() for p in params], 1 - stays)
        return figures

    def swap() -> None:
        for p, m in zip(params, mean, strict=True):
            p.data, m.data = m.data, p.data

    def of_the_mean(*args, **options):
        swap()
        found = evaluate(*args, **options)
        swap()
        return found

    train.train_step, train.evaluate = averaging_step, of_the_mean


GIVEN = "as given"
LEVERS = {
    GIVEN: Lever(),
    "probabilities handed down": Lever(hand_down(lambda logits: logits.softmax(dim=-1))),
    "logits handed down detached": Lever(hand_down(Tensor.detach)),
    "nothing handed down": Lever(hand_down(torch.zeros_like)),
    "attention pooling": Lever(attention_pooling),
    "CLS alone": Lever(embedding(lambda cls, mean, _: (cls, torch.zeros_like(mean)))),
    "mean of patches alone": Lever(embedding(lambda cls, mean, _: (torch.zeros_like(cls), mean))),
    "colour path": Lever(colour_path),
    "uncertainty weighting": Lever(uncertainty),
    "brand's loss in full": Lever(words=("--attributes", "brand.toml")),
    "logit adjustment": Lever(logit_adjustment),
    "class-balanced loss": Lever(class_balanced),
    "no label smoothing": Lever(words=("--label-smoothing", "0")),
    "logit adjustment, no label smoothing": Lever(logit_adjustment, ("--label-smoothing", "0")),
    "no warp": Lever(words=("--warp", "0")),
    "all patches": Lever(words=("--drop-patches", "0")),
    "weights averaged": Lever(averaged),
    "heads at 3 x the rate": Lever(heads_rate(3)),
    "LoRA+ 4": Lever(words=("--lora-plus", "4")),
    "a learning rate of 2e-4": Lever(words=("--lr", "2e-4")),
}
SEEDS = {GIVEN: 3}  # of all others one


def run(lever: Lever, words: list[str], seed: int) -> dict[str, float]:
    """Train and score; what training writes is removed."""
    scores, setup = [], train.setup

    def changed(args: argparse.Namespace, device: torch.device) -> Task:
        task = setup(args, device)
        lever.change(task)
        task.model.to(device)
        evaluate = train.evaluate  # the lever's

        def scoring(*args, **options) -> Evaluation:
            found = evaluate(*args, **options)
            scores.append(found.scores)
            return found

        train.evaluate = scoring
        return task

    train.setup = changed
    with tempfile.TemporaryDirectory() as folder:
        schema = Path(folder, "brand.toml")
        schema.write_text(FASHION_FILE.read_text(encoding="utf-8").replace("weight = 0.3", "weight = 1"))
        own = [str(schema) if word == schema.name else word for word in lever.words]
        train.main.__wrapped__([*words, *own, "--seed", str(seed), "--no-test", "--out", str(Path(folder, "run"))])
    best = max(scores, key=lambda found: found["mean_accuracy"])
    figures = {name: a["accuracy"] for name, a in best["attributes"].items()}
    macro_f1 = average([a["macro_f1"] for a in best["attributes"].values()])  # to which a rare class counts as any
    return figures | {"mean": best["mean_accuracy"], "path": best["path_accuracy"], "macro F1": macro_f1}


@exits_cleanly
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=positive_int, default=1)
    parser.add_argument("--results", type=Path, default=Path("runs/levers"))
    parser.add_argument("--only", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--run", nargs=2, metavar=("LEVER", "SEED"), help="this one, here")
    own, words = parser.parse_known_args()
    if own.run:
        name, seed = own.run
        figures = run(LEVERS[name], words, int(seed))
        (own.results / f"{name}-{seed}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        return 0
    if parse_args(words).accum > 1:
        raise UserError("--accum: uncertainty weighting has its price once a step; give a larger --batch-size instead")
    own.results.mkdir(parents=True, exist_ok=True)
    files = {name: [own.results / f"{name}-{seed}.json" for seed in range(SEEDS.get(name, 1))] for name in own.only}
    commands = {
        file: [__file__, *sys.argv[1:], "--run", name, str(seed)]
        for name, made in files.items()
        for seed, file in enumerate(made)
    }
    in_processes(commands, own.jobs, "runs")
    found = {name: [json.loads(file.read_text(encoding="utf-8")) for file in made] for name, made in files.items()}
    print(f"val rows; {machine(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
