"""Does the input keep up with training: decoding, the store and preprocessing alone, and how long `train.py` waits.

    python benchmarks/input_side.py --amp --data FOLDER --backbone vit_tiny_patch16_224 --weights FILE --img-size 112

Takes the options of `train.py`. Alone, as multiples of the bare step (forward, backward and optimizer on images in
memory): *decode* builds a store of `DECODED` pictures, bytes to canvas with all threads, as a first start does; *store*
gathers batches from the mapped file, in random order, the file being in the page cache; *preprocess* is resize, flip
and normalise on the device. Then, as shares of `train_epoch`'s own time: *waiting* is spent in `next()` of its loader,
*preprocessing* in `augmented`; on a GPU, where work is queued, these are the host's times. The parts take turns.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Training, in_turn, machine, markdown, ratios, training

import train
from data.batches import epoch_batches, make_loader
from data.preprocess import CHANCES
from data.store import open_store
from errors import exits_cleanly

ROUNDS, STEPS = 9, 6
DECODED = 2000  # pictures: half a second and more
GATHERED = 2000  # pictures: more than a processor's cache holds
WARP = 0.2
STEP, WHOLE = "bare step", "train.py"


class Shares:
    """The shares of `train_epoch`'s time that its parts take, run by run."""

    def __init__(self):
        self.seconds, self.runs = {}, []

    def timed(self, part: str, function: Callable) -> Callable:
        """The same function, its seconds added to the part's."""

        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return call

    def measure(self, run: Training) -> None:
        """Train the last steps of an epoch with a clock at the loader and one at the preprocessing."""
        plain = train.windows

        def windows(loader, accum):
            return iter(self.timed("waiting", partial(next, plain(loader, accum), None)), None)

        train.windows = windows
        preprocess = SimpleNamespace(augmented=self.timed("preprocessing", run.task.preprocess.augmented))
        self.seconds = dict.fromkeys(("waiting", "preprocessing"), 0.0)
        start = time.perf_counter()
        run._replace(task=run.task._replace(preprocess=preprocess)).last_steps(STEPS)
        whole = time.perf_counter() - start
        train.windows = plain
        assert all(self.seconds.values()), "a clock was not read"
        self.runs.append({part: seconds / whole for part, seconds in self.seconds.items()})


def input_ways(run: Training) -> tuple[dict[str, Callable], dict[str, int]]:
    """The parts of the input side, each alone, and the pictures of each."""
    task, device, folders = run.task, run.device, Path(tempfile.mkdtemp(dir=run.args.out))
    few = replace(task.catalogue, ids=task.catalogue.ids[:DECODED])
    rows = task.store.rows("train")
    batches = epoch_batches(rows, run.args.batch_size, seed=0)[: max(1, GATHERED // run.args.batch_size)]
    loader = make_loader(task.store, task.known, batches, device)
    pixels = [batch.pixels.to(device) for batch in loader][: STEPS * run.args.accum]

    def decode():
        with tempfile.TemporaryDirectory(dir=folders) as folder:
            open_store(few, task.preprocess.canvas, Path(folder))

    def preprocess(warp: float):
        for some in pixels:
            task.preprocess.augmented(some, torch.rand(CHANCES, len(some), device=device), warp)

    count = sum(map(len, pixels))
    ways = {
        "decode (cold)": (decode, len(few)),
        "store (warm)": (lambda: sum(len(batch.pixels) for batch in loader), sum(map(len, batches))),
        "preprocess": (partial(preprocess, 0.0), count),
        f"preprocess, --warp {WARP}": (partial(preprocess, WARP), count),
    }
    if device.type == "cuda":
        kept = torch.from_numpy(task.store.pixels[rows]).to(device)
        index = torch.randint(len(rows), (GATHERED // run.args.batch_size, run.args.batch_size), device=device)
        ways["store on the device"] = (lambda: [kept[some] for some in index], index.numel())
    return {name: way for name, (way, _) in ways.items()}, {name: n for name, (_, n) in ways.items()}


@exits_cleanly
def main() -> None:
    shares = Shares()
    with training(sys.argv[1:]) as run:
        ways, images = input_ways(run)
        windows = run.in_memory(STEPS)
        ways |= {STEP: lambda: [run.bare_step(window) for window in windows], WHOLE: partial(shares.measure, run)}
        images |= dict.fromkeys((STEP, WHOLE), STEPS * run.window_size)
        seconds = in_turn(ways, ROUNDS, run.device)
        args, title = run.args, machine(run.device)
    print(f"{args.backbone}, {args.amp or 'fp32'}, batch {args.batch_size} x {args.accum}, {ROUNDS} rounds\n{title}\n")
    speed = {name: [images[name] / s for s in times] for name, times in seconds.items()}
    rows = []
    for name, speeds in speed.items():
        times = ratios(speeds, speed[STEP])
        spread = f"{statistics.median(times):,.2f} ({min(times):,.2f} to {max(times):,.2f})"
        rows.append([name, f"{statistics.median(speeds):,.0f}", spread])
    print(markdown(["", "images/s", "times the bare step"], rows), end="\n\n")
    rows = []
    for part in shares.seconds:
        found = [share[part] for share in shares.runs[1:]]  # the first warms up
        rows.append([part, f"{statistics.median(found):.2%}", f"{min(found):.2%} to {max(found):.2%}"])
    print(markdown(["share of `train.py`'s time", "median", "rounds"], rows))


if __name__ == "__main__":
    main()
