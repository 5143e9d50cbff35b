import errno
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.catalogue import Skipped
from data.images import decode, pixel_hash
from data.preprocess import Preprocess
from data.sources import load_source
from data.split import SPLITS, at_most, in_split
from data.store import _pixels, common_size, default_cache_dir, open_store
from errors import UserError
from tests.data.conftest import picture, write_kaggle


@pytest.fixture
def shop(tmp_path):
    pictures = [picture(i) for i in range(8)]
    pictures[2] = picture(2, (53, 80))  # another shape
    pictures[4] = picture(4, kind="jpeg")[:1500]
    pictures[6] = b"<html>not found</html>"
    pictures[7] = picture(1, kind="bmp")  # the pixels of row 1 in another file
    return load_source(str(write_kaggle(tmp_path / "shop", pictures)), tmp_path)


SKIPPED = [Skipped("104", "truncated or damaged image"), Skipped("106", "not an image")]


def test_rows_of_the_store_are_rows_of_the_catalogue(shop, tmp_path):
    store = open_store(shop, (80, 60), tmp_path / "cache")
    assert store.pixels.shape == (8, 80, 60, 3)
    assert (store.pixels.dtype, store.nbytes) == (np.uint8, 8 * 80 * 60 * 3)
    assert (store.pixels[3] == np.asarray(decode(picture(3)))).all()
    assert store.ok.tolist() == [True] * 4 + [False, True, False, True]
    assert store.skipped == SKIPPED
    assert not store.pixels[4].any()
    assert store.hashes[2] == pixel_hash(decode(picture(2, (53, 80))))  # at native size
    assert store.hashes[1] == store.hashes[7] != store.hashes[0]
    preprocess = Preprocess((80, 60), (32, 32), "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert (store.pixels[2] == preprocess.to_canvas(decode(shop.read(2)))).all()
    with pytest.raises(ValueError, match="read-only"):
        store.pixels[0] = 0


def test_the_second_open_decodes_nothing_and_remembers_what_was_skipped(shop, tmp_path, monkeypatch):
    first = open_store(shop, (80, 60), tmp_path / "cache")
    monkeypatch.setattr("data.store.decode", lambda source: pytest.fail("decoded again"))
    again = open_store(shop, (80, 60), tmp_path / "cache")
    assert (first.built, again.built) == (True, False)
    assert again.path == first.path
    assert again.skipped == SKIPPED
    assert (again.pixels == first.pixels).all()
    assert (again.hashes == first.hashes).all()
    assert (again.ok == first.ok).all()
    assert open_store(shop, [80, 60], tmp_path / "cache").path == first.path  # as JSON has it


def test_the_canvas_is_the_common_size_but_no_larger_than_the_model_reads(shop, tmp_path):
    assert common_size(shop, 224) == common_size(shop, 80) == (80, 60)
    assert common_size(shop, 70) == (70, 60)
    odd = [picture(1, (90, 90)), picture(2), picture(3), picture(4, (120, 100))]
    assert common_size(load_source(str(write_kaggle(tmp_path / "odd", odd)), tmp_path), 224) == (80, 60)
    trimmed = [picture(i, (80 + i, 60 + i)) for i in range(5)] + [picture(i, (8, 8)) for i in (5, 6)]
    assert common_size(load_source(str(write_kaggle(tmp_path / "trimmed", trimmed)), tmp_path), 224) == (61, 81)
    full, capped = (open_store(shop, canvas, tmp_path / "cache") for canvas in ((80, 60), (32, 32)))
    assert capped.pixels.shape == (8, 32, 32, 3)
    assert (capped.hashes == full.hashes).all()


def test_what_earlier_stores_take_is_told_once_it_is_much(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.store.MUCH", 100_000)
    for canvas, more in (((80, 60), ""), ((32, 32), "1 more store of"), ((40, 40), "2 more stores"), ((40, 40), "")):
        open_store(shop, canvas, tmp_path / "cache")
        assert more in (said := capsys.readouterr().err) and ("delete" in said) == bool(more)


def test_room_for_pictures_is_taken_before_they_are_decoded(tmp_path):
    _pixels(tmp_path / "pixels.npy", (10, 80, 60, 3))
    found = (tmp_path / "pixels.npy").stat()
    assert found.st_blocks * 512 >= found.st_size > 10 * 80 * 60 * 3


def test_rows_of_a_split_are_readable_and_skipped_ones_are_listed(tmp_path):
    pictures = [picture(i, (6, 8)) for i in range(60)]
    pictures[3], pictures[9] = None, b"<html>"
    catalogue = load_source(str(write_kaggle(tmp_path / "shop", pictures)), tmp_path)
    store = open_store(catalogue, (8, 6), tmp_path / "cache")
    rows = [store.rows(split) for split in SPLITS]
    assert all(map(len, rows))
    assert sorted(np.concatenate(rows)) == store.rows("all").tolist() == [i for i in range(59) if i != 8]
    store.write_skipped(tmp_path / "skipped.csv")
    lines = (tmp_path / "skipped.csv").read_text().splitlines()
    assert lines == ["id,reason", "103,no such file in images/", "109,not an image"]


def test_of_many_rows_the_same_are_chosen():
    rows = np.arange(0, 3000, 3)
    chosen = at_most(rows, 200)
    assert (np.diff(chosen) > 0).all() and len(chosen) == 200 and set(chosen) <= set(rows)
    assert chosen[100] > rows[300], "from all of them, not the first ones"
    assert (at_most(rows, 200) == chosen).all()
    assert at_most(rows, 1000) is rows


def left_in(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_what_a_killed_build_has_left_is_deleted_by_the_next(shop, tmp_path):
    store = open_store(shop, (80, 60), tmp_path / "cache")
    own, other = (store.path.with_name(f".{store.path.name}.{of}.12ab.part") for of in (platform.node(), "other"))
    other.mkdir()  # of a machine that shares the folder, perhaps at work
    part = store.path.rename(own)  # as before it has its name
    (part / "hashes.npy").unlink()
    again = open_store(shop, (80, 60), tmp_path / "cache")
    assert again.built and set(left_in(tmp_path / "cache")) == {store.path.name, other.name}
    assert (again.pixels[3] == np.asarray(decode(picture(3)))).all()


def test_a_lock_of_another_users_keeps_nobody_from_building(shop, tmp_path, monkeypatch):
    def refused(lock, wait=False):
        raise PermissionError(errno.EACCES, "Permission denied", str(lock))

    monkeypatch.setattr("data.store.claim", refused)
    assert open_store(shop, (80, 60), tmp_path / "cache").built
    assert len(left_in(tmp_path / "cache")) == 1


def test_two_builders_at_once_leave_one_whole_store(shop, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: open_store(shop, (80, 60), tmp_path / "cache"), range(4)))
    assert len({store.path for store in stores}) == 1
    assert left_in(tmp_path / "cache") == [stores[0].path.name]
    assert sum(store.built for store in stores) == 1, "by one of them, while the others wait"
    assert stores[0].path.stat().st_mode == (tmp_path / "cache").stat().st_mode, "for other users to read, if that is"
    assert all((store.pixels[3] == np.asarray(decode(picture(3)))).all() for store in stores)


def test_an_interrupted_build_leaves_nothing(shop, tmp_path, monkeypatch):
    def interrupted(source):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.store.decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_store(shop, (80, 60), tmp_path / "cache")
    assert not left_in(tmp_path / "cache")


@pytest.mark.parametrize("fault", ["opening", "reading"])
def test_a_file_that_cannot_be_read_leaves_no_store_to_remember_it(shop, tmp_path, monkeypatch, fault):
    file, aside = tmp_path / "shop" / "images" / "101.jpg", tmp_path / "aside"
    if fault == "opening":
        file.rename(aside)
        file.symlink_to(file.name)
    else:
        whole = Path.read_bytes

        def failing(path):
            if path == file:
                raise OSError(errno.EIO, "Input/output error")  # reading names no file
            return whole(path)

        monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(
        UserError, match=r"shop, id 101: its file cannot be read: .* (levels|error).*: '.*101.jpg'; mend"
    ):
        open_store(shop, (80, 60), tmp_path / "cache")
    assert not left_in(tmp_path / "cache")
    monkeypatch.undo()
    if fault == "opening":
        aside.replace(file)
    assert open_store(shop, (80, 60), tmp_path / "cache").skipped == SKIPPED


@pytest.mark.parametrize("name", ["\u670d" * 80, "x" + "\u670d" * 80, "caf\udce9"])
def test_any_name_of_a_folder_is_the_beginning_of_a_stores(tmp_path, name):
    folder = write_kaggle(tmp_path / name, [picture(0)])
    store = open_store(load_source(str(folder), tmp_path), (80, 60), tmp_path / "cache")
    assert store.path.name.startswith(name[:20].encode(errors="ignore").decode())
    assert len(store.path.name.encode()) < 143


def test_not_one_readable_image(tmp_path):
    catalogue = load_source(str(write_kaggle(tmp_path / "shop", [b"<html>"] * 3)), tmp_path)
    with pytest.raises(UserError, match="shop: none of its 3 rows has a readable image"):
        common_size(catalogue, 224)
    with pytest.raises(UserError, match=r"shop: none of its 3 images can be read \(not an image\)"):
        open_store(catalogue, (80, 60), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(shop, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/cache .*need 0 MB there.*--cache-dir"):
        open_store(shop, (80, 60), tmp_path / "file" / "cache")


def test_too_little_room_is_named(shop, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"only 0 MB free in .*cache: .*--cache-dir"):
        open_store(shop, (80, 60), tmp_path / "cache")
    assert not left_in(tmp_path / "cache")


def test_default_cache_dir(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_cache_dir() == Path("/elsewhere/lora-vision")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "lora-vision"


def test_splits_are_a_function_of_the_picture_alone():
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    splits = np.stack([in_split(hashes, name) for name in SPLITS])
    assert (splits.sum(0) == 1).all()
    pinned = [SPLITS[i] for i in np.stack([in_split(np.arange(10, dtype=np.uint64), s) for s in SPLITS]).argmax(0)]
    assert pinned == ["test", "val", *["train"] * 8], "old checkpoints rely on it"
    assert np.allclose(splits.mean(1), [0.8, 0.1, 0.1], atol=0.01)
    order = np.random.default_rng(1).permutation(len(hashes))
    for name, inside in zip(SPLITS, splits, strict=True):
        assert (in_split(hashes[order], name) == inside[order]).all()  # row order does not matter
        assert (in_split(hashes[:50], name) == inside[:50]).all()  # nor do rows added or removed


def test_the_real_catalogue_decodes_whole_and_splits_without_a_leak(real):
    catalogue, store = real
    assert store.pixels.shape == (39924, 80, 60, 3)
    assert store.ok.all()
    assert not store.skipped
    for row in (0, 12345, 39923):
        assert (store.pixels[row] == np.asarray(decode(catalogue.read(row)))).all()
    splits = {name: in_split(store.hashes, name) for name in SPLITS}
    assert np.allclose([inside.mean() for inside in splits.values()], [0.8, 0.1, 0.1], atol=0.01)
    _, group = np.unique(store.pixels.reshape(39924, -1)[:, ::7], axis=0, return_inverse=True)
    assert 600 < 39924 - group.max() - 1 < 800  # pictures that are copies of another
    sides = {name: set(group[inside].tolist()) for name, inside in splits.items()}
    assert not sides["train"] & sides["test"]
    assert not sides["train"] & sides["val"]
    assert not sides["val"] & sides["test"]
