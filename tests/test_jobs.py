"""Jobs that processes share through a folder: killed, started again, two at once; each input has its answer once."""

import functools
import importlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import fashion
from errors import UserError
from jobs import Crew, Job
from tests.faults.processes import die_at, finish, start

ROOT = Path(__file__).parents[1]
KILLED = -signal.SIGKILL
ROWS, SHARD = 100, 7
SHARDS = -(-ROWS // SHARD)
BAD = {"13": "no image in this row", "57": "no image in this row", "30": "truncated or damaged image"}


@pytest.fixture(scope="module")
def pictures():
    encoded = []
    for index in range(10):
        fashion.draw(index, seed=3)[1].save(buffer := io.BytesIO(), "png")
        encoded.append(buffer.getvalue())
    return encoded


@pytest.fixture(scope="module")
def catalogue(pictures, tmp_path_factory):
    """Parquet of 100 rows, two of them without a picture and one whose picture is cut short."""
    images = [{"bytes": pictures[i % 10], "path": None} for i in range(ROWS)]
    images[13], images[57]["bytes"], images[30]["bytes"] = None, None, pictures[0][:500]
    image = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    path = tmp_path_factory.mktemp("catalogue") / "shop.parquet"
    pq.write_table(pa.table({"id": range(ROWS), "image": image}), path, row_group_size=16)
    return path


@pytest.fixture(scope="module")
def words(catalogue, demo_run):
    return (catalogue, "--checkpoint", demo_run / "best", "--shard-rows", SHARD, "--batch-size", 4, "--out")


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """{file name: table} of a job that one process did without a break."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start("infer", *words, folder / "job", log=folder / "log")) == 1, (folder / "log").read_text()
    said = (folder / "log").read_text()
    assert f"100 rows in {folder / 'job' / 'labels'}" in said
    assert "3 of 100 images could not be read" in said
    return results(folder / "job")


def results(job: Path) -> dict:
    """{file name: table}; of anything else that lies there reading fails."""
    return {name: pq.read_table(job / "labels" / name) for name in sorted(os.listdir(job / "labels"))}


def as_rank(rank: int, then=None) -> None:
    """What torchrun tells one of two processes, and a further fault."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    if then:
        then()


def test_a_job_holds_each_row_once_and_says_what_could_not_be_read(whole, catalogue):
    rows = [row for table in whole.values() for row in table.to_pylist()]
    assert [row["image"] for row in rows] == [str(i) for i in range(ROWS)]
    assert {row["image"]: row["error"] for row in rows if row["error"]} == BAD
    assert all((row["articleType"] is None) == (row["image"] in BAD) for row in rows)
    assert [len(table) for table in whole.values()] == [SHARD] * 14 + [2]


def test_workers_killed_at_random_moments_and_started_again_end_with_the_same_files(words, whole, tmp_path):
    rng = random.Random(0)
    for _ in range(5):
        dying = functools.partial(die_at, rng.randint(1, 25), "data.shards", "_row", after=rng.random() < 0.5)
        faults = [functools.partial(as_rank, rank, dying) for rank in range(2)]
        pair = [start("infer", *words, tmp_path / "job", log=tmp_path / "log", fault=fault) for fault in faults]
        codes = [finish(process) for process in pair]
        assert KILLED in codes, (tmp_path / "log").read_text()
    done = [path.name for path in (tmp_path / "job" / "labels").glob("*.parquet")]
    assert 0 < len(done) < SHARDS, "otherwise there is nothing to go on with"
    assert all(pq.read_table(tmp_path / "job" / "labels" / name) == whole[name] for name in done)
    assert finish(start("infer", *words, tmp_path / "job", log=tmp_path / "log")) == 1
    assert results(tmp_path / "job") == whole


@pytest.mark.parametrize(
    ("module", "name", "count", "after"),
    [
        ("jobs", "replace_file", 1, False),  # job.json is not there yet
        ("durable", "sync_file", 1, True),  # it is, but by another name
        ("output", "give_name", 2, False),  # a file of answers is whole but has no name
        ("output", "give_name", 2, True),
        ("os", "fsync", 4, True),
    ],
)
def test_killed_at_the_worst_moments_it_goes_on(words, whole, tmp_path, module, name, count, after):
    fault = functools.partial(die_at, count, module, name, after=after)
    assert finish(start("infer", *words, tmp_path / "job", log=tmp_path / "log", fault=fault)) == KILLED
    assert finish(start("infer", *words, tmp_path / "job", log=tmp_path / "log")) == 1, (tmp_path / "log").read_text()
    assert results(tmp_path / "job") == whole


def meet_and_note(folder: Path, rank: int) -> None:
    """Have no picture read before both processes are at work, and note each file of answers that is finished."""
    labeller, output = importlib.import_module("labeller"), importlib.import_module("output")
    decode, give_name = labeller.decode, output.give_name

    def waiting(picture):
        (folder / f"at work {rank}").touch()
        while not (folder / f"at work {1 - rank}").exists():
            time.sleep(0.01)
        return decode(picture)

    def noting(part, path):
        give_name(part, path)
        with open(folder / f"done {rank}", "a") as file:
            file.write(f"{path.name}\n")

    labeller.decode, output.give_name = waiting, noting


def test_two_processes_share_the_work_and_none_is_done_twice(words, whole, tmp_path):
    pair = []
    for rank in range(2):
        fault = functools.partial(as_rank, rank, functools.partial(meet_and_note, tmp_path, rank))
        pair.append(start("infer", *words, tmp_path / "job", log=tmp_path / f"log{rank}", fault=fault))
    assert [finish(process) for process in pair] == [0, 0], "torchrun takes anything else for a crash"
    done = [(tmp_path / f"done {rank}").read_text().split() for rank in range(2)]
    assert min(map(len, done)) >= 1
    assert sorted(done[0] + done[1]) == sorted(whole)
    assert (done[0][0], done[1][0]) == ("00000.parquet", "00007.parquet"), "each begins at a place of its own"
    assert results(tmp_path / "job") == whole
    first, second = ((tmp_path / f"log{rank}").read_text() for rank in range(2))
    assert "100/100" in first, "the bar counts what all have done"
    assert "3 of 100 images could not be read" in first
    assert second == ""


def test_what_a_process_holds_is_waited_for_and_taken_over_when_it_dies(words, whole, tmp_path):
    stopping = functools.partial(die_at, 5, "labeller", "decode", signal.SIGSTOP)
    stopped = start("infer", *words, tmp_path / "job", log=tmp_path / "stopped", fault=stopping)
    labels = tmp_path / "job" / "labels"
    try:
        while not list(labels.glob(".00000.parquet.*.part")):
            stopped.join(0.05)
            assert stopped.is_alive(), (tmp_path / "stopped").read_text()
        other = start("infer", *words, tmp_path / "job", log=tmp_path / "log")
        while len(done := list(labels.glob("[0-9]*.parquet"))) < SHARDS - 1:
            other.join(0.05)
            assert other.is_alive(), (tmp_path / "log").read_text()
        other.join(2)
        assert other.is_alive(), "it does not end before all is done"
        assert labels / "00000.parquet" not in done
    finally:  # else the suite would wait for it at its end
        stopped.kill()
        stopped.join()
    assert finish(other) == 1
    assert results(tmp_path / "job") == whole


def test_torchrun_gives_what_one_process_gives(words, whole, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    command = [str(word) for word in (*torchrun, ROOT / "infer.py", *words, tmp_path / "job")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "3 of 100 images could not be read" in done.stderr
    assert done.stderr.count("checkpoint ") == 1, "one of them speaks"
    assert results(tmp_path / "job") == whole


def small_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))


def test_a_full_disk_is_one_line_and_leaves_no_half_file(words, whole, tmp_path):
    assert finish(start("infer", *words, tmp_path / "job", log=tmp_path / "log", fault=small_disk)) == 2
    said = (tmp_path / "log").read_text().splitlines()[-1]
    assert said.startswith(f"error: cannot write --out {tmp_path / 'job'}: ")
    assert said.endswith("File too large; start the command again to go on")
    assert results(tmp_path / "job") == {}
    assert finish(start("infer", *words, tmp_path / "job", log=tmp_path / "log")) == 1
    assert results(tmp_path / "job") == whole


@pytest.fixture(scope="module")
def mixed(pictures, tmp_path_factory):
    """A folder of five photos, one of them no picture; a tar of three, an empty one, and one that is cut short."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "photos").mkdir()
    for i, data in enumerate([*pictures[:4], b"<html>404</html>"]):
        (folder / "photos" / f"{i}.png").write_bytes(data)
    for name, count in (("three.tar", 3), ("empty.tar", 0), ("cut.tar", 2)):
        with tarfile.open(folder / name, "w") as tar:
            for i in range(count):
                entry = tarfile.TarInfo(f"{name[0]}{i}.png")
                entry.size = len(pictures[i])
                tar.addfile(entry, io.BytesIO(pictures[i]))
    os.truncate(folder / "cut.tar", 1024 + len(pictures[0]) + 1000)
    return folder


def test_photos_and_tars_in_a_job_and_in_a_file(command, mixed, demo_run, tmp_path):
    inputs = (mixed / "photos", mixed, mixed / "*.tar", "--checkpoint", demo_run / "best")
    done = command("infer.py", *inputs, "--out", tmp_path / "all.parquet")
    assert done.returncode == 1, done.stderr
    assert f"{mixed}: took the image files; 3 tar files left out" in done.stderr
    assert "wrote 10 rows" in done.stderr
    plain = pq.read_table(tmp_path / "all.parquet").to_pylist()
    names = [str(mixed / "photos" / f"{i}.png") for i in range(5)]
    assert [row["image"] for row in plain] == [*names, "c0.png", str(mixed / "cut.tar"), "t0.png", "t1.png", "t2.png"]
    assert [row["error"] for row in plain if row["error"]] == [
        "not an image", "damaged or cut short after 1 pictures: c1.png is not whole"
    ]  # fmt: skip
    for _ in range(2):  # once more it has nothing to do, and says the same
        done = command("infer.py", *inputs, "--out", tmp_path / "job", "--shard-rows", 2)
        assert done.returncode == 1, done.stderr
        assert "2 of 10 images could not be read" in done.stderr
    tables = results(tmp_path / "job")
    assert [len(table) for table in tables.values()] == [2, 2, 1, 2, 0, 3]
    for one, other in zip(plain, pq.read_table(tmp_path / "job" / "labels").to_pylist(), strict=True):
        for name, value in one.items():
            assert other[name] == (pytest.approx(value, abs=2e-4) if isinstance(value, float) else value)
    shown = command("infer.py", mixed / "three.tar", "--json", "--checkpoint", demo_run / "best")
    assert shown.returncode == 0, shown.stderr
    answers = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [(a["image"], a["attributes"]["articleType"]["label"]) for a in answers] == [
        (row["image"], row["articleType"]) for row in plain[-3:]
    ]


def test_another_job_on_the_same_folder_is_refused(command, mixed, demo_run, with_config, tmp_path):
    job = ("--out", tmp_path / "job")
    best = ("--checkpoint", demo_run / "best")
    done = command("infer.py", mixed / "photos" / "0.png", *best, *job)
    assert done.returncode == 0, done.stderr
    other = with_config(demo_run / "best", lambda config: config.pop("calibration"))
    for words, differing in [
        ((mixed / "photos" / "0.png", "--checkpoint", other), "checkpoint differs"),
        ((mixed / "photos" / "1.png", *best), "inputs differs"),
        ((mixed / "photos" / "0.png", *best, "--independent", "--shard-rows", 5), "independent, shard_rows differ"),
        ((mixed / "photos" / "0.png", *best, "--amp", "bf16"), "amp differs"),
    ]:
        done = command("infer.py", *words, *job)
        assert done.returncode == 2
        line = f"error: --out {tmp_path / 'job'} holds another job (its {differing}); name another folder"
        hints = {
            "inputs differs": f"; for what is new since, also add --skip {tmp_path / 'job'}",
            "amp differs": ", or leave out --amp",
        }
        assert done.stderr.splitlines()[-1] == line + hints.get(differing, "")
    os.truncate(tmp_path / "job" / "labels" / "00000.parquet", 100)
    done = command("infer.py", mixed / "photos" / "0.png", *best, *job)
    assert done.returncode == 2
    assert "00000.parquet is damaged; delete it and start again" in done.stderr.splitlines()[-1]
    (tmp_path / "job" / "job.json").write_text("{")
    done = command("infer.py", mixed / "photos" / "0.png", *best, *job)
    assert (done.returncode, "job.json is damaged" in done.stderr.splitlines()[-1]) == (2, True)
    (tmp_path / "job" / "job.json").unlink()
    done = command("infer.py", mixed / "photos" / "1.png", *best, *job)  # whose answers these are nobody knows now
    assert (done.returncode, "holds answers, but " in done.stderr.splitlines()[-1]) == (2, True), done.stderr
    (tmp_path / "job" / "job.json").mkdir()  # it cannot be read, like one of another user's
    done = command("infer.py", mixed / "photos" / "0.png", *best, *job)
    assert (done.returncode, "error: cannot read " in done.stderr.splitlines()[-1]) == (2, True), done.stderr


def test_a_job_on_a_dataset_that_has_moved_on_says_how_to_go_on_with_it(tmp_path):
    Job(tmp_path, {"inputs": "one", "hub": ["hub:owner/shop@1"]}, [], [], Crew(0, 1))
    with pytest.raises(UserError, match=r"its inputs, hub differ.*, or go on with hub:owner/shop@1$"):
        Job(tmp_path, {"inputs": "two", "hub": ["hub:owner/shop@2"]}, [], [], Crew(0, 1))


def test_a_lock_that_cannot_be_opened_is_one_line(command, mixed, demo_run, tmp_path):
    (tmp_path / "job" / "locks" / "job").mkdir(parents=True)  # as one of another user's can't be
    done = command("infer.py", mixed / "photos", "--checkpoint", demo_run / "best", "--out", tmp_path / "job")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot write --out {tmp_path / 'job'}: "), done.stderr


@pytest.mark.parametrize(
    ("words", "crew", "message"),
    [
        (["--out", "job", "--json"], 1, "--out job is a folder, which goes without --json and --plot"),
        (["--out", "{file}"], 1, "cannot write --out {file}: File exists"),
        (["--out", "labels.csv"], 2, "2 processes share their work through a folder: name one with --out DIR"),
        ([], 2, "2 processes share their work through a folder"),
    ],
)
def test_mistakes_are_one_line(command, catalogue, demo_run, monkeypatch, tmp_path, words, crew, message):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WORLD_SIZE", str(crew))
    words = [word.format(file=tmp_path / "file") for word in words]
    done = command("infer.py", catalogue, *words, "--checkpoint", demo_run / "best", cwd=tmp_path)
    assert done.returncode == 2
    assert message.format(file=tmp_path / "file") in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
