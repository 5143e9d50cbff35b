"""What an answer follows from, shown beside it: in the report, and by infer.py."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from models.checkpoint import read_config, sealed
from models.neighbours import FILE
from report.alike import SHOWN, most_alike
from task import load_task
from tests.report.test_page import Page


@pytest.fixture(scope="module")
def words(cache_dir) -> tuple:
    return ("--data", "demo", "--limit", 1000, "--cache-dir", cache_dir)


@pytest.fixture(scope="module")
def looking(command, demo_run, words, tmp_path_factory):
    """A checkpoint with neighbours of the demo's own pictures."""
    folder = shutil.copytree(demo_run / "best", tmp_path_factory.mktemp("looking") / "best")
    done = command("refit.py", "--checkpoint", folder, *words, "--neighbours")
    assert ": kept, " in done.stdout, done.stderr
    return folder


@pytest.fixture
def task(looking, cache_dir):
    return load_task(looking, None, "demo", cache_dir, 1000, torch.device("cpu"), 1e9)


def test_they_are_train_rows_with_their_ids_and_labels(task):
    ids, train, val = task.catalogue.ids, set(task.store.rows("train").tolist()), task.store.rows("val").tolist()
    found = most_alike(task, val)
    assert list(found) == sorted(val)
    same = []
    for row, likes in found.items():
        assert len(likes) == SHOWN
        for like in likes:
            assert like.row in train
            assert like.labels == labels_of(task, like.row)
            assert like.id == ids[like.row] or (task.store.hashes == task.store.hashes[like.row]).sum() > 1
        same.append([likes[0].labels[name] == labels_of(task, row)[name] for name in ("masterCategory", "articleType")])
    assert all(torch.tensor(same).float().mean(0) > 0.8), "they look like it"


def labels_of(task, row):
    labels = zip(task.classes.items(), task.labels[row].tolist(), strict=True)
    return {name: texts[label] if label >= 0 else None for (name, texts), label in labels}


def test_the_very_picture_is_not_among_them(task):
    train = task.store.rows("train")[:40].tolist()
    alone = [row for row in train if (task.store.hashes == task.store.hashes[row]).sum() == 1]
    found = most_alike(task, alone)
    assert list(found) == alone != []
    assert all(row not in [like.row for like in likes] for row, likes in found.items())


def test_where_memory_runs_out_they_are_looked_for_in_smaller_batches(task, monkeypatch, capsys):
    rows = task.store.rows("val")[:50].tolist()
    found, real = most_alike(task, rows), task.model.explained

    def explained(images, tokens):
        if len(images) > 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(images, tokens)

    monkeypatch.setattr(task.model, "explained", explained)
    again = most_alike(task, rows)
    assert "going on with batches of 12" in capsys.readouterr().err
    assert {row: [like.id for like in likes] for row, likes in again.items()} == {
        row: [like.id for like in likes] for row, likes in found.items()
    }


def test_where_the_catalogue_has_no_such_picture_none_is_named(task):
    rows, others = task.store.rows("val")[:5].tolist(), task.store.hashes + np.uint64(1)
    found = most_alike(task._replace(store=dataclasses.replace(task.store, hashes=others)), rows)
    assert [like.row for likes in found.values() for like in likes] == [None] * 5 * SHOWN
    task.model.neighbours = None
    assert most_alike(task, rows) == {}, "who has none shows none"


def test_the_report_shows_them_beside_suspects(command, looking, words, task, tmp_path, monkeypatch):
    """On other rows than were refitted on, one of them under a hostile id."""
    monkeypatch.setattr("report.suspects.EXCLUDED", 0.2)  # so short a run excludes little
    tensors = load_file(looking / FILE)
    tensors["ids"][:] = torch.tensor(list(b"<i>&"), dtype=torch.uint8).repeat(len(tensors["ids"]), 2)[:, :5]
    files = {FILE: save(tensors), "adapter.safetensors": (looking / "adapter.safetensors").read_bytes()}
    folder = tmp_path / "best"
    folder.mkdir()
    for name, data in (files | {"config.json": sealed(read_config(looking), files)}).items():
        (folder / name).write_bytes(data)
    words = ("--checkpoint", folder, *words[:2], "--limit", 600, *words[4:], "--report", tmp_path / "report")
    done = command("evaluate.py", *words, "--split", "val")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert not Page(text).open
    section = re.search(r'<h2 id="suspects">.*?<h2 id="identical">', text, re.DOTALL)[0]
    assert "<i>" not in section and "&lt;i&gt;&amp;&lt;" in section
    *cards, _ = section.split("</figure>")
    place, shown = {id: row for row, id in enumerate(task.catalogue.ids)}, set()
    for card in cards:
        row = place[re.search(r"Picture of article (\d+)", card)[1]]
        attributes = re.findall(r"<b>(\w+)</b>", card)
        likes = re.findall(r"<div>(.*?)</div>", card, re.DOTALL)
        for like, told in zip(most_alike(task, [row])[row], likes, strict=True):
            assert re.findall(r"<span>(.*?)</span>", told) == [like.labels[name] or "–" for name in attributes]
            shown.add("<img" in told)
    assert len(cards) > 3 and shown == {True, False}, "some are not among these rows"


def test_infer_names_them(command, looking, demo_run, photos):
    done = command("infer.py", photos, "--json", "--top-k", 2, "--batch-size", 3, "--checkpoint", looking)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(answer) for answer in answers] == [
        {"image", "error"} if answer["image"].endswith(("cut.png", "page.jpg")) else {"image", "attributes", "like"}
        for answer in answers
    ]
    for answer in answers:
        like = answer.get("like", [])
        assert len(like) == 2 * ("like" in answer)
        assert [near for _, near in like] == sorted((near for _, near in like), reverse=True)
        assert all(name.isdigit() and 0 < near < 1 for name, near in like)
    said = command("infer.py", photos / "0.png", "--checkpoint", looking).stdout.splitlines()[-2]
    assert re.fullmatch(r"  like            \d{5} 0\.\d\d, \d{5} 0\.\d\d, \d{5} 0\.\d\d", said)
    assert "  like" not in command("infer.py", photos / "0.png", "--checkpoint", demo_run / "best").stdout
