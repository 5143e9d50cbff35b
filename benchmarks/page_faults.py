"""What it is worth that glibc keeps what a batch frees (`keep_freed_memory` of `memory.py`), on a CPU.

    python benchmarks/page_faults.py --accum 2 --data FOLDER --backbone vit_tiny_patch16_224 --weights FILE \\
        --img-size 112 --batch-size 32 [--rounds 5]

The options are those of `train.py`; answers are in fp32. In each round, a process that keeps memory and one that does
not take turns; each answers for pictures in memory, then takes training steps on them.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import memory

STEPS, WARM_UP = 8, 2
HOWS = ("given back", "kept")


def measure(words: list[str]) -> dict[str, tuple[float, float]]:
    """{"answers": (images/s, page faults a window), "training": the same} of this process."""
    import torch
    from common import training

    from lora import merge_lora

    def each(work, inputs: list) -> tuple[float, float]:
        seconds, faults = [], []
        for item in inputs:
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            work(item)
            seconds.append(time.perf_counter() - start)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return run.window_size / statistics.median(seconds[WARM_UP:]), statistics.median(faults[WARM_UP:])

    with training(words) as run:
        windows, model = run.in_memory(STEPS + WARM_UP), merge_lora(run.task.model).eval()
        with torch.inference_mode():
            answers = each(lambda window: [model(batch.pixels, batch.tokens) for batch in window], windows)
        return {"answers": answers, "training": each(run.bare_step, windows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--how", choices=HOWS, help=argparse.SUPPRESS)
    args, words = parser.parse_known_args()
    if args.how:
        if args.how == HOWS[0]:
            memory.keep_freed_memory = lambda: None
        print(json.dumps(measure(words)))
        return
    found = {how: [] for how in HOWS}
    for round_ in tqdm(range(args.rounds), desc="rounds"):
        for how in HOWS[:: 1 if round_ % 2 else -1]:
            command = [sys.executable, __file__, "--how", how, *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found[how].append(json.loads(done.stdout.splitlines()[-1]))
    from common import machine, markdown, ratios, spread, torch

    rows = []
    for what in ("answers", "training"):
        speeds = {how: [measured[what][0] for measured in found[how]] for how in HOWS}
        faults = [statistics.median(measured[what][1] for measured in found[how]) for how in HOWS]
        row = [
            what,
            *(f"{statistics.median(speeds[how]):.1f}" for how in HOWS),
            spread(ratios(speeds["kept"], speeds["given back"])),
        ]
        rows.append([*row, *(f"{count:,.0f}" for count in faults)])
    print(machine(torch.device("cpu")))
    heads = [f"images/s, {how}" for how in HOWS], [f"page faults, {how}" for how in HOWS]
    print(markdown(["", *heads[0], "ratio", *heads[1]], rows))


if __name__ == "__main__":
    main()
