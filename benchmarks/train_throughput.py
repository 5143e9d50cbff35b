"""How much of the bare training step's speed is left when `train.py` feeds it: both in turn, in one run.

    python benchmarks/train_throughput.py --data FOLDER --backbone vit_tiny_patch16_224 --weights FILE --img-size 112

Takes the options of `train.py`. *bare* is forward, backward and optimizer on normalised float images and labels that
are already in memory. *train.py* is its own `train_epoch`: store, loader, resize, flip, normalise, bar, TensorBoard.
Rounds are short, so that a noisy machine slows both alike.
"""

import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from data.batches import epoch_batches, make_loader
from errors import UserError, exits_cleanly
from models.checkpoint import trained_params
from models.classifier import attribute_losses
from options import choose_amp, choose_source, parse_args
from runs import Board
from state import TrainingState

ROUNDS, WINDOWS = 9, 6


def bare_step(model, window, optimizer, scaler, amp) -> None:
    """What a training step cannot do without."""
    known = sum((labels >= 0).sum(0) for _, labels in window)
    for images, labels in window:
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            logits = model(images)
        scaler.scale(attribute_losses(logits, labels, known).sum()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], train.MAX_GRAD_NORM
    )
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


@exits_cleanly
def main() -> None:
    args = parse_args(sys.argv[1:])
    choose_source(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.amp = choose_amp(device) if args.amp == "auto" else args.amp
    with tempfile.TemporaryDirectory() as folder:
        args.out = Path(folder)
        task = train.setup(args, device)
        task.model.train()
        optimizer = torch.optim.AdamW(train.parameter_groups(trained_params(task.model)), lr=args.lr, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        state = TrainingState(args.out, task.model, task.config, optimizer, scaler)
        board, stop = Board(args.out, task.names, {}, 0), SimpleNamespace(made=False)
        size = args.batch_size * args.accum * WINDOWS
        loader = make_loader(
            task.store, task.known, epoch_batches(task.store.rows("train")[:size], args.batch_size), device
        )
        in_memory = [(task.preprocess(batch.pixels.to(device)), batch.labels.to(device)) for batch in loader]
        bare_windows = list(train.windows(in_memory, args.accum))
        # `train_epoch` ends with its epoch: start it so many steps before the end.
        args.epochs, steps = 1, train.steps_in_epoch(args, task)
        if steps <= WINDOWS:
            raise UserError(f"{steps} steps an epoch are too few; give more rows")

        def bare() -> None:
            for window in bare_windows:
                bare_step(task.model, window, optimizer, scaler, train.AMP[args.amp])

        def whole() -> None:
            state.progress["step"] = steps - WINDOWS - 1
            train.train_epoch(args, task, state, steps, board, stop)

        tail = len(task.store.rows("train")) - (steps - WINDOWS - 1) * args.batch_size * args.accum
        images = {bare: size, whole: tail}
        speed = {bare: [], whole: []}
        for round_ in range(ROUNDS + 1):
            for way in (bare, whole) if round_ % 2 else (whole, bare):
                start = time.perf_counter()
                way()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if round_:  # the first warms up
                    speed[way].append(images[way] / (time.perf_counter() - start))
        ratios = [w / b for b, w in zip(speed[bare], speed[whole], strict=True)]
        print(f"{device.type} ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}")
        print(f"bare step  {statistics.median(speed[bare]):8.1f} images/s")
        print(f"train.py   {statistics.median(speed[whole]):8.1f} images/s")
        print(f"ratio      {statistics.median(ratios):8.3f}  (rounds: {', '.join(f'{r:.3f}' for r in ratios)})")


if __name__ == "__main__":
    main()
