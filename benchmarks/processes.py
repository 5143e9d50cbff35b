"""Training speed of several processes on one machine beside one process that has all of it.

    python benchmarks/processes.py --processes 1 2 [options of train.py]

Each count of processes trains the same steps with `torchrun train.py`, sharing `--batch-size`, in turn. Speed is what
the run itself logs once it is warm, so that start-up and scoring do not count.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import ratios, spread

ROOT = Path(__file__).parents[1]
ROUNDS = 3


def images_per_second(processes: int, batch_size: int, words: list[str], folder: Path) -> float:
    """The last value that the run logs."""
    command = [sys.executable, ROOT / "train.py"]
    if processes > 1:  # one alone takes all cores
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [ROOT / "train.py"]
    command += [*words, "--epochs", 1, "--batch-size", batch_size // processes, "--out", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True)
    if done.returncode:
        raise SystemExit(f"{processes} processes ended with code {done.returncode}:\n{done.stderr.decode()[-2000:]}")
    return EventAccumulator(str(folder)).Reload().Scalars("train/images_per_second")[-1].value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    own, words = parser.parse_known_args()
    speeds = {processes: [] for processes in own.processes}
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=ROUNDS * len(speeds), desc="runs") as bar:
        for number in range(ROUNDS):
            for processes in speeds:
                folder = Path(scratch, f"{number}-{processes}")
                speeds[processes].append(images_per_second(processes, own.batch_size, words, folder))
                bar.update()
    first = speeds[own.processes[0]]
    print("| processes | images/s, median | ratio |\n|---|---|---|")
    for processes, found in speeds.items():
        print(f"| {processes} | {statistics.median(found):.0f} | {spread(ratios(found, first))} |")


if __name__ == "__main__":
    main()
