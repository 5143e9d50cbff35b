"""Train LoRA adapters and hierarchical heads on a frozen timm ViT.

    python train.py --amp --accum 2
    torchrun --standalone --nproc-per-node 8 train.py --amp --out runs/NAME

The order of the rows, the flips, the dropout masks and the learning rate are functions of the seed and the step (the
masks also of how many processes there are), so a run that was stopped and resumed takes the same course as one that
never was. What a step does is in `step.py`.
"""

import startup  # noqa: F401

# isort: split
import argparse
import contextlib
import json
import math
import shlex
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import distributed
from calibration import calibrate
from data.batches import epoch_batches, make_loader
from data.preprocess import CHANCES
from defaults import warn_if_slow
from durable import replace_file
from errors import UserError, exits_cleanly, first_line
from evaluate import SCORED, Evaluation, evaluate
from figures import label_sheet
from memory import ran_out
from metrics import scores_table, trust_table
from models.checkpoint import amend_config, load_checkpoint, load_tensors, read_config, trained_params
from runs import Board, Stopped, StopRequest, choose, discard_run, holds_run, keep_options
from state import TrainingState, check_finite
from step import learning_rate, parameter_groups, train_step, windows
from task import AMP, Task, agree_on, setup

MOVED = 2**31  # added to a step's seed for augmentation, so that it does not draw what dropout draws
LOG_EVERY = 10  # steps: reading a loss makes a GPU wait
STOPPED = 75  # exit code of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h, "try again later"


def micro_batch_size(args: argparse.Namespace) -> int:
    """Pictures in a micro-batch of all processes; a run resumed with more or fewer processes keeps the number."""
    return args.batch_size * args.processes


def steps_in_epoch(args: argparse.Namespace, task: Task) -> int:
    return math.ceil(math.ceil(len(task.store.rows("train")) / micro_batch_size(args)) / args.accum)


def train_epoch(
    args: argparse.Namespace, task: Task, state: TrainingState, steps: int, board: Board | None, stop: StopRequest
) -> bool:
    """Train from the state's step to the end of its epoch; returns False if a stop was asked for before that.

    Args:
        steps: how many the whole run has.
        board: None in all processes but the first.
    """
    rows, epoch_steps = task.store.rows("train"), steps_in_epoch(args, task)
    epoch, taken = divmod(state.step, epoch_steps)
    batches = epoch_batches(rows, micro_batch_size(args), args.seed, epoch, task.store.run)[taken * args.accum :]
    loader = make_loader(task.store, task.known, [distributed.share(batch) for batch in batches], task.device)
    weights = torch.tensor([a["weight"] for a in task.config["attributes"]], device=task.device)
    drawing = torch.Generator(task.device)
    amp, prepare = AMP[args.amp], partial(augmented, args, task, drawing)
    how = {"smoothing": args.label_smoothing, "weights": weights, "teacher": task.teacher, "stop": stop}
    task.model.train()
    unread = []  # (step, rows, losses and norm still on the device) of the steps since the last look
    done = len(rows) - sum(map(len, batches))
    with tqdm(total=len(rows), initial=done, unit="img", smoothing=0.05, disable=not distributed.first()) as bar:
        bar.set_description(f"epoch {epoch + 1}/{args.epochs}")
        for cut, window in zip(windows(batches, args.accum), windows(loader, args.accum), strict=True):
            step, seen = state.step, np.concatenate(cut)
            drawing.manual_seed(seed_of(args.seed, step) + MOVED)
            # For dropped elements and patches, which differ between processes.
            torch.manual_seed(seed_of(args.seed, step, distributed.world(), distributed.rank()))
            lr = learning_rate(step, steps, args.lr)
            figures = train_step(state.parallel, window, state.optimizer, state.scaler, lr, amp, prepare, **how)
            stopping = distributed.any_of(stop.made)
            if figures is not None:
                unread.append((step, seen, figures))
                state.progress["step"] += 1
            saving = state.step % args.save_every == 0
            if step % LOG_EVERY == 0 or saving or stopping or state.step % epoch_steps == 0:
                # Before a save, so that what is saved is good.
                read = check_finite(unread, state, task.names, task.catalogue.ids)
                unread.clear()
            if step % LOG_EVERY == 0 and figures is not None and board:
                show_step(state, board, bar, step, lr, read[-1], weights)
            bar.update(len(seen))
            if saving:
                state.save_last(board)
            if stopping:
                return False
    return True


def seed_of(seed: int, step: int, processes: int = 1, rank: int = 0) -> int:
    """The seed for what a process draws in a step; no two are alike in runs of up to a million steps."""
    return (seed * 1_000_003 + step) * processes + rank


def augmented(args: argparse.Namespace, task: Task, drawing: torch.Generator, pixels: Tensor) -> Tensor:
    """This process's pixels of a micro-batch -> images (B, 3, S, S), augmented with numbers from `drawing`.

    It draws for the whole micro-batch, so what becomes of a picture does not depend on how many processes share that.
    """
    chance = torch.rand(micro_batch_size(args), CHANCES, generator=drawing, device=drawing.device)
    mine = distributed.share(chance)[: len(pixels)]
    if not len(mine):  # this process has no row, and its picture only stands in for one
        mine = chance[: len(pixels)]
    return task.preprocess.augmented(pixels, mine.T, args.warp)


def show_step(
    state: TrainingState, board: Board, bar: tqdm, step: int, lr: float, figures: list[float], weights: Tensor
) -> None:
    """Show a step's figures on TensorBoard and beside the bar: each attribute's loss and, last, the gradient norm; and
    what is trained on, the weighted sum of the losses."""
    *losses, norm = figures
    loss = sum(loss * weight for loss, weight in zip(losses, weights.tolist(), strict=True))
    overflows = state.progress["overflows"]
    scalars = {"learning_rate": lr, "gradient_norm": norm, "images_per_second": bar.format_dict["rate"] or 0}
    if state.scaler.is_enabled():
        scalars |= {"loss_scale": state.scaler.get_scale(), "overflows": overflows}
    board.train(step, losses, loss=loss, **scalars)
    bar.set_postfix(loss=f"{loss:.3f}", **({"overflows": overflows} if overflows else {}))


def fit(args: argparse.Namespace, task: Task) -> bool:
    """Train to the end, or until a stop is asked for (then False). `best/` holds the epoch with the best mean accuracy
    on validation rows."""
    epoch_steps = steps_in_epoch(args, task)
    steps = epoch_steps * args.epochs
    groups = parameter_groups(trained_params(task.model), args.lora_plus, decay_lora=not args.pissa)
    optimizer = torch.optim.AdamW(groups, fused=True)
    scaler = torch.amp.GradScaler(task.device.type, enabled=args.amp == "fp16")
    state = TrainingState(args.out, task.model, task.config, optimizer, scaler)
    written = {}
    if args.resume:
        folder = distributed.decided(state.sound)
        written = distributed.in_turn(lambda: state.restore(folder))
        distributed.agree(state.config["sha256"], "checkpoint")
        if distributed.first():
            keep_options(args)  # with the new place of what has moved
        print(f"going on with {args.out} at step {state.step:,} of {steps:,}")
    board = Board(args.out, task.names, written, state.step) if distributed.first() else None
    if not args.resume:
        state.save_last(board)  # from here on, whatever ends the run, it can be resumed

    with StopRequest() as stop, contextlib.suppress(Stopped):
        while (epoch := state.progress["epochs_scored"] + 1) <= args.epochs:
            if state.step < epoch * epoch_steps:
                going = train_epoch(args, task, state, steps, board, stop)
                state.save_last(board)
                if not going:
                    return False
            with stop.at_once():  # all is saved
                found = evaluate(task, "val", most=SCORED)
            keep_best(args, task, state, board, epoch, found)
            state.save_last(board)  # a run that is resumed once it has ended keeps its best/, whatever was done to it

        if args.base == "int8":
            task = on_float_base(args, task, state, stop)
        chosen = f"epoch {state.progress['best_epoch']} of {args.epochs} (best on validation)"
        if args.no_test:
            print(f"\nkept: {chosen}; the test rows are left alone")
        else:
            score_test(args, task, state, board, stop, chosen)
        if board:
            board.close()
        return True
    return False


def keep_best(
    args: argparse.Namespace, task: Task, state: TrainingState, board: Board | None, epoch: int, found: Evaluation
) -> None:
    """Show how an epoch did on validation rows, and save it in `best/` if none did better."""
    scores, rows = found.scores, found.rows
    print(scores_table(scores))
    if board:
        shown, said = rows[:12], found.answers.labels[:12].numpy()
        sheet = label_sheet(list(task.store.pixels[shown]), task.labels[shown], said, task.classes)
        board.validation(state.step - 1, scores, sheet)  # the step that was just taken
    state.progress["epochs_scored"] = epoch
    if scores["mean_accuracy"] >= state.progress["best_accuracy"]:  # of equals, the one trained longer
        state.progress |= {"best_accuracy": scores["mean_accuracy"], "best_epoch": epoch}
        fitted = {}
        if args.base == "float" and distributed.first():  # of an 8-bit base at the end, on the float base
            fitted["calibration"] = calibrate(found.logits, task.labels[rows], task.store.keys[rows], task.config)
        state.save_best(**fitted)


def on_float_base(args: argparse.Namespace, task: Task, state: TrainingState, stop: StopRequest) -> Task:
    """Load the best epoch as everybody will, on the float base instead of the quantised one, and calibrate it there."""
    distributed.wait_for_all()  # the first has written it
    model, config = load_checkpoint(state.best, args.weights)
    distributed.agree(config["sha256"], "checkpoint")
    task = task._replace(model=model.to(task.device), config=config)
    with stop.at_once():
        found = evaluate(task, "val", most=SCORED)
    if distributed.first() and "calibration" not in config:  # or the run had ended before, and was calibrated since
        fitted = calibrate(found.logits, task.labels[found.rows], task.store.keys[found.rows], config)
        amend_config(state.best, calibration=fitted)
    print(f"\non the float base:\n{scores_table(found.scores)}")
    return task


def score_test(
    args: argparse.Namespace, task: Task, state: TrainingState, board: Board | None, stop: StopRequest, chosen: str
) -> None:
    """Score the epoch that validation chose on the test rows, by which nothing was chosen; write `metrics.json`."""
    distributed.wait_for_all()  # the first has written it
    with stop.at_once():
        best = task._replace(config=read_config(state.best))  # with its calibration
        distributed.agree(best.config["sha256"], "checkpoint")
        load_tensors(state.best, task.model, best.config)
        scores = evaluate(best, "test", most=SCORED).scores
    if board:
        replace_file(args.out / "metrics.json", (json.dumps(scores, indent=1) + "\n").encode())
        board.outcome(args, scores)
    print(f"\ntest, {chosen}:\n{scores_table(scores)}")
    print(trust_table(scores))


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    with distributed.joined() as device, contextlib.ExitStack() as held:
        again = distributed.restarted()
        args = distributed.decided(lambda: choose(argv, device, held, again))
        if not (args.out / "options.json").is_file():
            raise UserError(f"--out {args.out}: all machines must see the same folder, and this one does not")
        return run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Set up and train; returns the exit code."""

    def make() -> Task:
        torch.manual_seed(args.seed)
        return setup(args, device)

    try:
        warn_if_slow(args.backbone, device)
        task = distributed.in_turn(make)
        agree_on(task)
    except BaseException:  # Ctrl-C too: nothing was learnt yet
        if not args.resume and distributed.first():
            discard_run(args.out)
        raise
    print(f"run {args.out}, in {args.amp or 'fp32'}; watch it: tensorboard --logdir {args.out.parent}")
    if args.processes > 1 or distributed.world() > 1:
        print(
            f"a step is {args.accum} x {micro_batch_size(args)} pictures ({args.processes} x --batch-size "
            f"{args.batch_size}), shared by {distributed.world()} processes; peak learning rate {args.lr:g}, as given"
        )
    for split in ["val"] if args.no_test else ["val", "test"]:
        if (rows := len(task.store.rows(split))) > SCORED:
            print(f"of {rows:,} {split} rows at most {SCORED:,} with labels are scored here, by evaluate.py all")
    out = shlex.quote(args.out.as_posix())
    again = f"python train.py --resume --out {out}"
    try:
        finished = fit(args, task)
    except RuntimeError as error:
        cause = getattr(error, "inner_exception", error)  # of a failed compilation
        if cause is not error and not ran_out(cause):
            reason = f"{type(cause).__name__}: {first_line(cause)}"
            raise UserError(f"--compile: {reason}; without it: {again} --no-compile") from None
        if not ran_out(cause):
            raise
        raise UserError(
            f"out of memory at --batch-size {args.batch_size}; start anew with half of it and twice --accum "
            f"{args.accum}, which takes the same steps, or with --amp. The last checkpoint is {args.out / 'last'}"
        ) from None
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, above all
        then = f"go on with: {again}" if holds_run(args.out) else "start again"
        raise UserError(f"{error}; if the disk is full make room, then {then}") from None
    if not finished:
        print(f"stopped and saved in {args.out / 'last'}; go on with: {again}")
        return STOPPED
    print(f"\ntrained: {args.out / 'best'}; try: python infer.py IMAGE --checkpoint {out}/best")
    return 0


if __name__ == "__main__":
    main()
