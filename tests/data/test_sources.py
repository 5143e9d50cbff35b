import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import fashion
from data.catalogue import Catalogue, Skipped
from data.images import ImageError, decode
from data.sources import _from_table, load_source
from data.store import open_store
from errors import UserError
from report import suspects
from tests.data.conftest import HEADER, picture, write_kaggle

ROW = ["Men", "Apparel", "Topwear", "Shirts", "Blue", "Summer", 2012.0, "Casual", "Nike Men Blue Shirt"]


def write_parquet(path, ids, **changed):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"id": ids} | {name: [value] * len(ids) for name, value in zip(HEADER.split(",")[1:], ROW, strict=True)}
    columns["image"] = [{"bytes": picture(i), "path": f"{i}.jpg"} for i in ids]
    columns |= changed
    types = {"id": pa.int64(), "year": pa.float64(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    arrays = {name: pa.array(v, types.get(name, pa.string())) for name, v in columns.items() if v is not None}
    pq.write_table(pa.table(arrays), path)


def test_kaggle_folder_with_all_its_quirks(tmp_path):
    folder = write_kaggle(
        tmp_path / "shop",
        [picture(0), None, picture(2), picture(3)],
        ["Nike Men Blue, Red, and Green Shirt", "Lost Men Shirt", "NA", '"Quoted, Properly" Shirt'],
    )
    table = (folder / "styles.csv").read_text()
    rows = table.replace("102,Men,", "102,NA,") + "../../secret,Men,Apparel,Topwear,Shirts,,Fall,2011,nan,Title\n\n"
    (folder / "styles.csv").write_text("\ufeff" + rows, encoding="utf-8")
    (tmp_path.parent / "secret.jpg").write_bytes(picture(9))

    catalogue = load_source(str(folder), tmp_path)
    assert catalogue.name == "shop"
    assert catalogue.ids == ["100", "102", "103"]
    assert catalogue.columns["gender"] == ["Men", None, "Men"]
    assert catalogue.columns["productDisplayName"] == [
        "Nike Men Blue, Red, and Green Shirt", None, "Quoted, Properly Shirt"
    ]  # fmt: skip
    assert catalogue.skipped == [Skipped(i, "no such file in images/") for i in ("101", "../../secret")]
    assert catalogue.read(1) == picture(2)


def test_a_quote_left_open_in_kaggles_table_swallows_no_row(tmp_path):
    folder = write_kaggle(tmp_path / "shop", [picture(i) for i in range(3)], ["Plain", "@", "Last"])
    table = (folder / "styles.csv").read_text()
    (folder / "styles.csv").write_text(table.replace("@", '"Open Shirt, Blue'))
    catalogue = load_source(str(folder), tmp_path)
    assert catalogue.columns["productDisplayName"] == ["Plain", "Open Shirt, Blue", "Last"]


def test_a_row_without_an_id_is_listed_and_a_file_that_is_no_picture_hides_none(tmp_path):
    folder = write_kaggle(tmp_path / "shop", [picture(i) for i in range(3)], ["One", "Two", "Three"])
    (folder / "images" / "100.jpeg.txt").touch()
    (folder / "images" / "100.json").write_text("{}")
    table = (folder / "styles.csv").read_text()
    (folder / "styles.csv").write_text(table.replace("\n102,", "\n,"))
    catalogue = load_source(str(folder), tmp_path)
    assert catalogue.ids == ["100", "101"]
    assert catalogue.read(0) == picture(0)
    assert catalogue.skipped == [Skipped("line 4", "no id")]


def test_kaggle_columns_are_found_by_name(tmp_path):
    folder = write_kaggle(tmp_path / "shop", [picture(0)])
    header, row = [line.split(",") for line in (folder / "styles.csv").read_text().splitlines()]
    order = [4, 0, 2, 1, 3, 5, 6, 7, 8, 9]
    (folder / "styles.csv").write_text("\n".join(",".join(line[i] for i in order) for line in (header, row)))
    assert load_source(str(folder), tmp_path).columns["gender"] == ["Men"]


def test_a_missing_column_is_named_with_the_nearest(tmp_path):
    folder = write_kaggle(tmp_path / "shop", [picture(0)])
    (folder / "styles.csv").write_text((folder / "styles.csv").read_text().replace("baseColour", "base_color"))
    assert load_source(str(folder), tmp_path).columns["base_color"] == ["Blue"], "only what is asked for must be there"
    with pytest.raises(UserError, match=r"shop lacks the column baseColour; nearest: base_color; it has id, gender, "):
        load_source(str(folder), tmp_path, needs=["gender", "baseColour"])
    write_parquet(tmp_path / "flat" / "a.parquet", [1], image=None)
    with pytest.raises(UserError, match="lacks the column image; it has id, gender"):
        load_source(str(tmp_path / "flat"), tmp_path)
    write_parquet(tmp_path / "named" / "a.parquet", [1], usage=None)
    with pytest.raises(UserError, match=r"named.a.parquet lacks the column usage; it has id, gender"):
        load_source(str(tmp_path / "named"), tmp_path, needs=["usage"])


def test_fingerprint_follows_content(tmp_path):
    folder = write_kaggle(tmp_path / "shop", [picture(0), picture(1)])
    first = load_source(str(folder), tmp_path).fingerprint
    assert load_source(str(folder), tmp_path).fingerprint == first
    (folder / "images" / "101.jpg").write_bytes(picture(7))
    os.utime(folder / "images" / "101.jpg", (1, 1))
    assert load_source(str(folder), tmp_path).fingerprint != first


def test_parquet_at_any_depth_in_the_order_of_names(tmp_path):
    write_parquet(tmp_path / "shop" / "data" / "b.parquet", [3], baseColour=[None])
    write_parquet(tmp_path / "shop" / "data" / "a.parquet", [1, 2], image=[{"bytes": picture(1), "path": None}, None])
    catalogue = load_source(str(tmp_path / "shop"), tmp_path / "cache")
    assert (catalogue.name, list(catalogue.ids), len(catalogue)) == ("shop", ["1", "2", "3"], 3)
    assert list(catalogue.columns["baseColour"]) == ["Blue", "Blue", None]
    assert list(catalogue.columns["year"]) == ["2012"] * 3  # a float only for its nulls
    assert "image" not in catalogue.columns
    assert (catalogue.read(0), catalogue.read(2)) == (picture(1), picture(3))
    with pytest.raises(ImageError, match="no image in this row"):
        catalogue.read(1)
    assert list(load_source(str(tmp_path / "shop" / "data" / "b.parquet"), tmp_path / "cache").ids) == ["3"]


def test_text_of_a_folder_with_a_long_name_is_kept_too(tmp_path):
    write_parquet(tmp_path / ("\u670d" * 80) / "a.parquet", [1])
    assert load_source(str(tmp_path / ("\u670d" * 80)), tmp_path / "cache").ids[0] == "1"
    (kept,) = (tmp_path / "cache" / "columns").glob("*.arrow")
    assert len(kept.name.encode()) < 143


def test_of_parquet_too_a_row_without_an_id_is_none_and_a_column_is_there_once(tmp_path):
    write_parquet(tmp_path / "shop" / "a.PARQUET", [1, None, 3])
    catalogue = load_source(str(tmp_path / "shop"), tmp_path / "cache")
    assert catalogue.read(2) == picture(3)
    store = open_store(catalogue, (80, 60), tmp_path / "cache")
    assert (store.skipped, store.ok.tolist()) == ([Skipped("row 1", "no id")], [True, False, True])
    table = pq.read_table(tmp_path / "shop" / "a.PARQUET")
    pq.write_table(table.append_column("gender", table.column("gender")), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice.parquet has the column gender twice"):
        load_source(str(tmp_path / "twice.parquet"), tmp_path / "cache")


def test_a_picture_is_the_file_of_that_very_name_else_of_one_that_is_spelt_otherwise(tmp_path):
    images = tmp_path / "shop" / "images"
    (images / "2024" / "images").mkdir(parents=True)
    names = ["front.jpg", "2024/images/front.jpg", "Side.JPG", "a.png", "A.png"]
    for i, name in enumerate(names):
        (images / name).write_bytes(picture(i, (6, 8)))
    asked = ["2024/images/front.jpg", "images/front.jpg", "photos\\Images\\side.jpg", "A.png", "a.PNG"]
    table = images.parent / "stock.csv"
    table.write_text("id,image\n" + "".join(f"{i},{name}\n" for i, name in enumerate(asked)))
    table = table.rename(images.parent / "STOCK.CSV")
    catalogue = load_source(str(images.parent), tmp_path)
    assert [catalogue.read(i) for i in range(4)] == [picture(i, (6, 8)) for i in (1, 0, 2, 4)]
    lacking = Skipped("4", "what its column image names is not in images/")
    assert catalogue.skipped == [lacking], "two files differ from it in case alone"


def test_a_url_names_the_file_at_its_end_and_of_several_in_a_cell_the_first_does(tmp_path, capsys):
    images = tmp_path / "shop" / "images"
    for i, name in enumerate(["a.jpg", "b.jpg", "2026/09/front.jpg", "cdn.x/2026/10/front.jpg", "so rot/a.jpg"]):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(picture(i, (6, 8)))
    cells = {
        "several": '"https://x/a.jpg?v=1, https://x/b.jpg"',
        "bars": "https://x/b.jpg|https://x/a.jpg",
        "first gone": "https://x/gone.jpg;https://x/a.jpg",
        "folders": "https://x/uploads/2026/09/front.jpg",
        "server": "https://cdn.x/2026/10/front.jpg?w=80",
        "other folder": "https://x/2026/11/front.jpg",
        "decoded": "https://x/so%20rot/a.jpg?from=/b.jpg",
        "of Access": "#https://x/a.jpg#",
    }
    lines = [f'"{id}",{cell if cell.startswith(chr(34)) else chr(34) + cell + chr(34)}' for id, cell in cells.items()]
    (images.parent / "items.tsv").write_text("id,image\n" + "\n".join(lines))
    catalogue = load_source(str(images.parent), tmp_path)
    found = {id: catalogue.read(i) for i, id in enumerate(catalogue.ids)}
    wanted = {"several": 0, "bars": 1, "folders": 2, "server": 3, "decoded": 4}
    assert found == {id: picture(i, (6, 8)) for id, i in wanted.items()}
    assert {skipped.id for skipped in catalogue.skipped} == {"first gone", "other folder", "of Access"}
    assert capsys.readouterr().err.endswith("column image names several pictures in 2 rows; the first is taken\n")


def test_a_file_that_different_urls_end_in_is_the_picture_of_none(tmp_path):
    images = tmp_path / "shop" / "images"
    images.mkdir(parents=True)
    for i, name in enumerate(["front.jpg", "side.jpg"]):
        (images / name).write_bytes(picture(i, (6, 8)))
    rows = ["1,https://x/09/front.jpg", "2,https://x/10/front.jpg", "3,https://x/side.jpg?v=1", "4,https://y/side.jpg"]
    (images.parent / "items.csv").write_text("\n".join(["id,image", *rows]))
    catalogue = load_source(str(images.parent), tmp_path)
    assert (list(catalogue.ids), [skipped.id for skipped in catalogue.skipped]) == (["3", "4"], ["1", "2"])
    assert "URLs of other rows end in the same name" in catalogue.skipped[0].reason


def test_an_edited_label_leaves_the_fingerprint_and_another_row_changes_it(tmp_path):
    folder = write_kaggle(tmp_path / "shop", [picture(i, (6, 8)) for i in range(3)])
    table, before = folder / "styles.csv", load_source(str(folder), tmp_path)
    (folder / "images" / "Thumbs.db").write_bytes(b"of whoever looked into the folder")
    table.write_text(table.read_text().replace("Casual", "Sports"))
    after = load_source(str(folder), tmp_path)
    assert after.columns != before.columns
    assert after.fingerprint == before.fingerprint, "so nothing is decoded again"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    assert load_source(str(folder), tmp_path).fingerprint != before.fingerprint


def test_limit_is_spread_and_stable(tmp_path):
    folder = write_kaggle(tmp_path / "shop", [picture(i, (6, 8)) for i in range(100)])
    full = load_source(str(folder), tmp_path)
    some = load_source(str(folder), tmp_path, limit=20)
    assert some.ids == load_source(str(folder), tmp_path, limit=20).ids == sorted(some.ids)
    assert len(some) == 20
    assert int(some.ids[0]) < 120
    assert int(some.ids[-1]) > 180
    assert some.fingerprint != full.fingerprint
    assert some.read(7) == full.read(full.ids.index(some.ids[7]))
    assert some.columns["productDisplayName"][7] == full.columns["productDisplayName"][full.ids.index(some.ids[7])]
    assert load_source(str(folder), tmp_path, limit=1000).ids == full.ids


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./nothing/here", r"no such data: './nothing/here'; give --data a folder"),
        ("nothing", r"no such data: 'nothing'"),
        ("~nobody-of-this-name/shop", r"no such data: '~nobody-of-this-name/shop'"),
        ("EMPTY", r"holds neither a CSV file with images/ nor \*.parquet"),
        ("TEXT", r"is no table, parquet or tar file; save a table as CSV"),
        ("BROKEN", r"broken.parquet cannot be read as parquet"),
        ("NO_IMAGES", r"has styles.csv but no folder images/"),
        ("NO_ROWS", r"an image \(1 skipped, 1 of them as 100: no such file in images/\); a column image names"),
    ],
)
def test_a_source_that_is_none_says_what_to_do(tmp_path, spec, message):
    if spec == "EMPTY":
        spec = tmp_path
    elif spec == "TEXT":
        (spec := tmp_path / "notes.txt").write_text("x")
    elif spec == "BROKEN":
        (spec := tmp_path / "broken.parquet").write_text("<html>")
    elif spec == "NO_IMAGES":
        (write_kaggle(spec := tmp_path / "shop", []) / "images").rmdir()
    elif spec == "NO_ROWS":
        write_kaggle(spec := tmp_path / "shop", [None])
    with pytest.raises(UserError, match=message) as caught:
        load_source(str(spec), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    write_parquet(tmp_path / "shop" / "a.parquet", [1])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"unpack it into .*/file/cache \(--cache-dir names another folder\)"):
        load_source(str(tmp_path / "shop"), tmp_path / "file" / "cache")


LOAD = """
import sys
from pathlib import Path
import hub
hub.TIMEOUT = 1
from data.sources import load_source
from errors import UserError
try:
    catalogue = load_source("owner/name", Path(sys.argv[1]))
    print(catalogue.name, list(catalogue.ids), len(catalogue.read(0)))
except UserError as error:
    print("error:", error)
"""


def load_without_hub(cache, endpoint):
    """Load owner/name in a process of its own, as the libraries read their environment when imported."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    env |= {"no_proxy": "*", "HF_HUB_OFFLINE": "0"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", LOAD, str(cache)]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def silent_server():
    """The address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_silent_hub_is_given_up(tmp_path, silent_server):
    done = load_without_hub(tmp_path, silent_server)
    assert done.stdout == (
        "error: owner/name: no such folder, and the hub cannot be reached; use --data FOLDER or --data demo\n"
    )
    assert done.stderr == ""


def test_a_row_that_only_names_a_file_is_skipped_and_opens_none(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(5))
    images = [{"bytes": picture(5), "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}, None]
    features = datasets.Features({"id": datasets.Value("int64"), "image": datasets.Image()})
    table = datasets.Dataset.from_dict({"id": [1, 2, 3], "image": images}, features)
    store = open_store(_from_table("shop", table, "1"), (80, 60), tmp_path / "cache")
    reasons = ["no image in this row, only a file's name", "no image in this row"]
    assert store.skipped == [Skipped(id_, reason) for id_, reason in zip("23", reasons, strict=True)]


def test_an_id_that_is_no_text_is_told():
    features = datasets.Features({"id": datasets.Value("binary"), "image": datasets.Image()})
    table = datasets.Dataset.from_dict({"id": [b"1"], "image": [{"bytes": picture(5), "path": None}]}, features)
    with pytest.raises(UserError, match="shop lacks the column id; it has image"):
        _from_table("shop", table, "1")


def test_a_cached_hub_dataset_loads_without_the_hub(tmp_path):
    write_parquet(tmp_path / "a.parquet", [5, 6])
    built = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path / "built")
    )
    arrow = Path(built.cache_files[0]["filename"])
    cached = tmp_path / "datasets" / "owner___name" / "default" / "0.0.0" / ("0" * 40)  # as the library lays it out
    cached.mkdir(parents=True)
    (cached / "name-train.arrow").write_bytes(arrow.read_bytes())
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    info |= {"dataset_name": "name", "config_name": "default", "version": {"version_str": "0.0.0"}}
    info["splits"]["train"]["dataset_name"] = "name"
    (cached / "dataset_info.json").write_text(json.dumps(info))
    done = load_without_hub(tmp_path, "http://127.0.0.1:9")  # nobody listens there
    assert done.stdout == f"owner/name ['5', '6'] {len(picture(5))}\n", done.stdout + done.stderr


def test_demo_is_drawn_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fashion, "ROWS", 12)
    first = load_source("demo", tmp_path)
    assert (first.name, len(first)) == ("demo", 12)
    assert "drawing the demo" in capfd.readouterr().err
    fields, image = fashion.draw(3)
    assert first.ids[3] == str(fields["id"])
    assert first.columns["articleType"][3] == fields["articleType"]
    assert decode(first.read(3)).tobytes() == image.convert("RGB").tobytes()
    again = load_source("demo", tmp_path)
    assert (again.fingerprint, again.read(3)) == (first.fingerprint, first.read(3))
    assert "drawing" not in capfd.readouterr().err


def test_a_disk_too_full_for_the_demo_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fashion, "draw", full)
    with pytest.raises(UserError, match=r"cannot draw the demo into .*demo: .*No space left on device; make room, or"):
        load_source("demo", tmp_path)


def test_answers_beside_a_catalogue_are_no_part_of_it(tmp_path):
    shop = tmp_path / "shop"
    (shop / "images").mkdir(parents=True)
    (shop / "images" / "1.png").write_bytes(picture(1))
    (shop / "items.csv").write_text("id,colour\n1,red\n")
    (shop / "labels.csv").write_text("image,gender,gender_confidence,gender_decision,error\n1,Men,0.9,accept,\n")
    (shop / "suspects.csv").write_text(",".join(suspects.COLUMNS) + "\n")
    assert list(load_source(str(shop), tmp_path / "cache").columns) == ["id", "colour"]
    (shop / "._items.csv").write_bytes(b"\0\5\x16\7")  # as macOS leaves on a stick
    assert list(load_source(str(shop), tmp_path / "cache").columns) == ["id", "colour"]
    (shop / "items.csv").rename(shop / "items.tsv")
    assert list(load_source(str(shop), tmp_path / "cache").columns) == ["id", "colour"]
    (shop / "items.tsv").rename(shop / "items.csv")
    (shop / "more.csv").write_text("id,colour\n2,red\n")
    with pytest.raises(UserError, match=r"holds several CSV files; name one: --data .*items.csv"):
        load_source(str(shop), tmp_path / "cache")

    rows = tmp_path / "rows"
    write_parquet(rows / "a.parquet", [1, 2])
    first = load_source(str(rows), tmp_path / "cache")
    (rows / "._a.parquet").write_bytes(b"\0\5\x16\7")
    (rows / "done" / "labels").mkdir(parents=True)
    (rows / "done" / "job.json").write_text("{}")
    pq.write_table(pa.table({"image": ["1", "2"], "error": [None, "x"]}), rows / "done" / "labels" / "00000.parquet")
    again = load_source(str(rows), tmp_path / "cache")
    assert (again.fingerprint, list(again.ids)) == (first.fingerprint, ["1", "2"])
    (tmp_path / "job.json").write_text("{}")  # of another program, above a catalogue's folder
    assert load_source(str(rows), tmp_path / "cache").fingerprint == first.fingerprint


def test_the_real_catalogue(real):
    catalogue: Catalogue = real[0]
    assert (catalogue.name, len(catalogue), catalogue.skipped) == ("fashion-product-images-small", 39924, [])
    assert len(set(catalogue.ids)) == 39924
    assert {name: values.count(None) for name, values in catalogue.columns.items() if None in values} == {
        "baseColour": 15, "season": 17, "year": 1, "usage": 288, "productDisplayName": 7
    }  # fmt: skip
    assert decode(catalogue.read(0)).size == (60, 80)
