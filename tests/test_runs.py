"""A run's folder: it goes on as if never stopped, mistakes leave none, and none that is there comes to harm."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from data.schema import FASHION_FILE
from models.backbone import DEMO_WEIGHTS
from models.checkpoint import amend_config, load_checkpoint, read_config

ROOT = Path(__file__).parents[1]
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def test_a_file_system_without_locks_is_one_line(command, cache_dir, tmp_path, monkeypatch):
    """As Lustre may be mounted. A lock that is a file alone would outlive a killed process."""

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    done = command("train.py", "--data", "demo", "--limit", 100, "--cache-dir", cache_dir, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'run'}: its file system has no locks (flock); name a folder on another\n"


def test_ctrl_c_leaves_a_usable_checkpoint_and_resuming_ends_as_if_never_stopped(command, cache_dir, tmp_path, request):
    options = ("--data", "demo", "--limit", 400, "--epochs", 2, "--accum", 3, "--cache-dir", cache_dir)
    assert command("train.py", *options, "--out", tmp_path / "whole").returncode == 0

    taken = request.getfixturevalue("ctrl_c")
    done = command("train.py", *options, "--out", tmp_path / "cut")
    assert done.returncode == train.STOPPED
    assert len(taken) == 5, "the step is finished, in the middle of an epoch, and no other begun"
    assert f"go on with: python train.py --resume --out {tmp_path / 'cut'}" in done.stdout
    load_checkpoint(tmp_path / "cut" / "last")
    amend_config(tmp_path / "cut" / "last", calibration=read_config(tmp_path / "whole" / "best")["calibration"])

    done = command("train.py", "--resume", "--out", tmp_path / "cut", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "at step 5 of" in done.stdout
    assert "calibration" not in read_config(tmp_path / "cut" / "last"), "it was of other weights"
    for name in ("best", "last"):
        whole, cut = (load_file(tmp_path / run / name / "adapter.safetensors") for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert (tmp_path / "whole" / "metrics.json").read_text() == (tmp_path / "cut" / "metrics.json").read_text()
    events = {run: EventAccumulator(str(tmp_path / run)).Reload() for run in ("whole", "cut")}
    for tag in ("train/learning_rate", "val/mean_accuracy"):
        steps = {run: [event.step for event in e.Scalars(tag)] for run, e in events.items()}
        assert steps["whole"] == steps["cut"], tag


def test_a_run_goes_on_neither_from_another_base_nor_with_other_rows_or_labels(
    command, kaggle_folder, cache_dir, tmp_path
):
    run, table = tmp_path / "run", (kaggle_folder / "styles.csv").read_text(encoding="utf-8").splitlines()
    words = ("--data", kaggle_folder, "--backbone", "demo", "--epochs", 1, "--cache-dir", cache_dir, "--out", run)
    assert command("train.py", *words).returncode == 0
    base = load_file(DEMO_WEIGHTS)
    save_file(base | {"norm.bias": base["norm.bias"] + 1}, tmp_path / "other.safetensors")
    men, women = ([line.replace(f",{a},", f",{b},") for line in table] for a, b in (("Women", "Men"), ("Men", "Women")))
    assert men != table != women
    for lines, name in (([table[0], *reversed(table[1:])], "reversed"), (men, "men"), (women, "women")):
        shutil.copytree(kaggle_folder, tmp_path / name)
        (tmp_path / name / "styles.csv").write_text("\n".join(lines), encoding="utf-8")
    for more, message in (
        (("--weights", tmp_path / "other.safetensors"), "--resume: the base weights are"),
        (("--data", tmp_path / "reversed"), "was trained on: its ids, or their order, differ"),
        (("--data", tmp_path / "men"), "was trained on: its attributes differ"),
        (("--data", tmp_path / "women"), "was trained on: its attributes differ"),
    ):
        done = command("train.py", "--resume", "--out", run, *more)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr


def test_a_run_whose_files_have_moved_goes_on_where_they_are_named_anew(command, kaggle_folder, cache_dir, tmp_path):
    folder = shutil.copytree(kaggle_folder, tmp_path / "shop")
    shutil.copy(DEMO_WEIGHTS, tmp_path / "base.safetensors")
    shutil.copy(FASHION_FILE, tmp_path / "own.toml")
    run, options = tmp_path / "run", tmp_path / "run" / "options.json"
    places = {"--data": folder, "--weights": tmp_path / "base.safetensors", "--attributes": tmp_path / "own.toml"}
    words = [word for pair in places.items() for word in pair]
    rest = ("--backbone", "demo", "--epochs", 1, "--cache-dir", cache_dir, "--out", run)
    assert command("train.py", *words, *rest).returncode == 0
    before, skipped = options.read_bytes(), (run / "skipped.csv").read_bytes()
    best = ("--checkpoint", run / "best", "--json")
    again, said = ["train.py", "--resume", "--out", run], command("infer.py", *best, folder / "images" / "10051.jpg")
    for option, place in places.items():
        place.rename(tmp_path / f"moved-{place.name}")
        done = command(*again)
        assert done.returncode == 2
        assert option in done.stderr.splitlines()[-1] and str(place) in done.stderr.splitlines()[-1]
        assert options.read_bytes() == before
        again += [option, tmp_path / f"moved-{place.name}"]
    done = command(*again, "--data", "demo")
    assert (done.returncode, "--resume: the catalogue has" in done.stderr) == (2, True)
    assert options.read_bytes() == before, "another catalogue is not taken for the one that has moved"
    assert (run / "skipped.csv").read_bytes() == skipped
    assert command(*again, "--cache-dir", tmp_path / "cache").returncode == 0
    kept = json.loads(options.read_text())
    wanted = json.loads(before) | {option[2:]: str(tmp_path / f"moved-{p.name}") for option, p in places.items()}
    assert kept == wanted | {"cache_dir": str(tmp_path / "cache")}
    done = command("infer.py", *best, tmp_path / "moved-shop" / "images" / "10051.jpg")
    assert done.stdout.replace("moved-shop", "shop") == said.stdout != ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--targets", "gate"), "target 'gate' matches no linear layer"),
        (("--rank", "query=4"), "no rank for target 'key'"),
        (("--init-from", "gone"), "no checkpoint at"),
        (("--teacher", "gone"), "no checkpoint at"),
        (("--teacher", "{run}/best", "--teacher-weights", "gone"), "/gone; give its place with --teacher-weights"),
        (("--teacher-weights", "gone"), "goes with --teacher CHECKPOINT"),
        (("--attributes", "own.toml"), "cells that are no numbers: "),
        (("--inputs", "title", "--vocab", "gone"), "cannot read --vocab "),
        (("--init-from", "{run}/best", "--inputs", "title"), "/best reads image and gives nothing to --inputs title"),
    ],
)
def test_a_mistake_is_told_before_pictures_are_decoded(command, demo_run, kaggle_folder, tmp_path, words, message):
    words = [word.format(run=demo_run) for word in words]
    number = '[attributes.price]\ncolumn = "productDisplayName"\nkind = "number"\nlevel = 4\n'
    (tmp_path / "own.toml").write_text(FASHION_FILE.read_text(encoding="utf-8") + number)
    where = ("--data", kaggle_folder, "--backbone", "demo", "--cache-dir", tmp_path / "cache")
    done = command("train.py", *where, *words, "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_ends_a_run_before_it_began_leaves_none(command, cache_dir, tmp_path, monkeypatch, error):
    def ended(*_):
        raise error

    monkeypatch.setattr("task.open_store", ended)
    words = ("--data", "demo", "--limit", 100, "--cache-dir", cache_dir, "--out", tmp_path / "run")
    assert command("train.py", *words).returncode == (130 if error is KeyboardInterrupt else 2)
    assert not (tmp_path / "run").exists()


def test_a_mistake_does_not_burn_the_out_folder(command, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 100, "--epochs", 1, "--cache-dir", cache_dir, "--out", tmp_path / "run")
    assert command("train.py", *words, "--targets", "gate").returncode == 2
    assert command("train.py", *words).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbone", "vit_tinny_patch16_224"], "unknown backbone 'vit_tinny_patch16_224'"),
        (["--data", "no/such/folder"], "no such data: 'no/such/folder'"),
        (["--targets", "query", "gate"], "target 'gate' matches no linear layer"),
        (["--rank", "0"], "--rank: 0 is not a whole number above 0"),
        (["--weights", "notes.txt"], "notes.txt is not a safetensors file"),
        (["--weights", "gone.safetensors"], "gone.safetensors"),
        (["--out", "/proc/run"], "cannot write --out /proc/run"),
        (["--epochs", "two"], "--epochs: two is not a whole number above 0"),
        (["--img-size", "60"], "60 pixels a side has no whole number of patches of 8"),
        (["--resume", "--out", "nothing", "--limit", "50"], "leave out --limit"),
        (["--alpha", "-1"], "alpha must be positive, got -1"),
        (["--seed", "-1"], "--seed -1 is not between 0 and 4294967295"),
        (["--seed", "1790000000000000"], "--seed 1790000000000000 is not between 0 and 4294967295"),
        (["--title-length", "13"], "--title-length is of titles, which --inputs image does not read"),
        (["--inputs", "title", "--compile"], "--compile is of images, which --inputs title does not read"),
        (["--inputs", "title", "--targets", "gate"], "--targets is of images, which --inputs title does not read"),
        (["--lr", "nan"], "--lr nan is not a positive number"),
        (["--rank", "query=0"], "--rank: 0 is not a whole number above 0"),
        (["--rank", "query=4"], "no rank for target 'key'"),
        (["--layers", "9"], "no target layer is in block 9; there are blocks [0, 1, 2, 3]"),
        (["--lora-plus", "0"], "--lora-plus 0.0 is not a positive number"),
        (["--patch-size", "7"], "64 pixels a side has no whole number of patches of 7"),
        (["--keep-patches", "0"], "--keep-patches 0.0 is out of its range"),
        (["--drop-patches", "1"], "--drop-patches 1.0 is not a number from 0 to below 1"),
        (["--warp", "1"], "--warp 1.0 is not a number from 0 to below 1"),
        (["--label-smoothing", "-0.1"], "--label-smoothing -0.1 is not a number from 0 to below 1"),
        (["--amp", "fp8"], "argument --amp: fp8 is none of bf16, fp16, auto; it may stand before --amp"),
        (["--accum", str(10**20)], f"argument --accum: {10**20} is more than 1,000,000,000,000"),
        (["--dropout", "nan"], "--dropout nan is out of its range"),
        (["--patch-size", "300", "--img-size", "600"], "--patch-size 300 is out of its range"),
        (["--backbone", "timm/vit_tiny"], "unknown backbone 'timm/vit_tiny'"),
        (["--limit", "3"], "is too small"),
        (["--data", ""], "argument --data: it is empty"),
        (["--backbone", ""], "argument --backbone: it is empty"),
        (["--rank", "query=5000"], "argument --rank: 5000 is more than 4096"),
        (["--img-size", "257", "--patch-size", "1"], "an image of 257 pixels a side has more than 256 patches of 1;"),
        (["--img-size", "4096"], "an image of 4096 pixels a side has more than 256 patches of 8;"),
        (["--img-size", "1000000"], "--img-size 1000000 is out of its range"),
        (["--rank", "query=8,key=4,value=4,dense=4,dens=2"], "rank of 'dens', which is no target"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(command, cache_dir, tmp_path, words, message):
    (tmp_path / "notes.txt").write_text("no tensors here")
    if "--data" not in words:
        words = ["--data", "demo", "--limit", "150", *words]
    done = command("train.py", "--cache-dir", cache_dir, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*")), "no folder is left of a run that never was"


def test_an_out_folder_that_holds_a_run_is_not_overwritten(command, demo_run, cache_dir):
    before = (demo_run / "metrics.json").read_text()
    done = command("train.py", "--data", "demo", "--out", demo_run, "--cache-dir", cache_dir)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert (demo_run / "metrics.json").read_text() == before


def test_resuming_a_run_that_has_ended_keeps_what_was_done_to_its_best(command, demo_run, cache_dir, tmp_path):
    shutil.copytree(demo_run, tmp_path / "run")
    best, last = tmp_path / "run" / "best", tmp_path / "run" / "last" / "config.json"
    progress = json.loads(last.read_text())["progress"]
    assert progress["epochs_scored"] == 3
    words = ("--data", "demo", "--limit", 1000, "--cache-dir", cache_dir, "--calibrate", "--target-precision", 0.7)
    assert command("evaluate.py", "--checkpoint", best, *words).returncode == 0
    before = {path.name: path.read_bytes() for path in best.iterdir()}
    done = command("train.py", "--resume", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in best.iterdir()} == before
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["calibration"]["target_precision"] == 0.7, "of best/ as it is"


def test_a_run_that_has_ended_is_scored_with_its_neighbours(command, demo_run, with_neighbours, cache_dir, tmp_path):
    run = shutil.copytree(demo_run, tmp_path / "run")
    shutil.rmtree(run / "best")
    best = shutil.copytree(with_neighbours(demo_run / "best"), run / "best")
    done = command("train.py", "--resume", "--out", run)
    assert done.returncode == 0, done.stderr
    words = ("--data", "demo", "--limit", 1000, "--cache-dir", cache_dir, "--json", tmp_path / "scores.json")
    assert command("evaluate.py", "--checkpoint", best, *words).returncode == 0
    scores, before = (json.loads(file.read_text()) for file in (run / "metrics.json", demo_run / "metrics.json"))
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    assert scores["mean_accuracy"] != before["mean_accuracy"]


def test_resuming_takes_no_option_even_at_its_default(command, demo_run):
    done = command("train.py", "--resume", "--out", demo_run, "--epochs", 5)
    assert done.returncode == 2
    assert "leave out --epochs" in done.stderr


@pytest.mark.parametrize("name", ["options.json", "skipped.csv", "vocab.txt", "events.out.tfevents.1.other"])
def test_files_that_no_run_made_are_left_alone(command, cache_dir, tmp_path, name):
    (tmp_path / name).write_text("mine")
    for more in ((), ("--weights", tmp_path / "gone")):
        done = command("train.py", "--data", "demo", "--limit", 100, "--out", tmp_path, "--cache-dir", cache_dir, *more)
        assert done.returncode == 2
        assert f"holds {name}, which is not of a run" in done.stderr.splitlines()[-1]
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_killed_before_its_first_save_can_be_begun_again(command, demo_run, cache_dir, tmp_path):
    (tmp_path / "options.json").write_bytes((demo_run / "options.json").read_bytes())
    words = ("--data", "demo", "--limit", 100, "--epochs", 1, "--cache-dir", cache_dir, "--out", tmp_path)
    assert command("train.py", *words).returncode == 0
