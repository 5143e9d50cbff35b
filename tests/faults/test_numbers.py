"""A loss or a gradient that is not finite never reaches the weights; memory that runs out ends in one line."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from errors import UserError
from models.checkpoint import trained_params
from state import TrainingState, check_finite
from step import parameter_groups, train_step
from tests.faults.conftest import assert_same
from tests.faults.processes import die_at, finish, start
from tests.test_step import PREPROCESS, batch, tiny_model


def spoil(step: int, what: str) -> None:
    """From this step on, the heads' logits or their gradient are not a number."""
    from models.heads import HierarchicalHeads

    real, calls = HierarchicalHeads.forward, []

    def forward(self, embedding):
        logits = real(self, embedding)
        calls.append(1)
        if self.training and len(calls) > step:
            if what == "loss":
                logits["baseColour"] = logits["baseColour"] * float("nan")
            else:
                logits["baseColour"].register_hook(lambda gradient: gradient * float("inf"))
        return logits

    HierarchicalHeads.forward = forward


@pytest.mark.parametrize(
    ("what", "said"),
    [("loss", "the loss of baseColour is not finite"), ("gradient", "the losses are finite but the gradient norm is")],
)
def test_the_run_stops_and_names_step_attribute_and_products(options, whole, tmp_path, what, said):
    run, log = tmp_path / "run", tmp_path / "log"
    process = start("train", *options, "--out", run, log=log, fault=functools.partial(spoil, 7, what))
    assert finish(process) == 2
    line = log.read_text().splitlines()[-1]
    assert line.startswith("error: step 7: ") and said in line
    assert f"{run / 'last'} holds the last good state" in line
    ids = line.split("Product ids: ")[1].split(", ")
    assert len(ids) == 16
    assert all(id.isdecimal() for id in ids)
    for folder in ("last", "last.previous"):
        assert all(tensor.isfinite().all() for tensor in load_file(run / folder / "adapter.safetensors").values())
    assert json.loads((run / "last" / "config.json").read_text())["progress"]["step"] == 6
    assert finish(start("train", "--resume", "--out", run, log=log)) == 0
    assert_same(run, whole)


@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
def test_neither_weights_nor_optimizer_take_a_bad_number(spoiled):
    model = tiny_model().float()
    optimizer = torch.optim.AdamW(parameter_groups(trained_params(model)), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train_step(model, [batch(4, 0)], optimizer, scaler, 0.1, None, PREPROCESS)
    before = {name: p.detach().clone() for name, p in trained_params(model).items()}
    moments = {name: {k: t.clone() for k, t in optimizer.state[p].items()} for name, p in trained_params(model).items()}
    parameter = model.heads.levels[0].weight
    if spoiled == "gradient":
        parameter.register_hook(lambda gradient: gradient * float("nan"))
        figures = train_step(model, [batch(4, 1)], optimizer, scaler, 0.1, None, PREPROCESS)
        assert figures[:-1].isfinite().all()
    else:
        hook = model.heads.register_forward_hook(lambda m, x, out: out | {"a": out["a"] * float("inf")})
        figures = train_step(model, [batch(4, 1)], optimizer, scaler, 0.1, None, PREPROCESS)
        hook.remove()
        assert not figures[0].isfinite()
    assert not figures[-1].isfinite()
    for name, p in trained_params(model).items():
        assert torch.equal(p, before[name])
        assert all(torch.equal(optimizer.state[p][k], t) for k, t in moments[name].items())


def test_an_fp16_overflow_is_skipped_and_counted():
    model = tiny_model().float()
    optimizer = torch.optim.AdamW(parameter_groups(trained_params(model)), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {name: p.detach().clone() for name, p in trained_params(model).items()}
    figures = train_step(model, [batch(4, 0)], optimizer, scaler, 0.1, None, PREPROCESS)
    assert figures[:-1].isfinite().all()
    assert all(torch.equal(p, before[name]) for name, p in trained_params(model).items())
    assert scaler.get_scale() == 2.0**126
    state = TrainingState(Path("run"), model, {}, optimizer, scaler)
    check_finite([(0, None, figures)], state, ["a", "b"], [])
    assert state.progress["overflows"] == 1
    scaler.update(0.5)  # a loss made smaller, and still too large a gradient: it is no overflow
    with pytest.raises(UserError, match=r"the gradient norm is nan, not finite.*Product ids: 7"):
        check_finite([(0, np.array([0]), figures)], state, ["a", "b"], ["7"])


def no_memory(most: int) -> None:
    """torch's own error, raised where a GPU would: at a batch of more than so many images."""
    from models.heads import HierarchicalHeads

    def hook(module, embeddings):
        if isinstance(module, HierarchicalHeads) and len(embeddings[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    torch.nn.modules.module.register_module_forward_pre_hook(hook)


def test_a_cpu_without_enough_memory_is_told_by_torchs_own_words(command, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 200, "--cache-dir", cache_dir, "--out", tmp_path / "run")
    done = command("train.py", *words, "--batch-size", 10**12)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: out of memory at --batch-size {10**12}; ")


def test_out_of_memory_in_training_says_what_helps_and_keeps_the_checkpoint(options, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    process = start("train", *options, "--out", run, log=log, fault=functools.partial(no_memory, 8))
    assert finish(process) == 2
    line = log.read_text().splitlines()[-1]
    assert line.startswith("error: out of memory at --batch-size 16; ")
    assert "--accum" in line and "--amp" in line and str(run / "last") in line
    again = start("train", "--resume", "--out", run, log=log, fault=functools.partial(die_at, 1, "train", "train_step"))
    assert finish(again) == -9


def test_scoring_halves_its_batch_and_goes_on(options, whole, tmp_path):
    """It takes more pictures at a time than training, which fits."""
    run, log = tmp_path / "run", tmp_path / "log"
    assert finish(start("train", *options, "--out", run, log=log, fault=functools.partial(no_memory, 20))) == 0
    assert "going on with batches of 18\n" in log.read_text()
    found, wanted = (json.loads((folder / "metrics.json").read_text()) for folder in (run, whole))
    assert found["rows"] == wanted["rows"]
    assert found["mean_accuracy"] == pytest.approx(wanted["mean_accuracy"], abs=0.02)


def test_infer_halves_its_batch_and_goes_on(whole, tmp_path):
    from data import fashion

    (tmp_path / "photos").mkdir()
    for index in range(20):
        fashion.draw(index, seed=5)[1].save(tmp_path / "photos" / f"{index:02}.png")
    words = (tmp_path / "photos", "--checkpoint", whole / "best", "--batch-size", 16, "--out")
    assert finish(start("infer", *words, tmp_path / "plain.jsonl", log=tmp_path / "log")) == 0
    halving = start(
        "infer", *words, tmp_path / "halved.jsonl", log=tmp_path / "log", fault=functools.partial(no_memory, 5)
    )
    assert finish(halving) == 0
    said = (tmp_path / "log").read_text()
    assert [said.count(f"going on with batches of {n}\n") for n in (8, 4, 2)] == [1, 1, 0], "and it stays there"
    plain, halved = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("plain", "halved")
    )
    assert [a["image"] for a in plain] == [a["image"] for a in halved]
    for a, b in zip(plain, halved, strict=True):
        for name, told in a["attributes"].items():
            assert b["attributes"][name]["confidence"] == pytest.approx(told["confidence"], abs=2e-4)
    none = start("infer", *words, tmp_path / "none.jsonl", log=tmp_path / "log", fault=functools.partial(no_memory, 0))
    assert finish(none) == 2
    assert "error: out of memory at a single image" in (tmp_path / "log").read_text()
