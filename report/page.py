"""The report: one HTML file that opens without a server or a network, and the suspects beside it as CSV.

Everything is computed in Python; `page.html.j2` only lays it out. Charts are inline SVG, pictures inlined as JPEG.
"""

import base64
import functools
import io
from collections import defaultdict
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from calibration import judged
from durable import replace_file
from metrics import path_distance, rounded
from models.decode import Decoder
from report import charts
from report.alike import most_alike
from report.suspects import EXCLUDED, LIKELY, conflicting, contradicted, write_csv

MISTAKES, SUSPECTS, PICTURES = 12, 60, 30  # at most: mistakes of an attribute, suspect rows, pictures of several rows
SIDE = 120  # pixels, the longest side of an inlined picture

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # titles and labels are a stranger's text
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(folder: Path, checkpoint: str, task, found) -> None:
    """Write `report.html` and `suspects.csv` for a calibrated checkpoint.

    Args:
        checkpoint: its name on the page.
        task, found: a `task.Task` and the `Evaluation` of one of its splits.
    """
    store, classes, rows = task.store, task.classes, found.rows
    given, said = task.labels[rows], found.answers.labels.numpy()
    p = {name: scores.numpy() for name, scores in Decoder(task.config).probabilities(found.logits).items()}
    single = contradicted(rows, given, said, p)
    groups = conflicting(rows, store.hashes[rows], given, said, p)
    titles = task.catalogue.columns.get(task.config["title"], [None] * len(task.catalogue))
    write_csv(folder / "suspects.csv", single, groups, task.catalogue, classes, titles)

    by_row, by_picture = defaultdict(list), defaultdict(list)
    for suspect in single:
        by_row[suspect.row].append(suspect)
    for group in groups:
        by_picture[store.hashes[group[0].row]].append(group)
    suspects = list(by_row.values())[:SUSPECTS]
    text = TEMPLATES.get_template("page.html.j2").render(
        checkpoint=checkpoint,
        backbone=task.config["backbone"],
        catalogue=task.catalogue.name,
        scores=found.scores,
        skipped=len(store.skipped),
        target=task.config["calibration"]["target_precision"],
        area={"left": charts.LEFT, "right": charts.RIGHT, "top": charts.TOP, "bottom": charts.BOTTOM},
        hierarchies=[" > ".join(path["attributes"]) for path in task.config["paths"]],
        chains=chains(task, given, said),
        often=charts.by_frequency(
            given, said, {a["name"]: a["counts"] for a in task.config["attributes"] if a["kind"] == "class"}
        ),
        starts=charts.OFTEN,
        figures=figures(task, found),
        suspects=suspects,
        like=most_alike(task, [row[0].row for row in suspects]),
        suspect_rows=len(by_row),
        suspect_labels=len(single),
        excluded=EXCLUDED,
        likely=LIKELY,
        pictures=list(by_picture.values())[:PICTURES],
        picture_total=len(by_picture),
        classes=classes,
        rounded=rounded,
        ids=task.catalogue.ids,
        title=lambda row: titles[row] or "",
        picture=functools.cache(lambda row: picture_uri(store.pixels[[row]][0])),
    )
    replace_file(folder / "report.html", text.encode(errors="replace"))


def chains(task, given: np.ndarray, said: np.ndarray) -> list[tuple[list[str], list[int]]]:
    """For each finest attribute of a hierarchy: its chain, coarse to fine (through the first of several parents), and
    how far off answers are along it, see `path_distance`."""
    parents, names = {a["name"]: a["parents"] for a in task.config["attributes"]}, list(task.classes)
    above, found = set().union(*parents.values()), []
    for leaf in (name for path in task.config["paths"] for name in path["attributes"] if name not in above):
        chain = [leaf]
        while parents[chain[0]]:
            chain.insert(0, parents[chain[0]][0])
        found.append((chain, path_distance(given, said, [names.index(name) for name in chain])))
    return found


def figures(task, found) -> dict[str, dict]:
    """Each attribute's charts, confusions and mistakes."""
    calibration, how = task.config["calibration"], found.scores["decoding"]
    raw = Decoder(task.config | {"calibration": None}, how == "joint")(found.logits)
    labels, made = task.labels[found.rows], {}
    for column, (name, texts) in enumerate(task.classes.items()):
        given, said = labels[:, column], found.answers.labels[:, column].numpy()
        confidence, threshold = found.answers.confidence[:, column].numpy(), calibration["threshold"][how][name]
        after = judged(found.answers, labels, column)
        made[name] = {
            "threshold": threshold,
            "before": charts.reliability_points(*judged(raw, labels, column)),
            "after": charts.reliability_points(*after),
            "coverage": charts.coverage_chart(*after, threshold, calibration["target_precision"]),
            "confusion": charts.confusion(given, said, texts),
            "mistakes": charts.confident_mistakes(found.rows, given, said, confidence, texts, MISTAKES),
        }
    return made


def picture_uri(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) -> a data URI, small enough for hundreds on a page."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    image.save(buffer := io.BytesIO(), "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
