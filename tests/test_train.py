"""train.py as a user runs it: what a run leaves, resuming, bad input, and that it harms no run that was there."""

import csv
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from data.schema import FASHION_FILE
from errors import UserError
from models.backbone import DEMO_WEIGHTS, create_backbone
from models.checkpoint import load_checkpoint, read_config
from options import parse_args

ROOT = Path(__file__).parents[1]
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def test_variants_train_and_load(command, cache_dir, tmp_path):
    done = command(
        *("train.py", "--data", "demo", "--limit", 200, "--epochs", 1, "--cache-dir", cache_dir, "--out", "run"),
        *("--targets", "query", "dense", "--rank", "query=2,dense=4", "--alpha", "8", "--layers", 0, 3),
        *("--rslora", "--dora", "--pissa", "--lora-plus", 4, "--base", "int8", "--amp", "bf16"),
        *("--patch-size", 4, "--keep-patches", 0.5, "--drop-patches", 0.2, "--warp", 0.1, "--label-smoothing", 0.1),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    model, _ = load_checkpoint(tmp_path / "run" / "best")
    block = model.backbone.blocks[3]
    assert (len(block.attn.qkv.query.lora_A), len(block.mlp.fc2.lora_A)) == (2, 4)
    assert block.mlp.fc2.scaling == 8 / 2
    start = create_backbone("demo", patch_size=4)[0].blocks[3].mlp.fc2.weight.norm(dim=1)
    assert (block.mlp.fc2.lora_magnitude - start).abs().max() > 1e-4, "DoRA's lengths train"
    assert isinstance(model.backbone.blocks[1].mlp.fc2, torch.nn.Linear), "--layers names the others"


@NEEDS_COMPILER
def test_a_compiled_run_learns_what_another_does(command, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 200, "--epochs", 1, "--dropout", 0, "--no-test", "--cache-dir", cache_dir)
    for out, more in ("plain", ()), ("compiled", ("--compile",)):
        done = command("train.py", *words, "--out", out, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    plain, compiled = (load_file(tmp_path / out / "best" / "adapter.safetensors") for out in ("plain", "compiled"))
    assert plain.keys() == compiled.keys(), "the names are those of the layers, compiled or not"
    for name, tensor in plain.items():
        assert (compiled[name] - tensor).norm() < 0.01 * tensor.norm(), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's kernels are not compiled by it")
def test_a_compiler_that_is_not_there_is_named(command, cache_dir, tmp_path):
    torch.compiler.reset()
    words = ("--data", "demo", "--limit", 100, "--epochs", 1, "--compile", "--cache-dir", cache_dir, "--out", "run")
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "none")), "force_disable_caches": True}):
        done = command("train.py", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: --compile: InvalidCxxCompiler" in done.stderr
    assert "without it: python train.py --resume --out run --no-compile" in done.stderr
    done = command("train.py", "--resume", "--out", "run", "--no-compile", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_of_many_rows_a_fixed_choice_is_scored(command, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SCORED", 9)
    words = ("--data", "demo", "--limit", 200, "--epochs", 1, "--cache-dir", cache_dir, "--out", "run")
    done = command("train.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "val rows at most 9 with labels are scored here, by evaluate.py all" in done.stdout
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"] == 9
    assert json.loads((tmp_path / "run" / "best" / "config.json").read_text())["calibration"]["rows"] == 9


def test_a_run_leaves_what_the_design_says(demo_run):
    metrics = json.loads((demo_run / "metrics.json").read_text())
    assert metrics["split"] == "test"
    assert set(metrics) >= {"rows", "attributes", "path_accuracy", "valid_path_rate", "exact_match"}
    assert set(metrics["attributes"]["articleType"]) == {"accuracy", "macro_f1", "weighted_f1", "rows"}
    assert metrics["mean_accuracy"] > 0.5, "three epochs on 800 drawings get most labels right"
    config = json.loads((demo_run / "best" / "config.json").read_text())
    assert [a["name"] for a in config["attributes"]] == list(metrics["attributes"])
    assert (demo_run / "skipped.csv").read_text().startswith("id,reason")


def test_a_checkpoint_holds_what_trained_and_no_path_of_the_machine(demo_run):
    tensors = load_file(demo_run / "best" / "adapter.safetensors")
    assert all("lora_" in name or name.startswith("heads.") for name in tensors)
    text = (demo_run / "best" / "config.json").read_text()
    assert str(ROOT) not in text
    assert "/tmp" not in text
    assert str(demo_run.parent) not in text


def test_tensorboard_shows_losses_rates_scores_and_pictures(demo_run):
    events = EventAccumulator(str(demo_run), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {"train/loss", "train/learning_rate", "train/gradient_norm", "train/images_per_second"}
    assert scalars >= {"loss/brand", "val_accuracy/articleType", "val/mean_accuracy", "val/path_accuracy"}
    assert len(events.Images("val/pictures")) == 3
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses[-1] < losses[0] / 2


def test_what_is_asked_for_reaches_the_step(command, cache_dir, tmp_path, monkeypatch):
    seen = {}

    def look(model, window, optimizer, scaler, lr, amp, prepare, smoothing, stop, weights, teacher):
        seen.update(drop=model.drop_patches, ratios=[group["lr_ratio"] for group in optimizer.param_groups])
        seen.update(scaled=scaler.is_enabled(), amp=amp, smoothing=smoothing, micro_batches=len(window))
        seen.update(teacher=teacher)
        seen.update(weights=weights.tolist(), moved=prepare(window[0].pixels.to(weights.device)))
        raise UserError("seen")

    monkeypatch.setattr(train, "train_step", look)
    words = ("--data", "demo", "--limit", 200, "--epochs", 1, "--cache-dir", cache_dir, "--out", tmp_path / "run")
    words += ("--amp", "fp16", "--lora-plus", 4, "--drop-patches", 0.2, "--label-smoothing", 0.1, "--accum", 3)
    assert "error: seen" in command("train.py", *words).stderr
    unmoved = seen.pop("moved")
    weights = [a["weight"] for a in read_config(tmp_path / "run" / "last")["attributes"]]
    assert len(set(weights)) > 1
    assert seen == {"drop": 0.2, "ratios": [4.0, 1.0, 1.0], "scaled": True, "amp": torch.float16, "smoothing": 0.1} | {
        "micro_batches": 3,
        "teacher": None,
        "weights": pytest.approx(weights),
    }
    shutil.rmtree(tmp_path / "run")
    command("train.py", *words, "--warp", 0.1)
    assert not torch.equal(seen["moved"], unmoved)


def test_each_epoch_has_all_rows_in_an_order_of_its_own_and_each_step_draws_anew(
    command, cache_dir, tmp_path, monkeypatch
):
    steps, take_step = [], train.train_step

    def look(model, window, *rest):
        rows = [picture.sum().item() for batch in window for picture in batch.pixels.long()]
        state, prepare = torch.get_rng_state(), rest[4]
        shape = window[0].pixels.shape[1:]
        fixed = torch.arange(shape.numel()).view(1, *shape).repeat(8, 1, 1, 1).to(torch.uint8)
        steps.append((rows, state, prepare(fixed)))
        return take_step(model, window, *rest)

    monkeypatch.setattr(train, "train_step", look)
    words = ("--data", "demo", "--limit", 100, "--epochs", 2, "--warp", 0.1, "--cache-dir", cache_dir)
    assert command("train.py", *words, "--out", tmp_path / "run").returncode == 0
    rows, states, images = zip(*steps, strict=True)
    epoch = len(rows) // 2
    first, second = (list(itertools.chain(*some)) for some in (rows[:epoch], rows[epoch:]))
    assert sorted(first) == sorted(second) and first != second and len(first) > 70
    for a, b in itertools.combinations(range(len(steps)), 2):
        assert not torch.equal(states[a], states[b]), "what dropout and dropped patches are drawn from"
        assert not torch.equal(images[a], images[b]), "how pictures are moved about"


def test_no_two_processes_steps_or_seeds_draw_alike():
    for processes in (1, 3):
        drawn = [train.seed_of(s, t, processes, r) for s in range(3) for t in range(50) for r in range(processes)]
        assert len(set(drawn)) == len(drawn)


def test_what_is_kept_and_tested_is_the_epoch_that_was_best_on_validation(command, cache_dir, tmp_path, monkeypatch):
    accuracies, score = iter((0.2, 0.9, 0.5)), train.evaluate

    def told(task, split, *rest, **options):
        found = score(task, split, *rest, **options)
        if split == "val":
            found.scores["mean_accuracy"] = next(accuracies)
        return found

    monkeypatch.setattr(train, "evaluate", told)
    words = ("--data", "demo", "--limit", 200, "--cache-dir", cache_dir)
    done = command("train.py", *words, "--epochs", 3, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "epoch 2 of 3 (best on validation)" in done.stdout
    best, last = (load_file(tmp_path / "run" / name / "adapter.safetensors") for name in ("best", "last"))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    best = ("--checkpoint", tmp_path / "run" / "best", "--json", tmp_path / "scores.json")
    assert command("evaluate.py", *words, *best).returncode == 0
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads((tmp_path / "run/metrics.json").read_text())


def test_ctrl_c_leaves_a_usable_checkpoint_and_resuming_ends_as_if_never_stopped(command, cache_dir, tmp_path, request):
    options = ("--data", "demo", "--limit", 400, "--epochs", 2, "--accum", 3, "--cache-dir", cache_dir)
    assert command("train.py", *options, "--out", tmp_path / "whole").returncode == 0

    taken = request.getfixturevalue("ctrl_c")
    done = command("train.py", *options, "--out", tmp_path / "cut")
    assert done.returncode == train.STOPPED
    assert len(taken) == 5, "the step is finished, in the middle of an epoch, and no other begun"
    assert f"go on with: python train.py --resume --out {tmp_path / 'cut'}" in done.stdout
    load_checkpoint(tmp_path / "cut" / "last")

    done = command("train.py", "--resume", "--out", tmp_path / "cut", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "at step 5 of" in done.stdout
    for name in ("best", "last"):
        whole, cut = (load_file(tmp_path / run / name / "adapter.safetensors") for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert (tmp_path / "whole" / "metrics.json").read_text() == (tmp_path / "cut" / "metrics.json").read_text()
    events = {run: EventAccumulator(str(tmp_path / run)).Reload() for run in ("whole", "cut")}
    for tag in ("train/learning_rate", "val/mean_accuracy"):
        steps = {run: [event.step for event in e.Scalars(tag)] for run, e in events.items()}
        assert steps["whole"] == steps["cut"], tag


@pytest.fixture(scope="module")
def kaggle_folder(tmp_path_factory):
    """Drawings in Kaggle's layout, two of whose pictures are damaged and one of which is gone."""
    folder = tmp_path_factory.mktemp("shop")
    subprocess.run([sys.executable, "-m", "data.demo", "--out", folder, "--rows", "120"], cwd=ROOT, check=True)
    names = sorted((folder / "images").iterdir())
    names[0].write_bytes(names[0].read_bytes()[:200])
    names[1].write_text("<html>404</html>")
    names[2].unlink()
    return folder


def test_bad_files_in_a_catalogue_are_skipped_counted_and_listed(command, kaggle_folder, cache_dir, tmp_path):
    words = ("--data", kaggle_folder, "--backbone", "demo", "--epochs", 1, "--cache-dir", cache_dir)
    done = command("train.py", *words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "3 skipped" in done.stdout
    with open(tmp_path / "run" / "skipped.csv", newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == {"10000", "10001", "10002"}

    (kaggle_folder / "images" / "10050.jpg").unlink()
    done = command("train.py", "--resume", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "--resume: the catalogue has rows: 118, but" in done.stderr


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
    assert (done.returncode, "--resume: the catalogue has rows" in done.stderr) == (2, True)
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
        (["--out", "/proc/run"], "cannot write to --out /proc/run"),
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
        (["--keep-patches", "0"], "--keep-patches 0.0 is not a share of the patches"),
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


def test_without_a_test_a_run_is_trained_calibrated_and_scored_on_no_test_row(command, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 200, "--epochs", 1, "--cache-dir", cache_dir, "--out", tmp_path / "run")
    done = command("train.py", *words, "--no-test")
    assert done.returncode == 0, done.stderr
    assert "test, epoch" not in done.stdout
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert "calibration" in json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert len(events.Scalars("val/mean_accuracy")) == 1, "what validation found is written to the end"


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


def test_resuming_takes_no_option_even_at_its_default(command, demo_run):
    done = command("train.py", "--resume", "--out", demo_run, "--epochs", 5)
    assert done.returncode == 2
    assert "leave out --epochs" in done.stderr


def test_the_defaults_are_those_of_the_recipe():
    """But for the learning rate: see `benchmarks/README.md`."""
    args = vars(parse_args([]))
    wanted = {"rank": 16, "alpha": 32, "dropout": 0.05, "targets": ["query", "key", "value", "dense"], "epochs": 5}
    wanted |= {"batch_size": 16, "accum": 1, "lr": 1e-3, "seed": 0, "amp": None, "data": None, "backbone": None}
    assert {name: args[name] for name in wanted} == wanted


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


def test_without_a_store_a_run_ends_with_the_same_bits(command, demo_run, cache_dir, tmp_path):
    amp = json.loads((demo_run / "options.json").read_text())["amp"]  # which the machine was asked for, and may waver
    done = command(
        *("train.py", "--data", "demo", "--limit", 1000, "--epochs", 3, "--accum", 2, "--no-store"),
        *("--out", tmp_path / "run", "--cache-dir", cache_dir, *(("--amp", amp) if amp else ())),
    )
    assert done.returncode == 0, done.stderr
    assert "images are not kept" in done.stdout
    stored, loose = (load_file(run / "best" / "adapter.safetensors") for run in (demo_run, tmp_path / "run"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in loose.items())
    assert (tmp_path / "run" / "metrics.json").read_text() == (demo_run / "metrics.json").read_text()


def test_tar_files_train_as_the_same_pictures_beside_a_table_do(command, kaggle_folder, cache_dir, tmp_path):
    """Without a store; and a table with pictures is read with one."""
    with open(kaggle_folder / "styles.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (kaggle_folder / "images" / f"{row['id']}.jpg").exists()]
    with tarfile.open(tmp_path / "shop.tar", "w") as tar:
        for row in rows:
            (tmp_path / "row.json").write_text(json.dumps(row))
            tar.add(kaggle_folder / "images" / f"{row['id']}.jpg", f"{row['id']}.jpg")
            tar.add(tmp_path / "row.json", f"{row['id']}.json")
    words = ("--backbone", "demo", "--epochs", 1, "--cache-dir", cache_dir)
    for data, name, extra in ((kaggle_folder, "table", ()), (tmp_path / "shop.tar", "tar", ("--no-store",))):
        done = command("train.py", "--data", data, *words, *extra, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    table, tar = (load_file(tmp_path / name / "last" / "adapter.safetensors") for name in ("table", "tar"))
    assert all(torch.equal(table[name], tensor) for name, tensor in tar.items())
