"""For all tests: the real catalogue and weights where they lie beside the checkout, and one trained demo run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a hub that can be reached would change what runs choose; read as its library loads

# isort: split
import functools
import importlib
import io
import json
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file, save

from data import fashion
from models.checkpoint import load_checkpoint, make_heads, save_checkpoint, sealed
from models.hog import hog
from models.neighbours import FILE, Neighbours

OWN_PATCHES = {"img_size": None, "patch_size": None, "keep_patches": 1.0}  # of a checkpoint's config

ROOT = Path(__file__).parents[1]

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draws do not depend on which tests came before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of the real catalogue and a real pretrained backbone, which are no part of the project."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the real catalogue and weights in {folder.name}/ beside the checkout")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """Decoded images, kept for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def command():
    """Run one of the project's commands from a folder, in this process, as importing torch anew takes seconds."""

    def run(script: str, *words, cwd: Path = ROOT) -> CompletedProcess:
        main = importlib.import_module(script.removesuffix(".py")).main
        out, err = io.StringIO(), io.StringIO()
        before = os.getcwd()
        os.chdir(cwd)
        try:
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
                main(list(map(str, words)))
        finally:
            os.chdir(before)
        return CompletedProcess(words, ended.value.code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def demo_run(command, cache_dir, tmp_path_factory) -> Path:
    """A short but real training run on part of the demo; the run's folder."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    done = command(
        *("train.py", "--data", "demo", "--limit", 1000, "--epochs", 3, "--accum", 2),
        *("--out", out, "--cache-dir", cache_dir),
    )
    assert done.returncode == 0, done.stderr
    return out


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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five fresh drawings in a folder and a folder below it, and two files that are no images."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for index in range(5):
        _, image = fashion.draw(index, seed=7)
        image.save((folder / "more" if index > 2 else folder) / f"{index}.png")
    (folder / "page.jpg").write_text("<html>404</html>")
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not asked about")
    return folder


@pytest.fixture
def ctrl_c(monkeypatch) -> list:
    """Ctrl-C in the fifth step of training that is taken from here on; what the steps gave."""
    train = importlib.import_module("train")
    taken, real_step = [], train.train_step

    def step_then_ctrl_c(*args, **options):
        taken.append(real_step(*args, **options))
        if len(taken) == 5:
            signal.raise_signal(signal.SIGINT)
        return taken[-1]

    monkeypatch.setattr(train, "train_step", step_then_ctrl_c)
    return taken


@pytest.fixture
def with_config(tmp_path):
    """`with_config(checkpoint, change)`: a copy of a checkpoint whose config was changed in place, and sealed again."""

    def make(checkpoint: Path, change) -> Path:
        folder = shutil.copytree(checkpoint, tmp_path / "best")
        config = json.loads((folder / "config.json").read_text())
        change(config)
        adapter = {"adapter.safetensors": (folder / "adapter.safetensors").read_bytes()}
        (folder / "config.json").write_bytes(sealed(config, adapter))
        return folder

    return make


def with_fresh_heads(checkpoint, folder):
    """A checkpoint with the adapters of another and heads that have learnt nothing."""
    model, config = load_checkpoint(checkpoint)
    torch.manual_seed(0)
    fresh = make_heads(model.backbone.num_features, config).state_dict()
    tensors = load_file(checkpoint / "adapter.safetensors") | {f"heads.{name}": t for name, t in fresh.items()}
    files = {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    files["adapter.safetensors"] = save(tensors)
    folder.mkdir(parents=True)
    for name, data in (files | {"config.json": sealed(config, files)}).items():
        (folder / name).write_bytes(data)


@pytest.fixture
def with_neighbours(looking, tmp_path):
    """`with_neighbours(checkpoint)`: a copy of a checkpoint that keeps 40 pictures of noise, which count by half."""
    return lambda checkpoint: shutil.copytree(looking(checkpoint), tmp_path / "looking" / "best")


@pytest.fixture(scope="session")
def looking(tmp_path_factory):
    """`with_neighbours`, of each checkpoint once."""

    @functools.cache
    def make(checkpoint: Path) -> Path:
        model, config = load_checkpoint(checkpoint)
        classes = {a["name"]: len(a["labels"]) for a in config["attributes"] if a["kind"] == "class"}
        drawing = torch.Generator().manual_seed(0)
        images = torch.randn(40, 3, *config["preprocess"]["size"], generator=drawing)
        labels = torch.stack([torch.randint(count, (40,), generator=drawing) for count in classes.values()], dim=1)
        with torch.no_grad():
            seen = hog(images), torch.cat(model.embed(images), dim=1)
        numbers = [a["name"] for a in config["attributes"] if a["kind"] == "number"]
        values = torch.randn(40, len(numbers), generator=drawing)
        known = {"labels": labels, "values": values, "hashes": torch.arange(40)}
        neighbours = Neighbours.of(classes, numbers, *seen, [f"noise {i}" for i in range(40)], known)
        neighbours.share.fill_(0.5)
        folder = tmp_path_factory.mktemp("looking") / "best"
        save_checkpoint(folder, model, config, {FILE: neighbours.tensors()})
        return folder

    return make
