import numpy as np
import torch

from data.batches import Rows, epoch_batches, make_loader
from data.sources import load_source
from data.store import open_store
from tests.data.conftest import picture, write_kaggle


def test_every_row_once_in_order_without_a_seed():
    rows = np.arange(100, 110)
    batches = epoch_batches(rows, 4)
    assert [batch.tolist() for batch in batches] == [[100, 101, 102, 103], [104, 105, 106, 107], [108, 109]]


def test_the_shuffle_is_a_function_of_seed_and_epoch():
    rows = np.arange(1000)

    def order(seed, epoch):
        return np.concatenate(epoch_batches(rows, 7, seed, epoch)).tolist()

    first = order(0, 0)
    np.random.seed(5)
    torch.manual_seed(5)
    assert order(0, 0) == first
    assert sorted(first) == rows.tolist()
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert rows.tolist() == list(range(1000))


def test_the_loader_gathers_pixels_and_what_is_known_of_them(tmp_path):
    catalogue = load_source(str(write_kaggle(tmp_path / "shop", [picture(i, (6, 8)) for i in range(9)])), tmp_path)
    store = open_store(catalogue, (8, 6), tmp_path / "cache")
    known = Rows(np.arange(18).reshape(9, 2), np.arange(9, dtype=np.float32)[:, None], np.arange(27).reshape(9, 3))
    plan = epoch_batches(np.array([8, 1, 5, 3, 2]), 2, seed=3, epoch=1)
    batches = list(make_loader(store, known, plan, torch.device("cpu")))
    assert [len(batch.pixels) for batch in batches] == [2, 2, 1]
    for wanted, batch in zip(plan, batches, strict=True):
        assert (batch.pixels.dtype, batch.pixels.shape[1:]) == (torch.uint8, (8, 6, 3))
        assert (batch.pixels.numpy() == store.pixels[wanted]).all()
        for got, all_rows in zip(batch[1:], known, strict=True):
            assert got.numpy().dtype == all_rows.dtype
            assert (got.numpy() == all_rows[wanted]).all()
