"""Machines that see other files than the first process are told, before they train or score on them."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import distributed
from models.backbone import DEMO_WEIGHTS
from models.checkpoint import amend_config, read_config
from task import agree_on, load_task
from tests.torchrun import ROOT, finish, torchrun


def test_machines_that_see_other_catalogues_are_told(tmp_path):
    (tmp_path / "ask.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import distributed\n"
        "from errors import exits_cleanly\n"
        "@exits_cleanly\n"
        "def main():\n"
        "    with distributed.joined():\n"
        "        distributed.agree('the same', 'checkpoint')\n"
        "        distributed.agree(distributed.rank() == 1, 'catalogue')\n"
        "main()\n"
    )
    code, said = finish(torchrun(2, tmp_path / "ask.py"))
    assert code == 1
    assert "error in process 1: the catalogue of this machine is not the one of the first process" in said


def test_a_mistake_that_the_first_process_finds_ends_all_of_them(tmp_path):
    code, said = finish(torchrun(2, "train.py", "--data", tmp_path / "nowhere", "--out", tmp_path / "run"))
    assert code == 1
    assert said.count("error: no such data") == 1


OTHERWISE = {  # how the second process reads another file by the same name, as it would on another machine
    "backbone": "task.create_backbone = lambda name, weights, *sizes: create_backbone(name, other, *sizes)",
    "checkpoint": "evaluate.load_task = lambda folder, *rest: task.load_task(other, *rest)",
}


@pytest.mark.parametrize("part", OTHERWISE)
def test_machines_that_have_other_files_by_the_same_names_are_told(demo_run, cache_dir, tmp_path, part):
    words = ("--data", "demo", "--limit", 400, "--cache-dir", cache_dir)
    if part == "backbone":
        script, other = "train", tmp_path / "other.safetensors"
        weights = load_file(DEMO_WEIGHTS)
        save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other)
        options = (*words, "--out", tmp_path / "run")
    else:
        script, other = "evaluate", shutil.copytree(demo_run / "best", tmp_path / "other")
        amend_config(other, data=read_config(other)["data"] | {"name": "another"})
        options = (*words, "--checkpoint", demo_run / "best")
    (tmp_path / "ask.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"import {script}, task\n"
        "from models.backbone import create_backbone\n"
        f"other = Path({str(other)!r})\n"
        f"if os.environ['RANK'] == '1': {OTHERWISE[part]}\n"
        f"{script}.main()\n"
    )
    code, said = finish(torchrun(2, tmp_path / "ask.py", *options))
    assert code == 1
    assert f"error in process 1: the {part} of this machine is not the one of the first process" in said


OTHER = {
    "labels": lambda task: task.known._replace(labels=task.known.labels + 1),
    "numbers": lambda task: task.known._replace(numbers=np.ones((400, 1))),
    "tokens": lambda task: task.known._replace(tokens=np.ones((400, 1), np.int32)),
}


@pytest.mark.parametrize("other", [*OTHER, "rows", "attributes", "preprocess", "backbone", "teacher"])
def test_what_processes_agree_on_is_all_that_training_follows_from(demo_run, cache_dir, monkeypatch, other):
    seen = []
    monkeypatch.setattr(distributed, "agree", lambda fact, what: seen.append(fact))
    task = load_task(demo_run / "best", None, "demo", cache_dir, 400, torch.device("cpu"), 100)
    agree_on(task)
    first, seen[:] = [*seen], []
    if other == "rows":
        task.store.ok[7] = False
    elif other in OTHER:
        task = task._replace(known=OTHER[other](task))
    else:
        task.config[other] = "another"
    agree_on(task)
    assert seen != first


def test_a_checkpoint_from_before_there_were_teachers_is_agreed_on_too(demo_run, cache_dir, with_config):
    best = with_config(demo_run / "best", lambda config: config.pop("teacher"))
    agree_on(load_task(best, None, "demo", cache_dir, 400, torch.device("cpu"), 100))
