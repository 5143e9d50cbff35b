"""Parquet read where it lies, in runs of rows; pictures decoded as they are asked for."""

import os
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import data.store
from data.batches import Rows, epoch_batches, make_loader
from data.columns import Column
from data.images import ImageError
from data.parquet import WINDOW, Pictures, open_file
from data.sources import _from_table, _take, load_source
from data.store import OnDemand, common_size, open_store
from errors import UserError
from tests.data.conftest import picture, write_kaggle


@pytest.fixture
def shop(tmp_path):
    """300 rows in two files, in row groups of 40 rows; the bytes of row i say so."""
    (tmp_path / "shop").mkdir()
    for name, rows in (("a", range(110)), ("b", range(110, 300))):
        images = [{"bytes": b"%d" % i, "path": None} if i % 50 else None for i in rows]
        table = pa.table({"id": list(rows), "gender": ["Men", "Women"] * (len(rows) // 2), "image": images})
        pq.write_table(table, tmp_path / "shop" / f"{name}.parquet", row_group_size=40)
    return tmp_path / "shop"


@pytest.mark.parametrize("run", [1, 7, 40, 64, 1000])
def test_any_row_is_read_from_runs_that_cross_row_groups_and_files(shop, run):
    pictures = Pictures([open_file(shop / "a.parquet"), open_file(shop / "b.parquet")], run)
    for row in np.random.default_rng(0).permutation(300):
        if row % 50:
            assert pictures(row) == b"%d" % row
        else:
            with pytest.raises(ImageError, match="no image in this row"):
                pictures(row)
        assert len(pictures.kept) <= 2 * WINDOW + 1


def test_a_file_that_was_replaced_since_is_told_before_its_pictures_get_other_rows_labels(shop):
    pictures = Pictures([open_file(shop / "a.parquet"), open_file(shop / "b.parquet")], 30)
    pictures(1)
    pq.write_table(pq.read_table(shop / "a.parquet").slice(1), shop / "new")
    os.replace(shop / "new", shop / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet was replaced meanwhile; start again"):
        pictures(90)


def test_a_date_that_python_has_none_of_is_told_with_its_column(tmp_path):
    table = pa.table(
        {"id": [1], "sold": pa.array([2**62], pa.timestamp("us")), "image": [{"bytes": b"", "path": None}]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: a cell of the column sold cannot be read \(.*\); leave it out"):
        load_source(str(tmp_path / "a.parquet"), tmp_path / "cache")


def test_in_order_few_runs_are_kept(shop, monkeypatch):
    monkeypatch.setattr("data.parquet.LAG", 60)
    pictures, most = Pictures([open_file(shop / "a.parquet"), open_file(shop / "b.parquet")], 30), 0
    for row in (row for row in range(300) if row % 50):
        pictures(row)
        most = max(most, len(pictures.kept))
    assert most <= 5


def test_a_store_is_built_in_one_pass_however_few_pictures_make_a_run(tmp_path, monkeypatch):
    images = [{"bytes": picture(i % 7, (6, 8)), "path": None} for i in range(1500)]
    table = pa.table({"id": list(range(1500)), "image": images})
    pq.write_table(table, tmp_path / "shop.parquet", row_group_size=1500)
    monkeypatch.setattr("data.parquet.RUN_ROWS", 40)
    catalogue = load_source(str(tmp_path / "shop.parquet"), tmp_path / "cache")
    begun, real, decode = [], Pictures._from, data.store.decode
    monkeypatch.setattr(Pictures, "_from", lambda self, start: begun.append(start) or real(self, start))
    monkeypatch.setattr(data.store, "decode", lambda source: time.sleep(0.003) or decode(source))  # or one does it all
    assert open_store(catalogue, (8, 6), tmp_path / "cache").ok.all()
    assert begun == [0]
    read, real_read = [], Pictures._read
    monkeypatch.setattr(Pictures, "_read", lambda self, number: read.append(number) or real_read(self, number))
    assert common_size(catalogue, 224) == (8, 6)
    assert len(read) <= 20, "of 38 runs, four times some that lie together"


def starts(pictures, monkeypatch) -> list[int]:
    """The rows from which reading begins anew, which goes over the rest of a row group."""
    rows, real = [], pictures._from
    monkeypatch.setattr(pictures, "_from", lambda start: rows.append(start) or real(start))
    return rows


def test_in_order_all_is_read_in_one_go_and_shuffled_within_a_window_each_run_once(shop, monkeypatch):
    rows = np.array([row for row in range(300) if row % 50])
    for seed in (None, 0):
        pictures = Pictures([open_file(shop / "a.parquet"), open_file(shop / "b.parquet")], 10)
        begun, read, real = starts(pictures, monkeypatch), [], pictures._read
        monkeypatch.setattr(pictures, "_read", lambda number, real=real, read=read: read.append(number) or real(number))
        for batch in epoch_batches(rows, 16, seed, run=10):
            assert [pictures(row) for row in batch] == [b"%d" % row for row in batch]
        assert sorted(read) == list(range(30))
        assert seed is not None or begun == [0]


def test_a_file_without_rows_is_passed_over(shop):
    pq.write_table(pq.read_table(shop / "a.parquet").slice(0, 0), shop / "empty.parquet")
    files = [open_file(shop / f"{name}.parquet") for name in ("empty", "a", "empty", "b", "empty")]
    for run in (7, 1000):
        pictures = Pictures(files, run)
        assert [pictures(row) for row in (1, 109, 110, 299)] == [b"1", b"109", b"110", b"299"]


def test_a_shuffle_in_windows_has_each_row_once_and_is_another_one_each_epoch():
    rows = np.flatnonzero(np.random.default_rng(0).random(10_000) < 0.8)
    first, again, second = (np.concatenate(epoch_batches(rows, 32, 3, epoch, run=100)) for epoch in (0, 0, 1))
    assert (first == again).all()
    assert (first != second).mean() > 0.9
    for order in (first, second):
        assert (np.sort(order) == rows).all()
        for start in range(0, len(rows), 300):  # fewer than a window has: from two at most
            assert len(set((order[start : start + 300] // 100).tolist())) <= 2 * WINDOW


def test_texts_are_copied_once(shop, tmp_path):
    first = load_source(str(shop), tmp_path / "cache")
    assert (len(first), first.ids[7], first.columns["gender"][:3]) == (300, "7", ["Men", "Women", "Men"])
    (kept,) = (tmp_path / "cache" / "columns").glob("*.arrow")
    written = kept.stat().st_mtime_ns
    assert list(load_source(str(shop), tmp_path / "cache").ids) == list(first.ids)
    assert kept.stat().st_mtime_ns == written
    assert kept.stat().st_size < 20_000, "no pictures"
    (left := kept.with_name(f".{kept.name}.part")).write_bytes(bytes(10**6))  # by a process that was killed
    kept.unlink()
    assert list(load_source(str(shop), tmp_path / "cache").ids) == list(first.ids)
    assert kept.stat().st_size < 20_000 and not left.exists()


@pytest.mark.parametrize("read", ["parquet", "datasets"])
def test_classes_go_by_their_names_and_further_pictures_are_no_text(tmp_path, read):
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "kind": datasets.ClassLabel(names=["Bed", "none", "Lamp"]),
            "image": datasets.Image(),
            "back": datasets.Image(),
            "vector": datasets.Sequence(datasets.Value("float32")),
            "raw": datasets.Value("binary"),
            "meta": {"a": datasets.Value("int64")},
            "boxes": [{"a": datasets.Value("int64")}],
        }
    )
    cells = [{"bytes": picture(i, (6, 8)), "path": None} for i in range(4)]
    columns = {"id": list(range(4)), "kind": [2, 0, -1, 1], "image": cells, "back": cells, "vector": [[0.5]] * 4}
    columns |= {"raw": [b"x"] * 4, "meta": [{"a": 1}] * 4, "boxes": [[{"a": 1}]] * 4}
    table = datasets.Dataset.from_dict(columns, features)
    if read == "parquet":
        table.to_parquet(tmp_path / "shop.parquet")
        catalogue = load_source(str(tmp_path / "shop.parquet"), tmp_path / "cache")
    else:
        catalogue = _from_table(
            "shop", datasets.concatenate_datasets([table.select([0, 1]), table.select([2, 3])]), "1"
        )
    assert {name: list(some) for name, some in catalogue.columns.items()} == {
        "id": ["0", "1", "2", "3"], "kind": ["Lamp", "Bed", None, None]
    }  # fmt: skip
    assert catalogue.columns["kind"][:2] == ["Lamp", "Bed"]
    assert list(_take(catalogue, 3).columns["kind"]) == ["Lamp", "Bed", None]


def test_names_of_classes_are_not_for_a_column_that_was_replaced_by_text(tmp_path):
    features = {"id": datasets.Value("int64"), "kind": datasets.ClassLabel(names=["Bed"]), "image": datasets.Image()}
    cells = {"id": [1], "kind": [0], "image": [{"bytes": picture(1, (6, 8)), "path": None}]}
    datasets.Dataset.from_dict(cells, datasets.Features(features)).to_parquet(tmp_path / "shop.parquet")
    table = pq.read_table(tmp_path / "shop.parquet")
    pq.write_table(table.set_column(1, "kind", pa.array(["Lamp"])), tmp_path / "shop.parquet")
    assert list(load_source(str(tmp_path / "shop.parquet"), tmp_path / "cache").columns["kind"]) == ["Lamp"]


def test_a_column_that_is_missing_is_told_before_anything_is_copied(shop, tmp_path):
    with pytest.raises(UserError, match=r"a.parquet lacks the column genre; nearest: gender; it has id, gender"):
        load_source(str(shop), tmp_path / "cache", needs=("genre",))
    assert not (tmp_path / "cache").exists()


def test_a_damaged_place_costs_the_rows_behind_it_once(shop, monkeypatch):
    with pq.ParquetFile(shop / "b.parquet") as opened:
        column = opened.metadata.row_group(2).column(opened.metadata.num_columns - 2)  # image.bytes of rows 80 to 120
    data = bytearray((shop / "b.parquet").read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (shop / "b.parquet").write_bytes(data)
    file = open_file(shop / "b.parquet")
    pictures = Pictures([file], 190)
    begun = starts(pictures, monkeypatch)
    assert pictures(3) == b"113"
    with pytest.raises(ImageError, match="damaged parquet"):
        pictures(100)
    with pytest.raises(ImageError, match="damaged parquet"):
        pictures(101)
    assert begun == [0]
    again = Pictures([file], 30)
    assert [again(row) for row in (0, 30, 125, 189)] == [b"110", b"140", b"235", b"299"], "what is whole stays"
    with pytest.raises(ImageError, match="damaged parquet"):
        again(95)


def test_a_damaged_file_costs_no_rows_of_the_files_after_it(tmp_path):
    for number in range(3):
        rows = [{"id": f"{number}{i}", "image": {"bytes": f"{number}{i}".encode(), "path": None}} for i in range(5)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{number}.parquet", compression="none")
    damaged = tmp_path / "1.parquet"
    with pq.ParquetFile(damaged) as opened:
        column = opened.metadata.row_group(0).column(1)
    data = bytearray(damaged.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    damaged.write_bytes(data)
    for run in (4, 100):
        pictures = Pictures([open_file(path) for path in sorted(tmp_path.iterdir())], run)
        for row in range(15):
            if 5 <= row < 10:
                with pytest.raises(ImageError, match="damaged parquet"):
                    pictures(row)
            else:
                assert pictures(row) == f"{row // 5}{row % 5}".encode()


def test_a_file_that_fails_is_no_property_of_its_rows(shop):
    pictures = Pictures([open_file(shop / "b.parquet")], 30)
    (shop / "b.parquet").unlink()
    with pytest.raises(UserError, match=r"b.parquet broke off: \[Errno 2\] No such file or directory.*; start again"):
        pictures(0)


def test_pictures_that_are_text_and_text_that_is_no_utf8_are_one_line(tmp_path):
    pq.write_table(pa.table({"id": ["1"], "image": [{"bytes": "aGVsbG8=", "path": None}]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="should hold bytes, in binary"):
        open_file(tmp_path / "a.parquet")
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"Caf\xe9"]).buffers())
    pq.write_table(pa.table({"id": latin, "image": [{"bytes": b"x", "path": None}]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet cannot be read as parquet: 'utf-8'"):
        load_source(str(tmp_path / "b.parquet"), tmp_path / "cache")


@pytest.mark.parametrize("read", [list, lambda column: column[1], lambda column: column[:2]])
def test_a_cell_that_is_no_utf8_is_one_line(read):
    latin = pa.Array.from_buffers(pa.string(), 2, pa.array([b"1", b"Caf\xe9"]).buffers())
    with pytest.raises(UserError, match=r"b'Caf\\xe9', is not UTF-8"):
        read(Column(pa.chunked_array([latin])))


def test_a_damaged_copy_of_the_texts_is_one_line(shop, tmp_path):
    load_source(str(shop), tmp_path / "cache")
    (kept,) = (tmp_path / "cache" / "columns").glob("*.arrow")
    kept.write_bytes(kept.read_bytes()[:500])
    with pytest.raises(UserError, match=r"arrow is damaged .*; delete it"):
        load_source(str(shop), tmp_path / "cache")


def test_files_of_other_columns_and_damaged_ones_are_named(shop, tmp_path):
    table = pq.read_table(shop / "b.parquet").rename_columns(["id", "sex", "image"])
    pq.write_table(table, shop / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet and .*a.parquet differ in the column gender"):
        load_source(str(shop), tmp_path / "cache")
    (shop / "b.parquet").write_bytes((shop / "b.parquet").read_bytes()[:500])
    with pytest.raises(UserError, match=r"b.parquet cannot be read as parquet"):
        load_source(str(shop), tmp_path / "cache")


@pytest.fixture
def photos(tmp_path):
    pictures = [picture(i) for i in range(30)]
    pictures[4] = b"<html>"
    return load_source(str(write_kaggle(tmp_path / "photos", pictures)), tmp_path)


def test_a_store_that_would_be_too_large_keeps_hashes_and_gives_the_same_pictures(photos, tmp_path):
    kept = open_store(photos, (80, 60), tmp_path / "cache")
    loose = open_store(photos, (80, 60), tmp_path / "cache", most=30 * 80 * 60 * 3 - 1)
    assert open_store(photos, (80, 60), tmp_path / "cache", most=30 * 80 * 60 * 3).path == kept.path
    assert isinstance(loose.pixels, OnDemand)
    assert {file.name for file in loose.path.iterdir()} == {"hashes.npy", "skipped.json"}
    assert (loose.hashes == kept.hashes).all()
    assert loose.skipped == kept.skipped != []
    known = Rows(np.zeros((30, 2), np.int32), np.zeros((30, 0), np.float32), np.zeros((30, 0), np.int64))
    batches = [np.array([3, 1]), np.array([29, 0, 7])]
    for a, b in zip(*(make_loader(store, known, batches, torch.device("cpu")) for store in (kept, loose)), strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert a.labels.dtype == b.labels.dtype == torch.int64


def test_a_picture_that_is_gone_since_is_named(photos, tmp_path):
    loose = open_store(photos, (80, 60), tmp_path / "cache", most=0)
    (tmp_path / "photos" / "images" / "107.jpg").unlink()
    with pytest.raises(UserError, match="photos, id 107: this picture could be read before, and not now: No such file"):
        loose.pixels[np.array([5, 7])]


@pytest.mark.parametrize("most", [0, 1e9])
def test_an_empty_share_of_a_batch_is_a_picture_without_labels(photos, tmp_path, most):
    """Even where the first picture is damaged."""
    (tmp_path / "photos" / "images" / "100.jpg").write_bytes(b"")
    store = open_store(photos, (80, 60), tmp_path / "cache", most)
    known = Rows(np.ones((30, 2), np.int32), np.ones((30, 1), np.float32), np.zeros((30, 0), np.int64))
    (batch,) = make_loader(store, known, [np.empty(0, dtype=int)], torch.device("cpu"))
    assert batch.pixels.shape == (1, 80, 60, 3)
    assert (batch.labels < 0).all()
    assert batch.numbers.isnan().all()
