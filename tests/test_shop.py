"""What `docs/shop.md` makes of shops' exports trains and comes back with labels."""

import functools
import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from data.demo import fashion
from data.sources import load_source

ROOT = Path(__file__).parents[1]
WOO, SHOPIFY, MERCHANT, DOWNLOAD, MERGE, NIGHTS = re.findall(
    r"```python\n(.+?)```", (ROOT / "docs" / "shop.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address that pictures 0.jpg to 3.jpg are downloaded from."""
    folder = tmp_path_factory.mktemp("server")
    for i in range(4):
        fashion.draw(i, 1)[1].save(folder / f"{i}.jpg")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def python(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("snippet", "file", "text", "ids", "column", "labels"),
    [
        (
            WOO,
            "export.csv",
            'ID,Type,Images,Categories\n7,simple,"URL/0.jpg, URL/1.jpg","Shirts, Sale"\n8,variation,URL/3.jpg,\n'
            "9,simple,,Shoes\n10,simple,URL/2.jpg,Shoes\n",
            ["7-0", "7-1", "10-0"],
            "category",
            ["Shirts", "Shirts", "Shoes"],
        ),
        (
            SHOPIFY,
            "export.csv",
            "Handle,Type,Vendor,Image Src\nred,Shirts,A,URL/0.jpg?v=1\nred,,,URL/1.jpg\nred,,,\n"
            "blue,Shoes,B,URL/2.jpg\n",
            ["red-0", "red-1", "blue-0"],
            "Type",
            ["Shirts", "Shirts", "Shoes"],
        ),
        (
            MERCHANT,
            "export.txt",
            "id\timage_link\tcolor\nA1\tURL/0.jpg\tRed\nA2\tURL/1.jpg\tRed\nA3\tURL/2.jpg\tBlue\n",
            ["A1", "A2", "A3"],
            "color",
            ["Red", "Red", "Blue"],
        ),
    ],
    ids=["woocommerce", "shopify", "merchant"],
)
def test_an_export_becomes_a_catalogue(server, tmp_path, snippet, file, text, ids, column, labels):
    (tmp_path / file).write_text(text.replace("URL", server))
    python(snippet + DOWNLOAD, tmp_path)
    catalogue = load_source(str(tmp_path / "shop"), tmp_path / "cache")
    assert (catalogue.ids, list(catalogue.columns[column]), catalogue.skipped) == (ids, labels, [])
    assert len({catalogue.read(i) for i in range(3)}) == 3


def test_labels_come_back_by_id_and_of_each_night_the_last(command, demo_run, server, tmp_path):
    rows = "".join(f"+{i}\t{server}/{i}.jpg\tRed\n" for i in range(3))
    (tmp_path / "export.txt").write_text("id\timage_link\tcolor\n" + rows)
    python(MERCHANT + DOWNLOAD, tmp_path)
    words = ("--checkpoint", demo_run / "best")
    assert (
        command("infer.py", tmp_path / "shop" / "items.csv", *words, "--out", tmp_path / "labels.parquet").returncode
        == 0
    )
    python(MERGE, tmp_path)
    labelled = pd.read_csv(tmp_path / "labelled.csv")
    assert len(labelled) == 3 and labelled["articleType"].notna().all()

    images, answers = tmp_path / "shop" / "images", tmp_path / "answers"
    answers.mkdir()
    whole = (images / "+2.jpg").read_bytes()
    (images / "+2.jpg").write_bytes(whole[:200])
    nightly = ("infer.py", images, *words, "--skip", answers, "--out")
    assert command(*nightly, answers / "1.parquet").returncode == 1
    (images / "+2.jpg").write_bytes(whole)
    assert command(*nightly, answers / "2.parquet").returncode == 0
    again = pd.read_parquet(answers / "1.parquet").head(1).assign(articleType="Other")  # as after an answer anew
    again.to_parquet(answers / "3.parquet")
    python(NIGHTS + "labels.to_parquet('nights.parquet')", tmp_path)
    labels = pd.read_parquet(tmp_path / "nights.parquet")
    assert sorted(Path(name).name for name in labels["image"]) == ["+0.jpg", "+1.jpg", "+2.jpg"]
    assert labels["articleType"].notna().all() and (labels["articleType"] == "Other").sum() == 1
