"""Learning from an earlier model beside the labels."""

import math
import signal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from data.store import STORE_GB
from errors import UserError
from evaluate import evaluate
from models.checkpoint import load_checkpoint, read_config
from models.classifier import TAUGHT, attribute_losses
from task import load_task
from teacher import Teacher

CPU = torch.device("cpu")


def teach(folder, config):
    return Teacher(folder, config, None, CPU, torch.float32)


def test_the_loss_is_partly_the_distance_from_what_the_teacher_says():
    log = math.log
    outputs = {"a": torch.tensor([[log(3.0), 0.0], [0.0, 0.0]]), "b": torch.tensor([[0.0, log(4.0)], [0.0, 0.0]])}
    labels = torch.tensor([[0, 1], [-1, 0]])  # of the second picture a is not known
    said = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    a = (1 - TAUGHT) * -log(3 / 4) + TAUGHT * -(log(3 / 4) + log(1 / 4)) / 2
    b = (-log(4 / 5) - log(1 / 2)) / 2
    losses = attribute_losses(outputs, labels, taught=[said, None])
    torch.testing.assert_close(losses, torch.tensor([a, b]))


def test_it_says_what_its_model_says(demo_run):
    model, config = load_checkpoint(demo_run / "best")
    images = torch.randn(5, 3, *config["preprocess"]["size"])
    with torch.no_grad():
        outputs = model(images)
    for said, logits in zip(teach(demo_run / "best", config)(images), outputs.values(), strict=True):
        torch.testing.assert_close(said, logits.softmax(dim=-1))


def test_a_run_may_read_pictures_of_another_size_and_norm(demo_run):
    model, config = load_checkpoint(demo_run / "best")
    p, colour = config["preprocess"], torch.tensor([0.2, 0.5, 0.9])[None, :, None, None]
    mean, std, own_mean, own_std = (
        torch.tensor(values)[:, None, None] for values in (p["mean"], p["std"], [0.1, 0.2, 0.3], [0.5, 0.4, 0.2])
    )
    other = config | {"preprocess": p | {"size": [40, 40], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.2]}}
    said = teach(demo_run / "best", other)((colour.expand(1, 3, 40, 40) - own_mean) / own_std)
    with torch.no_grad():
        outputs = model((colour.expand(1, 3, *p["size"]) - mean) / std)
    for probabilities, logits in zip(said, outputs.values(), strict=True):
        torch.testing.assert_close(probabilities, logits.softmax(dim=-1), rtol=1e-3, atol=1e-4)


def test_it_teaches_the_classes_that_have_the_run_s_labels(demo_run, capsys):
    config = read_config(demo_run / "best")
    images = torch.zeros(1, 3, *config["preprocess"]["size"])
    attributes = [a | {"labels": a["labels"][::-1]} if a["name"] == "brand" else a for a in config["attributes"]]
    said = teach(demo_run / "best", config | {"attributes": attributes})(images)
    assert [probabilities is None for probabilities in said] == [a["name"] == "brand" for a in attributes]
    assert capsys.readouterr().out == f"learning from {demo_run / 'best'} too, but not brand: its labels are others\n"
    attributes = [a | {"labels": [*a["labels"], "another"]} for a in attributes]
    with pytest.raises(UserError, match="none of its classes has the labels of this run"):
        teach(demo_run / "best", config | {"attributes": attributes})


def test_a_taught_run_comes_nearer_to_its_teacher(command, demo_run, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 1000, "--epochs", 1, "--no-test", "--cache-dir", cache_dir)
    folders = {"teacher": demo_run, "alone": tmp_path / "alone", "taught": tmp_path / "taught"}
    for name, more in ("alone", ()), ("taught", ("--teacher", demo_run / "best")):
        done = command("train.py", *words, *more, "--out", folders[name])
        assert done.returncode == 0, done.stderr
    logits = {}
    for name, folder in folders.items():
        task = load_task(folder / "best", None, "demo", cache_dir, 1000, CPU, STORE_GB)
        logits[name] = evaluate(task, "val", CPU).logits
    for name in logits["teacher"]:
        said = logits["teacher"][name].softmax(dim=-1)
        alone, taught = (F.cross_entropy(logits[run][name], said) for run in ("alone", "taught"))
        assert taught < alone, name


def test_a_taught_run_that_was_stopped_goes_on_to_the_same_bits(command, demo_run, cache_dir, tmp_path, monkeypatch):
    words = ("--data", "demo", "--limit", 400, "--epochs", 1, "--no-test", "--cache-dir", cache_dir)
    words += ("--teacher", demo_run / "best")
    assert command("train.py", *words, "--out", tmp_path / "whole").returncode == 0
    taken, real_step = [], train.train_step

    def step_then_ctrl_c(*args):
        taken.append(real_step(*args))
        if len(taken) == 5:
            signal.raise_signal(signal.SIGINT)
        return taken[-1]

    monkeypatch.setattr(train, "train_step", step_then_ctrl_c)
    assert command("train.py", *words, "--out", tmp_path / "cut").returncode == train.STOPPED
    assert command("train.py", "--resume", "--out", tmp_path / "cut", cwd=tmp_path).returncode == 0
    whole, cut = (load_file(tmp_path / run / "last" / "adapter.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
