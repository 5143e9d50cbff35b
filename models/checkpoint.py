"""A checkpoint is a folder: `config.json` rebuilds the model, `adapter.safetensors` holds what was trained.

The frozen base is not in it: `config.json` names the base by its fingerprint and loading onto another one is an error.
No pickle is read or written, and no path of the machine is stored, so a checkpoint can be copied anywhere.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errors import UserError
from lora import apply_lora, get_adapter_params, load_params, set_trainable_params
from models.backbone import VIT_TARGETS, create_backbone
from models.classifier import AttributeClassifier
from models.heads import HierarchicalHeads

FORMAT = 1


def attach(backbone: nn.Module, config: dict) -> AttributeClassifier:
    """Put LoRA layers and heads, as `config` describes them, on a backbone; only those require a gradient.

    Raises:
        UserError: a LoRA target that matches nothing, a rank below 1 (the message names it).
    """
    attributes, settings = config["attributes"], dict(config["lora"])
    try:
        apply_lora(backbone, settings.pop("targets"), **settings, table=VIT_TARGETS)
    except ValueError as error:
        raise UserError(str(error)) from None
    heads = HierarchicalHeads(
        2 * backbone.num_features,
        hidden=backbone.num_features,
        levels={a["name"]: a["level"] for a in attributes},
        classes={a["name"]: len(a["labels"]) for a in attributes},
    )
    model = AttributeClassifier(backbone, heads)
    set_trainable_params(model, trained_params(model))
    return model


def trained_params(model: AttributeClassifier) -> dict[str, nn.Parameter]:
    """What is trained and saved, by structure: the adapters in the backbone, and the heads."""
    adapters = get_adapter_params(model.backbone)
    return {f"backbone.{name}": p for name, p in adapters.items()} | {
        f"heads.{name}": p for name, p in model.heads.named_parameters()
    }


def save_checkpoint(
    folder: Path, model: AttributeClassifier, config: dict, extra: Mapping[str, dict[str, Tensor]] | None = None
):
    """Write the folder beside its place and swap it in, so that a crash leaves the old or the new one, whole.

    Args:
        extra: further safetensors files, by file name: the optimizer's state in `last/`.
    """
    finish_swap(folder)
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in trained_params(model).items()}
    save_file(tensors, fresh / "adapter.safetensors")
    for name, state in (extra or {}).items():
        save_file(state, fresh / name)
    text = json.dumps({"format": FORMAT, **config}, indent=1, ensure_ascii=False)
    (fresh / "config.json").write_text(text + "\n", encoding="utf-8")
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def finish_swap(folder: Path) -> None:
    """Put the old folder back where `save_checkpoint` was stopped between its two renames."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def read_config(folder: Path) -> dict:
    """`config.json` of a checkpoint folder."""
    finish_swap(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"no checkpoint at {folder} (no config.json there); give --checkpoint runs/NAME/best") from None
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{folder / 'config.json'} is not a format {FORMAT} checkpoint of this project")
    return config


def amend_config(folder: Path, **facts) -> None:
    """Put facts into a checkpoint's `config.json`, which is whole at any moment."""
    text = json.dumps(read_config(folder) | facts, indent=1, ensure_ascii=False)
    fresh = folder / "config.json.new"
    fresh.write_text(text + "\n", encoding="utf-8")
    os.replace(fresh, folder / "config.json")


def load_tensors(folder: Path, model: AttributeClassifier) -> None:
    """Load `adapter.safetensors` strictly: every missing, unexpected or misshaped tensor is named."""
    path = folder / "adapter.safetensors"
    try:
        state = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    try:
        load_params(trained_params(model), state)
    except ValueError as error:
        raise UserError(f"{path} does not fit its config.json: {error}") from None


def load_checkpoint(folder: Path, weights: Path | None = None) -> tuple[AttributeClassifier, dict]:
    """The trained model, in eval mode with LoRA layers in place (`merge_lora` folds them in), and its config.

    Args:
        weights: the backbone's base weights; None takes what the run used (remembered in the run's `options.json`,
            not in the checkpoint itself), else the hub's.
    """
    config = read_config(folder)
    name, fingerprint = config["backbone"]["name"], config["backbone"]["fingerprint"]
    weights = weights or remembered_weights(folder)
    backbone, found = create_backbone(name, weights, config["backbone"]["img_size"])
    if found != fingerprint:
        raise UserError(
            f"{folder} was trained on {name} weights {fingerprint}, but {weights or 'the hub copy'} holds {found}; "
            "name the right file with --weights"
        )
    model = attach(backbone, config)
    load_tensors(folder, model)
    return model.eval(), config


def remembered_weights(folder: Path) -> Path | None:
    """The --weights file that the run of this checkpoint was trained with."""
    options = folder.resolve().parent / "options.json"
    if not options.is_file():
        return None
    try:
        path = json.loads(options.read_text(encoding="utf-8"))["weights"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{options} is damaged; name the backbone's weights with --weights") from None
    return Path(path) if path else None


def find_checkpoint(given: Path | None, runs: Path = Path("runs")) -> Path:
    """The folder asked for, else the newest run's best."""
    return given or newest_checkpoint(runs, "best")


def newest_checkpoint(runs: Path, which: str) -> Path:
    """The most recently written `best` or `last` folder of any run."""
    found = sorted(runs.glob(f"*/{which}/config.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no run under {runs}/ has a {which}/ checkpoint; train one with train.py, or name its folder")
    return found[-1].parent
