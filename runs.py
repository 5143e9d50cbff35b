"""The folder of a run: its options and TensorBoard's events; and how a run is asked to stop."""

import argparse
import contextlib
import json
import os
import signal
from datetime import datetime
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

import distributed
import hub
from data.cells import clean
from defaults import choose_amp, choose_source
from durable import alone_in, replace_file
from errors import UserError, make_folder, told
from models.checkpoint import fresh_of, newest_checkpoint, previous_of
from options import INHERITED, MOVABLE, PATHS, parse_args

SET_UP = ("options.json", "skipped.csv", "vocab.txt")  # what a run has written before its first checkpoint


def choose(
    argv: list[str] | None, device: torch.device, held: contextlib.ExitStack, restarted: bool
) -> argparse.Namespace:
    """Parse the options and choose all that needs no data; the run's folder is held from here on."""
    args = parse_args(argv, restarted)
    if distributed.may_restart() and not args.out:
        raise UserError("torchrun --max-restarts: name the run's folder with --out, or a restart could not find it")
    if not args.resume:
        args.resume = restarted and holds_run(args.out) and started_with(args)
        if args.resume:
            vars(args).update(dict.fromkeys(MOVABLE))  # where the run has them; the hub may have moved on
        elif restarted:  # before the run had begun
            args = parse_args(argv)
    if args.resume:
        args.data = args.data and hub.pinned(args.data)
    else:
        choose_source(args)
        args.amp = choose_amp(device) if args.amp == "auto" else args.amp
        args.processes = distributed.world()
    args.out = run_folder(args)
    held.enter_context(alone_in(args.out))
    return open_run(args)


def run_folder(args: argparse.Namespace) -> Path:
    """`--out`, by default runs/BACKBONE-DATE, made if it is not there; with `--resume`, by default the newest run's."""
    if args.resume:
        out = args.out or newest_checkpoint(Path("runs"), "last").parent
        if not holds_run(out):
            raise UserError(f"--resume: {out} holds no run to go on with (there is no {out / 'last'})")
        return out
    out = args.out or Path("runs") / f"{args.backbone.replace('/', '--')}-{datetime.now():%Y%m%d-%H%M%S}"
    if clean(str(out)) != str(out):
        raise UserError(f"--out {out}: the name is not UTF-8, and TensorBoard takes no other; name another folder")
    make_folder(out, "--out")
    return out


def holds_run(out: Path) -> bool:
    """Whether there is a run to go on with."""
    last = out / "last"
    return last.is_dir() or previous_of(last).is_dir()


def started_with(args: argparse.Namespace) -> bool:
    """Whether the run in `--out` was started with these options.

    What the options leave open is not compared: the choice may differ today, as the hub changes or cannot be reached.
    """
    try:
        written = json.loads((args.out / "options.json").read_text(encoding="utf-8"))
        given = json.loads(options_text(args))
        left_open = [name for name in ("data", "backbone") if given[name] is None]
        left_open += ["amp"] if given["amp"] == "auto" else []
        left_open += INHERITED if args.init_from else []
        left_open += ["data"] if str(written["data"]).startswith(f"{given['data']}@") else []  # of whichever commit
        return given | {name: written[name] for name in (*left_open, "processes")} == written
    except (OSError, ValueError, TypeError, KeyError):
        return False


def options_text(args: argparse.Namespace) -> str:
    """What a run keeps of its options."""
    options = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
    return json.dumps(options, indent=1, default=str) + "\n"  # in ASCII: a path may have bytes that are no UTF-8


def open_run(args: argparse.Namespace) -> argparse.Namespace:
    """Keep the options in the run's folder; with `--resume`, take those that the run was started with.

    For what has moved, the new place is taken as given; once it has proved to hold the same, `keep_options` keeps it.
    """
    path = args.out / "options.json"
    if args.resume:
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
            for name in PATHS:
                options[name] = options.get(name) and Path(options[name])  # a run may be older than an option
            moved = {name: place for name in MOVABLE if (place := getattr(args, name)) is not None}
            return argparse.Namespace(**(vars(args) | options | {"resume": True} | moved))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--resume: cannot read {path}: {error}") from None
    if any(path.parent != fresh_of(args.out / "last") for path in args.out.glob("*/config.json")):
        raise UserError(f"--out {args.out} already holds a run: go on with it by --resume, or name another folder")
    there = [file for name in (*SET_UP, Board.FILES) for file in args.out.glob(name)]
    if there and not _has_options_of_a_run(path, args):  # as one has that was killed before its first save
        raise UserError(f"--out {args.out} holds {there[0].name}, which is not of a run; name another folder")
    keep_options(args)
    return args


def keep_options(args: argparse.Namespace) -> None:
    """Write them where `--resume`, and whoever looks for the base weights, will read them."""
    with told(f"cannot write --out {args.out}"):
        replace_file(args.out / "options.json", options_text(args).encode())


def _has_options_of_a_run(path: Path, args: argparse.Namespace) -> bool:
    """Whether the file has exactly the options that a run has, whatever their values."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).keys() == json.loads(options_text(args)).keys()
    except (OSError, ValueError, AttributeError):
        return False


def discard_run(out: Path) -> None:
    """Take away the folder of a run that could not be set up, unless there is more in it than `open_run` put there."""
    with contextlib.suppress(OSError):  # not empty: it was there before; on Windows, the lock is still open
        for made in (*SET_UP, ".lock"):
            (out / made).unlink(missing_ok=True)
        out.rmdir()


class Stopped(Exception):
    """A stop was asked for while nothing had to be finished first."""


class StopRequest:
    """While entered, Ctrl-C or SIGTERM only asks for a stop: the current micro-batch is finished, then the run saved.

    A second signal ends the process at once, and loses no more than a crash would. torchrun's processes ignore it: they
    get signals from torchrun and from others, and stop together.
    """

    def __enter__(self):
        self.made = self.may_raise = False
        self.before = {number: signal.signal(number, self.make) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def make(self, number, _):
        alone = "TORCHELASTIC_RUN_ID" not in os.environ
        if self.made and alone:
            os._exit(128 + number)
        if self.made:
            return
        self.made = True
        if distributed.first():
            when = "micro-batch; a second signal stops at once" if alone else "micro-batch, all processes together"
            with contextlib.suppress(OSError):  # `print` raises where a bar is being written just now
                os.write(2, f"\nstopping after this {when}\n".encode())
        if self.may_raise:
            raise Stopped

    @contextlib.contextmanager
    def at_once(self):
        """For work that is done again on resuming, such as scoring: a signal raises `Stopped` in the middle of it.

        Several processes raise it together, before the work or after it.
        """
        if distributed.any_of(self.made):
            raise Stopped
        self.may_raise = distributed.world() == 1
        try:
            yield
        finally:
            self.may_raise = False
        if distributed.any_of(self.made):
            raise Stopped

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Board:
    """What TensorBoard shows of a run.

    Args:
        written: what `Board.written` gave when the state that the run goes on from was saved. Events after that, of an
            earlier attempt, are cut off, so that no step is there twice.
        step: where the run starts or goes on, for a TensorBoard that is watching and has seen those events.
    """

    FILES = "events.out.tfevents.*"

    def __init__(self, folder: Path, attributes: list[str], written: dict[str, int], step: int):
        self.attributes, self.folder = attributes, folder
        for file in folder.glob(self.FILES):
            if file.name not in written or file.is_symlink():
                file.unlink()
            elif file.stat().st_size > written[file.name]:
                os.truncate(file, written[file.name])
        self.writer = SummaryWriter(str(folder), purge_step=step)

    def written(self) -> dict[str, int]:
        """The size in bytes of each file of events, all that was logged so far included."""
        self.writer.flush()
        return {file.name: file.stat().st_size for file in self.folder.glob(self.FILES)}

    def train(self, step: int, losses: list[float], **scalars: float) -> None:
        for name, loss in zip(self.attributes, losses, strict=True):
            self.writer.add_scalar(f"loss/{name}", loss, step)
        for name, value in scalars.items():
            self.writer.add_scalar(f"train/{name}", value, step)

    def validation(self, step: int, scores: dict, figure) -> None:
        for name, metrics in scores["attributes"].items():
            for metric, value in metrics.items():
                if value is not None and metric != "rows":
                    self.writer.add_scalar(f"val_{metric}/{name}", value, step)
        for name in ("mean_accuracy", "path_accuracy", "valid_path_rate", "exact_match"):
            if scores[name] is not None:
                self.writer.add_scalar(f"val/{name}", scores[name], step)
        self.writer.add_figure("val/pictures", figure, step)

    def outcome(self, args: argparse.Namespace, scores: dict) -> None:
        """The options as TensorBoard's hyperparameters, beside what they led to on test."""
        told = vars(args).keys() - {"out", "resume", *PATHS}
        options = {name: clean(str(vars(args)[name])) for name in sorted(told)}
        accuracy = scores["mean_accuracy"]  # None where no test row has a label
        found = {} if accuracy is None else {"hparam/test_mean_accuracy": accuracy}
        self.writer.add_hparams(options, found, run_name=".")

    def close(self) -> None:
        self.writer.close()
