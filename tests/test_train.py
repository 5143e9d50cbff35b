"""The loop: exact accumulation, schedule, what trains, resuming, and train.py as a user runs it."""

import csv
import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from data.batches import Batch
from data.preprocess import Preprocess
from lora import apply_lora
from models.backbone import VIT_TARGETS
from models.checkpoint import load_checkpoint, trained_params
from models.classifier import AttributeClassifier
from models.heads import HierarchicalHeads
from options import choose_amp
from step import learning_rate, parameter_groups, train_step, windows

ROOT = Path(__file__).parents[1]
PREPROCESS = Preprocess((32, 32), (32, 32), "bicubic", (0.5,) * 3, (0.5,) * 3)


def tiny_model(dropout: float = 0.0) -> AttributeClassifier:
    """A real timm ViT of 50k parameters in fp64, with LoRA and two levels of heads, B away from zero."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, embed_dim=32, num_heads=2, img_size=32)
    apply_lora(backbone, ["query", "value", "dense"], 4, 8, dropout, VIT_TARGETS)
    model = AttributeClassifier(backbone, HierarchicalHeads(64, 32, {"a": 1, "b": 2}, {"a": 3, "b": 5})).double()
    for name, p in trained_params(model).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    return model


def in_double(pixels: torch.Tensor) -> torch.Tensor:
    """The real preprocessing, not augmented, for a model in fp64."""
    return PREPROCESS(pixels).double()


def batch(rows: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    labels = torch.stack(
        [torch.randint(-1, 3, (rows,), generator=g), torch.randint(-1, 5, (rows,), generator=g)], dim=1
    )
    pixels = torch.randint(0, 256, (rows, 32, 32, 3), dtype=torch.uint8, generator=g)
    return Batch(pixels, labels, torch.empty(rows, 0), torch.empty(rows, 0, dtype=torch.int64))


def sgd(model) -> torch.optim.SGD:
    """Without weight decay, so that a step is the gradient alone; fused, so that `found_inf` skips a step."""
    return torch.optim.SGD([{"params": list(trained_params(model).values()), "lr_ratio": 1.0}], lr=1, fused=True)


def updated(model, micro_batches, scale: float | None = None) -> dict[str, torch.Tensor]:
    """What trains, after one step; with the loss scaled as for fp16 where `scale` is given."""
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    train_step(model, micro_batches, optimizer, scaler, 0.1, None, in_double)
    return {name: p.detach() for name, p in trained_params(model).items()}


@pytest.mark.parametrize("sizes", [(4, 4), (4, 1), (1, 3, 2), (6,)])
def test_a_window_steps_as_one_big_batch(sizes):
    """Also when it is short or uneven, and when labels are missing here and there."""
    parts = [batch(rows, seed) for seed, rows in enumerate(sizes)]
    big = Batch(*map(torch.cat, zip(*parts, strict=True)))
    one, many = updated(tiny_model(), [big]), updated(tiny_model(), parts)
    start = {name: p.detach() for name, p in trained_params(tiny_model()).items()}
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=0, atol=1e-7)  # the losses themselves are fp32
        assert not torch.equal(one[name], start[name]), f"{name} did not train"


def test_a_step_changes_adapters_and_heads_and_nothing_else():
    model, before = tiny_model(), tiny_model().state_dict()
    updated(model, [batch(8, 0)])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trained_params(model))
    pairs = ["attn.qkv.query", "attn.qkv.value", "attn.proj", "mlp.fc1", "mlp.fc2"]
    adapters = {f"backbone.blocks.{i}.{p}.lora_{m}" for i in (0, 1) for p in pairs for m in "AB"}
    heads = {
        f"heads.levels.{name}" for name in ("0.weight", "0.bias", "1.0.weight", "1.0.bias", "1.2.weight", "1.2.bias")
    }
    assert changed == adapters | heads


@pytest.mark.parametrize("magnitude", [1, 100])
def test_the_loss_scale_of_fp16_changes_no_update_clipped_or_not(magnitude):
    """It would if gradients were clipped before they are unscaled."""

    def model():
        grown = tiny_model()
        for p in grown.heads.parameters():
            p.data *= magnitude
        return grown

    plain, scaled = updated(model(), [batch(4, 0)]), updated(model(), [batch(4, 0)], scale=1024.0)
    for name in plain:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-6, atol=1e-9)


def test_an_overflow_under_fp16_takes_no_step_and_halves_the_scale():
    model, before = tiny_model(), trained_params(tiny_model())
    for p in model.heads.parameters():
        p.data *= 1e200  # the scaled loss is no longer finite
    heads = {name: p.detach().clone() for name, p in trained_params(model).items()}
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    train_step(model, [batch(4, 0)], optimizer, scaler, 0.1, None, in_double)
    assert scaler.get_scale() == 2.0**15
    assert all(torch.equal(p, heads[name]) for name, p in trained_params(model).items())
    assert heads.keys() == before.keys()


def test_a_window_without_any_label_changes_nothing_and_is_finite():
    unlabelled = batch(4, 0)
    unlabelled = unlabelled._replace(labels=torch.full_like(unlabelled.labels, -1))
    model = tiny_model()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    *losses, norm = train_step(model, [unlabelled], optimizer, scaler, 0.1, None, in_double)
    assert losses == [0, 0]
    assert norm == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny_model().parameters(), strict=True))


def test_the_gradient_is_clipped_to_norm_one():
    model = tiny_model()
    for p in model.heads.parameters():
        p.data *= 100
    before = {name: p.detach().clone() for name, p in trained_params(model).items()}
    optimizer = sgd(model)
    *_, norm = train_step(
        model, [batch(4, 0)], optimizer, torch.amp.GradScaler("cpu", enabled=False), 0.1, None, in_double
    )
    moved = torch.stack([(p - before[name]).norm() for name, p in trained_params(model).items()]).norm()
    assert norm > 1
    assert moved.item() == pytest.approx(0.1 * 1, rel=1e-4)  # learning rate times the clipped norm


def test_a_weight_scales_an_attributes_gradient_and_not_its_reported_loss():
    def figures(weights):
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        model = tiny_model()
        return train_step(model, [batch(8, 0)], sgd(model), scaler, 0.1, None, in_double, weights=weights)

    plain, doubled, first = figures(None), figures(torch.tensor([2.0, 2.0])), figures(torch.tensor([1.0, 0.0]))
    assert torch.equal(plain[:2], doubled[:2])
    assert torch.equal(plain[:2], first[:2])
    assert doubled[2].item() == pytest.approx(2 * plain[2].item(), rel=1e-5)
    assert 0 < first[2] < plain[2]


def test_windows_keep_the_short_tail():
    assert [len(w) for w in windows(range(7), 3)] == [3, 3, 1]


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 100, 1e-3) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3 / 5)
    assert max(rates) == pytest.approx(1e-3) == rates[4]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 1e-6
    assert learning_rate(0, 1, 1e-3) > 0


def test_biases_are_not_decayed():
    params = trained_params(tiny_model())
    *decayed, rest = parameter_groups(params)
    assert all(group["weight_decay"] > 0 for group in decayed)
    assert rest["weight_decay"] == 0
    assert {p.ndim for group in decayed for p in group["params"]} == {2}
    assert {p.ndim for p in rest["params"]} == {1}
    assert sum(len(group["params"]) for group in [*decayed, rest]) == len(params)


def test_lora_plus_is_the_learning_rate_of_b_alone():
    def moved(lora_plus):
        model = tiny_model()
        before = {name: p.detach().clone() for name, p in trained_params(model).items()}
        optimizer = torch.optim.SGD(
            parameter_groups(trained_params(model), lora_plus), lr=1, weight_decay=0, fused=True
        )
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train_step(model, [batch(4, 0)], optimizer, scaler, 1e-4, None, in_double)
        return {name: (p - before[name]).norm() for name, p in trained_params(model).items()}

    plain, plus = moved(1.0), moved(16.0)
    for name in plain:
        ratio = 16 if name.endswith("lora_B") else 1
        torch.testing.assert_close(plus[name], ratio * plain[name], rtol=1e-2, atol=1e-9)  # decay differs in part


def test_amp_alone_never_means_fp16_on_a_cpu():
    assert choose_amp(torch.device("cpu")) in (None, "bf16")


def test_bf16_step_stays_close_to_fp32():
    steps = {}
    for amp in (None, torch.bfloat16):
        model = tiny_model().float()
        optimizer = sgd(model)
        *losses, norm = train_step(
            model, [batch(4, 0)], optimizer, torch.amp.GradScaler("cpu", enabled=False), 0.1, amp, PREPROCESS
        )
        steps[amp] = [loss.item() for loss in losses], norm.item()
    np.testing.assert_allclose(steps[torch.bfloat16][0], steps[None][0], rtol=0.05)
    np.testing.assert_allclose(steps[torch.bfloat16][1], steps[None][1], rtol=0.1)


# train.py as a user runs it


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
    assert (block.mlp.fc2.lora_magnitude - block.mlp.fc2.base_layer.weight.norm(dim=1)).abs().max() > 0
    assert isinstance(model.backbone.blocks[1].mlp.fc2, torch.nn.Linear), "--layers names the others"


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


def test_ctrl_c_leaves_a_usable_checkpoint_and_resuming_ends_as_if_never_stopped(
    command, cache_dir, tmp_path, monkeypatch
):
    options = ("--data", "demo", "--limit", 400, "--epochs", 2, "--accum", 3, "--cache-dir", cache_dir)
    assert command("train.py", *options, "--out", tmp_path / "whole").returncode == 0

    taken, real_step = [], train.train_step

    def step_then_ctrl_c(*args):
        taken.append(real_step(*args))
        if len(taken) == 5:
            signal.raise_signal(signal.SIGINT)
        return taken[-1]

    monkeypatch.setattr(train, "train_step", step_then_ctrl_c)
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
        (["--resume", "--out", "nothing", "--limit", "50"], "leave out --data"),
        (["--alpha", "-1"], "alpha must be positive, got -1"),
        (["--seed", "-1"], "--seed -1 is not between 0 and 4294967295"),
        (["--seed", "1790000000000000"], "--seed 1790000000000000 is not between 0 and 4294967295"),
        (["--title-length", "13"], "--title-length is of titles, which --inputs image does not read"),
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
        (["--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
        (["--limit", "3"], "is too small"),
        (["--data", ""], "--data is empty; name one, or leave it out"),
        (["--rank", "5000"], "no checkpoint of this run could be read: its lora.rank is not what it should be"),
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


def test_resuming_takes_no_option_even_at_its_default(command, demo_run):
    done = command("train.py", "--resume", "--out", demo_run, "--epochs", 5)
    assert done.returncode == 2
    assert "leave out --epochs" in done.stderr


@pytest.mark.parametrize("name", ["options.json", "skipped.csv", "events.out.tfevents.1.other"])
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
    done = command(
        *("train.py", "--data", "demo", "--limit", 1000, "--epochs", 3, "--amp", "--accum", 2, "--no-store"),
        *("--out", tmp_path / "run", "--cache-dir", cache_dir),
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
