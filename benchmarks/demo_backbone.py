"""What the demo's pretrained backbone is worth: the demo run on it, and the same run on a random frozen backbone.

    python benchmarks/demo_backbone.py

Runs `train.py --data demo --amp --accum 2` twice as a user would, the second time with random weights in `--weights`,
and prints both runs' test accuracy and how long training took.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.backbone import DEMO, DEMO_WEIGHTS, bare_backbone

ROOT = Path(__file__).parents[1]


def run(weights: Path, folder: Path) -> tuple[dict, float]:
    """Train on the demo on this base; the test metrics and the seconds it took, drawings already made."""
    words = [sys.executable, ROOT / "train.py", "--data", DEMO, "--weights", weights, "--amp", "--accum", 2]
    start = time.perf_counter()
    subprocess.run([*map(str, words), "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "metrics.json").read_text()), time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        save_file(bare_backbone(DEMO).state_dict(), f"{scratch}/random.safetensors")
        found = {
            "pretrained": run(DEMO_WEIGHTS, Path(scratch, "pretrained")),
            "random": run(Path(scratch, "random.safetensors"), Path(scratch, "random_run")),
        }
    print(f"{'test accuracy':<16}" + "".join(f"{name:>12}" for name in found))
    for attribute in found["random"][0]["attributes"]:
        figures = (scores["attributes"][attribute]["accuracy"] for scores, _ in found.values())
        print(f"{attribute:<16}" + "".join(f"{figure:>12.3f}" for figure in figures))
    print(f"{'mean':<16}" + "".join(f"{scores['mean_accuracy']:>12.3f}" for scores, _ in found.values()))
    print(f"{'seconds':<16}" + "".join(f"{seconds:>12.0f}" for _, seconds in found.values()))


if __name__ == "__main__":
    main()
