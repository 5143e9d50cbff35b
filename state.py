"""The whole state of a training run: what is saved every `--save-every` steps and what `--resume` goes on from.

No generator's state is among it: all that is random, and the place within the epoch, follow from the seed and the step
(see `train.py`).
"""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

import distributed
from errors import BARRED, FAILING, UserError
from models.backbone import read_tensors
from models.checkpoint import load_tensors, previous_of, read_config, save_checkpoint, trained_params
from models.classifier import AttributeClassifier
from runs import Board


class TrainingState:
    """Weights, optimizer, loss scale and progress of the run in the folder `out`.

    Attributes:
        parallel: the model as all processes train it together.
        progress: `step`, how many optimizer updates were taken; `epochs_scored`; the best epoch and its accuracy;
            `overflows`, how many updates fp16's loss scaler has skipped.
    """

    def __init__(self, out: Path, model: AttributeClassifier, config: dict, optimizer: Optimizer, scaler: GradScaler):
        self.last, self.best = out / "last", out / "best"
        self.model, self.config, self.optimizer, self.scaler = model, config, optimizer, scaler
        self.params = trained_params(model)
        self.parallel = distributed.in_step(model)
        self.progress = {"step": 0, "epochs_scored": 0, "best_accuracy": -1.0, "best_epoch": 0, "overflows": 0}

    @property
    def step(self) -> int:
        return self.progress["step"]

    def save_last(self, board: Board | None) -> None:
        if not distributed.first():
            return
        resume = {"scaler": self.scaler.state_dict(), "events": board.written()}
        config = self.config | {"progress": self.progress, "resume": resume}
        save_checkpoint(self.last, self.model, config, {"optimizer.safetensors": self.optimizer_tensors()})

    def save_best(self, **facts) -> None:
        if not distributed.first():
            return
        save_checkpoint(self.best, self.model, self.config | facts | {"progress": self.progress})

    def sound(self) -> Path:
        """The checkpoint to go on from: `last/`, or if that is damaged (and is then moved aside) the one before it. To
        be called in one process only.

        Raises:
            UserError: neither can be read, or the disk fails, which leaves the files undamaged.
        """
        try:
            read_config(self.last)
            return self.last
        except UserError as damage:
            folder = previous_of(self.last)
            if getattr(damage.__context__, "errno", None) in (*FAILING, *BARRED):
                hint = f"start again, or if that never helps move {self.last} away, before which {folder} was"
                raise UserError(f"{damage}; {hint}") from None
            read_config(folder)
            print(f"{damage}\ngoing on from the one before, {folder}")
            if self.last.exists():  # or the next save would keep it, and drop the good one
                damaged = self.last.with_name("last.damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                os.replace(self.last, damaged)
            return folder

    def restore(self, folder: Path) -> dict[str, int]:
        """Go back to what `save_last` saved; returns its `Board.written`.

        Raises:
            UserError: this run is set up with other weights, labels or rows.
        """
        saved = read_config(folder)
        check_same(saved, self.config, folder.parent)
        load_tensors(folder, self.model, saved)
        self.restore_optimizer(read_tensors(folder / "optimizer.safetensors"))
        self.scaler.load_state_dict(saved["resume"]["scaler"])
        own = ("progress", "resume", "calibration")  # of this checkpoint alone: another epoch needs its own calibration
        self.progress, self.config = saved["progress"], {k: v for k, v in saved.items() if k not in own}
        return saved["resume"]["events"]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """AdamW's state as named tensors, so that it is saved without pickle too."""
        state = self.optimizer.state
        return {f"{name}/{key}": t.cpu() for name, p in self.params.items() for key, t in state[p].items()}

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `optimizer_tensors`."""
        for path, tensor in tensors.items():
            name, key = path.rsplit("/", 1)
            # A copy: the tensor may be a view of the file, which could not be replaced on Windows then.
            self.optimizer.state[self.params[name]][key] = tensor.to(self.params[name].device, copy=True)


def check_same(saved: dict, config: dict, out: Path) -> None:
    """Raise a `UserError` where a run is set up with other base weights, labels or rows than it was stopped with."""
    base, was = config["backbone"]["fingerprint"], saved["backbone"]["fingerprint"]
    if base != was:
        raise UserError(f"--resume: the base weights are {base}, but {out} was trained with {was}")
    rows, were = config["data"]["rows"], saved["data"]["rows"]
    if rows != were:
        anew = f"start a new run where it is: --init-from {out / 'best'}"
        raise UserError(f"--resume: the catalogue has {rows:,} rows, but {out} was trained with {were:,}; {anew}")
    if config["teacher"] != saved.get("teacher"):
        raise UserError(f"--resume: the model that --teacher names is not the one {out} learned from")
    for key in ("article", "attributes", "paths", "preprocess", "inputs", "text"):
        if config[key] != saved.get(key):
            raise UserError(f"--resume: the catalogue is not the one {out} was trained on: its {key} differ")
    if config["data"]["ids"] != saved["data"].get("ids", config["data"]["ids"]):
        raise UserError(f"--resume: the catalogue is not the one {out} was trained on: its ids, or their order, differ")


def check_finite(
    steps: list[tuple[int, np.ndarray, Tensor]], state: TrainingState, attributes: list[str], ids: list[str]
) -> list[list[float]]:
    """Read the losses and gradient norms of steps, which makes a GPU wait, and count the updates that fp16's scaler
    skipped.

    Args:
        steps: the number of each, its rows, and what `train_step` gave.
        ids: the product id of each row.

    Raises:
        UserError: one is not finite and is no overflow of fp16; it names the step, the attributes and the product ids.
    """
    read = torch.stack([figures for *_, figures in steps]).tolist() if steps else []
    for (step, rows, _), (*losses, norm) in zip(steps, read, strict=True):
        if math.isfinite(sum(losses) + norm):
            continue
        if state.scaler.is_enabled() and math.isfinite(sum(losses)) and state.scaler.get_scale() >= 1:
            state.progress["overflows"] += 1
            continue
        bad = [name for name, loss in zip(attributes, losses, strict=True) if not math.isfinite(loss)]
        what = f"the loss of {', '.join(bad)} is" if bad else f"the losses are finite but the gradient norm is {norm},"
        products = ", ".join(ids[row] for row in rows)
        raise UserError(
            f"step {step}: {what} not finite; this update was not made, and {state.last} holds the last good state. "
            f"Look at these products, or try a lower --lr. Product ids: {products}"
        )
    return read
