"""How much of the bare training step's speed is left when `train.py` feeds it: both in turn, in one run.

    python benchmarks/train_throughput.py --data FOLDER --backbone vit_tiny_patch16_224 --weights FILE --img-size 112

Takes the options of `train.py`. *bare* is forward, backward and optimizer on normalised float images and labels that
are already in memory. *train.py* is its own `train_epoch`: store, loader, resize, flip, normalise, bar, TensorBoard.
Rounds are short, so that a noisy machine slows both alike.
"""

import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import in_turn, machine, ratios, training

from errors import exits_cleanly

ROUNDS, WINDOWS = 9, 6


@exits_cleanly
def main() -> None:
    with training(sys.argv[1:]) as run:
        images = WINDOWS * run.window_size
        windows = run.in_memory(WINDOWS)
        ways = {
            "bare step": lambda: [run.bare_step(window) for window in windows],
            "train.py": partial(run.last_steps, WINDOWS),
        }
        seconds = in_turn(ways, ROUNDS, run.device)
        print(machine(run.device))
    speed = {name: [images / s for s in times] for name, times in seconds.items()}
    for name, speeds in speed.items():
        print(f"{name:<10} {statistics.median(speeds):8.1f} images/s")
    left = ratios(speed["train.py"], speed["bare step"])
    print(f"ratio      {statistics.median(left):8.3f}  (rounds: {', '.join(f'{r:.3f}' for r in left)})")


if __name__ == "__main__":
    main()
