"""Peak memory and speed of `infer.py`, which must not grow with the number of images: over folders of 1,000 and 10,000
image files, and as a job over parquet of 5,000 and 50,000 rows in a single row group.

    python benchmarks/infer_memory.py [--checkpoint FOLDER] [--weights FILE]

The images are 200 drawings under many names; each is read and decoded again. Options are passed on to `infer.py`.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq

from data.fashion import draw

ROOT = Path(__file__).parents[1]


def folder_of(drawings: list[Path], count: int, place: Path) -> Path:
    place.mkdir()
    for index in range(count):
        os.link(drawings[index % len(drawings)], place / f"{index:05d}.jpg")
    return place


def parquet_of(drawings: list[Path], count: int, place: Path) -> Path:
    images = [drawing.read_bytes() for drawing in drawings]
    cells = [{"bytes": images[index % len(images)], "path": None} for index in range(count)]
    table = pa.table({"id": range(count), "image": cells})
    pq.write_table(table, place, row_group_size=count, use_dictionary=False, compression="none")
    return place


def measure(inputs: Path, out: Path, count: int, kind: str) -> None:
    words = [sys.executable, ROOT / "infer.py", inputs, "--out", out, *sys.argv[1:]]
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, words)), stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"infer.py ended with status {status}")
    seconds = time.perf_counter() - start
    print(f"{count:>7,} {kind}: peak {usage.ru_maxrss / 1024:,.0f} MB, {seconds:.0f} s with start-up", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        (scratch / "drawings").mkdir()
        for index in range(200):
            draw(index, seed=2)[1].save(scratch / "drawings" / f"{index}.jpg")
        drawings = sorted((scratch / "drawings").iterdir())
        for count in (1_000, 10_000):
            measure(folder_of(drawings, count, scratch / str(count)), scratch / "labels.csv", count, "images")
        for count in (5_000, 50_000):
            rows = parquet_of(drawings, count, scratch / f"{count}.parquet")
            measure(rows, scratch / f"job {count}", count, f"rows of {rows.stat().st_size / 1e6:.0f} MB of parquet")


if __name__ == "__main__":
    main()
