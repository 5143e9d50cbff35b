"""What happens to long runs: they are killed, preempted, run out of disk, and their files rot."""

import errno
import functools
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

import train
from models.checkpoint import sealed
from state import TrainingState
from tests.faults.conftest import assert_same
from tests.faults.processes import die_at, finish, start

KILLED = -signal.SIGKILL


def test_killed_at_eight_random_steps_and_resumed_it_ends_as_if_never_killed(options, whole, tmp_path):
    rng = random.Random(0)
    words = (*options, "--out", tmp_path / "run")
    for _ in range(8):  # into the second epoch
        fault = functools.partial(die_at, rng.randint(1, 9), "train", "train_step", after=rng.random() < 0.5)
        code = finish(start("train", *words, log=tmp_path / "log", fault=fault))
        assert code == KILLED, (tmp_path / "log").read_text()
        words = ("--resume", "--out", tmp_path / "run")
    assert finish(start("train", *words, log=tmp_path / "log")) == 0
    assert (tmp_path / "log").read_text().count("going on with") == 8
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        ("os", "replace", 6),  # between the two renames of a save
        ("os", "replace", 7),
        ("os", "fsync", 12),  # in the middle of a save
        ("train", "evaluate", 2),
        ("train", "replace_file", 1),  # all is done but metrics.json
    ],
)
def test_killed_within_a_save_or_a_scoring_it_ends_as_if_never_killed(options, whole, tmp_path, module, name, count):
    fault = functools.partial(die_at, count, module, name)
    words = (*options, "--out", tmp_path / "run")
    code = finish(start("train", *words, log=tmp_path / "log", fault=fault))
    assert code == KILLED, (tmp_path / "log").read_text()
    assert finish(start("train", "--resume", "--out", tmp_path / "run", log=tmp_path / "log")) == 0
    assert_same(tmp_path / "run", whole)


def test_killed_within_its_first_save_it_can_be_begun_again(options, whole, tmp_path):
    words, log = (*options, "--out", tmp_path / "run"), tmp_path / "log"
    fault = functools.partial(die_at, 1, "models.checkpoint", "sync_folder")  # all is written, nothing in its place
    assert finish(start("train", *words, log=log, fault=fault)) == KILLED
    assert (tmp_path / "run" / "last.new" / "config.json").is_file() and not (tmp_path / "run" / "last").exists()
    assert finish(start("train", *words, log=log)) == 0, log.read_text()
    assert_same(tmp_path / "run", whole)


def test_a_disk_too_small_for_the_first_save_is_said_to_start_again(options, tmp_path):
    words, log = (*options, "--out", tmp_path / "run"), tmp_path / "log"
    assert finish(start("train", *words, log=log, fault=functools.partial(small_disk, 50_000))) == 2
    assert log.read_text().rstrip().endswith("if the disk is full make room, then start again")
    assert finish(start("train", *words, "--epochs", 1, log=log)) == 0, log.read_text()


def stopped(options, folder, calls=15):
    """A run killed at the `calls`th step."""
    fault = functools.partial(die_at, calls, "train", "train_step")
    process = start("train", *options, "--out", folder, log=folder.with_name("log"), fault=fault)
    assert finish(process) == KILLED
    with pytest.raises(ProcessLookupError):  # its group is empty: no worker is left
        os.killpg(process.pid, 0)
    return folder


@pytest.fixture(scope="module")
def killed(options, tmp_path_factory):
    return stopped(options, tmp_path_factory.mktemp("killed") / "run")


def flip(path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1 << 4
    path.write_bytes(data)


def test_the_loss_scale_of_fp16_goes_on_where_it_was(options, tmp_path):
    run = stopped((*options, "--amp", "fp16"), tmp_path / "run", calls=3)
    config = json.loads((run / "last" / "config.json").read_text())
    config["resume"]["scaler"] |= {"scale": 512.0, "_growth_tracker": 7}
    files = {name: (run / "last" / name).read_bytes() for name in ("adapter.safetensors", "optimizer.safetensors")}
    (run / "last" / "config.json").write_bytes(sealed(config, files))
    fault = functools.partial(die_at, 3, "train", "train_step")  # two steps and a save later
    assert finish(start("train", "--resume", "--out", run, log=tmp_path / "log", fault=fault)) == KILLED
    after = json.loads((run / "last" / "config.json").read_text())
    assert after["progress"]["step"] == config["progress"]["step"] + 2
    assert (after["resume"]["scaler"]["scale"], after["resume"]["scaler"]["_growth_tracker"]) == (512.0, 9)


DAMAGE = {
    "a bit of the weights": lambda last: flip(last / "adapter.safetensors", 0.7),
    "a bit of the optimizer's state": lambda last: flip(last / "optimizer.safetensors", 0.7),
    "a bit of a header": lambda last: flip(last / "adapter.safetensors", 0.0001),
    "a bit of the config": lambda last: flip(last / "config.json", 0.5),
    "cut short": lambda last: os.truncate(last / "optimizer.safetensors", 5000),
    "empty": lambda last: os.truncate(last / "config.json", 0),
    "a file gone": lambda last: (last / "optimizer.safetensors").unlink(),
    "all gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_found_and_moved_aside(killed, tmp_path, capsys, damage):
    run = shutil.copytree(killed, tmp_path / "run")
    DAMAGE[damage](run / "last")
    assert TrainingState.sound(SimpleNamespace(last=run / "last")) == run / "last.previous"
    assert f"going on from the one before, {run / 'last.previous'}" in capsys.readouterr().out
    assert not (run / "last").exists()
    assert (run / "last.damaged").exists() == (damage != "all gone")


def test_from_the_checkpoint_before_a_damaged_one_a_run_ends_as_if_nothing_had_been(killed, whole, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    DAMAGE["cut short"](run / "last")
    assert finish(start("train", "--resume", "--out", run, log=tmp_path / "log")) == 0
    said = (tmp_path / "log").read_text()
    assert f"going on from the one before, {run / 'last.previous'}" in said
    assert "at step 12 of 42" in said
    assert_same(run, whole)


def failing_disk() -> None:
    read = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path.name == "optimizer.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    Path.read_bytes = broken


def test_a_disk_that_fails_is_no_damage(killed, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    assert finish(start("train", "--resume", "--out", run, log=tmp_path / "log", fault=failing_disk)) == 2
    assert "Input/output error" in (tmp_path / "log").read_text().splitlines()[-1]
    assert (run / "last").is_dir() and not (run / "last.damaged").exists()


def test_both_checkpoints_damaged_is_one_line(killed, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    for name in ("last", "last.previous"):
        flip(run / name / "adapter.safetensors", 0.5)
    assert finish(start("train", "--resume", "--out", run, log=tmp_path / "log")) == 2
    assert f"error: {run / 'last.previous' / 'adapter.safetensors'} is damaged" in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


def small_disk(limit: int) -> None:
    """No file of this process may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_disk_that_fills_up_in_the_middle_of_a_save_loses_nothing(killed, whole, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    room = (run / "last" / "adapter.safetensors").stat().st_size + 1000  # the weights fit, the optimizer does not
    before = load_file(run / "last" / "adapter.safetensors")
    fault = functools.partial(small_disk, room)
    assert finish(start("train", "--resume", "--out", run, log=tmp_path / "log", fault=fault)) == 2
    said = (tmp_path / "log").read_text()
    assert (
        "File too large; if the disk is full make room, then go on with: python train.py --resume"
        in said.splitlines()[-1]
    )
    assert "Traceback" not in said
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"last", "last.previous"}
    assert before.keys() == load_file(run / "last" / "adapter.safetensors").keys()
    assert finish(start("train", "--resume", "--out", run, log=tmp_path / "log")) == 0
    assert_same(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_micro_batch_saves_and_has_its_own_exit_code(options, whole, tmp_path, number):
    run = tmp_path / "run"
    fault = functools.partial(die_at, 9, "step", "attribute_losses", number)
    words = (*options, "--save-every", 1000, "--out", run)
    assert finish(start("train", *words, log=tmp_path / "log", fault=fault)) == train.STOPPED
    assert f"go on with: python train.py --resume --out {run}" in (tmp_path / "log").read_text()
    assert finish(start("train", "--resume", "--out", run, log=tmp_path / "log")) == 0
    assert "at step 9 of 42" in (tmp_path / "log").read_text()
    assert_same(run, whole)


def test_a_signal_within_a_window_does_not_wait_for_its_end(options, tmp_path):
    fault = functools.partial(die_at, 10, "step", "attribute_losses", signal.SIGTERM)
    words = (*options, "--accum", 4, "--out", tmp_path / "run")
    assert finish(start("train", *words, log=tmp_path / "log", fault=fault)) == train.STOPPED
    fault = functools.partial(die_at, 1, "train", "train_step")
    finish(start("train", "--resume", "--out", tmp_path / "run", log=tmp_path / "log", fault=fault))
    assert "at step 2 of 12" in (tmp_path / "log").read_text(), "the tenth micro-batch is the second of its window"


def test_a_signal_while_scoring_does_not_wait_for_the_scores(options, whole, tmp_path):
    run = tmp_path / "run"
    fault = functools.partial(die_at, 2, "evaluate", "predict", signal.SIGTERM)
    assert finish(start("train", *options, "--out", run, log=tmp_path / "log", fault=fault)) == train.STOPPED
    assert finish(start("train", "--resume", "--out", run, log=tmp_path / "log")) == 0
    assert_same(run, whole)


def two_signals() -> None:
    die_at(5, "step", "attribute_losses", signal.SIGTERM)
    die_at(5, "step", "attribute_losses", signal.SIGTERM, after=True)


def test_a_second_signal_ends_it_at_once(options, tmp_path):
    process = start("train", *options, "--out", tmp_path / "run", log=tmp_path / "log", fault=two_signals)
    assert finish(process) == 128 + signal.SIGTERM
    assert "stopped and saved" not in (tmp_path / "log").read_text()


def test_a_second_run_on_the_same_folder_refuses(options, tmp_path):
    stopping = functools.partial(die_at, 3, "train", "train_step", signal.SIGSTOP)
    first = start("train", *options, "--out", tmp_path / "run", log=tmp_path / "log", fault=stopping)
    try:
        while not (tmp_path / "run" / "last").exists():
            first.join(0.05)
            assert first.is_alive(), (tmp_path / "log").read_text()
        before = (tmp_path / "run" / "options.json").read_text()
        for words in ((*options, "--seed", 1, "--out", tmp_path / "run"), ("--resume", "--out", tmp_path / "run")):
            assert finish(start("train", *words, log=tmp_path / "second")) == 2
            said = (tmp_path / "second").read_text().splitlines()[-1]
            assert said == f"error: --out {tmp_path / 'run'} is in use by a run that has not ended; name another folder"
        assert (tmp_path / "run" / "options.json").read_text() == before
    finally:
        first.kill()
        first.join()
    fault = functools.partial(die_at, 1, "train", "train_step")
    again = start("train", "--resume", "--out", tmp_path / "run", log=tmp_path / "log", fault=fault)
    assert finish(again) == KILLED, "the lock died with its process"
