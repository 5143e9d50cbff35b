"""infer.py where something goes wrong: one line, and no half answers."""

import csv
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import infer
from data.images import decode
from data.shards import Row
from durable import alone_in
from labeller import Labeller
from models.checkpoint import amend_config
from output import Output

ROOT = Path(__file__).parents[1]
PATH = ["masterCategory", "subCategory", "articleType"]
ATTRIBUTES = ["gender", "masterCategory", "usage", "subCategory", "articleType", "baseColour", "brand"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numbers_too_large_are_no_answers(demo_run, photos, dtype, monkeypatch):
    labeller = Labeller(demo_run / "best", None, torch.device("cpu"), True, 3, 8, dtype)
    rows = [Row("page", "not an image"), Row("0.png", photos / "0.png"), Row("1.png", photos / "1.png")]
    (batch,) = labeller.batches(rows)
    (good,) = labeller(batch[2:])

    def too_bright(pixels, preprocess=labeller.preprocess):
        second = (pixels == torch.tensor(batch[1].picture)).flatten(1).all(1)
        return torch.where(second[:, None, None, None], torch.inf, preprocess(pixels))

    monkeypatch.setattr(labeller, "preprocess", too_bright)
    reason = f"the model makes no finite numbers of it in {str(dtype)[6:]}"
    *errors, answer = labeller(batch)
    assert errors == [{"image": "page", "error": "not an image"}, {"image": "0.png", "error": reason}]
    assert {name: said.get("label") for name, said in answer["attributes"].items()} == {
        name: said.get("label") for name, said in good["attributes"].items()
    }


def test_a_full_memory_is_one_line_and_no_damaged_picture(command, demo_run, photos, monkeypatch):
    def full(source):
        raise MemoryError

    monkeypatch.setattr("labeller.decode", full)
    done = command("infer.py", photos / "0.png", "--checkpoint", demo_run / "best")
    assert (done.returncode, done.stderr.splitlines()[-1][:20]) == (2, "error: out of memory")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="it is a file that cannot be read, on Linux")
def test_a_disk_that_fails_is_no_answer(command, demo_run, photos, tmp_path):
    """Of a job the rows would count as done."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").symlink_to(photos / "0.png")
    (failing := tmp_path / "photos" / "1.png").symlink_to("/proc/self/mem")
    done = command("infer.py", tmp_path / "photos", "--checkpoint", demo_run / "best", "--out", tmp_path / "labels")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {failing}: Input/output error; start again"
    assert not list((tmp_path / "labels" / "labels").glob("*.parquet"))


def test_a_checkpoint_that_is_replaced_meanwhile_answers_nothing(command, demo_run, photos, tmp_path, monkeypatch):
    """As by a run that goes on: the job would say that other weights had answered."""
    best, open_source = shutil.copytree(demo_run / "best", tmp_path / "best"), infer.open_source

    def replace(*words):
        amend_config(best, data={"fingerprint": "another"})
        return open_source(*words)

    monkeypatch.setattr(infer, "open_source", replace)
    done = command("infer.py", photos, "--checkpoint", best, "--out", tmp_path / "labels")
    assert done.returncode == 2
    assert f"{best} was replaced meanwhile" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "labels").exists()


def test_a_disk_that_is_full_is_one_line(command, demo_run, photos, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        done = command("infer.py", photos, "--checkpoint", demo_run / "best", "--out", tmp_path / "labels.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 2
    assert f"cannot write {tmp_path / 'labels.jsonl'}: File too large; with a folder" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_ctrl_c_says_what_becomes_of_the_answers(command, demo_run, photos, tmp_path, monkeypatch):
    def interrupted(source):
        raise KeyboardInterrupt

    monkeypatch.setattr("labeller.decode", interrupted)
    out = tmp_path / "labels.csv"
    done = command("infer.py", photos, "--checkpoint", demo_run / "best", "--out", out)
    assert done.returncode == 130
    assert done.stderr.endswith(f"{out} was not written; with a folder as --out what is done is kept\ninterrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_terminated_one_leaves_no_part_of_a_file(command, demo_run, photos, tmp_path, monkeypatch):
    def terminated(source):
        assert list(tmp_path.iterdir()), "a part is there"
        signal.raise_signal(signal.SIGTERM)
        return decode(source)

    monkeypatch.setattr("labeller.decode", terminated)
    before = signal.getsignal(signal.SIGTERM)
    done = command("infer.py", photos, "--checkpoint", demo_run / "best", "--out", tmp_path / "labels.csv")
    signal.signal(signal.SIGTERM, before)
    assert done.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_two_that_answer_into_a_folder_whose_results_they_leave_out_do_not_answer_the_same(
    command, demo_run, photos, tmp_path
):
    words = ("infer.py", photos / "0.png", "--checkpoint", demo_run / "best", "--skip", tmp_path)
    with alone_in(tmp_path):
        done = command(*words, "--out", tmp_path / "a.csv")
    assert (done.returncode, f"{tmp_path} is where another infer.py puts its answers" in done.stderr) == (2, True)
    for name, rows in (("a.csv", 1), ("b.csv", 0)):
        done = command(*words, "--out", tmp_path / name)
        assert (done.returncode, f"wrote {rows} rows" in done.stderr) == (0, True), done.stderr


def test_a_sheet_that_cannot_be_written_does_not_deny_the_answers(command, demo_run, photos, tmp_path):
    (tmp_path / "sheet.png").symlink_to("/dev/full")
    words = ("--out", tmp_path / "labels.csv", "--plot", tmp_path / "sheet.png")
    done = command("infer.py", photos / "0.png", "--checkpoint", demo_run / "best", *words)
    assert (done.returncode, len((tmp_path / "labels.csv").read_text().splitlines())) == (2, 2)
    assert (
        done.stderr.splitlines()[-1] == f"error: cannot write --plot {tmp_path / 'sheet.png'}: No space left on device"
    )


def test_two_that_write_to_one_name_mix_no_rows(tmp_path):
    with Output(tmp_path / "labels.csv", []) as one, Output(tmp_path / "labels.csv", []) as other:
        for _ in range(3):
            for output, name in ((one, "one"), (other, "other")):
                output.write([{"image": name * 3000, "error": "x"}] * 5)
    with open(tmp_path / "labels.csv", newline="") as file:
        assert len({row["image"] for row in csv.DictReader(file)}) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_whoever_stops_reading_ends_it_quietly(demo_run, photos):
    words = [sys.executable, ROOT / "infer.py", photos, "--checkpoint", demo_run / "best", "--json"]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert "Traceback" not in run.stderr.read()
    assert run.wait() == 141


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.jpg"], "no image file, folder or match for 'gone.jpg'"),
        (["{empty}"], "no image in folder"),
        (["{photos}/0.png", "--out", "labels.xls"], "--out labels.xls: the name must end in .csv, .jsonl, .parquet"),
        (["{photos}/0.png", "--out", "/proc/labels.csv"], "cannot write --out /proc/labels.csv"),
        (["{photos}/0.png", "--plot", "/proc/sheet.png"], "cannot write --plot /proc/sheet.png"),
        (["{photos}/0.png", "--top-k", "0"], "--top-k: 0 is not a whole number above 0"),
        (["{photos}/0.png", "--plot", "sheet"], "--plot sheet: the name must end in .png"),
        (["{photos}/*.gif"], "no image file, folder or match for"),
        (["{photos}/0.png", "--weights", "gone.safetensors"], "no weights file at gone.safetensors"),
        ([""], "one of the inputs is an empty word"),
        (["{photos}", "--plot", "{photos}/0.png"], "--plot {photos}/0.png would replace what is read"),
        (["{parquet}", "--out", "{parquet}"], "--out {parquet} would replace what is read"),
        (["{photos}/0.png", "--checkpoint", "."], "no checkpoint at . (no config.json there)"),
        (
            ["--amp", "{photos}/0.png"],
            "argument --amp: {photos}/0.png is none of bf16, fp16, auto; it may stand before",
        ),
        (["{photos}/0.png", "--shard-rows", "9", "--out", "a.csv"], "--shard-rows 9 is of a folder's files: name a"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(command, demo_run, photos, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    places = {"photos": photos, "empty": tmp_path / "empty", "parquet": tmp_path / "rows.parquet"}
    row = {"id": "1", "image": {"bytes": (photos / "0.png").read_bytes(), "path": None}}
    pq.write_table(pa.Table.from_pylist([row]), places["parquet"])
    done = command(
        "infer.py", "--checkpoint", demo_run / "best", *(word.format(**places) for word in words), cwd=tmp_path
    )
    assert done.returncode == 2
    assert message.format(**places) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("out", ["caf\udce9.parquet", "caf\udce9"])
def test_a_name_that_no_parquet_takes_is_one_line(command, demo_run, photos, tmp_path, out):
    done = command("infer.py", photos, "--checkpoint", demo_run / "best", "--out", tmp_path / out)
    assert done.returncode == 2
    assert "is not UTF-8, as it has to be here; rename it" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.csv", None, "cannot read --skip"),
        ("other.csv", "id,name\n1,shirt\n", "is no file that --out wrote"),
        ("short.csv", "image,usage,usage_decision,error\n1\n2.jpg,Sports\n3.jpg,Sports,", ""),
        ("error.csv", "error\n\n,\n", "is no file that --out wrote"),
        ("nameless.jsonl", '{"image": 1, "attributes": {}}\n', "is no file that --out wrote: an image has no name"),
        ("deep.jsonl", "[" * 100_000 + "\n", "is no file that --out wrote"),
        ("x" * 300, None, "cannot read --skip"),
        ("other.jsonl", "[1]\n", "is no file that --out wrote"),
        ("other.parquet", "image\n", "is no file that --out wrote"),
        (".", None, "holds no answers"),
    ],
)
def test_a_result_to_skip_that_is_none_is_one_line(command, demo_run, photos, tmp_path, name, text, message):
    (tmp_path / "notes.txt").write_text("of something else")
    if text:
        (tmp_path / name).write_text(text)
    words = ("--checkpoint", demo_run / "best", "--skip", tmp_path / name)
    done = command("infer.py", photos, *words)
    if not message:  # rows that were cut off have no labels
        assert (done.returncode, "as they have labels" in done.stderr) == (1, False)
        assert "whose pictures count as new: 1, line 4, 3 cells under 4 columns" in done.stderr
        assert done.stdout.count("articleType") == 5
        return
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
