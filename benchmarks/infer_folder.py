"""Labelling a folder of pictures, all told: `infer.py` beside Hugging Face's pipeline, each started anew every time.

    pip install -r benchmarks/requirements.txt
    python benchmarks/infer_folder.py --weights FILE --data FOLDER [--checkpoint FOLDER] [--pictures 2000] [--rounds 3]

Both read the catalogue's JPEG files and write a CSV file of labels. The pipeline's ViT has the checkpoint's size,
random weights (speed does not depend on them) and one linear layer, for `articleType` alone. Where the machine has
bf16, both run in it too. *Without start-up* is the time for all pictures less the time for one. Programs take turns,
and ratios are within rounds.
"""

import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import in_turn, machine, markdown, ratios, spread
from hf_vit import save_hf_vit

from arguments import add_checkpoint_options
from data.images import ImageError, decode
from data.sources import load_source
from data.store import default_cache_dir
from defaults import choose_amp
from errors import Parser, UserError, exits_cleanly, positive_int
from lora import merge_lora
from models.checkpoint import find_checkpoint, load_checkpoint

ROOT = Path(__file__).parents[1]
FIRST = "HF pipeline, fp32"


def write_pictures(data: str, count: int, folder: Path) -> int:
    """The catalogue's JPEG files into `all/`, the first of them into `one/` too; returns how many there are."""
    catalogue, written = load_source(data, default_cache_dir(), count), 0
    (folder / "all").mkdir()
    (folder / "one").mkdir()
    for row in tqdm(range(len(catalogue)), desc="pictures"):
        try:
            source = catalogue.read(row)
            decode(source)
        except ImageError:
            continue
        for part in ("all", "one")[: 2 - bool(written)]:
            (folder / part / f"{row}.jpg").write_bytes(source)
        written += 1
    if written < 2:
        raise UserError(f"{data} has {written} readable pictures; two are needed at least")
    return written


def programs(checkpoint: Path, weights: Path | None, folder: Path, narrow: bool) -> dict[str, list[str]]:
    """The command lines before the folder of pictures and the file to write."""
    hf = [sys.executable, ROOT / "benchmarks" / "hf_pipeline.py", "--model", folder / "hf"]
    ours = [sys.executable, ROOT / "infer.py", "--checkpoint", checkpoint, *(["--weights", weights] if weights else [])]
    commands = {FIRST: hf, "HF pipeline, fp32, a worker": [*hf, "--workers", "1"], "infer.py": ours}
    if narrow:
        hf, ours = [*hf, "--dtype", "bfloat16"], [*ours, "--amp", "bf16"]
        commands |= {"HF pipeline, bf16": hf, "HF pipeline, bf16, a worker": [*hf, "--workers", "1"]}
        commands |= {"infer.py --amp bf16": ours}
    return {name: list(map(str, words)) for name, words in commands.items()}


def run(words: list[str], pictures: Path, out: Path) -> None:
    done = subprocess.run([*words, str(pictures), "--out", str(out)], capture_output=True)
    if done.returncode:
        raise SystemExit(f"{words} ended with code {done.returncode}:\n{done.stderr.decode()[-2000:]}")


def measure(commands: dict[str, list[str]], folder: Path, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each program in each round, for all pictures and for one."""
    turns = {
        (name, part): partial(run, words, folder / part, folder / "labels.csv")
        for name, words in commands.items()
        for part in ("all", "one")
    }
    return in_turn(turns, rounds, torch.device("cpu"), warm_up=False)


def table(commands: dict[str, list[str]], seconds: dict[tuple[str, str], list[float]], count: int) -> str:
    """Markdown: all of a program's time, its start, what is left; and each program beside the fastest rival."""
    more = {name: [a - o for a, o in zip(seconds[name, "all"], seconds[name, "one"], strict=True)] for name in commands}
    rows, first = [], f"times {FIRST}"
    for name in commands:
        whole, start, rest = (statistics.median(s) for s in (seconds[name, "all"], seconds[name, "one"], more[name]))
        row = [name, f"{whole:.1f}", spread(ratios(seconds[FIRST, "all"], seconds[name, "all"])), f"{start:.1f}"]
        rows.append([*row, f"{(count - 1) / rest:,.0f}", spread(ratios(more[FIRST], more[name]))])
    lines = [markdown(["", "all, s", first, "one picture, s", "images/s without start-up", first], rows)]
    rivals = [name for name in commands if name.startswith("HF")]
    best = min(rivals, key=lambda name: statistics.median(seconds[name, "all"]))
    for name in (name for name in commands if name not in rivals):
        whole, rest = ratios(seconds[best, "all"], seconds[name, "all"]), ratios(more[best], more[name])
        lines.append(f"{name}, times {best}, the fastest pipeline: {spread(whole)}, without start-up {spread(rest)}")
    return "\n".join(lines)


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add_checkpoint_options(parser)
    parser.add_argument("--data", required=True, help="catalogue whose pictures are labelled")
    parser.add_argument("--pictures", type=positive_int, default=2000, help="in the folder (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()
    checkpoint = find_checkpoint(args.checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, config = load_checkpoint(checkpoint, args.weights)
        save_hf_vit(merge_lora(model.backbone), config, folder / "hf")
        count = write_pictures(args.data, args.pictures, folder)
        commands = programs(checkpoint, args.weights, folder, choose_amp(device) == "bf16")
        seconds = measure(commands, folder, args.rounds)
    size = "x".join(map(str, config["preprocess"]["size"]))
    print(machine(device, transformers))
    print(f"{config['backbone']['name']}, {size} px, {count:,} JPEG files, {args.rounds} rounds\n")
    print(table(commands, seconds, count))


if __name__ == "__main__":
    main()
