"""Catalogues of 10,000 to 1,000,000 rows without a store: neither memory nor the time for a picture may grow with rows.

    python benchmarks/large_catalogue.py --data FOLDER [--rows 10000 100000 1000000]

FOLDER holds parquet in the hub's schema; its rows are written over and over until there are enough, each with an id of
its own, which is also appended to its title, so that no title repeats. Each size runs in a process of its own: text
columns copied, every picture decoded once for its hash and so for the split, label maps fitted and all rows encoded,
one pass of a tiny ViT over all pictures, and validation rows calibrated on and scored as after an epoch, of random
outputs. *anonymous* is memory that the system cannot take back, before and after validation; *resident* counts pages of
mapped files too, which it can.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import startup  # noqa: F401

# isort: split
from common import machine, markdown

from calibration import calibrate
from data.attributes import known_paths, read_numbers
from data.batches import epoch_batches, make_loader
from data.preprocess import Preprocess
from data.schema import FASHION, FASHION_FILE, read_schema
from data.sources import load_source
from data.split import SPLITS
from data.store import open_store
from evaluate import SCORED, choice, judge
from targets import fit_targets
from task import Task

GROUP, FILE = 10_000, 100_000  # rows of a row group and of a file
TITLE = read_schema(FASHION_FILE).title
WATCH = 0.05  # seconds
STUB = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 1, "num_classes": 0}


def write(source: Path, folder: Path, rows: int) -> None:
    """Parquet of so many rows."""
    folder.mkdir()

    def groups() -> Iterator[pa.Table]:
        while True:
            for path in sorted(source.rglob("*.parquet")):
                with pq.ParquetFile(path) as file:
                    yield from (pa.Table.from_batches([batch]) for batch in file.iter_batches(GROUP))

    written, some = 0, groups()
    with tqdm(total=rows, desc=f"writing {rows:,} rows", unit="row") as bar:
        for number in itertools.count():
            if written >= rows:
                return
            first = next(some)
            with pq.ParquetWriter(folder / f"{number:05d}.parquet", first.schema, compression="none") as writer:
                end = min(rows, written + FILE)
                for group in itertools.chain([first], some):
                    group = group.slice(0, end - written)
                    numbers = range(written, written + len(group))
                    titles = [t and f"{t} {n}" for t, n in zip(group[TITLE].to_pylist(), numbers, strict=True)]
                    for name, cells in {"id": numbers, TITLE: titles}.items():
                        field = group.schema.field(name)
                        group = group.set_column(group.schema.get_field_index(name), field, pa.array(cells, field.type))
                    writer.write_table(group)
                    written += len(group)
                    bar.update(len(group))
                    if written == end:
                        break


class Memory(threading.Thread):
    """Watches this process; `peak` is the most anonymous memory so far, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, kilobytes("RssAnon") * 1024)
            time.sleep(WATCH)


def kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(f"{name}:"))


def measure(folder: Path, cache: Path) -> dict:
    """Seconds of each part, and memory, for one catalogue."""
    memory, seconds = Memory(), {}
    memory.start()
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **STUB).eval()

    def timed(name: str, work):
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    catalogue = timed("columns", lambda: load_source(str(folder), cache))
    store = timed("hashes", lambda: open_store(catalogue, (80, 60), cache, most=0))
    train = timed("split", lambda: {split: store.rows(split) for split in SPLITS})["train"]

    entries, known = timed(
        "labels", lambda: fit_targets(catalogue, read_numbers(catalogue.columns, FASHION), train, FASHION, 10)
    )
    paths = timed("paths", lambda: known_paths(known.labels, train, FASHION))
    preprocess = Preprocess(store.pixels.canvas, (32, 32), "bilinear", (0.5,) * 3, (0.5,) * 3)

    def look() -> int:
        looked = 0
        with torch.inference_mode(), tqdm(total=len(catalogue), desc="inference", unit="img") as bar:
            for batch in make_loader(store, known, epoch_batches(store.rows("all"), 64), torch.device("cpu")):
                looked += len(model(preprocess(batch.pixels)))
                bar.update(len(batch.pixels))
        return looked

    looked = timed("inference", look)
    assert looked == store.ok.sum()
    config = {"attributes": entries, "paths": paths, "inputs": "image", "text": None}
    task, before = Task(model, config, preprocess, catalogue, store, known), memory.peak
    rows = choice(task, "val", SCORED)

    def validate() -> None:
        logits = {a["name"]: torch.randn(len(rows), len(a["labels"])) for a in entries}
        fitted = calibrate(logits, known.labels[rows], rows, config)
        judge(task._replace(config=config | {"calibration": fitted}), "val", rows, logits, joint=True)

    timed("validation", validate)
    time.sleep(2 * WATCH)
    return {"seconds": seconds, "before": before, "after": memory.peak, "resident": kilobytes("VmHWM") * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for rows in args.rows:
            write(args.data, folder := Path(scratch, str(rows)), rows)
            words = [sys.executable, __file__, "--data", args.data, "--measure", folder, Path(scratch, "cache")]
            done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, check=True)
            found[rows] = json.loads(done.stdout.splitlines()[-1])
    print(machine(torch.device("cpu")))
    parts = list(next(iter(found.values()))["seconds"])
    table = []
    for rows, m in found.items():
        memory = [f"{m[when] / 1e6:,.0f}" for when in ("before", "after", "resident")]
        table.append([f"{rows:,}", *memory, *(f"{1e6 * m['seconds'][part] / rows:.2f}" for part in parts)])
    head = ["rows", "anonymous, MB", "with validation", "resident", *(f"{part}, µs a row" for part in parts)]
    print(markdown(head, table))


if __name__ == "__main__":
    main()
