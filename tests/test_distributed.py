"""Several processes train as one: the same steps, the same scores, and nothing lost when one of them dies."""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distributed
import startup
from errors import UserError
from models.checkpoint import sealed
from options import parse_args
from runs import choose, options_text, started_with
from tests import twenty_steps
from tests.faults.conftest import assert_same
from tests.torchrun import ROOT, finish, run, torchrun


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What trains, after 20 steps in fp64 of the same micro-batches, shared by 1, 2 and 3 processes; step by step."""
    folder = tmp_path_factory.mktemp("steps")
    twenty_steps.main(folder / "1.safetensors")
    for processes in (2, 3):
        run(processes, ROOT / "tests" / "twenty_steps.py", folder / f"{processes}.safetensors")
    return {processes: load_file(folder / f"{processes}.safetensors") for processes in (1, 2, 3)}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_share_a_batch_step_as_one_with_all_of_it(steps, processes):
    """Windows of two micro-batches with missing labels, clipping and AdamW; the last micro-batch has a single row, so
    that some processes have none."""
    alone, shared = steps[1], steps[processes]
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        assert (tensor - shared[name]).abs().max() < 1e-9, name
    assert (alone["19/heads.levels.0.weight"] - alone["0/heads.levels.0.weight"]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def words(cache_dir):
    """A run of 42 steps on drawings, saved every second step. Dropout would depend on who shares a batch."""
    words = ("--data", "demo", "--limit", 400, "--epochs", 2, "--save-every", 2, "--dropout", 0)
    return (*words, "--cache-dir", cache_dir)


@pytest.fixture(scope="module")
def alone(command, words, tmp_path_factory):
    """The folder of such a run, in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = command("train.py", *words, "--batch-size", 16, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pair(words, tmp_path_factory):
    """The folder of the same run, shared by two processes; and what they said."""
    out = tmp_path_factory.mktemp("pair") / "run"
    return out, run(2, "train.py", *words, "--batch-size", 8, "--out", out)


def assert_close(run: Path, other: Path) -> None:
    """In all that was trained; sums are taken in another order, so not to the bit."""
    a, b = (load_file(folder / "last" / "adapter.safetensors") for folder in (run, other))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=1e-4)


def test_two_processes_train_what_one_trains_with_batches_of_both(alone, pair):
    out, said = pair
    assert_close(out, alone)
    assert said.count("trained: ") == 1, "one speaks for all"
    assert "a step is 1 x 16 pictures (2 x --batch-size 8), shared by 2 processes; peak learning rate 0.001" in said
    logged = EventAccumulator(str(out), purge_orphaned_data=False).Reload().Scalars("train/loss")
    assert [event.step for event in logged] == [0, 10, 20, 30, 40]
    scores = [json.loads((folder / "metrics.json").read_text()) for folder in (alone, out)]
    assert scores[0]["rows"] == scores[1]["rows"]
    assert {n: a["rows"] for n, a in scores[0]["attributes"].items()} == {
        n: a["rows"] for n, a in scores[1]["attributes"].items()
    }


def test_two_processes_train_on_a_base_in_8_bits_as_one_does(words, tmp_path):
    words = (*words, "--limit", 200, "--epochs", 1, "--base", "int8")
    for processes in (1, 2):  # both under torchrun: rounding depends on how many threads there are
        run(processes, "train.py", *words, "--batch-size", 16 // processes, "--out", tmp_path / str(processes))
    assert_close(tmp_path / "1", tmp_path / "2")


def test_scores_of_three_processes_are_those_of_one(command, alone, cache_dir, tmp_path):
    """Of 400 rows one process has a row more than the others: none is left out, none counts twice."""
    options = ("--checkpoint", alone / "best", "--data", "demo", "--limit", 400, "--cache-dir", cache_dir)
    options = (*options, "--split", "all", "--json")
    assert command("evaluate.py", *options, tmp_path / "1.json").returncode == 0
    said = run(3, "evaluate.py", *options, tmp_path / "3.json")
    assert said.count("path_accuracy") == 3, "one speaks for all"
    one, three = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 3))
    assert one["rows"] == three["rows"] == 400
    assert one["attributes"] == three["attributes"]
    assert one["joint"] == three["joint"]


def progress(out: Path) -> int:
    """How many steps the newest checkpoint has."""
    try:
        return json.loads((out / "last" / "config.json").read_text())["progress"]["step"]
    except FileNotFoundError:  # between the two renames of a save, or before the first
        return 0


def wait_for(process: subprocess.Popen, out: Path, step: int) -> None:
    while progress(out) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def workers(process: subprocess.Popen) -> list[int]:
    """The ids of torchrun's processes, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environment = {int(pid): Path(f"/proc/{pid}/environ").read_text() for pid in children}
    return sorted(environment, key=lambda pid: int(re.search(r"\0RANK=(\d+)", environment[pid]).group(1)))


def test_a_killed_worker_is_started_again_and_goes_on_from_the_last_checkpoint(words, pair, tmp_path):
    """The first one; of the others see below."""
    out = tmp_path / "run"
    process = torchrun(2, "train.py", *words, "--batch-size", 8, "--out", out, restarts=1)
    wait_for(process, out, 8)
    os.kill(workers(process)[0], signal.SIGKILL)
    code, said = finish(process)
    assert code == 0, said
    step = int(re.search(r"going on with .* at step (\d+) of 42", said).group(1))
    assert 8 <= step < 42
    assert_same(out, pair[0])


def test_of_three_processes_the_sums_are_the_same_bits_after_a_restart_too(words, tmp_path):
    """Where three numbers are added their order shows; and each process drops what is its own to drop."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    words = (*words, "--batch-size", 4, "--dropout", 0.05, "--drop-patches", 0.2)
    words += ("--with-price", "--inputs", "image+title")
    run(3, "train.py", *words, "--out", whole)
    process = torchrun(3, "train.py", *words, "--out", out, restarts=1)
    wait_for(process, out, 8)
    os.kill(workers(process)[1], signal.SIGKILL)
    code, said = finish(process)
    assert code == 0, said
    assert_same(out, whole)


@pytest.fixture(scope="module")
def stopped(words, tmp_path_factory):
    """The folder of such a run that was stopped on its way."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    process = torchrun(2, "train.py", *words, "--batch-size", 8, "--out", out)
    wait_for(process, out, 8)
    process.send_signal(signal.SIGTERM)  # which torchrun passes on: all stop after the same step
    _, said = finish(process)
    assert "stopped and saved" in said
    assert 8 <= progress(out) < 42
    return out


@pytest.mark.parametrize("processes", [1, 3])
def test_a_run_goes_on_with_another_number_of_processes(stopped, alone, tmp_path, processes):
    out = shutil.copytree(stopped, tmp_path / "run")
    said = run(processes, "train.py", "--resume", "--out", out)
    assert f"at step {progress(stopped)} of 42" in said
    assert f"(2 x --batch-size 8), shared by {processes} processes" in said
    assert_close(out, alone)


def test_a_run_goes_on_with_more_processes_than_a_micro_batch_has_pictures(command, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 60, "--epochs", 1, "--cache-dir", cache_dir, "--out", tmp_path / "run")
    done = command("train.py", *words, "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "run" / "best")
    config = tmp_path / "run" / "last" / "config.json"
    files = {path.name: path.read_bytes() for path in config.parent.iterdir() if path != config}
    saved = json.loads(config.read_text())
    saved["progress"] |= {"step": 3, "epochs_scored": 0}
    config.write_bytes(sealed(saved, files))
    assert "at step 3 of" in run(3, "train.py", "--resume", "--out", tmp_path / "run")


def test_a_restart_does_not_go_on_with_a_run_of_other_options(words, alone):
    before = (alone / "last" / "config.json").read_bytes()
    options = [*map(str, words), "--seed", "5", "--out", str(alone)]
    for restarted in (False, True):
        with contextlib.ExitStack() as held, pytest.raises(UserError, match="already holds a run"):
            choose(options, torch.device("cpu"), held, restarted)
    assert (alone / "last" / "config.json").read_bytes() == before


def test_a_restart_knows_its_run_though_the_hub_has_moved_on(tmp_path):
    (tmp_path / "last").mkdir()

    def options(*words):
        return parse_args(["--out", str(tmp_path), *words])

    given = options("--data", "hub:owner/shoes", "--amp")
    run = argparse.Namespace(
        **vars(given) | {"data": "hub:owner/shoes@1234", "amp": "bf16", "backbone": "vit", "processes": 3}
    )
    (tmp_path / "options.json").write_text(options_text(run))
    assert started_with(given)
    assert started_with(options("--amp")), "which catalogue was left open"
    assert not started_with(options("--data", "hub:owner/boots", "--amp"))
    assert not started_with(options("--data", "hub:owner/shoes"))
    assert not started_with(options("--data", "hub:owner/shoes", "--amp", "--seed", "5"))

    with contextlib.ExitStack() as held:  # and asks the hub for nothing
        words = ["--out", str(tmp_path), "--data", "hub:owner/shoes", "--amp"]
        assert choose(words, torch.device("cpu"), held, restarted=True).data == "hub:owner/shoes@1234"


def test_a_restart_knows_its_run_though_what_it_began_from_is_gone(demo_run, tmp_path):
    first = shutil.copytree(demo_run / "best", tmp_path / "first")
    words = ["--out", str(tmp_path / "run"), "--data", "demo", "--init-from", str(first), "--epochs", "2"]

    def chosen(restarted: bool) -> argparse.Namespace:
        with contextlib.ExitStack() as held:
            return choose(words, torch.device("cpu"), held, restarted)

    began = chosen(restarted=True)  # by a process that died before it had saved anything
    assert (began.resume, began.backbone) == (False, "demo")
    shutil.copytree(demo_run / "last", tmp_path / "run" / "last")
    shutil.rmtree(first)
    again = chosen(restarted=True)
    assert (again.resume, again.backbone, again.epochs) == (True, "demo", 2)
    words[-1] = "3"
    with pytest.raises(UserError, match="no checkpoint at"):  # another run, which would begin from what is gone
        chosen(restarted=True)


def test_all_know_of_a_restart_that_one_machine_has_counted(tmp_path):
    (tmp_path / "ask.py").write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import distributed\n"
        "with distributed.joined():\n"
        "    os.environ['TORCHELASTIC_RESTART_COUNT'] = str(distributed.rank())\n"
        "    open(f'{sys.argv[1]}/{distributed.rank()}', 'w').write(str(distributed.restarted()))\n"
    )
    run(2, tmp_path / "ask.py", tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["True", "True"]


def test_a_signal_within_a_window_of_two_processes_does_not_wait_for_its_end(words, tmp_path):
    out = tmp_path / "run"
    process = torchrun(2, "train.py", *words, "--limit", 2000, "--batch-size", 1, "--accum", 1000, "--out", out)
    while not (out / "last").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    time.sleep(0.5)  # of the many that 800 micro-batches take
    os.kill(workers(process)[1], signal.SIGTERM)  # the other one is told by it
    _, said = finish(process)
    assert "stopped and saved" in said
    assert progress(out) == 0, said


def test_restarts_need_a_folder_to_find_again(words, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with contextlib.ExitStack() as held, pytest.raises(UserError, match="max-restarts: name the run's folder with"):
        choose(list(map(str, words)), torch.device("cpu"), held, False)


@pytest.mark.parametrize(
    ("quota", "cores"), [("400000 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("", 8)]
)
def test_a_containers_quota_counts(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    (tmp_path / "cpu.max").write_text(quota)
    assert startup.cores(tmp_path / "cpu.max") == cores
    assert startup.cores(tmp_path / "none") == 8


def test_processes_share_the_cores(monkeypatch):
    given = []
    for name, value in {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    distributed.share_cores()
    assert given == [4]


@pytest.mark.parametrize(
    ("surrounding", "message"),
    [
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "2 processes share 1 GPUs: --nproc-per-node 1"),
        (
            {"TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "4", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ),
    ],
)
def test_what_processes_cannot_have_is_told(monkeypatch, surrounding, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "GPU" in message)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in ({"TORCHELASTIC_RUN_ID": "none"} | surrounding).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), distributed.joined():
        pass
