"""Pictures and tables from strangers: decoded right, or reported with their name and reason; and a store never torn."""

import csv
import functools
import io
import json
import os
import random
import resource
import signal
import zipfile
from multiprocessing.util import Finalize

import numpy as np
import pytest
from PIL import Image

from data.images import MAX_PIXELS, ImageError, decode
from data.sources import load_source
from data.store import open_store
from errors import UserError
from tests.data.conftest import HEADER, picture, write_kaggle
from tests.faults.processes import CONTEXT, die_at, finish, start

FILES = 2000
NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
RGB = Image.fromarray(NOISE)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def zipped() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        file.writestr("shirt.jpg", encoded(RGB, "jpeg"))
    return buffer.getvalue()


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(RGB.transpose(Image.Transpose.ROTATE_90), "png", exif=exif)


def see_through() -> bytes:
    image = Image.new("P", (30, 40), 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    return encoded(image, "png", transparency=1)


# What it is -> its bytes and its right pixels.
ODD_BUT_RIGHT = {
    "wrong extension": (encoded(RGB, "png"), NOISE),
    "16 bits": (
        encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "png"),
        np.repeat(NOISE[..., :1], 3, axis=2),
    ),
    "CMYK": (encoded(RGB.convert("CMYK"), "tiff"), NOISE),
    "palette with transparency": (see_through(), np.full((40, 30, 3), 255, np.uint8)),
    "turned by EXIF": (sideways(), NOISE),
    "animated": (encoded(RGB, "png", save_all=True, append_images=[RGB.convert("L").convert("RGB")]), NOISE),
    "1x1": (encoded(RGB.crop((0, 0, 1, 1)), "bmp"), NOISE[:1, :1]),
    "20,000 px wide": (encoded(RGB.resize((20_000, 40), 0), "png"), np.asarray(RGB.resize((20_000, 40), 0))),
}
BOMB = encoded(Image.new("1", (30_000, 30_000)), "png")  # 110 kB that would be 2.7 GB
NO_PICTURE = {
    "empty": b"",
    "zip": zipped(),
    "HTML": b"<!doctype html><title>404</title>",
    "a bomb": BOMB,
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 40\n%%EndComments\nshowpage\n",
}


def flipped(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("what", ODD_BUT_RIGHT)
def test_odd_pictures_are_decoded_right(what):
    data, right = ODD_BUT_RIGHT[what]
    assert (np.asarray(decode(data)) == right).all()


@pytest.mark.parametrize("what", NO_PICTURE)
def test_what_is_no_picture_is_refused(what):
    with pytest.raises(ImageError, match=r"not an image|megapixels"):
        decode(NO_PICTURE[what])


def test_a_damaged_png_gives_its_own_pixels_or_none():
    data, rng = encoded(RGB, "png"), random.Random(0)
    refused = 0
    for _ in range(500):
        try:
            assert (np.asarray(decode(flipped(data, rng))) == NOISE).all(), "a substitute"
        except ImageError:
            refused += 1
    assert refused > 450


def report_memory(path: str) -> None:
    """When this process ends, write the most memory it had, in bytes."""

    def write():
        with open(path, "w") as file:
            file.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))

    Finalize(None, write, exitpriority=1)


def test_infer_answers_two_thousand_damaged_files_once_each_in_bounded_memory(whole, tmp_path):
    folder, rng = tmp_path / "photos", random.Random(1)
    folder.mkdir()
    whole_files = [encoded(RGB, kind) for kind in ("jpeg", "png", "webp", "gif", "tiff")]
    bad = set()
    for i in range(FILES - 1):
        name, kind = f"{i:04}.jpg", rng.random()
        if kind < 0.4:
            data = flipped(rng.choice(whole_files), rng)
        elif kind < 0.6:
            data = rng.choice(whole_files[:2])  # of these every byte counts
            data = data[: rng.randrange(1, len(data) // 2)]
            bad.add(name)
        elif kind < 0.8:
            data = rng.choice(list(NO_PICTURE.values()))
            bad.add(name)
        else:
            data = rng.choice(list(ODD_BUT_RIGHT.values()))[0]
        (folder / name).write_bytes(data)
    side = int(MAX_PIXELS**0.5)
    (folder / "largest.png").write_bytes(encoded(Image.new("RGBA", (side, side)), "png", compress_level=1))

    words = (folder, "--checkpoint", whole / "best", "--out", tmp_path / "labels.csv")
    fault = functools.partial(report_memory, str(tmp_path / "memory"))
    assert finish(start("infer", *words, log=tmp_path / "log", fault=fault)) == 1, (tmp_path / "log").read_text()[
        -2000:
    ]
    with open(tmp_path / "labels.csv", newline="") as lines:
        rows = {os.path.basename(row["image"]): row for row in csv.DictReader(lines)}
        lines.seek(0)
        assert sum(1 for _ in csv.reader(lines)) == FILES + 1
    assert rows.keys() == {path.name for path in folder.iterdir()}
    assert {name for name in bad if not rows[name]["error"]} == set()
    assert all(bool(row["error"]) != bool(row["gender"]) for row in rows.values()), "an answer or a reason"
    assert rows["largest.png"]["gender"]
    assert int((tmp_path / "memory").read_text()) < 1e9 + 20 * MAX_PIXELS, "20 bytes a pixel of the largest picture"


TITLES = [
    "Nike Men Shirt",
    '=HYPERLINK("http://x")',
    "<script>alert(1)</script> Men Shirt",
    '"Open Men Shirt, Blue',
]


def test_a_table_with_every_fault_gives_the_good_rows_and_lists_the_others(tmp_path):
    folder = write_kaggle(tmp_path / "shop", [picture(i) for i in range(len(TITLES))])
    row = "{},Men,Apparel,Topwear,Shirts,Blue,Summer,{},Casual,{}".format
    lines = [HEADER + ",notes"]
    lines += [f"{row(100 + i, 'soon', title)},a note" for i, title in enumerate(TITLES)]
    lines += [row(100, 2012, "The Same Id Again") + ",x", row("../../etc/passwd", 2012, "Outside") + ",x"]
    lines += [row("=1+1", 2012, "A Formula For An Id") + ",x", row(999, 2012, "x" * 200_000) + ",x", "104", ""]
    data = "\ufeff" + "\r\n".join(lines)
    (folder / "styles.csv").write_bytes(data.encode() + "\r\n105,Caf\xe9".encode("latin-1") + b"\r\n1\x0006,Men\n")
    catalogue = load_source(str(folder), tmp_path)
    assert catalogue.ids == ["100", "101", "102"]
    assert catalogue.columns["gender"] == ["Men"] * 3
    assert catalogue.columns["productDisplayName"] == TITLES[:3]
    assert catalogue.columns["year"] == ["soon"] * 3
    reasons = {skipped.id: skipped.reason for skipped in catalogue.skipped}
    assert reasons == {
        "line 5": "a quote that is left open",  # it takes the rest of its line, the note too, and no row after it
        "100": "line 6 has an id that came before",
        "../../etc/passwd": "no such file in images/",
        "=1+1": "no such file in images/",
        "line 9": "not UTF-8, or no CSV",
        "104": "no such file in images/",
        "line 12": "not UTF-8, or no CSV",
        "1\x0006": "no such file in images/",
    }
    open_store(catalogue, (80, 60), tmp_path / "cache").write_skipped(tmp_path / "skipped.csv")
    with open(tmp_path / "skipped.csv", newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert "'=1+1" in cells
    assert not [cell for cell in cells if cell[:1] in "=+-@"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEADER.encode("utf-16"), "is not UTF-8 text with a row in each line; save it as CSV in UTF-8"),
        (b"", "lacks the column id; it has "),
        (f"{HEADER},gender".encode(), "has the column gender twice"),
        (
            (HEADER.replace("usage", "use") + "\n100" + ",a" * 9).encode(),
            "lacks the column usage; nearest: use; it has id",
        ),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, data, message):
    folder = write_kaggle(tmp_path / "shop", [picture(0)])
    (folder / "styles.csv").write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_source(str(folder), tmp_path, needs=["usage"])


def test_a_formula_in_a_label_or_a_file_name_is_no_formula_in_the_csv(tmp_path):
    from output import Output

    said = {"label": "=cmd|' /C calc'!A0", "confidence": 0.5, "decision": "review", "top": []}
    with Output(
        tmp_path / "labels.csv", [{"name": "brand", "kind": "class"}, {"name": "=1", "kind": "number"}]
    ) as output:
        output.write([{"image": "@x.jpg", "attributes": {"brand": said}}, {"image": "-1.jpg", "error": "+1"}])
    with open(tmp_path / "labels.csv", newline="") as lines:
        head, *rows = csv.reader(lines)
    assert head == ["image", "brand", "brand_confidence", "brand_decision", "'=1", "error"]
    assert rows == [["'@x.jpg", "'=cmd|' /C calc'!A0", "0.5", "review", "", ""], ["'-1.jpg", "", "", "", "", "'+1"]]


def build(folder: str, cache: str, result: str, fault=None) -> None:
    """Open a catalogue's store in this process, building it if need be; write down what is in it."""
    if fault:
        fault()
    from pathlib import Path

    catalogue = load_source(folder, Path(cache))
    try:
        store = open_store(catalogue, (80, 60), Path(cache))
    except UserError as error:
        Path(result).write_text(json.dumps(str(error)))
        return
    Path(result).write_text(json.dumps([store.built, int(store.pixels.sum()), store.ok.tolist()]))


def small_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_store_is_never_torn(tmp_path):
    folder = write_kaggle(tmp_path / "shop", [picture(i) for i in range(300)])
    cache = tmp_path / "cache"

    def begin(name, fault=None):
        process = CONTEXT.Process(target=build, args=(str(folder), str(cache), str(tmp_path / name), fault))
        process.start()
        return process

    assert finish(begin("full", small_disk)) == 0
    message = json.loads((tmp_path / "full").read_text())
    assert "cannot write to" in message and "File too large" in message and "--cache-dir" in message
    assert not list(cache.glob("shop-*"))

    dying = begin("killed", functools.partial(die_at, 100, "data.store", "to_canvas"))
    assert finish(dying) == -signal.SIGKILL
    assert not list(cache.glob("shop-*")), "half a store has no name"
    assert len(list(cache.glob(".shop-*.part"))) == 1

    both = [begin("first"), begin("second")]
    assert [finish(process) for process in both] == [0, 0]
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first", "second"))
    right = sum(int(np.asarray(decode(picture(i))).sum()) for i in range(300))
    assert first[1:] == second[1:] == [right, [True] * 300]
    assert sorted([first[0], second[0]]) == [False, True], "one builds, the other waits"
    assert len(list(cache.glob("shop-*"))) == 1 and not list(cache.glob(".shop-*.part"))

    (store,) = cache.glob("shop-*")
    os.truncate(store / "pixels.npy", 10_000)
    assert finish(begin("cut")) == 0
    assert json.loads((tmp_path / "cut").read_text()).endswith("delete that folder")
