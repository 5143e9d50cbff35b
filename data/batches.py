"""Batches of stored pixels and labels. A batch is one gather from the store, so no worker processes are needed."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.store import ImageStore


class ImageBatches(Dataset):
    """Indexed by an array of rows, gives (pixels uint8 (B, H, W, 3), labels int64 (B, A))."""

    def __init__(self, store: ImageStore, labels: np.ndarray):
        self.pixels, self.labels = store.pixels, labels

    def __getitem__(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(np.asarray(self.pixels[rows])), torch.from_numpy(self.labels[rows])


def epoch_batches(rows: np.ndarray, batch_size: int, seed: int | None = None, epoch: int = 0) -> list[np.ndarray]:
    """Cut `rows` into batches, the last one short where it must be. Without a seed in order; else shuffled by a
    permutation that is a function of (seed, epoch) alone, so that a resumed run sees the batches it would have seen."""
    if seed is not None:
        rows = np.random.default_rng((seed, epoch)).permutation(rows)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def make_loader(store: ImageStore, labels: np.ndarray, batches: list[np.ndarray], device: torch.device) -> DataLoader:
    """A loader that gives the named batches in their order, from pinned memory where `device` is a GPU."""
    pin = device.type == "cuda"
    return DataLoader(ImageBatches(store, labels), sampler=batches, batch_size=None, pin_memory=pin)
