"""`--base int8` with real weights and real pictures, and in a run: rounded for train pictures, merged without it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from data.preprocess import Preprocess
from data.sources import load_source
from data.store import common_size, open_store
from lora import Int8Linear, get_adapter_params, merge_lora, quantize_base
from models.backbone import DEMO, create_backbone
from models.checkpoint import load_checkpoint
from options import parse_args
from task import ROUNDED_FOR, setup

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def real(shared, cache_dir):
    """How to make the real ViT-Tiny, images to round for, and others to score with."""
    catalogue = load_source(str(shared / "data" / "fashion-product-images-small"), cache_dir, 3000)
    store = open_store(catalogue, common_size(catalogue, 224), cache_dir)
    preprocess = Preprocess(store.pixels.shape[1:3], (224, 224), "bicubic", (0.5,) * 3, (0.5,) * 3)
    rows = store.rows("train")[:ROUNDED_FOR], store.rows("test")[:32]
    seen, scored = (preprocess(torch.from_numpy(store.pixels[some])) for some in rows)
    weights = shared / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k" / "model.safetensors"

    def make() -> nn.Module:
        return create_backbone("vit_tiny_patch16_224", weights)[0].eval().requires_grad_(False)

    return SimpleNamespace(make=make, seen=seen, scored=scored)


@pytest.fixture(scope="module")
def rounded(real):
    """The real ViT-Tiny, rounded for the images to round for."""
    model = real.make()
    return quantize_base(model, lambda: model(real.seen))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def test_every_layer_is_within_a_hundredth_on_pictures_it_was_not_rounded_for(real, rounded):
    model, errors, nearest = real.make(), {}, {}

    def compare(path):
        def hook(layer, x, y):
            errors[path] = relative(rounded.get_submodule(path)(x[0]), y)
            nearest[path] = relative(Int8Linear(layer)(x[0]), y)

        return hook

    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(compare(path))
    model(real.scored)
    assert len(errors) == 48
    assert max(errors.values()) < 0.008, "measured: 0.0071"
    assert np.median(list(errors.values())) < 0.0031, "measured: 0.0027"
    assert all(errors[path] < nearest[path] for path in errors)


@torch.no_grad()
def test_the_embedding_is_closer_than_that_of_weights_rounded_to_the_nearest(real, rounded):
    wanted = real.make()(real.scored)
    error, nearest = (relative(model(real.scored), wanted) for model in (rounded, quantize_base(real.make())))
    assert error < 0.02, "measured: 0.017"
    assert error < 0.75 * nearest


@pytest.fixture
def prepare(cache_dir, tmp_path):
    """Set up a run on the demo with an int8 base and further options, as `train.py` does; its task."""

    def make(*words, resume: bool = False):
        args = parse_args(["--data", "demo", "--limit", "300", "--base", "int8", *words, "--cache-dir", str(cache_dir)])
        args.backbone, args.out, args.resume = DEMO, tmp_path, resume
        torch.manual_seed(args.seed)
        return setup(args, CPU)

    return make


def base(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("quantised")}


def test_a_run_rounds_its_base_for_its_train_pictures(prepare):
    task = prepare()
    assert not [path for path, module in task.model.backbone.named_modules() if type(module) is nn.Linear]
    nearest = quantize_base(create_backbone(DEMO)[0].requires_grad_(False)).state_dict()
    for path, found in base(task.model.backbone).items():
        steps = (found.int() - nearest[path.replace("base_layer.", "")].int()).abs()
        assert 0 < steps.double().mean() < 1, path


def test_a_resumed_run_has_the_same_base_to_the_bit_whatever_it_began_with(prepare, demo_run):
    words = ("--init-from", str(demo_run / "best"))
    begun, resumed = prepare(*words), prepare(*words, resume=True)
    adapters = [get_adapter_params(task.model) for task in (begun, resumed)]
    assert not torch.equal(*(torch.cat([p.flatten() for p in params.values()]) for params in adapters))
    found, again = base(begun.model), base(resumed.model)
    assert len(found) == 16
    assert all(torch.equal(found[path], again[path]) for path in found)


def test_a_trained_run_is_merged_onto_the_original_weights(command, cache_dir, tmp_path):
    done = command(
        *("train.py", "--data", "demo", "--limit", 200, "--epochs", 1, "--base", "int8", "--cache-dir", cache_dir),
        *("--out", tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr
    assert f"rounded for {ROUNDED_FOR} train pictures" in done.stdout
    model, _ = load_checkpoint(tmp_path / "run" / "best")
    layer, merged = model.backbone.blocks[3].mlp.fc2, merge_lora(model).backbone.blocks[3].mlp.fc2
    original = create_backbone(DEMO)[0].blocks[3].mlp.fc2.weight
    assert layer.delta_weight().abs().max() > 0
    assert torch.equal(merged.weight, original + layer.delta_weight())


def test_what_is_scored_is_what_is_loaded(command, cache_dir, tmp_path):
    """The float base, though it was trained on one of 8 bits."""
    words = ("--data", "demo", "--limit", 1000, "--epochs", 1, "--cache-dir", cache_dir)
    done = command("train.py", *words, "--base", "int8", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    words = ("--data", "demo", "--limit", 1000, "--cache-dir", cache_dir, "--json", tmp_path / "scores.json")
    done = command("evaluate.py", "--checkpoint", tmp_path / "run" / "best", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads((tmp_path / "run/metrics.json").read_text())
