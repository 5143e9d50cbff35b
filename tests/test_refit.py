"""refit.py: heads trained once more on a checkpoint's embeddings."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import refit
from data import fashion
from data.batches import Rows
from durable import at_rest, claim
from errors import UserError
from models.checkpoint import FORMAT, LOOKING, amend_config, read_config
from models.heads import HierarchicalHeads
from models.neighbours import FILE
from models.schema import learnt_on
from tests.conftest import with_fresh_heads

TEXT = {"vocab": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "length": 3, "mask": True}


@pytest.fixture
def words(cache_dir):
    return ("--data", "demo", "--limit", 1000, "--cache-dir", cache_dir)


@pytest.fixture
def photo(tmp_path):
    _, image = fashion.draw(0, seed=7)
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_heads_learn_and_adapters_stay(command, demo_run, words, tmp_path):
    folder = tmp_path / "run" / "best"
    with_fresh_heads(demo_run / "best", folder)
    before = bytes_in(folder)
    done = command("refit.py", "--checkpoint", folder, *words)
    assert done.returncode == 0, done.stderr
    was, now = map(float, re.search(r"mean accuracy (\S+) before, (\S+) after; .*: kept", done.stdout).groups())
    assert now > was + 0.2
    assert bytes_in(folder.with_name("best.previous")) == before
    old, new = (load_file(f / "adapter.safetensors") for f in (folder.with_name("best.previous"), folder))
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == {name for name in old if not name.startswith("heads.")}

    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["heads_fingerprint"] == config["data"]["fingerprint"], "this catalogue is no new one to it"
    assert config["calibration"] != json.loads(before["config.json"])["calibration"]
    scores = tmp_path / "scores.json"
    assert command("evaluate.py", "--checkpoint", folder, *words, "--split", "val", "--json", scores).returncode == 0
    assert json.loads(scores.read_text())["mean_accuracy"] == pytest.approx(now, abs=5e-5), "the heads that were kept"


@pytest.mark.parametrize(("name", "value"), [("LEARNING_RATE", 0.0), ("LEARNING_RATE", 10.0), ("FEWER", -1.0)])
def test_what_is_no_better_changes_nothing(command, demo_run, words, tmp_path, monkeypatch, name, value):
    """Neither the same, nor worse, nor where as many more labels are asked for as there are."""
    monkeypatch.setattr(refit, name, value)
    shutil.copytree(demo_run / "best", tmp_path / "run" / "best")
    done = command("refit.py", "--checkpoint", tmp_path / "run" / "best", *words, "--limit", 300)
    assert done.returncode == 0, done.stderr
    was, now = re.search(r"mean accuracy (\S+) before, (\S+) after; .*: \S+ stays as it was", done.stdout).groups()
    assert (was == now) == (value == 0) or name == "FEWER"
    assert bytes_in(tmp_path / "run" / "best") == bytes_in(demo_run / "best")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["best"]


def test_a_calibration_that_accepts_more_is_not_thrown_away(command, demo_run, words, tmp_path):
    """As one may that was fitted on more rows than validation has."""
    shutil.copytree(demo_run / "best", best := tmp_path / "run" / "best")
    calibration = read_config(best)["calibration"]
    calibration["threshold"]["joint"] = dict.fromkeys(calibration["threshold"]["joint"], 0.0)
    amend_config(best, calibration=calibration)
    before = bytes_in(best)
    done = command("refit.py", "--checkpoint", best, *words)
    assert "accepted 1.000, " in done.stdout
    assert "stays as it was" in done.stdout
    assert bytes_in(best) == before


def test_neighbours_come_are_renewed_and_go(command, demo_run, cache_dir, tmp_path, photo):
    heads_of, banks = demo_run / "best", {}
    for run, limit, more in (("one", 500, ["--neighbours"]), ("two", 1000, []), ("three", 1000, ["--no-neighbours"])):
        folder = tmp_path / run / "best"
        with_fresh_heads(heads_of, folder)
        words = ("--checkpoint", folder, "--data", "demo", "--limit", limit, "--cache-dir", cache_dir)
        done = command("refit.py", *words, *more)
        assert done.returncode == 0, done.stderr
        now = float(re.search(r"(\S+) after; .*: kept", done.stdout)[1])
        assert ("neighbours count for" in done.stdout) == (folder / FILE).exists() == (run != "three")
        banks[run] = load_file(folder / FILE) if run != "three" else {}
        scores = folder.parent / "scores.json"
        assert command("evaluate.py", *words, "--split", "val", "--json", scores).returncode == 0
        assert json.loads(scores.read_text())["mean_accuracy"] == pytest.approx(now, abs=5e-5), "as they were kept"
        assert command("infer.py", photo, "--checkpoint", folder).returncode == 0
        heads_of = folder
    assert all(banks[run]["share"].max() > 0.05 for run in ("one", "two"))
    assert len(banks["one"]["bank"]) < len(banks["two"]["bank"])
    formats = [read_config(tmp_path / run / "best")["format"] for run in banks]
    assert formats == [LOOKING, LOOKING, FORMAT], "who knows of no neighbours is not to read them"


def test_a_share_is_what_makes_the_labels_most_probable():
    torch.manual_seed(0)
    heads, votes = torch.rand(2000), torch.rand(2000)
    share = refit.fit_share(heads, votes)

    def likelihood(share):
        return ((1 - share) * heads + share * votes).log().mean()

    assert all(likelihood(share) >= likelihood(share + by) for by in (-0.01, 0.01))
    assert refit.fit_share(heads, heads / 2) < 0.01 < 0.99 < refit.fit_share(heads, heads * 2)
    assert refit.fit_share(heads[:0], votes[:0]) == 0.0


def test_a_share_of_numbers_is_what_makes_errors_least():
    torch.manual_seed(0)
    heads, votes = torch.randn(2000), 0.5 * torch.randn(2000)
    share = refit.fit_share_of_number(heads, votes)
    assert share == pytest.approx(0.8, abs=0.03), "of independent errors, as the inverse of their squares"
    assert f"{refit.fit_share_of_number(heads, heads * 2):.2f}" == "0.00"
    assert refit.fit_share_of_number(heads, heads / 2) == 1
    assert refit.fit_share_of_number(heads[:0], votes[:0]) == 0, "where nothing is known"


def test_who_looks_at_no_picture_has_no_neighbours(command, with_config, demo_run, words):
    folder = with_config(demo_run / "best", lambda config: config.update(inputs="title", title="x", text=TEXT))
    done = command("refit.py", "--checkpoint", folder, *words, "--neighbours")
    assert done.returncode == 2
    assert f"--neighbours looks at pictures, which {folder} does not" in done.stderr.splitlines()[-1]


def test_what_is_not_known_teaches_nothing(monkeypatch):
    monkeypatch.setattr(refit, "LEARNING_RATE", 0.02)  # for so few rows
    monkeypatch.setattr(refit, "EPOCHS", 20)
    torch.manual_seed(0)
    levels, classes = {"kind": 1, "colour": 2, "width": 2}, {"kind": 2, "colour": 3, "width": 1}
    embeddings = torch.randn(1000, 8)
    kind, colour = (embeddings[:, 0] > 0).long(), embeddings[:, 1:4].argmax(1)
    width = embeddings[:, 4:5].clone()
    known = torch.rand(1000, 3) < 0.5
    labels = torch.stack([kind, colour], dim=1).where(known[:, :2], -1).numpy()
    numbers = width.where(known[:, 2:], torch.nan).numpy()

    def fitted():
        torch.manual_seed(1)
        heads = HierarchicalHeads(8, 16, levels, classes)
        refit.train_heads(heads, embeddings, Rows(labels, numbers, np.empty((1000, 0), np.int32)))
        return heads

    heads = fitted()
    said = heads(embeddings)
    assert (said["kind"].argmax(1) == kind)[~known[:, 0]].float().mean() > 0.9, "of rows that it was not told"
    assert (said["colour"].argmax(1) == colour)[~known[:, 1]].float().mean() > 0.8
    assert (said["width"] - width)[~known[:, 2]].abs().mean() < 0.3
    for mine, again in zip(heads.parameters(), fitted().parameters(), strict=True):
        assert torch.equal(mine, again)


def test_what_is_left_is_the_mean_of_all_ways(monkeypatch):
    heads = HierarchicalHeads(8, 16, {"kind": 1}, {"kind": 2})
    before = [p.detach().clone() for p in heads.parameters()]

    def go(heads, embeddings, known, seed):
        with torch.no_grad():
            for p in heads.parameters():
                p += seed

    monkeypatch.setattr(refit, "train_once", go)
    refit.train_heads(heads, torch.empty(0, 8), None)
    for p, was in zip(heads.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), was + 1.5)


def test_a_run_in_progress_is_left_alone(command, demo_run, words, tmp_path):
    shutil.copytree(demo_run, tmp_path / "run")
    with claim(tmp_path / "run" / ".lock"):
        done = command("refit.py", "--checkpoint", tmp_path / "run" / "best", *words)
    assert done.returncode == 2
    assert f"{tmp_path / 'run'} is a run that has not ended; wait for it" in done.stderr.splitlines()[-1]


def test_a_run_that_was_stopped_is_resumed_first(demo_run, tmp_path):
    """Or the next good epoch would replace what is made of its `best/`."""
    for part in ("options.json", "last/config.json"):
        (tmp_path / "run" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(demo_run / part, tmp_path / "run" / part)
    with at_rest(tmp_path / "run"), at_rest(tmp_path):
        pass
    options = json.loads((demo_run / "options.json").read_text())
    (tmp_path / "run" / "options.json").write_text(json.dumps(options | {"epochs": options["epochs"] + 1}))
    with pytest.raises(UserError, match="run was stopped before its end: --resume it first"), at_rest(tmp_path / "run"):
        pass
    (tmp_path / "run" / "last").rename(tmp_path / "run" / "last.previous")
    with at_rest(tmp_path / "run"):  # whose last/ somebody has deleted
        pass
    (tmp_path / "run" / "last.damaged").mkdir()
    with pytest.raises(UserError, match="run was stopped before its end: --resume it first"), at_rest(tmp_path / "run"):
        pass


def test_of_an_attribute_without_labels_nothing_is_held_against_it():
    labelled, none = {"accuracy": 0.5, "rows": 4}, {"accuracy": None, "rows": 0}

    def scores(*accepted):
        attributes = {"kind": labelled, "usage": none, "cm": {"mae": 1.0, "rows": 4}}
        known = {name: {"accepted": share} for name, share in zip(("kind", "usage"), accepted, strict=True)}
        return {"attributes": attributes, "calibration": {"attributes": known}}

    before, after = scores(0.7, 0.9), scores(0.8, 0.0)
    assert [refit.share_accepted(some) for some in (before, after)] == [0.7, 0.8]
    assert "usage           no labels here: if this is kept, none of it is accepted\n" in refit.comparison(
        before, after
    )


def test_all_that_heads_were_fitted_to_is_known_again(command, demo_run, words, tmp_path):
    folder = tmp_path / "best"
    with_fresh_heads(demo_run / "best", folder)
    data = read_config(folder)["data"]
    amend_config(folder, data=data | {"heads_fingerprint": "of-before"})
    assert command("refit.py", "--checkpoint", folder, *words).returncode == 0
    config = read_config(folder)
    assert config["data"]["heads_fingerprint"] == f"of-before {data['fingerprint']}"
    for found, known in (("of-before", True), (data["fingerprint"], True), ("other", False)):
        task = SimpleNamespace(config=config, catalogue=SimpleNamespace(fingerprint=found))
        assert learnt_on(task.config, task.catalogue.fingerprint, None) == known


def test_errors(command, demo_run, words, tmp_path):
    shutil.copytree(demo_run / "best", tmp_path / "best")
    (tmp_path / "best" / "README.md").touch()
    for options, message in (
        (("--checkpoint", tmp_path / "gone", *words), f"no checkpoint at {tmp_path / 'gone'}"),
        (("--checkpoint", demo_run / "last", *words), f"is where a run goes on from; name {demo_run / 'best'}"),
        (("--checkpoint", tmp_path / "best", *words), "also holds README.md: copy its checkpoint into a folder"),
        (
            ("--checkpoint", demo_run / "best", *words, "--limit", 1),
            "demo has 0 train and 1 val rows with labels; both are needed",
        ),
    ):
        done = command("refit.py", *options)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]


def test_rows_of_which_nothing_is_known_are_left_out_and_of_too_many_some(monkeypatch):
    labels, numbers = np.array([[-1], [0], [-2], [1], [0], [1]]), np.full((6, 1), np.nan)
    numbers[0] = 3
    known = Rows(labels, numbers, np.zeros((6, 0)))
    task = SimpleNamespace(store=SimpleNamespace(rows=lambda split: np.arange(6)), known=known)
    assert refit.known_rows(task, "train").tolist() == [0, 1, 3, 4, 5]
    monkeypatch.setattr(refit, "MOST", 3)
    few = refit.known_rows(task, "train").tolist()
    assert len(set(few)) == 3 and {0, 1, 3, 4, 5}.issuperset(few)


def test_what_is_said_of_before_and_after():
    def scores(accuracy, accepted, mae):
        attributes = {"kind": {"accuracy": accuracy, "rows": 4}, "cm": {"mae": mae, "rows": 4}, "none": {"rows": 0}}
        return {"attributes": attributes, "calibration": {"attributes": {"kind": {"accepted": accepted}}}}

    said = " ".join(refit.comparison(scores(0.1, 0.3, 5.0), scores(0.2, 0.4, 6.0)).split())
    assert said == "val accuracy after accepted after kind 0.100 0.200 0.300 0.400 cm MAE 5, after 6"
