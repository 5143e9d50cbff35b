"""Answers as text: a table on the screen, CSV, JSON lines and Parquet, a caption below a picture."""

import csv
import itertools
import json
import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.cells import inert, without_apostrophe
from data.table import read_rows
from durable import give_name
from errors import CONTROLS, UserError, first_line, say_once

# In Parquet. With a row group for each batch, metadata would need more room than the answers.
GROUP_ROWS = 4096


class Output:
    """A file of answers, written as they come; it takes its name only when all is done.

    Use as a context manager. CSV and Parquet have a column for each class's label, confidence and decision, for each
    number, and `error`; JSONL has the objects of `--json`, where with neighbours train pictures are named too.

    Args:
        attributes: the checkpoint's.
    """

    KINDS = (".csv", ".jsonl", ".parquet")

    def __init__(self, path: Path, attributes: list[dict]):
        self.path, self.kind = path, path.suffix.lower()
        # Hidden, so that readers of a parquet folder skip it; named uniquely, as a lock may not reach other machines.
        self.part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        classes = [a["name"] for a in attributes if a["kind"] == "class"]
        numbers = [a["name"] for a in attributes if a["kind"] == "number"]
        said = ((name, f"{name}_confidence", f"{name}_decision") for name in classes)
        self.columns = ["image", *itertools.chain(*said), *numbers, "error"]
        self.held: list[pa.RecordBatch] = []  # rows of Parquet that are not written yet
        self.floats = {*numbers, *(f"{name}_confidence" for name in classes)}

    def __enter__(self):
        if self.kind == ".parquet":
            fields = [(c, pa.float64() if c in self.floats else pa.string()) for c in self.columns]
            self.file = pq.ParquetWriter(self.part, pa.schema(fields))
        else:
            self.file = open(self.part, "w", newline="", encoding="utf-8")
        if self.kind == ".csv":
            csv.writer(self.file).writerow(map(inert, self.columns))
        return self

    def __exit__(self, failed, *_):
        try:
            if self.held and not failed:
                self._write_held()
            self.file.close()
            if not failed:
                give_name(self.part, self.path)
        finally:
            self.part.unlink(missing_ok=True)

    def write(self, answers: list[dict]) -> None:
        if self.kind == ".jsonl":
            self.file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            return
        rows = [dict.fromkeys(self.columns) | {"image": a["image"], "error": a.get("error")} for a in answers]
        for row, answer in zip(rows, answers, strict=True):
            for name, said in answer.get("attributes", {}).items():
                row[name] = said["value"] if "value" in said else said["label"]
                row |= {f"{name}_{key}": said[key] for key in ("confidence", "decision") if key in said}
        if self.kind == ".csv":
            csv.writer(self.file).writerows(map(inert, row.values()) for row in rows)
        else:
            self.held.append(pa.RecordBatch.from_pylist(rows, schema=self.file.schema))
            if sum(map(len, self.held)) >= GROUP_ROWS:
                self._write_held()

    def _write_held(self) -> None:
        self.file.write_table(pa.Table.from_batches(self.held, self.file.schema))
        self.held = []


def labelled_in(path: Path) -> set[str]:
    """Names of the pictures that earlier results have labels for: a file that `Output` wrote, a folder of such, or a
    job's.

    Raises:
        UserError: it is no such result.
    """
    files, names = [path], set()
    if os.path.isdir(path):  # which says no to a name too long, where `Path.is_dir` raises
        job = (path / "job.json").is_file() or any((path / "labels").glob("*.parquet"))
        place = path / "labels" if job else path
        there = [place / name for name in os.listdir(place) if not name.startswith(".")]  # hidden while it is written
        files = [file for file in there if file.suffix.lower() in Output.KINDS]
        if there and not files and not job:  # an empty folder is where they are to be; a job may have found nothing
            raise UserError(f"--skip {path} holds no answers: name a file that --out wrote, or a job's folder")
    for file in files:
        try:
            names.update(_labelled_in(file))
        except OSError as error:
            raise UserError(f"cannot read --skip {file}: {error.strerror or error}") from None
        except (UserError, ValueError, LookupError, TypeError, RecursionError, pa.ArrowException) as error:
            raise UserError(f"--skip {file} is no file that --out wrote: {first_line(error)}") from None
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"--skip {path} is no file that --out wrote: an image has no name")
    return {name for name in names if "\ufffd" not in name}  # which stands for a letter that is not known


def _labelled_in(file: Path) -> list[str]:
    if file.suffix.lower() == ".parquet":
        columns = pq.read_table(file, columns=["image", "error"])
        rows = zip(columns["image"].to_pylist(), columns["error"].to_pylist(), strict=True)
        return [name for name, error in rows if error is None]
    if file.suffix.lower() == ".csv":  # which a spreadsheet may have saved since
        rows = list(read_rows(file, ("image", "error")))
        if bad := [f"line {number}, {row}" for number, row in rows if isinstance(row, str)]:
            say_once(f"--skip {file}: rows that cannot be read, whose pictures count as new: {len(bad):,}, {bad[0]}")
        whole = (row for _, row in rows if isinstance(row, dict) and not row["error"] and row[list(row)[-2]])
        return [without_apostrophe(row["image"]) for row in whole]
    with open(file, encoding="utf-8-sig") as lines:
        answers = [(answer["image"], "attributes" in answer) for answer in map(json.loads, lines)]
    return [name for name, labelled in answers if labelled]


def table(answer: dict) -> str:
    """What is said of one image, an attribute a line: a number, or label, confidence, decision and the next guesses;
    then the train pictures that are like it."""
    if "error" in answer:
        return f"{answer['image']}: {answer['error']}".translate(CONTROLS) + "\n"
    lines = [answer["image"]]
    for name, said in answer["attributes"].items():
        if "value" in said:
            lines.append(f"  {name:<16}{number_text(said['value'])}")
            continue
        rest = ", ".join(f"{label} {p:.2f}" for label, p in said["top"][1:])
        lines.append(f"  {name:<16}{said['label']:<24}{said['confidence']:>5.2f}  {said['decision']}  {rest}".rstrip())
    if like := answer.get("like"):
        lines.append(f"  {'like':<16}{', '.join(f'{name} {near:.2f}' for name, near in like)}")
    return "\n".join(line.translate(CONTROLS) for line in lines) + "\n"


def caption(said: dict) -> str:
    """What is said of an attribute, for a contact sheet."""
    return number_text(said["value"]) if "value" in said else f"{said['label']} {said['confidence']:.2f}"


def number_text(value: float) -> str:
    """A number to read: 24,500, but 2012, which may be a year."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:g}"
