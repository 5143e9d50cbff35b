"""Batches of stored pixels and targets. A batch is one gather from the store, so no worker processes are needed."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.attributes import MISSING
from data.parquet import WINDOW
from data.store import ImageStore


class Batch(NamedTuple):
    """Rows of a catalogue, as training and evaluation read them.

    Attributes:
        pixels: uint8 (B, H, W, 3).
        labels: int64 (B, A), negative where missing.
        numbers: float32 (B, M), scaled, NaN where missing.
        tokens: int32 (B, T) of the titles; T is 0 where the model reads none.
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
    """What is known of each row of a store besides its picture: arrays (N, ·), named as the fields of `Batch`."""

    labels: np.ndarray
    numbers: np.ndarray
    tokens: np.ndarray


class Batches(Dataset):
    """Indexing with an array of rows gives their `Batch`; with an empty array, one blank picture without labels: if a
    batch is too short for all processes that share it, each must take the step, and this one then adds no gradient."""

    def __init__(self, store: ImageStore, known: Rows):
        self.pixels, self.known = store.pixels, known

    def __getitem__(self, rows: np.ndarray) -> Batch:
        labels, numbers, tokens = (array[rows if len(rows) else [0]] for array in self.known)
        pixels = np.asarray(self.pixels[rows]) if len(rows) else np.zeros((1, *self.pixels.shape[1:]), np.uint8)
        batch = Batch(*map(torch.from_numpy, (pixels, labels.astype(np.int64), numbers, tokens)))
        return batch if len(rows) else batch.unlabelled()


def epoch_batches(
    rows: np.ndarray, batch_size: int, seed: int | None = None, epoch: int = 0, run: int | None = None
) -> list[np.ndarray]:
    """Cut `rows` into batches, of which the last may be short. Without a seed, rows keep their order; with one, they
    are permuted by a function of only (seed, epoch), so that a resumed run sees the batches it would have seen.

    Args:
        run: the number of neighbouring rows that are read together, if they are: then whole runs are shuffled, and
            rows only within groups of `WINDOW` runs.
    """
    if seed is not None:
        rng = np.random.default_rng((seed, epoch))
        if run:
            runs = np.split(rows, np.flatnonzero(np.diff(rows // run)) + 1)
            order = rng.permutation(len(runs))
            windows = [order[start : start + WINDOW] for start in range(0, len(runs), WINDOW)]
            rows = np.concatenate([rng.permutation(np.concatenate([runs[i] for i in some])) for some in windows])
        else:
            rows = rng.permutation(rows)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def make_loader(store: ImageStore, known: Rows, batches: list[np.ndarray], device: torch.device) -> Iterable[Batch]:
    """Load the given batches in order, into pinned memory if `device` is a GPU."""
    pin = device.type == "cuda"
    loader = DataLoader(Batches(store, known), sampler=batches, batch_size=None, pin_memory=pin)
    return loader if store.nbytes else ahead(loader)  # stored pictures need no decoding


def ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the same batches, each prepared while the one before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        source = iter(batches)
        coming = pool.submit(next, source, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, source, None)
            yield batch
