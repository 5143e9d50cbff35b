"""Attributes for images: files, folders and globs in, a table or JSON, CSV or Parquet out.

    python infer.py shirt.jpg
    python infer.py photos/ --out labels.csv --plot sheet.png

Exit code 1 says that some image could not be read; its answer is the reason.
"""

import glob
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.images import ImageError, decode
from data.preprocess import Preprocess
from data.sources import read_rows
from data.titles import TitleReader
from errors import Parser, UserError, check_writable, exits_cleanly, positive_int
from figures import QUIET, contact_sheet
from lora import merge_lora
from models.checkpoint import find_checkpoint, load_checkpoint
from models.decode import Decoder
from output import Output, caption, table

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
PLOT_AT_MOST = 48  # pictures on a contact sheet
PLOT_KINDS = (".png", ".jpg", ".pdf", ".svg")


def find_images(asked: list[str]) -> list[Path]:
    """Every image file meant by files, folders (searched to any depth) and globs, in order, each once."""
    found: list[Path] = []
    for item in asked:
        path = Path(item)
        if path.is_file():
            found.append(path)
            continue
        matches = path.rglob("*") if path.is_dir() else map(Path, glob.glob(item, recursive=True))
        images = sorted(p for p in matches if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not images:
            where = f"no image in folder {item}" if path.is_dir() else f"no image file, folder or match for {item!r}"
            raise UserError(f"{where} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
        found += images
    return list(dict.fromkeys(found))


def read_batches(
    paths: list[Path], batch_size: int, preprocess: Preprocess
) -> Iterator[list[tuple[Path, np.ndarray | str]]]:
    """Batches of (path, picture as uint8 (H, W, 3)); the reason in place of the picture where it cannot be read.

    Threads decode one batch ahead, so at most two batches are in memory.
    """

    def read(path: Path) -> tuple[Path, np.ndarray | str]:
        try:
            return path, preprocess.to_canvas(decode(path))
        except (ImageError, OSError) as error:
            return path, str(error)

    with ThreadPoolExecutor() as pool:
        ahead = None
        for start in range(0, len(paths), batch_size):
            now, ahead = ahead, [pool.submit(read, path) for path in paths[start : start + batch_size]]
            if now:
                yield [future.result() for future in now]
        if ahead:
            yield [future.result() for future in ahead]


@torch.inference_mode()
def answer_batch(
    batch: list[tuple[Path, np.ndarray | str]],
    model: nn.Module,
    preprocess: Preprocess,
    decoder: Decoder,
    attributes: list[dict],
    top_k: int,
    device: torch.device,
    tokens_of: Callable[[list[Path]], Tensor] | None = None,
) -> list[dict]:
    """An object for each input, as `--json` prints it: {"image", "attributes": {name: {"label", "confidence",
    "decision", "top"}}}, of a number {name: {"value"}}; or {"image", "error"}.

    Args:
        tokens_of: pictures' paths -> the tokens (B, T) of their titles, for a model that reads them.

    `top` begins with the label; the next guesses follow, most probable first. One of them may be more probable than the
    label: then the label is what fits the other attributes of the path.
    """
    # A file name need not be text; what no text can hold is replaced, or no format could write it.
    answers = [{"image": os.fsencode(path).decode("utf-8", "replace")} for path, _ in batch]
    readable = []
    for answer, (path, picture) in zip(answers, batch, strict=True):
        if isinstance(picture, str):
            answer["error"] = picture
        else:
            answer["attributes"] = {}
            readable.append((answer["attributes"], picture, path))
    if not readable:
        return answers
    pixels = torch.from_numpy(np.stack([picture for _, picture, _ in readable]))
    tokens = tokens_of([path for *_, path in readable]).to(device) if tokens_of else None
    outputs = model(preprocess(pixels.to(device)), tokens)
    found = decoder(outputs)
    classes = [attribute for attribute in attributes if attribute["kind"] == "class"]
    for column, (attribute, p) in enumerate(zip(classes, found.probabilities.values(), strict=True)):
        labels, chosen = attribute["labels"], found.labels[:, [column]]  # (B, 1)
        order = p.scatter(1, chosen, 2.0).topk(min(top_k, len(labels))).indices  # the label first: 2 is above any p
        rows = zip(
            readable, order.tolist(), p.gather(1, order).tolist(), found.accepted[:, column].tolist(), strict=True
        )
        for (said, *_), classes, row_p, accepted in rows:
            top = [[labels[c], round(q, 4)] for c, q in zip(classes, row_p, strict=True)]
            said[attribute["name"]] = {
                "label": top[0][0],
                "confidence": top[0][1],
                "decision": "accept" if accepted else "review",
                "top": top,
            }
    for a in (a for a in attributes if a["kind"] == "number"):
        values = a["mean"] + a["std"] * outputs[a["name"]][:, 0].double()
        for (said, *_), value in zip(readable, values.tolist(), strict=True):
            said[a["name"]] = {"value": float(f"{value:.6g}")}
    return answers


def answer_in_parts(batch: list[tuple[Path, np.ndarray | str]], most: int, *how) -> tuple[list[dict], int]:
    """`answer_batch(part, *how)` of parts of at most `most` images, halved as often as the GPU's memory runs out.

    Returns:
        the answers, and the size that went through, to go on with.
    """
    answers: list[dict] = []
    while len(answers) < len(batch):
        try:
            answers += answer_batch(batch[len(answers) : len(answers) + most], *how)
        except torch.OutOfMemoryError:
            if most == 1:
                raise UserError(
                    "out of memory at a single image; free the GPU or hide it: CUDA_VISIBLE_DEVICES="
                ) from None
            most //= 2
            print(f"out of memory: going on with batches of {most}", file=sys.stderr)
    return answers, most


def find_titles(title: str | None, table: Path | None, column: str | None, paths: list[Path]) -> dict[Path, str | None]:
    """The title of each picture: the one given, or from a table in whose rows `image` or `id` names the picture."""
    if title is not None:
        if len(paths) > 1:
            raise UserError(
                f"--title goes with one picture, and there are {len(paths):,}; --titles FILE.csv is for many"
            )
        return {paths[0]: title}
    if table is None:
        return {}
    named = {}
    try:
        for _, row in read_rows(table, [column]):
            if isinstance(row, dict):
                named[Path(row["image"]).name if row.get("image") else row.get("id")] = row[column]
    except OSError as error:
        raise UserError(f"cannot read --titles {table}: {error.strerror}") from None
    found = {path: named.get(path.name) or named.get(path.stem) for path in paths}
    if not any(found.values()):
        raise UserError(f"--titles {table} has a title for none of the pictures: its image or id must be a file's name")
    return found


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Predict the attributes of product photos.")
    parser.add_argument("images", nargs="+", help="image files, folders, globs")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the newest run's best)")
    parser.add_argument("--weights", type=Path, help="the backbone's base weights, a safetensors file")
    parser.add_argument(
        "--top-k", type=positive_int, default=3, help="guesses for each attribute (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument("--independent", action="store_true", help="each attribute's most probable class, paths or not")
    one_or_many = parser.add_mutually_exclusive_group()
    one_or_many.add_argument("--title", help="the picture's title, for a model that reads titles")
    one_or_many.add_argument("--titles", type=Path, metavar="FILE.csv", help="titles of many, named by id or image")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on standard output")
    parser.add_argument("--out", type=Path, help="write all answers to FILE.csv, .jsonl or .parquet")
    parser.add_argument(
        "--plot", type=Path, help=f"draw the first {PLOT_AT_MOST} pictures with their labels to FILE.png"
    )
    args = parser.parse_args(argv)
    for option, path, kinds in (("--out", args.out, Output.KINDS), ("--plot", args.plot, PLOT_KINDS)):
        if path and path.suffix.lower() not in kinds:
            raise UserError(f"{option} {path}: the name must end in {', '.join(kinds)}")
        if path:
            check_writable(path, option)

    paths = find_images(args.images)
    folder = find_checkpoint(args.checkpoint)
    model, config = load_checkpoint(folder, args.weights)
    print(f"checkpoint {folder}", file=sys.stderr)
    tokens_of = None
    if config["text"]:
        titles, reader = find_titles(args.title, args.titles, config["title"], paths), TitleReader(config)
        tokens_of = lambda some: torch.from_numpy(reader([titles.get(path) for path in some])[0])  # noqa: E731
        print(f"answers from {config['inputs']}; {sum(map(bool, titles.values())):,} titles given", file=sys.stderr)
    elif args.title is not None or args.titles:
        raise UserError(f"{folder} was trained on pictures alone; leave out --title and --titles")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = merge_lora(model).to(device)
    preprocess, attributes = Preprocess(**config["preprocess"]), config["attributes"]
    decoder = Decoder(config, joint=not args.independent)
    if simulated := [a["name"] for a in attributes if a["derive"] == "price"]:
        print(f"{simulated[0]} is simulated: it was learnt from a table, not from prices", file=sys.stderr)
    if "calibration" not in config:
        print("not calibrated, so all is for review: evaluate.py --calibrate does it", file=sys.stderr)

    unreadable, sheet, most = 0, [], args.batch_size
    with ExitStack() as stack:
        output = stack.enter_context(Output(args.out, attributes)) if args.out else None
        bar = stack.enter_context(tqdm(total=len(paths), unit="img", disable=len(paths) <= args.batch_size))
        for batch in read_batches(paths, args.batch_size, preprocess):
            how = (model, preprocess, decoder, attributes, args.top_k, device, tokens_of)
            answers, most = answer_in_parts(batch, most, *how)
            for (_, picture), answer in zip(batch, answers, strict=True):
                unreadable += "error" in answer
                if "error" not in answer and len(sheet) < PLOT_AT_MOST:
                    sheet.append((picture, answer))
                if args.json:
                    bar.write(json.dumps(answer, ensure_ascii=False), file=sys.stdout)
                elif not output:
                    bar.write(table(answer), file=sys.stdout)
            if output:
                output.write(answers)
            bar.update(len(batch))
    if output:
        print(f"wrote {len(paths):,} rows to {args.out}", file=sys.stderr)
    if args.plot and sheet:
        captions = [[(f"{name}: {caption(said)}", QUIET) for name, said in a["attributes"].items()] for _, a in sheet]
        contact_sheet([picture for picture, _ in sheet], captions).savefig(args.plot)
        print(f"drew {len(sheet)} of {len(paths):,} pictures to {args.plot}", file=sys.stderr)
    if unreadable:
        print(f"{unreadable:,} of {len(paths):,} images could not be read", file=sys.stderr)
    return 1 if unreadable else 0


if __name__ == "__main__":
    main()
