"""What benchmarks share: a training run set up as `train.py` does it, ways that take turns, tables."""

import argparse
import contextlib
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import accumulate
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from arguments import add_catalogue_options, add_checkpoint_options
from data.batches import Batch, epoch_batches, make_loader
from defaults import choose_amp, choose_source
from errors import Parser, UserError
from models.checkpoint import find_checkpoint, trained_params
from options import parse_args
from runs import Board
from state import TrainingState
from step import parameter_groups, train_step, windows
from task import AMP, Task, load_task, setup


class Training(NamedTuple):
    """A run of one epoch, set up in a folder of its own."""

    args: argparse.Namespace
    device: torch.device
    task: Task
    state: TrainingState
    board: Board

    @property
    def window_size(self) -> int:
        """Pictures of an optimizer step."""
        return self.args.batch_size * self.args.accum

    def last_steps(self, count: int) -> None:
        """`train_epoch` over the last so many steps, since it goes on to the end of its epoch."""
        steps = self.steps(count)
        self.state.progress["step"] = steps - count
        train.train_epoch(self.args, self.task, self.state, steps, self.board, SimpleNamespace(made=False))
        wait_for(self.device)

    def steps(self, more_than: int) -> int:
        """The steps of the epoch. Raises `UserError` if they are no more than `more_than`."""
        steps = train.steps_in_epoch(self.args, self.task)
        if steps <= more_than:
            raise UserError(f"{steps} steps an epoch are too few; give more rows")
        return steps

    def in_memory(self, steps: int) -> list[list[Batch]]:
        """Windows on the device, of pictures that are already images: resized and normalised."""
        rows = self.task.store.rows("train")[: steps * self.window_size]
        loader = make_loader(self.task.store, self.task.known, epoch_batches(rows, self.args.batch_size), self.device)
        batches = [batch.to(self.device) for batch in loader]
        ready = [batch._replace(pixels=self.task.preprocess(batch.pixels)) for batch in batches]
        return list(windows(ready, self.args.accum))

    def bare_step(self, window: list[Batch]) -> None:
        """A training step on images that are ready in memory."""
        state, args = self.state, self.args
        amp, as_they_are = AMP[args.amp], lambda images: images
        train_step(
            state.parallel, window, state.optimizer, state.scaler, args.lr, amp, as_they_are, teacher=self.task.teacher
        )


@contextlib.contextmanager
def training(words: list[str]) -> Iterator[Training]:
    """A run with these options of `train.py`, every step of which is full; what it writes is removed at the end."""
    args = parse_args(words)
    choose_source(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.amp = choose_amp(device) if args.amp == "auto" else args.amp
    args.epochs = 1
    with tempfile.TemporaryDirectory() as folder:
        args.out = Path(folder)
        task = setup(args, device)
        task.model.train()
        optimizer = torch.optim.AdamW(parameter_groups(trained_params(task.model)), lr=args.lr, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        state = TrainingState(args.out, task.model, task.config, optimizer, scaler)
        run = Training(args, device, task, state, Board(args.out, task.names, {}, 0))
        rows = task.store.rows("train")
        # In this process alone: on the disk the store stays whole.
        task.store.ok[rows[len(rows) // run.window_size * run.window_size :]] = False
        yield run


def in_turn(
    ways: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one that does not count; the order turns: none is always first."""
    seconds = {name: [] for name in ways}
    order = list(ways)
    for round_ in tqdm(range(-warm_up, rounds), desc="rounds"):
        order = order[1:] + order[:1]
        for name in order:
            gc.collect()
            start = time.perf_counter()
            ways[name]()
            wait_for(device)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def trained(description: str) -> Task:
    """A checkpoint with a labelled catalogue, both named by the options of `evaluate.py`."""
    parser = Parser(description=description)
    add_checkpoint_options(parser)
    add_catalogue_options(parser)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = find_checkpoint(args.checkpoint)
    return load_task(folder, args.weights, args.data, args.cache_dir, args.limit, device, args.store_gb)


def peak_memory(way: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors of this process take while a way runs, beyond those that are there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        way()
    memory = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())))


def in_processes(commands: Mapping[Path, list], jobs: int, what: str) -> None:
    """Run the command that makes each file, where there is none yet: some at a time, on equal shares of the cores."""
    shared = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}

    def make(file: Path) -> None:
        if file.exists():
            return
        done = subprocess.run([sys.executable, *commands[file]], env=shared, capture_output=True)
        if done.returncode:
            raise SystemExit(f"{file} was to be made, but:\n{done.stderr.decode()[-2000:]}")

    with ThreadPoolExecutor(jobs) as pool:
        made = [pool.submit(make, file) for file in commands]
        try:
            for done in tqdm(as_completed(made), total=len(made), desc=what):
                done.result()
        finally:  # after a failure none is begun any more
            pool.shutdown(cancel_futures=True)


def ratios(above: list[float], below: list[float]) -> list[float]:
    """The ratios of two lists, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: list[float]) -> str:
    """Their median (and the least and the most of them)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def machine(device: torch.device, *modules: ModuleType) -> str:
    """Where and with which versions figures were measured."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, *modules))
    return f"{where} ({platform.machine()}), {versions}, Python {platform.python_version()}"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
