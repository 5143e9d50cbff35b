"""A checkpoint is a folder: `config.json` describes the model, `adapter.safetensors` holds the trained tensors, and
`neighbours.safetensors`, if there is one, holds what `models.neighbours` needs of the train pictures, and their ids.

The frozen base is not stored: `config.json` names it by its fingerprint, and loading onto another base is an error. No
pickle is read or written, and no path of the machine is stored, so a checkpoint can be copied anywhere. The config ends
with the SHA-256 of every file, itself included, so that a file damaged by a disk or a network is never loaded.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from durable import replace_file, sync_folder, write_synced
from errors import UserError
from lora import apply_lora, get_adapter_params, load_params, set_trainable_params
from models.backbone import VIT_TARGETS, create_backbone, read_tensors
from models.classifier import AttributeClassifier
from models.heads import HierarchicalHeads
from models.hog import WIDTH as HOG_WIDTH
from models.neighbours import FILE, Neighbours
from models.schema import contradiction, labels_of, misfit
from models.text import PAD, TextEncoder
from models.text import WIDTH as TEXT_WIDTH

LEAST = 32  # numbers of a label or a word; no ViT is narrower
FORMAT, LOOKING = 4, 7  # without and with neighbours; raise both if older code could not read the new files


def adapt(backbone: nn.Module, config: dict) -> nn.Module:
    """Put LoRA layers, as `config` describes them, into a backbone that is to be trained.

    Raises:
        UserError: a LoRA target matches nothing, or a rank is below 1; the message names it.
    """
    settings = dict(config["lora"])
    try:
        if config["inputs"] != "title":
            apply_lora(backbone, settings.pop("targets"), **settings, table=VIT_TARGETS)
    except ValueError as error:
        raise UserError(str(error)) from None
    return backbone


def attach(backbone: nn.Module, config: dict) -> AttributeClassifier:
    """Put fresh heads (and a text encoder) on a backbone from `adapt`; only they and its LoRA layers will train."""
    text, blind = config["text"], config["inputs"] == "title"
    heads, keep = make_heads(backbone.num_features, config), config["backbone"]["keep_patches"]
    encoder = TextEncoder(len(text["vocab"]), text["length"], text["vocab"].index(PAD)) if text else None
    model = AttributeClassifier(backbone, heads, keep, encoder, blind)
    trained = [name for name, _ in model.named_parameters() if name.startswith(("heads.", "text."))]
    set_trainable_params(model, [*get_adapter_params(model), *trained])
    return model


def make_heads(width: int, config: dict) -> HierarchicalHeads:
    """Fresh heads for a backbone whose embedding is `width` wide."""
    attributes, inputs = config["attributes"], config["inputs"].split("+")
    return HierarchicalHeads(
        2 * width * ("image" in inputs) + TEXT_WIDTH * ("title" in inputs),
        hidden=width,
        levels={a["name"]: a["level"] for a in attributes},
        classes={a["name"]: len(a["labels"]) if a["kind"] == "class" else 1 for a in attributes},
    )


def trained_params(model: AttributeClassifier) -> dict[str, nn.Parameter]:
    """The parameters that are trained and saved: in a model from `attach`, the adapters, heads and text encoder."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    folder: Path, model: AttributeClassifier, config: dict, extra: Mapping[str, dict[str, Tensor]] | None = None
) -> None:
    """Write a new folder beside `folder` and swap it in; the checkpoint that it replaces is kept as `NAME.previous`.

    A crash at any moment leaves the new or the replaced checkpoint complete on the disk.

    Args:
        extra: further safetensors files by file name, such as the optimizer's state in `last/`, or neighbours.

    Raises:
        OSError: there is no space or no permission; the existing checkpoint is unchanged.
    """
    fresh, previous = fresh_of(folder), previous_of(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in trained_params(model).items()}
    try:
        files = {name: tensor_bytes(state) for name, state in {"adapter.safetensors": tensors, **(extra or {})}.items()}
        for name, data in (files | {"config.json": sealed(config, files)}).items():
            write_synced(fresh / name, data)
        sync_folder(fresh)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
    os.replace(fresh, folder)
    sync_folder(folder.parent)


def fresh_of(folder: Path) -> Path:
    """Where `save_checkpoint` writes a checkpoint until it is complete."""
    return folder.with_name(folder.name + ".new")


def previous_of(folder: Path) -> Path:
    """Where `save_checkpoint` puts the checkpoint that it replaces."""
    return folder.with_name(folder.name + ".previous")


def sealed(config: dict, files: Mapping[str, bytes]) -> bytes:
    """The text of `config.json`, with the format and the SHA-256 of the files beside it and of the config itself."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    config = config | {"format": LOOKING if FILE in files else FORMAT, "sha256": sums}
    sums["config.json"] = _own_sum(config)
    return (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode()


def _own_sum(config: dict) -> str:
    """SHA-256 of a config without this sum itself, independent of white space and the order of the keys."""
    sums = {name: value for name, value in config["sha256"].items() if name != "config.json"}
    return hashlib.sha256(json.dumps(config | {"sha256": sums}, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> dict:
    """`config.json` of a checkpoint folder, after checking that none of the checkpoint's files is damaged.

    Raises:
        UserError: there is no checkpoint, or it is damaged, has another format, or describes no model.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        hint = f"; {before} holds the one before" if (before := previous_of(folder.resolve())).is_dir() else ""
        raise UserError(
            f"no checkpoint at {folder} (no config.json there{hint}); name the folder of one, such as runs/NAME/best"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    found = config.get("format") if isinstance(config, dict) else None
    if found not in (FORMAT, LOOKING):
        newer = "; it was written by a newer version: update" if isinstance(found, int) and found > LOOKING else ""
        raise UserError(f"{path} is of format {found!r}, not {FORMAT} or {LOOKING}, those of this project{newer}")
    sums = config.get("sha256")
    if not isinstance(sums, dict) or not {"adapter.safetensors", "config.json"} <= sums.keys():
        raise UserError(f"{path} is damaged: it lacks the checksums of its files")
    if sums["config.json"] != _own_sum(config):
        raise UserError(f"{path} is damaged: its checksum differs")
    for name in sums.keys() - {"config.json"}:
        if name != Path(name).name:
            raise UserError(f"{path} names a file outside its folder: {name!r}")
        try:
            data = (folder / name).read_bytes()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {folder / name}: {error}") from None
        if hashlib.sha256(data).hexdigest() != sums[name]:
            raise UserError(f"{folder / name} is damaged: its checksum differs")
    if where := misfit(config):
        raise UserError(f"{path} does not describe a model: {where} is missing or not what it should be")
    if what := contradiction(config):
        raise UserError(f"{path} does not describe a model: {what}")
    return config


def amend_config(folder: Path, **facts) -> None:
    """Add facts to a checkpoint's `config.json`, which is replaced atomically."""
    config = read_config(folder)
    files = {name: (folder / name).read_bytes() for name in config["sha256"] if name != "config.json"}
    replace_file(folder / "config.json", sealed(config | facts, files))


def stored_tensors(folder: Path, config: dict, name: str = "adapter.safetensors") -> dict[str, Tensor]:
    """The tensors of a checkpoint's file, if it still belongs to this config: a running training may replace both."""
    path = folder / name
    state = read_tensors(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != config["sha256"][path.name]:
        raise UserError(f"{folder} was replaced while it was read, as by a run that goes on; start again")
    return state


def load_tensors(folder: Path, model: AttributeClassifier, config: dict) -> None:
    """Load a checkpoint's tensors strictly: an error names every missing, unexpected, misshaped or non-finite one."""
    path, state = folder / "adapter.safetensors", stored_tensors(folder, config)
    try:
        load_params(trained_params(model), state)
    except ValueError as error:
        raise UserError(f"{path} does not fit its config.json: {error}") from None
    if bad := sorted(name for name, tensor in state.items() if not tensor.isfinite().all()):
        raise UserError(f"{path} holds numbers that are not finite, in {', '.join(bad)}")
    model.neighbours = read_neighbours(folder, model, config) if FILE in config["sha256"] else None


def read_neighbours(folder: Path, model: AttributeClassifier, config: dict) -> Neighbours:
    """The train pictures that a checkpoint keeps for this model.

    Raises:
        UserError: they do not fit the config.
    """
    classes = {name: len(labels) for name, labels in labels_of(config).items()}
    numbers = [a["name"] for a in config["attributes"] if a["kind"] == "number"]
    try:
        found = Neighbours(classes, numbers, stored_tensors(folder, config, FILE))
    except ValueError as error:
        raise UserError(f"{folder / FILE} does not fit its config.json: {error}") from None
    if (len(found.hog_mean), len(found.embedding_mean)) != (HOG_WIDTH, model.heads.levels[0].in_features):
        raise UserError(f"{folder / FILE} does not fit its config.json: it is of another version or another backbone")
    return found.to(next(model.parameters()).device)


def load_checkpoint(folder: Path, weights: Path | None = None) -> tuple[AttributeClassifier, dict]:
    """The trained model, in eval mode with LoRA layers in place (`merge_lora` folds them in), and its config.

    Args:
        weights: the backbone's base weights; None takes what the run used (remembered in the run's `options.json`,
            not in the checkpoint itself), else the hub's.
    """
    config = read_config(folder)
    base = config["backbone"]
    name, fingerprint = base["name"], base["fingerprint"]
    weights = weights or remembered_weights(folder)
    backbone, found = create_backbone(name, weights, base["img_size"], base["patch_size"])
    if found != fingerprint:
        raise UserError(
            f"{folder} was trained on {name} weights {fingerprint}, but {weights or 'the hub copy'} holds {found}; "
            "name the right file with --weights"
        )
    if list(backbone.patch_embed.img_size) != config["preprocess"]["size"]:
        raise UserError(f"{folder} contradicts itself: its preprocess.size is not what its backbone reads")
    check_size(stored_tensors(folder, config), config, folder)
    model = attach(adapt(backbone, config), config)
    load_tensors(folder, model, config)
    return model.eval(), config


def check_size(state: Mapping[str, Tensor], config: dict, folder: Path) -> None:
    """Raise a `UserError` if a checkpoint's tensors are too small for so many labels and words, each of which has a row
    of numbers there: building heads and a text encoder for them could take all memory."""
    labels, vocab = sum(map(len, labels_of(config).values())), (config["text"] or {}).get("vocab", ())
    if (labels + len(vocab)) * LEAST > sum(tensor.numel() for tensor in state.values()):
        raise UserError(f"{folder} does not fit its config.json: its tensors are too small for so many labels or words")


def remembered_weights(folder: Path) -> Path | None:
    """The --weights file that the run of this checkpoint was trained with."""
    options = folder.resolve().parent / "options.json"
    if not options.is_file():
        return None
    try:
        path = json.loads(options.read_text(encoding="utf-8")).get("weights")  # another program's file may have none
        return Path(path) if path else None
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"{options} is damaged; name the backbone's weights with --weights") from None


def find_checkpoint(given: Path | None) -> Path:
    """The given folder, else the `best` checkpoint of the newest run."""
    return given or newest_checkpoint(Path("runs"), "best")


def newest_checkpoint(runs: Path, which: str) -> Path:
    """The newest `best` or `last` folder of any run, even if only its `.previous` is there at the moment."""
    names = (which, previous_of(Path(which)).name)
    found = [path for name in names for path in runs.glob(f"*/{name}/adapter.safetensors")]
    if not found:
        raise UserError(f"no run under {runs}/ has a {which}/ checkpoint; train one with train.py, or name its folder")
    return max(found, key=_trained_at).parents[1] / which


def _trained_at(adapter: Path) -> float:
    """The time the adapter was written: calibrating rewrites only config.json. One that is being replaced is newest."""
    try:
        return adapter.stat().st_mtime
    except FileNotFoundError:
        return math.inf
