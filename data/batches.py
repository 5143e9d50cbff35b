"""Batches of stored pixels and targets. A batch is one gather from the store, so no worker processes are needed."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.attributes import MISSING
from data.store import ImageStore


class Batch(NamedTuple):
    """Rows of a catalogue, as training and evaluation read them.

    Attributes:
        pixels: uint8 (B, H, W, 3).
        labels: int64 (B, A), negative where missing.
        numbers: float32 (B, M), scaled, NaN where missing.
        tokens: int64 (B, T) of the titles; T is 0 where the model reads none.
    """

    pixels: Tensor
    labels: Tensor
    numbers: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def unlabelled(self) -> "Batch":
        return self._replace(
            labels=torch.full_like(self.labels, MISSING), numbers=torch.full_like(self.numbers, torch.nan)
        )


class Rows(NamedTuple):
    """What is known of each row of a store besides its picture: arrays (N, ·) of what `Batch` calls by these names."""

    labels: np.ndarray
    numbers: np.ndarray
    tokens: np.ndarray


class Batches(Dataset):
    """Indexed by an array of rows, gives their `Batch`; of no rows, a picture without labels: where several processes
    share a batch too short for all, each must take the step, and this one adds nothing to its gradient."""

    def __init__(self, store: ImageStore, known: Rows):
        self.pixels, self.known = store.pixels, known

    def __getitem__(self, rows: np.ndarray) -> Batch:
        if not len(rows):
            return self[np.zeros(1, dtype=int)].unlabelled()
        arrays = (np.asarray(self.pixels[rows]), *(array[rows] for array in self.known))
        return Batch(*map(torch.from_numpy, arrays))


def epoch_batches(rows: np.ndarray, batch_size: int, seed: int | None = None, epoch: int = 0) -> list[np.ndarray]:
    """Cut `rows` into batches, the last one short where it must be. Without a seed in order; else shuffled by a
    permutation that is a function of (seed, epoch) alone, so that a resumed run sees the batches it would have seen."""
    if seed is not None:
        rows = np.random.default_rng((seed, epoch)).permutation(rows)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def make_loader(store: ImageStore, known: Rows, batches: list[np.ndarray], device: torch.device) -> DataLoader:
    """A loader that gives the named batches in their order, from pinned memory where `device` is a GPU."""
    pin = device.type == "cuda"
    return DataLoader(Batches(store, known), sampler=batches, batch_size=None, pin_memory=pin)
