"""Tar files as a catalogue to train on."""

import json
import tarfile

import pytest

from data.images import ImageError
from data.sources import load_source
from data.store import open_store
from data.tars import NOT_PLAIN, NOT_READ
from errors import UserError
from tests.data.conftest import picture, write_tar


@pytest.fixture
def shop(tmp_path):
    write_tar(
        tmp_path / "shop" / "00.tar",
        {
            "a/1.json": json.dumps({"gender": "Men", "year": 2012.0}).encode(),
            "a/1.png": picture(1),
            "a/2.png": picture(2),
            "a/2.back.png": picture(3),  # of the same product, and not its first
            "a/2.json": json.dumps({"gender": None, "colour": "Red"}).encode(),
            "a/3.json": b"{}",  # no picture: no row
        },
    )
    write_tar(
        tmp_path / "shop" / "01.tar",
        {"4.txt": b"A shirt", "4.jpg": picture(4, kind="jpeg"), "5.jpg": b"<html>", "5.json": b"no JSON"},
    )
    return tmp_path / "shop"


@pytest.mark.parametrize("read", [1, 3, 100])
def test_products_are_rows_and_what_is_said_of_them_columns(shop, tmp_path, monkeypatch, read):
    monkeypatch.setattr("data.tars.READ", read)
    catalogue = load_source(str(shop), tmp_path / "cache", needs=["gender", "txt"])
    assert list(catalogue.ids) == ["a/1", "a/2", "4", "5"]
    assert {name: list(cells) for name, cells in catalogue.columns.items() if name != "id"} == {
        "gender": ["Men", None, None, None],
        "year": ["2012", None, None, None],
        "colour": [None, "Red", None, None],
        "txt": [None, None, "A shirt", None],
    }
    assert [catalogue.read(row) for row in range(4)] == [
        picture(1), picture(2), picture(4, kind="jpeg"), b"<html>"
    ]  # fmt: skip
    store = open_store(catalogue, (80, 60), tmp_path / "cache", most=0)
    assert store.ok.tolist() == [True, True, True, False]


def test_a_picture_that_is_not_read_is_a_row_with_the_reason(tmp_path):
    members = {"1.heic": b"x", "1.json": b'{"gender": "Men"}', "2.heic": b"x", "2.png": picture(2), "3.AVIF": b""}
    path = write_tar(tmp_path / "0.tar", members)
    with tarfile.open(path, "a") as tar:
        tar.add(__file__, "4.png")
        linked = tarfile.TarInfo("5.png")
        linked.type, linked.linkname = tarfile.LNKTYPE, "2.png"
        tar.addfile(linked)
    catalogue = load_source(str(path), tmp_path / "cache")
    assert list(catalogue.ids) == ["1", "2", "3", "4", "5"]
    assert catalogue.columns["gender"][0] == "Men"
    assert catalogue.read(1) == picture(2)
    assert [(some.id, some.reason) for some in open_store(catalogue, (80, 60), tmp_path / "cache").skipped] == [
        ("1", NOT_READ), ("3", NOT_READ), ("4", "not an image"), ("5", NOT_PLAIN)
    ]  # fmt: skip


def test_what_is_said_beside_a_picture_that_is_not_read_is_not_lost_when_it_is_converted(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"1.heic": b"x", "1.json": b'{"gender": "Men"}', "2.png": picture(2)})
    with tarfile.open(path, "a") as tar:
        (tmp_path / "1.jpg").write_bytes(picture(1, kind="jpeg"))
        tar.add(tmp_path / "1.jpg", "1.jpg")
    with pytest.raises(UserError, match=r"1 products, such as 1, is not beside their pictures; pack it with"):
        load_source(str(path), tmp_path / "cache")


def test_files_that_a_dot_makes_one_product_and_that_say_different_things_are_told(tmp_path):
    members = {"12.5cm-lamp.png": picture(1), "12.5cm-lamp.json": b'{"width": 5}'}
    members |= {"12.7cm-lamp.png": picture(2), "12.7cm-lamp.json": b'{"width": 7}'}
    path = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match="files of 12, a name that ends at its first dot, differ in width"):
        load_source(str(path), tmp_path / "cache", needs=["width"])
    assert list(load_source(str(path), tmp_path / "cache").ids) == ["12"], "nobody needs it"
    with pytest.raises(UserError, match="files of 12, a name that ends at its first dot, differ in width"):
        load_source(str(path), tmp_path / "cache", needs=["width"])


@pytest.mark.parametrize("said", [b"{", b"[1]", json.dumps({"gender": "Men", "thumbnail": "x" * (1 << 20)}).encode()])
def test_a_json_that_cannot_be_columns_is_told(tmp_path, capsys, said):
    members = {"1.png": picture(1), "1.json": said, "2.png": picture(2), "2.json": b'{"gender": "Men"}'}
    catalogue = load_source(str(write_tar(tmp_path / "0.tar", members)), tmp_path / "cache")
    assert list(catalogue.columns["gender"]) == [None, "Men"]
    assert (
        "1 .json files are no JSON object of at most 1 MB, and left out, such as 1.json in " in capsys.readouterr().err
    )


def test_what_one_file_of_a_product_lacks_another_may_say(tmp_path):
    members = {"1.png": picture(1), "1.json": b'{"brand": "Puma"}', "1.more.json": b'{"brand": null, "id": "A"}'}
    path = write_tar(tmp_path / "0.tar", members)
    catalogue = load_source(str(path), tmp_path / "cache", needs=["brand"])
    assert (list(catalogue.ids), list(catalogue.columns["brand"])) == (["A"], ["Puma"])


def test_an_id_may_be_told(tmp_path):
    write_tar(tmp_path / "a" / "0.tar", {"x.json": b'{"id": 77}', "x.png": picture(1)})
    assert list(load_source(str(tmp_path / "a" / "0.tar"), tmp_path / "cache").ids) == ["77"]


def test_no_id_told_is_the_products_name(tmp_path):
    write_tar(tmp_path / "0.tar", {"x.json": b'{"id": null}', "x.png": picture(1)})
    assert list(load_source(str(tmp_path / "0.tar"), tmp_path / "cache").ids) == ["x"]


@pytest.mark.parametrize("order", ["x.json y.png x.png", "x.png y.png x.json", "x.txt x.png y.png x.json"])
def test_what_lies_apart_from_its_picture_is_told(tmp_path, order):
    members = {"x.json": b'{"gender": "Men"}', "x.txt": b"A shirt", "x.png": picture(1), "y.png": picture(2)}
    write_tar(tmp_path / "0.tar", {name: members[name] for name in order.split()})
    with pytest.raises(UserError, match=r"1 products, such as x, is not beside their pictures; pack it with"):
        load_source(str(tmp_path / "0.tar"), tmp_path / "cache")


def test_what_macos_adds_beside_each_file_is_no_product(tmp_path):
    members = {"._x.png": b"Mac", "x.png": picture(1), "._x.json": b"Mac", "x.json": b'{"gender": "Men"}'}
    catalogue = load_source(str(write_tar(tmp_path / "0.tar", members)), tmp_path / "cache")
    assert (list(catalogue.ids), list(catalogue.columns["gender"])) == (["x"], ["Men"])


def test_a_file_that_is_gone_since_is_the_pictures_reason(shop, tmp_path):
    catalogue = load_source(str(shop), tmp_path / "cache")
    (shop / "01.tar").unlink()
    with pytest.raises(ImageError, match="No such file"):
        catalogue.read(2)


def test_a_tar_that_is_cut_short_is_one_line_and_leaves_nothing(shop, tmp_path):
    whole = (shop / "01.tar").read_bytes()
    (shop / "01.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"01.tar cannot be read as tar: "):
        load_source(str(shop), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.arrow*"))


def test_no_product_with_a_picture(tmp_path):
    write_tar(tmp_path / "a" / "0.tar", {"x.json": b'{"id": 77}'})
    with pytest.raises(UserError, match="has no rows with an image"):
        load_source(str(tmp_path / "a"), tmp_path / "cache")


def test_names_and_cells_that_are_no_text_are_mended(tmp_path):
    write_tar(tmp_path / "a" / "0.tar", {"caf\udce9.png": picture(1), "caf\udce9.json": b'{"title": "\\ud800 shirt"}'})
    catalogue = load_source(str(tmp_path / "a"), tmp_path / "cache")
    assert catalogue.ids[0].startswith("caf\ufffd")
    assert catalogue.columns["title"][0].endswith("\ufffd shirt")
