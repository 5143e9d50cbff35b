"""Pretrain the demo's backbone, a compact timm ViT, on drawn scenes: shapes, patterns and symbols, no garments.

    python pretrain_demo.py

It learns to say eight things about a scene at once, from scratch, on the CPU, and keeps the backbone's weights alone in
`models/demo_backbone.safetensors`. The committed file took 16,000 scenes, 10 epochs and 12 minutes on two
cores of an AMD EPYC (2026-11-24, torch 2.15.0, timm 1.0.31). On 1,000 held-out scenes it was right about aspect .996,
colour .988, size .981, shape .926, corners .796, border .709, symbol .310 (one of 10) and pattern .297 (one of 4): it
sees little of small print.
"""

import startup  # noqa: F401

# isort: split
import colorsys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from data.pen import GOLD, Pen, box, circle, mirrored, rounded
from durable import replace_file
from errors import Parser, UserError, check_writable, exits_cleanly, positive_int
from models.backbone import DEMO, DEMO_BACKBONE, DEMO_WEIGHTS, bare_backbone

BATCH_SIZE = 64
HELD_OUT = 1000


def star(points: int, inner: float = 1.0) -> np.ndarray:
    """A star in the unit circle, one point up; a regular polygon where `inner` is 1."""
    angle = np.linspace(0, 2 * np.pi, 2 * points, endpoint=False)
    radius = np.where(np.arange(2 * points) % 2, inner * np.cos(np.pi / points) if inner == 1 else inner, 1)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


# Everything is symmetric, left for right, so that a flipped scene keeps its labels.
SHAPES = [
    star(3),
    np.array(box(-0.9, -0.9, 0.9, 0.9)),
    star(5),
    circle(0, 0, 1),
    star(5, 0.45),
    star(4, 0.4),
    star(8, 0.75),
    np.array(mirrored([(0.4, -1), (1, 1)])),  # a trapezium
    np.array(mirrored([(0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35), (0.35, 1)])),  # a cross
    np.array(mirrored([(0, -0.5), (0.5, -1), (1, -0.5), (0.8, 0.3), (0, 1)])),  # a heart
]
SYMBOLS = [
    [box(-0.9, -0.9, 0.9, 0.9)],
    [star(3)],
    [star(3) * (1, -1)],
    [star(5, 0.4)],
    [star(2, 0.15) @ np.array([[0.7, 0.7], [-0.7, 0.7]]), star(2, 0.15) @ np.array([[0.7, -0.7], [0.7, 0.7]])],  # an x
    [box(-1, -1, 1, -0.45), box(-0.3, -1, 0.3, 1)],  # a T
    [circle(-0.6, 0, 0.5), circle(0.6, 0, 0.5)],
    [circle(0, -0.6, 0.5), circle(0, 0.6, 0.5)],
    [mirrored([(0.9, -1), (0.15, 0), (0.9, 1)])],  # an hourglass
    [mirrored([(1, 1), (1, -1), (0, -1), (0, -0.5), (0.5, -0.5), (0.5, 1)])],  # an arch
]
PALETTE = [tuple(255 * c for c in colorsys.hsv_to_rgb(hue / 9, 0.7, 0.85)) for hue in range(9)]
PALETTE += [(40, 40, 44), (140, 142, 146), (240, 240, 238), (110, 70, 44)]
PATTERNS = ["plain", "hoops", "checks", "dots"]
QUESTIONS = {  # what is asked about a scene: how many answers
    "shape": len(SHAPES),
    "colour": len(PALETTE),
    "size": 3,
    "aspect": 3,
    "corners": 2,  # sharp, rounded
    "pattern": len(PATTERNS),
    "symbol": len(SYMBOLS),
    "border": 3,  # none, lines down the sides, beads below
}


def scene(rng: np.random.Generator) -> tuple[Image.Image, list[int]]:
    """A drawn scene and the answers to the questions about it."""
    answers = {question: int(rng.integers(count)) for question, count in QUESTIONS.items()}
    pen = Pen(rng, PALETTE[answers["colour"]], 1)
    radius = np.array([(0.6, 1.1), (1, 1), (1, 0.6)])[answers["aspect"]] * (15, 20, 26)[answers["size"]]
    outline = rounded(SHAPES[answers["shape"]] * radius, 3 if answers["corners"] else 0)
    pen.fill(outline)
    if answers["pattern"]:
        pen.pattern(outline, PATTERNS[answers["pattern"]])
    with pen.inside(outline):
        x, y = 0.6 * radius
        if answers["border"] == 1:
            pen.pair(pen.line, [(x, -40), (x, 40)], pen.contrast, 1.3)
            pen.pair(pen.line, [(x - 3, -40), (x - 3, 40)], pen.contrast, 1.3)
        for x in np.linspace(-25, 25, 14) if answers["border"] == 2 else []:
            pen.fill(circle(x, y, 1.3)[::3], GOLD, False)
    at, size = rng.uniform(-0.15, 0.15, 2) * radius, rng.uniform(4, 11)
    for part in SYMBOLS[answers["symbol"]]:
        pen.fill(np.multiply(part, size) + at, pen.contrast, False)
    return pen.finished(), list(answers.values())


def draw_scenes(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`(count, 3, 64, 64)` uint8 pictures, stretched as the demo's are, and `(count, questions)` answers."""
    size = (DEMO_BACKBONE["img_size"],) * 2
    drawn = [scene(np.random.default_rng([seed, i])) for i in tqdm(range(count), desc="drawing", leave=False)]
    pictures = np.stack([np.asarray(picture.resize(size, Image.Resampling.BICUBIC)) for picture, _ in drawn])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), torch.tensor([answers for _, answers in drawn])


def prepared(pictures: torch.Tensor) -> torch.Tensor:
    return pictures / 127.5 - 1  # mean = std = 0.5


def varied(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """The batch moved by up to 3 pixels, every other one of its pictures flipped."""
    pictures = torch.roll(pictures, tuple(rng.integers(-3, 4, 2)), (2, 3))
    pictures[::2] = pictures[::2].flip(3)
    return pictures


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=positive_int, default=16000, help="how many scenes to draw and train on")
    parser.add_argument("--epochs", type=positive_int, default=10, help="how often to go through them")
    parser.add_argument("--out", type=Path, default=DEMO_WEIGHTS, help="where to save")
    args = parser.parse_args(argv)
    if args.scenes < BATCH_SIZE:
        raise UserError(f"--scenes {args.scenes} is less than a batch; give {BATCH_SIZE} or more")
    check_writable(args.out, "--out")

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pictures, answers = draw_scenes(args.scenes + HELD_OUT)
    backbone = bare_backbone(DEMO)
    answer_counts = list(QUESTIONS.values())
    heads = nn.Linear(backbone.num_features, sum(answer_counts))  # one head per question, side by side
    model = nn.Sequential(backbone, heads)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = args.scenes // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.epochs * batches, pct_start=0.1)

    for epoch in range(args.epochs):
        order = torch.randperm(args.scenes)[: batches * BATCH_SIZE].view(batches, BATCH_SIZE)
        bar = tqdm(order, desc=f"epoch {epoch + 1}/{args.epochs}")
        for rows in bar:
            logits = model(prepared(varied(pictures[rows], rng))).split(answer_counts, dim=1)
            losses = [F.cross_entropy(x, y) for x, y in zip(logits, answers[rows].T, strict=True)]
            loss = torch.stack(losses).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")

    model.eval()
    with torch.inference_mode():
        logits = model(prepared(pictures[args.scenes :])).split(answer_counts, dim=1)
    for question, x, y in zip(QUESTIONS, logits, answers[args.scenes :].T, strict=True):
        print(f"{question:14}{(x.argmax(1) == y).float().mean():.3f}")
    replace_file(args.out, save(backbone.state_dict()))


if __name__ == "__main__":
    main()
