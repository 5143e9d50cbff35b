"""Runs that read titles, as a user has them: trained, scored, asked with and without a title."""

import csv
import io
import json
import re
import string
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

import train
from data.shards import Row, open_source
from data.title_table import TitleTable
from data.titles import SPECIAL
from infer import find_titles
from models.checkpoint import read_config

ROOT = Path(__file__).parents[1]
WORDS = ("train.py", "--data", "demo", "--limit", 600, "--epochs")


def run(command, cache_dir, out, *words, epochs=2):
    done = command(*WORDS, epochs, "--cache-dir", cache_dir, "--out", out, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def both(command, cache_dir, tmp_path_factory):
    """A run on pictures and titles whose leaks are left in."""
    out = tmp_path_factory.mktemp("runs") / "both"
    return out, *run(command, cache_dir, out, "--inputs", "image+title", "--no-mask-title-leaks")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    words = [sys.executable, "-m", "data.demo", "--out", str(folder), "--rows", "40", "--seed", "9"]
    subprocess.run(words, cwd=ROOT, check=True)
    return folder


def test_titles_tell_what_pictures_do_not(both):
    out, text, scores = both
    assert scores["inputs"] == "image+title, leaks and all"
    assert "titles: words that give labels away left in; vocabulary of " in text
    assert "% cut at 13 tokens" in text
    assert scores["attributes"]["gender"]["accuracy"] > 0.9
    names = load_file(out / "best" / "adapter.safetensors")
    assert {name.split(".")[0] for name in names} == {"backbone", "heads", "text"}


def test_masked_titles_of_the_demo_tell_nothing(command, cache_dir, tmp_path):
    """No word of them is left, so a blind model has one answer for all rows: that of the most frequent class."""
    text, scores = run(command, cache_dir, tmp_path / "run", "--inputs", "title", epochs=1)
    assert "LoRA 0, text" in text
    assert scores["inputs"] == "title, leaks masked"
    assert all(a["accuracy"] < 0.7 for a in scores["attributes"].values())
    names = load_file(tmp_path / "run" / "best" / "adapter.safetensors")
    assert {name.split(".")[0] for name in names} == {"heads", "text"}


def test_a_title_changes_the_answer_and_the_column_for_batches_does_the_same(command, both, drawings, tmp_path):
    out, *_ = both
    words = ("--checkpoint", out / "best", "--json")
    with open(drawings / "styles.csv", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    done = command("infer.py", drawings / "images", "--titles", drawings / "styles.csv", *words)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    by_image = tmp_path / "by_image.csv"  # which needs no ids
    with by_image.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("image", "productDisplayName"), *((f"{id}.jpg", row["productDisplayName"]) for id, row in rows.items())]
        )
    assert command("infer.py", drawings / "images", "--titles", by_image, *words).stdout == done.stdout
    told = [(a, rows[Path(a["image"]).stem]) for a in answers if rows[Path(a["image"]).stem]["productDisplayName"]]
    assert sum(a["attributes"]["gender"]["label"] == row["gender"] for a, row in told) > 0.9 * len(told)
    answer, row = told[0]
    one = command("infer.py", answer["image"], "--title", row["productDisplayName"], *words)
    (one,) = (json.loads(line)["attributes"] for line in one.stdout.splitlines())
    without = json.loads(command("infer.py", answer["image"], *words).stdout)["attributes"]
    for name, said in answer["attributes"].items():
        assert one[name]["label"] == said["label"]
        assert one[name]["confidence"] == pytest.approx(said["confidence"], abs=2e-4)
    assert without != one, "a row without a title has an answer too, another one"
    assert without.keys() == one.keys()


def test_pictures_of_one_name_in_two_folders_have_each_its_own_title(tmp_path):
    paths = [tmp_path / folder / "1.jpg" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    source, table = open_source([str(tmp_path)]), tmp_path / "titles.csv"
    table.write_text("image,title\n" + "".join(f"{path},Title of {path.parent.name}\n" for path in paths))

    def found() -> list[str | None]:
        find = find_titles(None, TitleTable(table, "title"), source)
        return [find(Row(str(path), path)) for path in paths]

    assert found() == ["Title of a", "Title of b"]
    table.write_text("image,title\na/1.jpg,Title of a\nb/1,Title of b\n")
    assert found() == ["Title of a", "Title of b"]
    table.write_text("image,title\na/1.jpg,Title of a\nc/1.jpg,Title of c\n")
    assert found() == ["Title of a", None], "another folder's picture is another"
    table.write_text("id,title\n1,Title of both\n1.5,Title of none\n")
    assert found() == ["Title of both"] * 2


def test_a_number_is_an_id_where_answers_go_by_ids_though_it_is_another_picture_s_name_too(tmp_path):
    table = tmp_path / "titles.csv"
    table.write_text("id,image,title\n1,2.jpg,Red Shoe\n2,1.jpg,Blue Shoe\n")
    find = TitleTable(table, "title")
    assert [find(name) for name in ("1", "2", "1.jpg", "shop/2.jpg")] == [
        "Red Shoe", "Blue Shoe", "Blue Shoe", "Red Shoe"
    ]  # fmt: skip


def test_a_table_of_ids_and_images_goes_by_both_and_fills_up_with_what_rows_bring(tmp_path):
    table = tmp_path / "titles.csv"
    table.write_text("id,image,title\n7,500/front.jpg,Red Shoe\n7,500/back.jpg,\n8,,Blue Shoe\n")
    find = find_titles(None, TitleTable(table, "title"), None)
    rows = [Row("7", b""), Row("shop/500/front.jpg", b""), Row("8", b"", "Own"), Row("9", b"", "Own"), Row("9", b"")]
    assert [find(row) for row in rows] == ["Red Shoe", "Red Shoe", "Blue Shoe", "Own", None]


def test_titles_in_parquet_and_in_tar_do_the_same(command, both, drawings, tmp_path):
    with open(drawings / "styles.csv", newline="") as file:
        titles = {row["id"]: row["productDisplayName"] or None for row in csv.DictReader(file)}
    pictures = {id: (drawings / "images" / f"{id}.jpg").read_bytes() for id in sorted(titles)}
    images = [{"bytes": data, "path": None} for data in pictures.values()]
    columns = {"id": list(pictures), "image": images, "productDisplayName": [titles[id] for id in pictures]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for id, data in pictures.items():
            told = json.dumps({"productDisplayName": titles[id]}).encode()
            for name, content in ((f"{id}.jpg", data), (f"{id}.json", told)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    words = ("--checkpoint", both[0] / "best", "--json")
    plain, parquet, tar = (
        [json.loads(line)["attributes"] for line in command("infer.py", *inputs, *words).stdout.splitlines()]
        for inputs in (
            (drawings / "images", "--titles", drawings / "styles.csv"),
            (tmp_path / "a.parquet",),
            (tmp_path / "a.tar",),
        )
    )
    assert len(plain) == len(titles) == 40
    assert plain == parquet == tar
    untitled = command("infer.py", drawings / "images", *words).stdout.splitlines()
    assert plain != [json.loads(line)["attributes"] for line in untitled]
    (tmp_path / "all.jsonl").write_text("\n".join(untitled) + "\n")
    none_new = ("--skip", tmp_path / "all.jsonl", "--titles", drawings / "styles.csv")
    done = command("infer.py", drawings / "images", *words, *none_new)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_heads_over_titles_and_numbers_can_be_refitted(command, cache_dir, tmp_path):
    run(command, cache_dir, tmp_path / "run", "--inputs", "image+title", "--with-price")
    words = ("--data", "demo", "--limit", 600, "--cache-dir", cache_dir)
    done = command("refit.py", "--checkpoint", tmp_path / "run" / "best", *words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"price_in_vnd +MAE [\d,.e+]+, after [\d,.e+]+\n", done.stdout)


def test_scored_from_the_checkpoint_as_at_the_end_of_training(command, both, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 600, "--cache-dir", cache_dir, "--json", tmp_path / "scores")
    done = command("evaluate.py", "--checkpoint", both[0] / "best", *words)
    assert done.returncode == 0, done.stderr
    assert "answers from image+title, leaks and all" in done.stdout
    assert json.loads((tmp_path / "scores").read_text()) == both[2]


def test_a_run_with_titles_resumes_to_the_same_bits(command, cache_dir, tmp_path, request):
    """With the vocabulary that it began with, wherever that was from."""
    vocab = tmp_path / "tokens.txt"
    vocab.write_text(
        "\n".join([*SPECIAL, *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)])
    )
    words = ("--data", "demo", "--limit", 300, "--epochs", 1, "--inputs", "image+title", "--cache-dir", cache_dir)
    words += ("--vocab", vocab, "--title-length", 9)
    assert command("train.py", *words, "--out", tmp_path / "whole").returncode == 0
    assert read_config(tmp_path / "whole" / "best")["text"]["length"] == 9
    request.getfixturevalue("ctrl_c")
    assert command("train.py", *words, "--out", tmp_path / "cut").returncode == train.STOPPED
    vocab.unlink()
    done = command("train.py", "--resume", "--out", tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    whole, cut = (load_file(tmp_path / run / "best" / "adapter.safetensors") for run in ("whole", "cut"))
    assert all((whole[name] == cut[name]).all() for name in whole)


def test_titles_added_to_a_run_of_pictures_change_no_answer_at_first(command, demo_run, cache_dir, tmp_path):
    words = ("--inputs", "image+title", "--init-from", demo_run / "best", "--lr", 1e-12, "--limit", 1000)
    text, scores = run(command, cache_dir, tmp_path / "run", *words, epochs=1)
    assert "kept the adapters, the heads of gender, masterCategory" in text
    before = json.loads((demo_run / "metrics.json").read_text())
    for name, a in before["attributes"].items():
        assert scores["attributes"][name]["accuracy"] == pytest.approx(a["accuracy"], abs=0.02), name


def test_a_run_that_starts_from_one_with_titles_has_its_text_encoder(command, both, cache_dir, tmp_path):
    """In its vocabulary, though titles are read with other words masked for an attribute more."""
    words = ("--init-from", both[0] / "best", "--with-season-year", "--lr", 1e-12)
    said, scores = run(command, cache_dir, tmp_path / "run", *words, epochs=1)
    assert "kept the adapters and the text encoder" in said
    assert read_config(tmp_path / "run" / "best")["text"] == read_config(both[0] / "best")["text"]
    for name, a in both[2]["attributes"].items():
        assert scores["attributes"][name]["accuracy"] == pytest.approx(a["accuracy"], abs=0.02), name


def test_a_text_encoder_of_another_vocabulary_is_begun_anew_and_that_is_said(command, both, cache_dir, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "shoe", "red"]))
    words = ("--init-from", both[0] / "best", "--vocab", tmp_path / "vocab.txt")
    said, _ = run(command, cache_dir, tmp_path / "run", *words, epochs=1)
    assert "of another vocabulary or length, so begun anew: the text encoder" in said
    words = ("train.py", "--data", "demo", "--limit", 300, "--cache-dir", cache_dir, *words, "--inputs", "title")
    done = command(*words, "--out", tmp_path / "titles")
    assert done.returncode == 2
    assert "titles in another vocabulary or length: none of it can be kept" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b", "--title", "x"], "--title goes with one picture, and there are 2"),
        (["a", "--titles", "gone.csv"], "cannot read --titles gone.csv: No such file"),
        (["a", "--titles", "other.csv"], "--titles other.csv has a title for none of the pictures"),
        (["a", "--title", "x", "--titles", "other.csv"], "argument --titles: not allowed with argument --title"),
        (["a", "--titles", "bare.csv"], "bare.csv lacks the column productDisplayName"),
        (["a", "--titles", "nameless.csv"], "names no pictures: it has neither a column image nor id"),
        (["rows.parquet", "--titles", "other.csv"], "--titles other.csv has a title for none of the pictures"),
    ],
)
def test_mistakes_with_titles_are_one_line(command, both, drawings, tmp_path, words, message):
    pictures = sorted((drawings / "images").iterdir())
    (tmp_path / "other.csv").write_text("id,productDisplayName\n77,Red Shoe\n")
    (tmp_path / "bare.csv").write_text("id,name\n77,Red Shoe\n")
    (tmp_path / "nameless.csv").write_text("key,productDisplayName\n77,Red Shoe\n")
    rows = {"id": ["5"], "image": [{"bytes": pictures[0].read_bytes(), "path": None}]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    words = [pictures["ab".index(word)] if word in ("a", "b") else word for word in words]
    done = command("infer.py", *words, "--checkpoint", both[0] / "best", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_titles_are_refused_where_there_is_no_place_for_them(command, demo_run, both, drawings, tmp_path):
    picture = next((drawings / "images").iterdir())
    done = command("infer.py", picture, "--title", "Red shoe", "--checkpoint", demo_run / "best")
    assert done.returncode == 2
    assert "was trained on pictures alone; leave out --title" in done.stderr.splitlines()[-1]
    for kind, out in (("timm", "a.safetensors"), ("peft", "a"), ("onnx", "a.onnx")):
        done = command("export.py", "--checkpoint", both[0] / "best", "--to", kind, "--out", tmp_path / out)
        assert done.returncode == 2
        assert "reads titles, which none of these formats has a place for" in done.stderr.splitlines()[-1]


def test_a_column_of_titles_that_is_empty_or_not_there_is_one_line(command, drawings, cache_dir, tmp_path):
    with open(drawings / "styles.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (tmp_path / "images").symlink_to(drawings / "images")
    for row in rows:
        row["name"] = ""
    with open(tmp_path / "styles.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    cases = {
        'title = "name"\n': "--inputs title: no train row has a title (column name)",
        'title = "nam"\n': "lacks the column nam; nearest: name; it has id, gender",
        "": "names no column of titles; add title =",
    }
    for head, message in cases.items():
        (tmp_path / "own.toml").write_text(head + "[attributes.gender]\n")
        done = command(
            *("train.py", "--data", tmp_path, "--attributes", tmp_path / "own.toml", "--inputs", "title"),
            *("--backbone", "demo", "--cache-dir", cache_dir, "--out", tmp_path / "run"),
        )
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]


def test_a_model_that_reads_titles_teaches_none(command, both, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 100, "--cache-dir", cache_dir, "--out", tmp_path / "run")
    done = command("train.py", *words, "--teacher", both[0] / "best")
    assert (done.returncode, "reads titles (--inputs image+title); name one that" in done.stderr) == (2, True)
