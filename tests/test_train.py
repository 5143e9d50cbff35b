"""train.py as a user runs it: what it learns, with which options, from which catalogues, and what it leaves."""

import csv
import itertools
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from errors import UserError
from lora import LoRALayer, get_adapter_params
from models.backbone import create_backbone
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
    assert block.mlp.fc2.start_A is not None, "it began at the principal part"
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
    attributes = read_config(demo_run / "best")["attributes"]
    first = sum(a["weight"] * events.Scalars(f"loss/{a['name']}")[0].value for a in attributes)
    assert losses[0] == pytest.approx(first, rel=1e-5), "what is trained on"
    (told,) = events.Scalars("hparam/test_mean_accuracy")
    assert told.value == pytest.approx(json.loads((demo_run / "metrics.json").read_text())["mean_accuracy"])


def test_what_is_asked_for_reaches_the_step(command, cache_dir, tmp_path, monkeypatch):
    seen = {}

    def look(model, window, optimizer, scaler, lr, amp, prepare, smoothing, stop, weights, teacher):
        seen.update(drop=model.drop_patches, ratios=[group["lr_ratio"] for group in optimizer.param_groups])
        seen.update(scaled=scaler.is_enabled(), amp=amp, smoothing=smoothing, micro_batches=len(window))
        seen.update(teacher=teacher)
        seen.update(keep=model.keep_patches, dropout={m.dropout for m in model.modules() if isinstance(m, LoRALayer)})
        seen.update(weights=weights.tolist(), moved=prepare(window[0].pixels.to(weights.device)))
        seen.update(pixels=window[0].pixels, A=next(iter(get_adapter_params(model).values())).clone())
        raise UserError("seen")

    monkeypatch.setattr(train, "train_step", look)
    words = ("--data", "demo", "--limit", 200, "--epochs", 1, "--cache-dir", cache_dir, "--out", tmp_path / "run")
    words += ("--amp", "fp16", "--lora-plus", 4, "--drop-patches", 0.2, "--label-smoothing", 0.1, "--accum", 3)
    words += ("--keep-patches", 0.5, "--dropout", 0.2)
    assert "error: seen" in command("train.py", *words).stderr
    unmoved, pixels, A = seen.pop("moved"), seen.pop("pixels"), seen.pop("A")
    weights = [a["weight"] for a in read_config(tmp_path / "run" / "last")["attributes"]]
    assert len(set(weights)) > 1
    assert seen == {"drop": 0.2, "ratios": [1.0, 4.0, 1.0], "scaled": True, "amp": torch.float16, "smoothing": 0.1} | {
        "micro_batches": 3,
        "teacher": None,
        "weights": pytest.approx(weights),
        "keep": 0.5,
        "dropout": {0.2},
    }
    shutil.rmtree(tmp_path / "run")
    command("train.py", *words, "--warp", 0.1)
    assert not torch.equal(seen["moved"], unmoved)
    assert torch.equal(seen["pixels"], pixels) and torch.equal(seen["A"], A)
    shutil.rmtree(tmp_path / "run")
    command("train.py", *words, "--seed", 1)
    assert not torch.equal(seen["pixels"], pixels) and not torch.equal(seen["A"], A)


def test_each_epoch_has_all_rows_in_an_order_of_its_own_and_each_step_draws_anew(
    command, cache_dir, tmp_path, monkeypatch
):
    steps, take_step = [], train.train_step

    def look(model, window, *rest, **options):
        rows = [picture.sum().item() for batch in window for picture in batch.pixels.long()]
        state, prepare = torch.get_rng_state(), rest[4]
        shape = window[0].pixels.shape[1:]
        fixed = torch.arange(shape.numel()).view(1, *shape).repeat(8, 1, 1, 1).to(torch.uint8)
        steps.append((rows, state, prepare(fixed)))
        return take_step(model, window, *rest, **options)

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
        drawn += [train.seed_of(s, t) + train.MOVED for s in range(3) for t in range(50)]
        assert len({seed % 2**32 for seed in drawn}) == len(drawn), "a CPU takes no more of a seed"


def test_what_is_kept_and_tested_is_the_epoch_that_was_best_on_validation(command, cache_dir, tmp_path, monkeypatch):
    accuracies, score = iter((0.9, 0.9, 0.5)), train.evaluate

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
    assert "--resume: the catalogue has 118 rows, but" in done.stderr


def test_without_a_test_a_run_is_trained_calibrated_and_scored_on_no_test_row(command, cache_dir, tmp_path):
    words = ("--data", "demo", "--limit", 200, "--epochs", 1, "--cache-dir", cache_dir, "--out", tmp_path / "run")
    done = command("train.py", *words, "--no-test")
    assert done.returncode == 0, done.stderr
    assert "test, epoch" not in done.stdout
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert "calibration" in json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert len(events.Scalars("val/mean_accuracy")) == 1, "what validation found is written to the end"


def test_the_defaults_are_those_of_the_recipe():
    """But for the learning rate: see `benchmarks/quality.md`."""
    args = vars(parse_args([]))
    wanted = {"rank": 16, "alpha": 32, "dropout": 0.05, "targets": ["query", "key", "value", "dense"], "epochs": 5}
    wanted |= {"batch_size": 16, "accum": 1, "lr": 1e-3, "seed": 0, "amp": None, "data": None, "backbone": None}
    assert {name: args[name] for name in wanted} == wanted


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
        assert ("images are not kept" in done.stdout) == (name == "tar")
    table, tar = (load_file(tmp_path / name / "last" / "adapter.safetensors") for name in ("table", "tar"))
    assert all(torch.equal(table[name], tensor) for name, tensor in tar.items())
    table, tar = ((tmp_path / name / "metrics.json").read_text() for name in ("table", "tar"))
    assert table == tar


def test_pissa_drops_nothing_unless_it_is_asked_to():
    words = {(): 0.05, ("--pissa",): 0, ("--pissa", "--dropout", "0.1"): 0.1}
    for again in (False, True):
        assert {some: parse_args(list(some), again).dropout for some in words} == words
