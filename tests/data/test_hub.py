"""A dataset on the hub, read where it lies: by the hub's own library, from a server that answers as the hub does."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hub
from data import parquet, sources
from data.sources import load_source
from data.store import open_store
from errors import UserError
from tests.data.conftest import picture

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder that is served as the dataset owner/shop, and the (file, first, last byte) of each range asked for."""
    folder, ranges = tmp_path / "served", []
    (folder / "data").mkdir(parents=True)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(b"")

        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            if path.startswith(f"/api/datasets/owner/shop/tree/{SHA}"):
                return self.answer(self.entries())
            if path in ("/api/datasets/owner/shop", f"/api/datasets/owner/shop/revision/{SHA}"):
                return self.answer({"id": "owner/shop", "sha": SHA, "private": False, "tags": [], "siblings": []})
            file = re.fullmatch(rf"/datasets/owner/shop/resolve/{SHA}/(.+)", path)
            if file and (folder / file[1]).exists():
                first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
                ranges.append((file[1], first, last))
                return self.answer((folder / file[1]).read_bytes()[first : last + 1], 206)
            self.answer({"error": f"no {path}"}, 404)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(self.entries())

        def entries(self):
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            named = [(str(path.relative_to(folder)), path.stat().st_size) for path in files]
            return [{"type": "file", "oid": "0" * 40, "path": name, "size": size} for name, size in named]

        def answer(self, body, status=200):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(hub, "reachable", lambda: True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield folder, ranges
        server.shutdown()


def write(folder, rows: range, name: str) -> None:
    images = [{"bytes": picture(seed=i), "path": None} for i in rows]
    table = pa.table({"id": list(rows), "gender": ["Men", "Women"] * (len(rows) // 2), "image": images})
    pq.write_table(table, folder / "data" / f"{name}.parquet", row_group_size=20)


def test_text_comes_at_once_and_pictures_as_they_are_asked_for(served, monkeypatch, tmp_path):
    monkeypatch.setattr(parquet, "RUN_ROWS", 20)
    monkeypatch.setattr(parquet, "READ", 10)
    monkeypatch.setattr(sources, "BUFFER", 4096)
    folder, ranges = served
    write(folder, range(100), "train-0")
    write(folder, range(100, 160), "train-1")
    (folder / "README.md").write_text("about")
    sizes = {f"data/{path.name}": path.stat().st_size for path in (folder / "data").iterdir()}

    def fetched(file: str) -> float:
        return sum(last + 1 - first for name, first, last in ranges if name == file) / sizes[file]

    catalogue = load_source("hub:owner/shop", tmp_path)
    assert list(catalogue.ids) == [str(i) for i in range(160)]
    assert (catalogue.name, catalogue.fingerprint) == ("owner/shop", SHA)
    assert fetched("data/train-0.parquet") < 0.2 and fetched("data/train-1.parquet") < 0.2
    ranges.clear()
    assert catalogue.read(130) == picture(seed=130)
    assert {file for file, *_ in ranges} == {"data/train-1.parquet"}
    assert fetched("data/train-1.parquet") < 0.6, "one of three row groups"

    store = open_store(catalogue, (8, 8), tmp_path, most=0)
    local = load_source(str(folder), tmp_path)
    assert (store.hashes == open_store(local, (8, 8), tmp_path, most=0).hashes).all()
    assert np.array_equal(store.pixels[np.array([3, 159])], open_store(local, (8, 8), tmp_path).pixels[[3, 159]])


def test_a_commit_is_kept_to(served, tmp_path):
    folder, _ = served
    write(folder, range(40), "train")
    assert hub.pinned("hub:owner/shop") == hub.pinned(f"hub:owner/shop@{SHA}") == f"hub:owner/shop@{SHA}"
    assert hub.pinned("owner/shop") == "owner/shop"
    assert len(load_source(f"hub:owner/shop@{SHA}", tmp_path)) == 40
    for wrong in ("hub:owner", f"hub:owner/shop@{SHA[:7]}"):
        with pytest.raises(UserError, match="is written hub:OWNER/NAME"):
            load_source(wrong, tmp_path)


def test_training_ends_with_the_same_bits_as_from_the_disk(served, command, tmp_path):
    folder, _ = served
    write(folder, range(160), "train")
    (tmp_path / "one.toml").write_text("[attributes.gender]\n")
    words = ("--attributes", tmp_path / "one.toml", "--backbone", "demo", "--epochs", 1, "--no-store", "--no-test")
    for data, out in (("hub:owner/shop", "hub"), (folder, "disk")):
        done = command("train.py", "--data", data, *words, "--cache-dir", tmp_path / "cache", "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
        assert "images are not kept" in done.stdout
    assert json.loads((tmp_path / "hub" / "options.json").read_text())["data"] == f"hub:owner/shop@{SHA}"
    streamed, local = ((tmp_path / out / "last" / "adapter.safetensors").read_bytes() for out in ("hub", "disk"))
    assert streamed == local


def test_a_network_that_fails_is_no_property_of_a_row(served, tmp_path):
    folder, _ = served
    write(folder, range(40), "train")
    catalogue = load_source("hub:owner/shop", tmp_path)
    (folder / "data" / "train.parquet").unlink()
    with pytest.raises(UserError, match=r"train\.parquet broke off"):
        catalogue.read(0)


def test_a_dataset_without_parquet_or_that_is_not_there_is_one_line(served, tmp_path):
    folder, _ = served
    (folder / "README.md").write_text("about")
    with pytest.raises(UserError, match=r"^hub:owner/shop@\w+ holds no parquet files"):
        load_source("hub:owner/shop", tmp_path)
    with pytest.raises(UserError, match=r"^cannot read hub:owner/other: [^\n]*$"):
        load_source("hub:owner/other", tmp_path)
