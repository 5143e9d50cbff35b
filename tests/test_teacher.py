"""Learning from an earlier model beside the labels."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from errors import UserError
from models.checkpoint import load_checkpoint, read_config
from models.classifier import TAUGHT, attribute_losses
from teacher import Teacher, load_teacher

CPU = torch.device("cpu")


def teach(folder, pupil, dtype=torch.float32):
    return Teacher(*load_teacher(folder, None, pupil, None), pupil, CPU, dtype)


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
    for dtype, close in (torch.float32, 1e-5), (torch.bfloat16, 0.05):
        for said, logits in zip(teach(demo_run / "best", config, dtype)(images), outputs.values(), strict=True):
            assert said.dtype == torch.float32
            torch.testing.assert_close(said, logits.softmax(dim=-1), rtol=close, atol=close)


def test_a_run_may_read_pictures_of_another_size_and_norm(demo_run):
    model, config = load_checkpoint(demo_run / "best")
    p = config["preprocess"]
    pictures = F.interpolate(torch.rand(3, 3, 5, 5), (40, 40), mode="bilinear")  # in 0 to 1
    large = F.interpolate(pictures, p["size"], mode="bicubic", antialias=True)
    mean, std, own_mean, own_std = (
        torch.tensor(values)[:, None, None] for values in (p["mean"], p["std"], [0.1, 0.2, 0.3], [0.5, 0.4, 0.2])
    )
    other = config | {"preprocess": p | {"size": [40, 40], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.2]}}
    said = teach(demo_run / "best", other)((pictures - own_mean) / own_std)
    with torch.no_grad():
        outputs = model((large - mean) / std)
    for probabilities, logits in zip(said, outputs.values(), strict=True):
        torch.testing.assert_close(probabilities, logits.softmax(dim=-1), rtol=1e-3, atol=1e-4)


def test_it_teaches_the_classes_that_have_the_run_s_labels(demo_run):
    config = read_config(demo_run / "best")
    images = torch.zeros(1, 3, *config["preprocess"]["size"])
    attributes = [a | {"labels": a["labels"][::-1]} if a["name"] == "brand" else a for a in config["attributes"]]
    teacher = teach(demo_run / "best", config | {"attributes": attributes})
    said = teacher(images)
    assert [probabilities is None for probabilities in said] == [a["name"] == "brand" for a in attributes]
    assert str(teacher) == "learning from a teacher too, but not brand: it has other labels"
    attributes = [a | {"labels": [*a["labels"], "another"]} for a in attributes]
    with pytest.raises(UserError, match="it has the labels of none of this run's classes"):
        teach(demo_run / "best", config | {"attributes": attributes})


def test_a_taught_run_that_was_stopped_goes_on_to_the_same_bits(
    command, demo_run, cache_dir, tmp_path, with_config, request
):
    """Also where its teacher has moved, but with no other."""
    words = ("--data", "demo", "--limit", 400, "--epochs", 1, "--no-test", "--cache-dir", cache_dir)
    assert command("train.py", *words, "--out", tmp_path / "alone").returncode == 0
    words += ("--teacher", demo_run / "best")
    assert command("train.py", *words, "--out", tmp_path / "whole").returncode == 0
    request.getfixturevalue("ctrl_c")
    assert command("train.py", *words, "--out", tmp_path / "cut").returncode == train.STOPPED
    again = ("--resume", "--out", tmp_path / "cut", "--teacher")
    done = command("train.py", *again, tmp_path / "whole" / "best")
    assert (done.returncode, "is not the one" in done.stderr) == (2, True)
    moved = with_config(demo_run / "best", lambda config: config.pop("calibration"))
    assert command("train.py", *again, moved, cwd=tmp_path).returncode == 0
    names = ("alone", "whole", "cut")
    alone, whole, cut = (load_file(tmp_path / run / "last" / "adapter.safetensors") for run in names)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not any(torch.equal(whole[name], alone[name]) for name in whole), "it did learn from its teacher"
