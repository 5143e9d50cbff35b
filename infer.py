"""Attributes for images: files, folders, globs or a table in, a table or JSON, CSV or Parquet out.

    python infer.py shirt.jpg
    python infer.py photos/ --out labels.csv --plot sheet.png
    python infer.py photos/ --skip labels.csv --out new.csv            # what labels.csv has no labels for
    python infer.py shop/styles.csv --out labels.csv                  # a table beside images/: answers by its ids
    torchrun --nproc-per-node 8 infer.py catalogue/ --out labels      # parquet, tar or photos; any number of machines

Exit code 1 says that some image could not be read; its answer is the reason. (Of several processes it is 0.)
"""

import startup  # noqa: F401

# isort: split
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from arguments import MIXED, add_checkpoint_options
from data.shards import SHARD_ROWS, Row, Shard, Source, open_source
from data.title_table import TitleTable
from defaults import AMP, choose_amp
from distributed import local_rank, share_cores
from durable import alone_in
from errors import CONTROLS, Parser, UserError, check_writable, exits_cleanly, positive_int, told
from jobs import Crew, Job
from labeller import Labeller
from models.checkpoint import find_checkpoint, read_config
from output import Output, caption, labelled_in, table

PLOT_AT_MOST = 48  # pictures on a contact sheet
PLOT_KINDS = (".png", ".jpg", ".pdf", ".svg")


def find_titles(title: str | None, table: TitleTable | None, source: Source) -> Callable[[Row], str | None]:
    """Row -> its title: the one given, or from a table, or where that has none the row's own."""
    if title is not None:
        if source.rows != 1:
            count = "more" if source.rows is None else f"{source.rows:,}"
            raise UserError(f"--title goes with one picture, and there are {count}; --titles FILE.csv is for many")
        return lambda row: title
    if table is None:
        return lambda row: row.title
    return lambda row: table(row.name) or row.title


def no_titles(table: Path) -> str:
    return f"--titles {table} has a title for none of the pictures: its image or id must be what answers call them"


def parse_args(argv: list[str] | None, crew: Crew):
    parser = Parser(description="Predict the attributes of product photos.")
    parser.add_argument(
        "images",
        nargs="+",
        help="image files, parquet, tar shards; folders or globs of them; FILE.csv beside images/; hub:OWNER/NAME",
    )
    add_checkpoint_options(parser)
    parser.add_argument(
        "--top-k",
        type=positive_int,
        default=3,
        help="guesses for each attribute, and train pictures that look like it, in JSON and on the screen "
        "(default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, help="pictures at a time (default: %(default)s)")
    parser.add_argument("--independent", action="store_true", help="each attribute's most probable class, paths or not")
    parser.add_argument("--amp", **MIXED, help="half precision: faster, and confidences differ a little (default: off)")
    one_or_many = parser.add_mutually_exclusive_group()
    one_or_many.add_argument("--title", help="the picture's title, for a model that reads titles")
    one_or_many.add_argument("--titles", type=Path, metavar="FILE.csv", help="titles of many, named by id or image")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on standard output")
    parser.add_argument(
        "--out",
        type=Path,
        help="write all answers to FILE.csv, .jsonl or .parquet; or a folder, for a job that several processes share "
        "and that, started again, continues where it was",
    )
    parser.add_argument(
        "--skip",
        type=Path,
        action="append",
        default=[],
        metavar="RESULT",
        help="leave out pictures that an earlier --out, file or folder, has labels for, by name; may be repeated",
    )
    parser.add_argument(
        "--shard-rows",
        type=positive_int,
        help=f"rows in each file of that folder (default: {SHARD_ROWS:,})",
    )
    parser.add_argument(
        "--plot", type=Path, help=f"draw the first {PLOT_AT_MOST} pictures with their labels to FILE.png"
    )
    args = parser.parse_args(argv)
    args.job = args.out is not None and (args.out.is_dir() or not args.out.suffix)
    if args.job and (args.json or args.plot):
        raise UserError(f"--out {args.out} is a folder, which goes without --json and --plot")
    if args.shard_rows and not args.job:
        raise UserError(f"--shard-rows {args.shard_rows} is of a folder's files: name a folder with --out DIR")
    args.shard_rows = args.shard_rows or SHARD_ROWS
    if crew.size > 1 and not args.job:
        raise UserError(f"{crew.size} processes share their work through a folder: name one with --out DIR")
    file = None if args.job else args.out
    for option, path, kinds in (("--out", file, Output.KINDS), ("--plot", args.plot, PLOT_KINDS)):
        if path and path.suffix.lower() not in kinds:
            folder = "; a folder's, in none of the kind" if option == "--out" else ""
            raise UserError(f"{option} {path}: the name must end in {', '.join(kinds)}{folder}")
    return args


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    crew = Crew.of_torchrun()
    share_cores()
    args = parse_args(argv, crew)
    with ExitStack() as held:
        beside = os.path.dirname(os.path.realpath(args.out)) if args.out and not args.job else None
        if any(os.path.isdir(folder) and os.path.realpath(folder) == beside for folder in args.skip):
            # What another answers just now is not among its results yet.
            held.enter_context(
                alone_in(Path(beside), "where another infer.py puts its answers just now; wait for that")
            )
        return answer(args, crew)


def answer(args, crew: Crew) -> int:
    """Do what the command does; returns the exit code."""
    folder = find_checkpoint(args.checkpoint)
    config = read_config(folder)
    labelled = set().union(*map(labelled_in, args.skip))
    title = config["title"] if config["text"] else None
    source = open_source(args.images, title, args.shard_rows, labelled)
    for option, path in (("--out", None if args.job else args.out), ("--plot", args.plot)):
        if path:
            earlier = (file for skip in args.skip for file in (skip.iterdir() if skip.is_dir() else [skip]))
            check_writable(path, option, [*source.paths, args.titles, args.weights, *earlier])
    if not config["text"] and (args.title is not None or args.titles):
        raise UserError(f"{folder} was trained on pictures alone; leave out --title and --titles")
    titles = TitleTable(args.titles, config["title"]) if args.titles else None
    title_of = find_titles(args.title, titles, source)
    notes = [f"checkpoint {folder}", *source.notes, *notes_of(args, config, source, title_of)]
    if crew.rank == 0:
        print(*(note.translate(CONTROLS) for note in notes), sep="\n", file=sys.stderr)
    labeller = load_labeller(args, folder)
    if labeller.config != config:
        raise UserError(f"{folder} was replaced meanwhile, as by a run that goes on; start again")
    if args.job:
        job = Job(args.out, facts(args, config, source, titles), source.shards, config["attributes"], crew)
        return together(job, labeller, title_of, crew)
    try:
        return alone(args, source, answered(labeller, source.shards, title_of), config["attributes"])
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, or a file that may not be written
        kept = "; with a folder as --out what is done is kept" if args.out else ""
        where = error.filename or args.out or "the answers"
        raise UserError(f"cannot write {where}: {error.strerror or error}{kept}") from None


def notes_of(args, config: dict, source: Source, title_of: Callable[[Row], str | None]) -> list[str]:
    """Notes for the user, before there are answers."""
    notes = []
    if config["text"]:
        notes.append(f"answers from {config['inputs']}")
        if len(source.files) == source.rows:
            given = sum(bool(title_of(Row(path.as_posix(), path))) for path in source.files)
            notes[-1] += f"; {given:,} titles given"
            if args.titles and source.files and not given:
                raise UserError(no_titles(args.titles))
    if simulated := [a["name"] for a in config["attributes"] if a["derive"] == "price"]:
        notes.append(f"{simulated[0]} is simulated: it was learnt from a table, not from prices")
    if "calibration" not in config:
        notes.append("not calibrated, so all is for review: evaluate.py --calibrate does it")
    return notes


def load_labeller(args, folder: Path) -> Labeller:
    """The checkpoint on this process's device; sets `args.amp` to the precision it computes in."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    args.amp = choose_amp(device) if args.amp == "auto" else args.amp
    joint, dtype = not args.independent, AMP[args.amp] or torch.float32
    return Labeller(folder, args.weights, device, joint, args.top_k, args.batch_size, dtype)


def answered(
    labeller: Labeller, shards: Iterable[Shard], title_of: Callable[[Row], str | None]
) -> Iterator[tuple[list[Row], list[dict]]]:
    """Batches of rows, with their answers."""
    rows = (row._replace(title=title_of(row)) for shard in shards for row in shard.read())
    return ((batch, labeller(batch)) for batch in labeller.batches(rows))


def together(job: Job, labeller: Labeller, title_of: Callable[[Row], str | None], crew: Crew) -> int:
    """Do this process's part of a job; returns the exit code."""
    job.run(lambda shard: (answers for _, answers in answered(labeller, [shard], title_of)))
    if crew.rank:
        return 0
    rows, unreadable = job.tally()
    print(f"{rows:,} rows in {job.labels}", file=sys.stderr)
    code = report(unreadable, rows)
    return code if crew.size == 1 else 0  # torchrun takes any other for a crash, and ends the others


def facts(args, config: dict, source: Source, titles: TitleTable | None) -> dict:
    """All that the answers of a job depend on."""
    told = repr((args.title, titles and [sorted(some.items()) for some in titles.titles])).encode()
    return {
        "checkpoint": config["sha256"]["config.json"],  # which covers the adapters and the weights below them
        "inputs": source.fingerprint,
        "titles": hashlib.sha256(told).hexdigest(),
        "independent": args.independent,
        "amp": args.amp,
        "shard_rows": args.shard_rows,
    } | ({"hub": source.hub} if source.hub else {})


def report(unreadable: int, rows: int) -> int:
    """Say how many images could not be read; returns the exit code."""
    if unreadable:
        print(f"{unreadable:,} of {rows:,} images could not be read", file=sys.stderr)
    return 1 if unreadable else 0


def alone(args, source: Source, answered: Iterator[tuple[list[Row], list[dict]]], attributes: list[dict]) -> int:
    """Answer to the screen or a file; returns the exit code."""
    rows, unreadable, given, sheet = 0, 0, 0, []
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that no part of a file is left

    def not_written(kind, *_):
        if kind is KeyboardInterrupt and args.out:
            print(f"{args.out} was not written; with a folder as --out what is done is kept", file=sys.stderr)

    with ExitStack() as stack:
        stack.push(not_written)
        output = stack.enter_context(Output(args.out, attributes)) if args.out else None
        few = source.rows is not None and source.rows <= args.batch_size
        bar = stack.enter_context(tqdm(total=source.rows, unit="img", disable=few))
        for batch, answers in answered:
            for row, answer in zip(batch, answers, strict=True):
                given += bool(row.title)
                unreadable += "error" in answer
                if args.plot and "error" not in answer and len(sheet) < PLOT_AT_MOST:
                    sheet.append((row.picture, answer))
                if args.json:
                    bar.write(json.dumps(answer, ensure_ascii=False), file=sys.stdout)
                elif not output:
                    bar.write(table(answer), file=sys.stdout)
            if output:
                output.write(answers)
            rows += len(batch)
            bar.update(len(batch))
        if args.titles and rows and not given:  # a job does not ask: this may be a shard without any
            raise UserError(no_titles(args.titles))
    if output:
        print(f"wrote {rows:,} rows to {args.out}", file=sys.stderr)
    if sheet:
        from figures import QUIET, contact_sheet  # matplotlib takes its time

        captions = [[(f"{name}: {caption(said)}", QUIET) for name, said in a["attributes"].items()] for _, a in sheet]
        drawn = contact_sheet([picture for picture, _ in sheet], captions)
        with told(f"cannot write --plot {args.plot}"):
            drawn.savefig(args.plot)
        print(f"drew {len(sheet)} of {rows:,} pictures to {args.plot}", file=sys.stderr)
    return report(unreadable, rows)


if __name__ == "__main__":
    main()
