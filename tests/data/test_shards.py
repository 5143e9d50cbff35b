"""Every kind of input as shards: each row once, with its name and title, whatever is damaged."""

import os
import tarfile
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import shards
from data.images import ImageError, decode
from data.inputs import all_files
from data.shards import Row, open_source, stream_shards
from errors import UserError, check_writable
from tests.data.conftest import picture, write_tar

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def rows_of(source) -> list[Row]:
    return [row for shard in source.shards for row in shard.read()]


def write_parquet(path, images, group=7, page=1024, **columns):
    """`images`: bytes, (bytes, path), or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [image and dict(zip(("bytes", "path"), image if isinstance(image, tuple) else (image, None), strict=True))
             for image in images]  # fmt: skip
    table = pa.table({"image": pa.array(cells, IMAGE)} | columns)
    pq.write_table(table, path, row_group_size=group, use_dictionary=page == 1024, write_batch_size=page)
    return path


@pytest.fixture
def shop(tmp_path):
    """Two parquet files of 30 and 5 rows, ids 0 to 34."""
    pictures = [picture(i, (6, 8)) for i in range(35)]
    for name, some in (("b.parquet", range(30)), ("c/a.parquet", range(30, 35))):
        titles = [None if i % 5 == 0 else f"Title {i}" for i in some]
        write_parquet(tmp_path / "shop" / name, [pictures[i] for i in some], id=list(some), name=titles)
    return tmp_path / "shop", pictures


@pytest.mark.parametrize("rows", [4, 7, 10, 4096])
def test_parquet_is_cut_at_any_row_wherever_its_row_groups_end(shop, rows):
    folder, pictures = shop
    source = open_source([str(folder)], rows=rows)
    assert [shard.rows for shard in source.shards] == [
        min(rows, count - start) for count in (30, 5) for start in range(0, count, rows)
    ]
    assert all(len(list(shard.read())) == shard.rows for shard in source.shards)
    assert rows_of(source) == [Row(str(i), pictures[i]) for i in range(35)]
    assert source.rows == 35


def test_titles_of_parquet_are_read_only_where_they_are_asked_for(shop):
    folder, _ = shop
    titled = rows_of(open_source([str(folder)], title="name"))
    assert [row.title for row in titled] == [None if i % 5 == 0 else f"Title {i}" for i in range(35)]
    source = open_source([str(folder / "b.parquet")], title="productDisplayName")
    assert source.notes == [f"{folder / 'b.parquet'} lacks the column of titles, productDisplayName: its pictures are "
                            "read without"]  # fmt: skip
    assert {row.title for row in rows_of(source)} == {None}


def test_names_of_rows_without_an_id(tmp_path):
    images = [(picture(0), "a/shirt.jpg"), (picture(1), None), None, (b"", "gone.jpg")]
    path = write_parquet(tmp_path / "a.parquet", images, id=pa.array([None, None, None, 7.0]))
    rows = rows_of(open_source([str(path)]))
    assert [row.name for row in rows] == ["a/shirt.jpg", f"{path}#1", f"{path}#2", "7"]
    assert [row.picture for row in rows[2:]] == ["no image in this row", "no image in this row, only a file's name"]


def test_only_the_columns_that_are_needed_are_read(tmp_path, shop):
    """A column that cannot be decoded stands in the way of nobody who does not ask for it."""
    folder, pictures = shop
    path = folder / "b.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(3)
    assert chunk.path_in_schema == "name"
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    assert [row.picture for row in rows_of(open_source([str(path)]))] == pictures[:30]
    damaged = rows_of(open_source([str(path)], title="name", rows=10))
    assert all(row.picture.startswith("damaged parquet: ") for row in damaged[:10])
    assert [row.name for row in damaged[:2]] == [f"{path}#0", f"{path}#1"]
    assert [row.picture for row in damaged[20:]] == pictures[20:30], "other shards do not touch it"


def test_text_that_is_no_utf8_is_the_rows_reason(tmp_path):
    latin = pa.Array.from_buffers(pa.string(), 2, pa.array([b"1", b"Caf\xe9"]).buffers())
    path = write_parquet(tmp_path / "a.parquet", [picture(0)] * 2, id=latin)
    rows = rows_of(open_source([str(path)]))
    assert [row.name for row in rows] == [f"{path}#0", f"{path}#1"]
    assert all(row.picture.startswith("damaged parquet: 'utf-8' codec") for row in rows)


def test_of_a_large_row_group_little_is_in_memory(tmp_path):
    images = [os.urandom(100_000) for _ in range(300)]
    path = write_parquet(tmp_path / "a.parquet", images, group=300, page=8)
    before = pa.total_allocated_bytes()
    for start in (0, 4):
        rows = open_source([str(path)], rows=60).shards[start].read()
        assert next(rows).picture == images[60 * start]
        assert pa.total_allocated_bytes() - before < 10e6, "of 30 MB"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("<html>"), "shop.parquet cannot be read as parquet: "),
        (lambda path: path.write_bytes(b""), "shop.parquet cannot be read as parquet: "),
        (lambda path: os.truncate(write_parquet(path, [picture(0)]), 300), "cannot be read as parquet: "),
        (lambda path: pq.write_table(pa.table({"id": [1]}), path), "lacks the column image; it has id"),
        (
            lambda path: pq.write_table(pa.table({"image": ["a.jpg"]}), path),
            "image holds string, and should hold bytes",
        ),
        (lambda path: write_parquet(path, []), "shop.parquet has no rows"),
    ],
)
def test_a_parquet_file_that_is_none_is_one_line(tmp_path, write, message):
    write(tmp_path / "shop.parquet")
    with pytest.raises(UserError, match=message) as caught:
        open_source([str(tmp_path / "shop.parquet")])
    assert "\n" not in str(caught.value)


def test_tar_with_titles(tmp_path):
    a, b, c, d = (picture(i, (6, 8)) for i in range(4))
    members = {
        "x/1.JPG": a, "x/1.txt": b" Plain \n", "x/1.json": b'{"name": "Cap"}', "x/2.front.png": b, "x/2.back.png": c,
        "x/2.json": b'{"name": "Red Shoe"}', "x/2.cls": b"3", "y/2.webp": d, "y/2.json": b"[" * 100_000,
        "y/2.txt": b" Plain \n", "y/3.txt": b"no picture",
    }  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    rows = [Row("x/1.JPG", a), Row("x/2.front.png", b), Row("x/2.back.png", c), Row("y/2.webp", d)]
    source = open_source([str(path)])
    assert (source.rows, rows_of(source)) == (None, rows)
    titled = [row._replace(title=t) for row, t in zip(rows, ["Cap", "Red Shoe", "Red Shoe", "Plain"], strict=True)]
    assert rows_of(open_source([str(tmp_path)], title="name")) == titled


def test_pictures_of_a_kind_that_is_not_read_have_that_as_their_reason_in_a_tar(tmp_path):
    members = {"1.heic": b"ftypheic", "2.heic": b"x", "2.png": picture(2), "3.AVIF": b"", "4.txt": b"no"}
    reason = "of a format that is not read; convert it to JPEG"
    rows = [Row("1.heic", reason), Row("2.png", picture(2)), Row("3.AVIF", reason)]
    assert rows_of(open_source([str(write_tar(tmp_path / "a.tar", members))])) == rows


def test_a_tar_cut_anywhere_gives_what_came_before_and_says_so(tmp_path):
    pictures = {f"{i}.png": picture(i, (6, 8)) for i in range(4)}
    whole = write_tar(tmp_path / "a.tar", pictures).read_bytes()
    entry = 512 + -(-len(pictures["0.png"]) // 512) * 512
    for cut in [0, 100, 512, 600, *range(entry - 5, 3 * entry, 177), entry, 2 * entry, 4 * entry]:
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        *rows, last = rows_of(open_source([str(tmp_path / "a.tar")]))
        assert last.name == str(tmp_path / "a.tar"), cut
        assert f"damaged or cut short after {len(rows)} pictures" in last.picture
        assert rows == [Row(name, data) for name, data in list(pictures.items())[: len(rows)]]
        assert len(rows) >= (cut - len(pictures["0.png"]) % 512) // entry - 1
    damaged = bytearray(whole)
    damaged[2 * entry + 20] ^= 255  # in the third header
    (tmp_path / "a.tar").write_bytes(damaged)
    rows = rows_of(open_source([str(tmp_path / "a.tar")]))
    assert [row.name for row in rows] == ["0.png", "1.png", str(tmp_path / "a.tar")]
    (tmp_path / "a.tar").write_bytes(b"<html>" * 1000)
    (row,) = rows_of(open_source([str(tmp_path / "a.tar")]))
    assert "damaged or cut short after 0 pictures" in row.picture


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_disk_that_fails_is_no_reason_of_the_rows(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write_tar(path, {"0.png": picture(0)}) if kind == "tar" else write_parquet(path, [picture(0)])
    source = open_source([str(path)], title="name")
    path.unlink()
    with pytest.raises(UserError, match=rf"a.{kind} broke off: .*No such file or directory.*; start again"):
        rows_of(source)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="it is a file that cannot be read, on Linux")
def test_nor_is_one_that_fails_at_a_picture_of_a_table(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").symlink_to("/proc/self/mem")
    (tmp_path / "shop.csv").write_text("id\n1\n")
    with pytest.raises(UserError, match=f"{tmp_path.name}, id 1: Input/output error; start again"):
        rows_of(open_source([str(tmp_path / "shop.csv")]))


def test_a_damaged_tar_whose_name_is_no_utf8_has_a_name_that_can_be_written(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.tar")
    path.write_bytes(b"<html>" * 1000)
    (row,) = rows_of(open_source([str(path)]))
    assert row.name.endswith("caf\ufffd.tar")


def test_nor_has_the_reason_of_a_tar_cut_within_such_a_name(tmp_path):
    write_tar(tmp_path / "a.tar", {os.fsdecode(b"caf\xe9.png"): picture(0)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(picture(0)) + 10])
    (row,) = rows_of(open_source([str(tmp_path / "a.tar")]))
    assert row.picture.encode().endswith(b"is not whole")


def test_an_empty_tar_has_no_rows_and_a_hostile_one_no_surprise(tmp_path):
    write_tar(tmp_path / "empty.tar", {})
    assert rows_of(open_source([str(tmp_path / "empty.tar")])) == []
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for name, kind in (("folder.jpg", tarfile.DIRTYPE), ("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        entry = tarfile.TarInfo("huge.jpg")
        entry.size = 1 << 40
        tar.addfile(entry)
    *rows, last = rows_of(open_source([str(tmp_path / "links.tar")]))
    assert rows == [Row("a.jpg", "not a plain file"), Row("b.jpg", "not a plain file")]
    assert "huge.jpg is not whole" in last.picture


def header(name: str, kind: bytes, size: bytes) -> bytes:
    """A tar's header with any bytes for a size."""
    data = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    data[124:136], data[156:157], data[148:156] = size, kind, b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, b"?"])
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(b"\xff" * 10 + b"\xfe\x00", id="of -512, back to the header itself"),
        pytest.param(b"\xff" * 12, id="of -1, which reads all the rest"),
        pytest.param(b"\x80" + b"\xff" * 11, id="of more than a disk has"),
        pytest.param(b"\x80" + bytes(4) + b"\x7f" + bytes(6), id="of more than memory has"),
    ],
)
def test_a_tar_whose_headers_lie_about_sizes_ends(tmp_path, kind, size):
    whole = write_tar(tmp_path / "a.tar", {"1.png": picture(0)}).read_bytes()
    begins = 512 + len(picture(0)) + -len(picture(0)) % 512  # of what comes after the first member
    (tmp_path / "a.tar").write_bytes(whole[:begins] + header("x.png", kind, size) + bytes(1024))
    rows = rows_of(open_source([str(tmp_path / "a.tar")]))
    assert rows[0] == Row("1.png", picture(0))
    assert rows[-1].picture.startswith("damaged or cut short after 1 pictures")
    assert len(rows) == 2


def test_a_footer_that_counts_other_rows_than_there_are_is_not_believed(shop):
    """It has no checksum. 30, in Thrift's zigzag, is 60; a row group of 7 rows is 14."""
    folder, pictures = shop
    path = folder / "b.parquet"
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8]
    places = [i for i, byte in enumerate(footer) if footer[i - 1 : i + 1] == b"\x16\x3c"]
    for place in places:
        path.write_bytes(data[: -8 - length] + footer[:place] + b"\x38" + footer[place + 1 :] + data[-8:])
        if pq.ParquetFile(path).metadata.num_rows == 28:
            break
    else:
        pytest.fail("no byte of the footer is the number of rows")
    assert [row.picture for row in rows_of(open_source([str(path)]))] == pictures[:30]


@pytest.mark.parametrize("field", [{"path": pa.int64()}, {"path": pa.binary()}])
def test_a_name_that_is_no_text_is_made_one(tmp_path, field):
    kind = pa.struct({"bytes": pa.binary()} | field)
    cell = {"bytes": picture(0), "path": 5 if field["path"] == pa.int64() else b"x"}
    pq.write_table(pa.table({"image": pa.array([cell], kind)}), tmp_path / "a.parquet")
    (row,) = rows_of(open_source([str(tmp_path / "a.parquet")]))
    assert isinstance(row.name, str)


def test_an_id_that_python_has_no_date_for_is_the_rows_reason(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [picture(0)], id=pa.array([2**62], pa.timestamp("us")))
    (row,) = rows_of(open_source([str(path)]))
    assert row.name == f"{path}#0"
    assert row.picture.startswith("damaged parquet: ")


def test_a_csv_file_is_answered_by_its_ids_and_each_row_once(tmp_path):
    images = tmp_path / "shop" / "images"
    images.mkdir(parents=True)
    for i in range(5):
        (images / f"{i}.png").write_bytes(picture(i, (6, 8)))
    table = images.parent / "stock.csv"
    table.write_text("id,name\n0,Blue jeans\n7,No picture\n1,\n2,Red shirt\n0,Again\n")
    source = open_source([str(table)], title="name", rows=2)
    assert [shard.rows for shard in source.shards] == [2, 1, 2]
    assert {*source.paths} == {table, *images.iterdir()}, "no answer is written over them"
    titles = {"0": "Blue jeans", "1": None, "2": "Red shirt"}
    found, lost = rows_of(source)[:3], rows_of(source)[3:]
    assert found == [Row(i, picture(int(i), (6, 8)), title) for i, title in titles.items()]
    assert lost == [Row("7", "no such file in images/"), Row("0", "line 6 has an id that came before")]
    (images / "1.png").unlink()
    assert rows_of(source)[1] == Row("1", "No such file or directory")
    assert open_source([str(table)]).fingerprint != source.fingerprint

    folder = open_source([str(table.parent)])
    assert [row.name for row in rows_of(folder)] == [str(images / f"{i}.png") for i in (0, 2, 3, 4)]
    assert folder.notes == [f"{table.parent}: {table} left out; name one to have answers go by its ids"]
    assert open_source([str(table)], title="title").notes == [
        f"{table} lacks the column of titles, title: its pictures are read without"
    ]
    with pytest.raises(UserError, match="no folder images/"):
        open_source([str(table.rename(tmp_path / "stock.csv"))])


def test_files_folders_and_globs_in_order_each_once(tmp_path):
    for name in ("b.png", "a.jpg", "c/d.webp", "odd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    asked = [str(tmp_path / "odd"), str(tmp_path / "*.png"), str(tmp_path)]
    source = open_source(asked, rows=3)
    assert source.files == [tmp_path / name for name in ("odd", "b.png", "a.jpg", "c/d.webp")]
    assert [shard.rows for shard in source.shards] == [3, 1]
    assert rows_of(source) == [Row(str(path), path) for path in source.files]
    # a folder that a glob matches is looked into, as one that the shell makes of it would be
    for asked in ("*", "[a-z]*", "**", "*/**", "**/*"):
        found = open_source([str(tmp_path / asked)]).files
        assert found == [tmp_path / n for n in ("a.jpg", "b.png", "c/d.webp")][2 * (asked == "*/**") :]
    assert open_source([str(tmp_path / "**" / "c")]).files == [tmp_path / "c/d.webp"]


def test_a_folder_is_taken_for_what_it_holds_and_the_rest_is_named(shop, tmp_path):
    folder, _ = shop
    write_tar(folder / "a.tar", {"0.png": picture(0)})
    source = open_source([str(folder)])
    assert source.notes == [f"{folder}: took the parquet files; 1 tar file left out, name them to have them read"]
    (folder / "logo.png").write_bytes(picture(0))
    source = open_source([str(folder), str(folder / "*.tar"), str(folder / "*.parquet")])
    assert source.files == [folder / "logo.png"]
    assert "took the image files; 2 parquet files left out" in source.notes[0]
    assert [row.name for row in rows_of(source)] == [str(folder / "logo.png"), "0.png", *map(str, range(30))]


def test_of_a_folder_what_is_no_picture_stays_and_what_cannot_be_read_is_counted(tmp_path):
    for name in ("._a.jpg", "b.HEIC", "c.heic", "._c.heic"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no image in folder .*; .*: 2 .heic left out"):
        open_source([str(tmp_path)])
    (tmp_path / "a.jfif").write_bytes(b"x")
    source = open_source([str(tmp_path)])
    assert source.files == [tmp_path / "a.jfif"]
    assert source.notes == [f"{tmp_path}: 2 .heic left out, a format that is not read; convert them to JPEG"]


def test_a_linked_folder_is_named(shop, tmp_path, capsys):
    folder, _ = shop
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    (tmp_path / "photos" / "linked").symlink_to(folder)
    source = open_source([str(tmp_path / "photos")])
    assert source.files == [tmp_path / "photos" / "a.png"]
    assert source.notes == [f"{tmp_path / 'photos'}: 1 linked folder left out, name them to have them read"]
    assert all_files(tmp_path / "photos") == source.files
    assert (
        capsys.readouterr().err == f"{tmp_path / 'photos'}: 1 linked folder left out; put the files themselves there\n"
    )


def test_a_link_that_leads_nowhere_is_a_row_with_the_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "b.png").symlink_to("gone.png")
    (tmp_path / "c.png").symlink_to("c.png")
    for asked in (tmp_path, tmp_path / "*.png"):
        source = open_source([str(asked)])
        assert source.files == [tmp_path / name for name in ("a.png", "b.png", "c.png")]
        for path, reason in ((source.files[1], "No such file or directory"), (source.files[2], "Too many levels of")):
            with pytest.raises(ImageError, match=reason):
                decode(path)
    (tmp_path / "gone.png").write_bytes(picture(0))
    assert open_source([str(tmp_path / "*.png")]).fingerprint != source.fingerprint


def test_a_folder_that_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # which anybody may enter
        photos = Path(name)
        photos.chmod(0o755)
        (photos / "a.png").write_bytes(b"x")
        (photos / "mine").mkdir(0o000)
        (photos / "listed").mkdir()
        (photos / "listed" / "b.png").write_bytes(b"x")
        (photos / "listed").chmod(0o444)
        user = os.geteuid()
        try:
            os.seteuid(user or 65534)  # root may read all
            source = open_source([name])
            (listed,) = open_source([str(photos / "listed")]).files
            with pytest.raises(UserError, match="no image in folder"):
                open_source([str(photos / "mine")])
            with pytest.raises(UserError, match="Permission denied"):
                check_writable(photos / "labels.csv", "--out", source.paths)
            with pytest.raises(UserError, match=f"cannot read {photos / 'mine'}: Permission denied; have it opened"):
                all_files(photos)  # of a catalogue
            os.seteuid(user)
            (photos / "mine").rename(photos / "lost+found")  # which a disk has at its root, for root alone
            (photos / "listed").chmod(0o755)
            os.seteuid(user or 65534)
            assert sorted(all_files(photos)) == [photos / "a.png", photos / "listed" / "b.png"]
        finally:
            os.seteuid(user)
    assert source.files == [photos / "a.png", photos / "listed" / "b.png"], "the latter for its reason to be given"
    assert listed == photos / "listed" / "b.png"
    assert source.notes == [f"{photos}: 1 in it cannot be read, {photos / 'mine'}: Permission denied"]


def test_other_files_are_counted_but_hidden_ones(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in (".DS_Store", ".git/config", "a.png", "b.mov", "c.MOV", "d.psd", "README", "e.csv"):
        (tmp_path / name).write_bytes(b"x")
    said = f"{tmp_path}: left out as no pictures: 2 .mov, "
    (note,) = open_source([str(tmp_path)]).notes
    assert note.startswith(said)
    assert set(note.removeprefix(said).split(", ")) == {"1 .psd", "1 without a suffix", "1 .csv"}


def test_a_word_too_long_for_a_name_is_one_line():
    with pytest.raises(UserError, match="no image file, folder or match"):
        open_source(["a.jpg " * 60])


def test_results_are_no_input(shop):
    folder, pictures = shop
    write_parquet(folder / "out" / "labels" / "00000.parquet", pictures[:3])
    assert open_source([str(folder)]).rows == 38
    (folder / "out" / "job.json").write_text("{}")
    for asked in (str(folder), os.path.relpath(folder), f"{folder}/**/*.parquet"):
        assert open_source([asked]).rows == 35
    (folder / "out" / "job.json").rename(folder / "job.json")
    assert open_source([str(folder)]).rows == 38, "only labels/ beside it would be its results"


def test_the_fingerprint_follows_names_and_sizes(shop, tmp_path):
    folder, _ = shop
    tar = write_tar(tmp_path / "a.tar", {"0.png": picture(0)})
    asked = [str(folder), str(tar)]
    first = open_source(asked).fingerprint
    assert open_source(asked).fingerprint == first
    found = {first, open_source(asked[::-1]).fingerprint}
    write_tar(tar, {"0.png": picture(0), "1.png": picture(1)})
    os.truncate(tar, tar.stat().st_size + 512)
    found.add(open_source(asked).fingerprint)
    tar.rename(tmp_path / "b.tar")
    found.add(open_source([str(folder), str(tmp_path / "b.tar")]).fingerprint)
    assert len(found) == 4


def test_streamed_datasets(shop, tmp_path):
    """As the hub's are streamed, but from the disk."""
    folder, pictures = shop
    files = sorted(map(str, folder.rglob("*.parquet")))
    splits = datasets.load_dataset("parquet", data_files={"train": files, "test": files[1:]}, streaming=True)
    streamed = stream_shards("owner/name", dict(splits), title="name")
    rows = [[row.name for row in shard.read()] for shard in streamed]
    first, second = [str(i) for i in range(30)], [str(i) for i in range(30, 35)]
    assert rows == [first, second, second]
    assert [row.picture for row in streamed[1].read()] == pictures[30:]
    assert [row.title for row in streamed[1].read()] == [None, *(f"Title {i}" for i in range(31, 35))]
    assert [row.picture for row in stream_shards("owner/name", dict(splits))[0].read()] == pictures[:30]
    os.truncate(files[1], 200)
    with pytest.raises(UserError, match=r"owner/name/train-1 broke off after 0 rows: .*; start again"):
        list(streamed[1].read())
    pq.write_table(pa.table({"id": [1]}), tmp_path / "bare.parquet")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.png").write_bytes(pictures[0])
    splits = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "files"), streaming=True)
    (row,) = next(iter(stream_shards("owner/files", dict(splits)))).read()
    assert row.picture == "no image in this row, only a file's name"  # which a stranger may have written
    splits = datasets.load_dataset("parquet", data_files=str(tmp_path / "bare.parquet"), streaming=True)
    with pytest.raises(UserError, match="owner/name, split train, has no column image; it has id"):
        stream_shards("owner/name", dict(splits))


@pytest.mark.parametrize(
    ("name", "message"), [("hub:owner", "is written hub:OWNER/NAME"), ("hub:a/b", "the hub cannot be reached")]
)
def test_the_hub_is_named_by_a_word_of_its_own(monkeypatch, name, message):
    monkeypatch.setattr(shards.hub, "reachable", lambda: False)
    with pytest.raises(UserError, match=message):
        open_source([name])


def test_rows_of_the_hub_without_a_name_are_called_by_its_commit(monkeypatch, tmp_path):
    """Else an earlier commit's answer would stand for another picture; and a job goes on with the commit it names."""
    pq.write_table(pa.table({"image": [{"bytes": picture(1), "path": None}]}), tmp_path / "0.parquet")
    splits = datasets.load_dataset("parquet", data_files=str(tmp_path / "0.parquet"), streaming=True)
    monkeypatch.setattr(shards.hub, "pinned", lambda name: name if "@" in name else f"{name}@{'0' * 40}")
    monkeypatch.setattr(shards, "_load_hub", lambda name: splits)
    typed, full = open_source(["hub:a/b"]), open_source([f"hub:a/b@{'0' * 40}"])
    assert typed.hub == full.hub == [f"hub:a/b@{'0' * 40}"]
    assert typed.fingerprint == full.fingerprint
    assert [row.name for row in typed.shards[0].read()] == [f"hub:a/b@{'0' * 40}/train-0#0"]


def test_the_real_catalogue_from_the_middle_of_a_row_group(shared):
    """Its files are one row group of 19,962 rows each."""
    folder = shared / "data" / "fashion-product-images-small"
    source = open_source([str(folder)], title="productDisplayName")
    assert (source.rows, len(source.shards)) == (39_924, 10)
    rows = list(source.shards[4].read())
    table = pq.read_table(sorted(folder.rglob("*.parquet"))[0]).slice(4 * 4096, 4096)
    assert len(rows) == len(table) == 19_962 - 4 * 4096
    assert [row.name for row in rows] == [str(i) for i in table["id"].to_pylist()]
    assert [row.picture for row in rows] == [image["bytes"] for image in table["image"].to_pylist()]
    assert [row.title for row in rows[:9]] == table["productDisplayName"].to_pylist()[:9]


def test_rows_that_have_labels_are_left_out_of_every_kind(shop, tmp_path):
    parquet, pictures = shop
    (tmp_path / "shelf" / "images").mkdir(parents=True)
    for name in ("7.png", "8.png", "9.png"):
        (tmp_path / "shelf" / "images" / name).write_bytes(pictures[0])
    table = tmp_path / "shelf" / "stock.csv"
    table.write_text("id\n7x\n8\n9\n7\n")
    tar = write_tar(tmp_path / "a.tar", {"one.png": pictures[1], "two.png": pictures[2]})
    asked = [str(path) for path in (parquet, table, tar, table.parent / "images")]
    names = [row.name for row in rows_of(open_source(asked))]
    assert len(names) == 35 + 4 + 2 + 3
    for labelled in set(names[::2]), set(names[1::2]):
        some = open_source(asked, rows=3, labelled=labelled)
        assert [row.name for row in rows_of(some)] == [name for name in names if name not in labelled]
        assert some.fingerprint != open_source(asked, rows=3).fingerprint
        assert all(str(path) not in labelled for path in some.files)
    none = open_source(asked, labelled=set(names))
    assert rows_of(none) == []
    assert none.notes[-2:] == ["left out, as they have labels: 4 of 4", "left out, as they have labels: 3 of 3"]
