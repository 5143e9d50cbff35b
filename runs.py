"""The folder of a run: its options, TensorBoard's events, and the training state that `--resume` goes on from."""

import argparse
import contextlib
import json
import signal
import sys
from datetime import datetime
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from errors import UserError
from models.checkpoint import finish_swap, newest_checkpoint


def open_run(args: argparse.Namespace) -> argparse.Namespace:
    """Make the folder `--out` (by default runs/BACKBONE-DATE) and keep the options in it.

    With `--resume` the options are those the run was started with, read back from there.
    """
    if args.resume:
        out = args.out or newest_checkpoint(Path("runs"), "last").parent
        finish_swap(out / "last")
        if not (out / "last" / "config.json").is_file():
            raise UserError(f"--resume: {out} holds no run to go on with (there is no {out / 'last' / 'config.json'})")
        try:
            options = json.loads((out / "options.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--resume: cannot read {out / 'options.json'}: {error}") from None
        for name in ("weights", "cache_dir"):
            options[name] = options[name] and Path(options[name])
        return argparse.Namespace(**options, out=out, resume=True)

    args.out = args.out or Path("runs") / f"{args.backbone}-{datetime.now():%Y%m%d-%H%M%S}"
    if any(args.out.glob("*/config.json")):
        raise UserError(f"--out {args.out} already holds a run: go on with it by --resume, or name another folder")
    options = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(options, indent=1, default=str, ensure_ascii=False)
        (args.out / "options.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to --out {args.out}: {error.strerror}") from None
    return args


def discard_run(out: Path) -> None:
    """Take away the folder of a run that could not be set up, unless there is more in it than `open_run` put there."""
    for made in ("options.json", "skipped.csv"):
        (out / made).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: it was there before
        out.rmdir()


def optimizer_tensors(optimizer: Optimizer, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state as named tensors, so that it is saved without pickle too."""
    return {f"{name}/{key}": t.cpu() for name, p in params.items() for key, t in optimizer.state[p].items()}


def restore_optimizer(optimizer: Optimizer, params: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        optimizer.state[params[name]][key] = tensor if key == "step" else tensor.to(params[name].device)


class StopRequest:
    """While entered, Ctrl-C only asks for a stop, so that the current step is finished; a second one stops at once."""

    def __enter__(self):
        self.made = False
        self.before = signal.signal(signal.SIGINT, self.make)
        return self

    def make(self, *_):
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


class Board:
    """What TensorBoard shows of a run.

    Args:
        step: where the run starts or goes on; events after it, of an earlier attempt, are dropped.
    """

    def __init__(self, folder: Path, attributes: list[str], step: int):
        self.attributes = attributes
        self.writer = SummaryWriter(str(folder), purge_step=step)

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
        self.writer.flush()

    def close(self, args: argparse.Namespace, scores: dict) -> None:
        """The options as TensorBoard's hyperparameters, beside what they led to on test."""
        options = {
            name: str(value)
            for name, value in vars(args).items()
            if name not in ("out", "resume", "cache_dir", "weights")
        }
        self.writer.add_hparams(options, {"hparam/test_mean_accuracy": scores["mean_accuracy"]}, run_name=".")
        self.writer.close()
