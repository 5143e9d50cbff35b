"""Peak memory and speed of `infer.py` over folders of 1,000 and 10,000 images: the first must not grow with the second.

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

from data.demo import draw

ROOT = Path(__file__).parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        drawings = Path(scratch, "drawings")
        drawings.mkdir()
        for index in range(200):
            draw(index, seed=2)[1].save(drawings / f"{index}.jpg")
        for count in (1_000, 10_000):
            folder = Path(scratch, str(count))
            folder.mkdir()
            for index in range(count):
                os.link(drawings / f"{index % 200}.jpg", folder / f"{index:05d}.jpg")
            words = [sys.executable, ROOT / "infer.py", folder, "--out", Path(scratch, "labels.csv"), *sys.argv[1:]]
            start = time.perf_counter()
            process = subprocess.Popen(list(map(str, words)), stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"infer.py ended with status {status}")
            seconds = time.perf_counter() - start
            print(f"{count:>7,} images: peak {usage.ru_maxrss / 1024:,.0f} MB, {seconds:.0f} s with start-up")


if __name__ == "__main__":
    main()
