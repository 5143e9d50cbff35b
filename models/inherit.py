"""Start from a trained checkpoint: a new model takes over what both have, even if their attributes differ.

The adapters are copied if both models read pictures, and the text encoder if vocabulary and length of titles are the
same. In the heads, everything that a kept label is computed from is copied: its output rows, the hidden layer of its
level, and the columns for inputs that both models have. Columns for new inputs start at zero, so that at first all that
is kept predicts as before, unless an attribute of a level above it, or the text encoder, was left out. Numbers predict
as before too, even if the new train rows give them another scale.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError
from lora import get_adapter_params, load_params
from models.checkpoint import check_size, make_heads, read_config, stored_tensors
from models.classifier import AttributeClassifier
from models.heads import HierarchicalHeads
from models.neighbours import FILE
from models.text import WIDTH as TEXT_WIDTH

NUMBER = "a number"  # what the one output of a number means; a class's outputs mean its labels


def predecessor(config: dict, folder: Path) -> dict:
    """The config of the checkpoint that a run with `config` (needs `backbone`, `lora`, `inputs` only) inherits from.

    Raises:
        UserError: the checkpoint cannot be read, has another backbone or other LoRA layers, or shares no input.
    """
    old = read_config(folder)
    if not set(old["inputs"].split("+")) & set(config["inputs"].split("+")):
        raise UserError(f"--init-from {folder} reads {old['inputs']} and gives nothing to --inputs {config['inputs']}")
    for what, key in (("backbone", "name"), ("base weights", "fingerprint")):
        theirs, ours = old["backbone"][key], config["backbone"][key]
        if theirs != ours:
            raise UserError(f"--init-from {folder} has the {what} {theirs}, not {ours}")
    theirs, ours = _set(old["lora"]), _set(config["lora"])
    for key in sorted(theirs | ours) if _both_see(old, config) else []:
        if theirs.get(key) != ours.get(key):
            raise UserError(f"--init-from {folder} has --{key} {theirs.get(key)}, not {ours.get(key)}")
    return old


def _both_see(old: dict, config: dict) -> bool:
    return "image" in old["inputs"] and "image" in config["inputs"]


def inherit(model: AttributeClassifier, config: dict, folder: Path) -> str:
    """Copy a checkpoint's share into `model`, described by `config`, in place; returns what was kept and is new.

    Raises:
        UserError: as `predecessor`; titles are the only shared input, but with another vocabulary or length; the
            checkpoint's tensors do not fit its config.
    """
    old = predecessor(config, folder)
    seen, state = _both_see(old, config), stored_tensors(folder, old)
    read = bool(old["text"] and _tokens(old) == _tokens(config))
    if not seen and not read:
        raise UserError(f"--init-from {folder} reads titles in another vocabulary or length: none of it can be kept")
    check_size(state, old, folder)
    heads = make_heads(model.backbone.num_features, old)
    mine = {"heads.": dict(heads.named_parameters())}
    mine |= {"backbone.": get_adapter_params(model.backbone)} if seen else {}
    mine |= {"text.": dict(model.text.named_parameters())} if read else {}
    try:
        for prefix, params in mine.items():
            load_params(params, {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    except ValueError as error:
        raise UserError(f"{folder} does not fit its config.json: {error}") from None

    kept = _inherit_heads(model.heads, config, heads, old)
    said = [f"kept {' and '.join(['the adapters'] * seen + ['the text encoder'] * read)}"]
    whole = [name for name, (have, of) in kept.items() if have == of]
    said += [f"the heads of {', '.join(whole)}"] if whole else []
    said += [f"{have} of {of} labels of {name}" for name, (have, of) in kept.items() if 0 < have < of]
    before = [a["name"] for a in old["attributes"]]
    lost = [name for name, (have, _) in kept.items() if not have]
    begun = "of another vocabulary or length, so begun anew"
    changes = {begun: ["the text encoder"] if old["text"] and config["text"] and not read else []}
    changes |= {
        "new": [name for name in lost if name not in before],
        "of another kind of level or other labels, so begun anew": [name for name in lost if name in before],
        "left out": [name for name in before if name not in kept],
    }
    changes["left out"] += ["the neighbours"] if FILE in old["sha256"] else []
    changes = [f"{what}: {', '.join(names)}" for what, names in changes.items() if names]
    return f"from {folder}: " + "; ".join([", ".join(said), *changes])


def _set(lora: dict) -> dict:
    """The LoRA options that are set and shape the layers; dropout may differ."""
    return {key: value for key, value in lora.items() if key != "dropout" and value is not None and value is not False}


def _tokens(config: dict) -> tuple[int, list[str]] | None:
    """Length and vocabulary of titles, which give a text encoder's weights their meaning; None without titles."""
    return config["text"] and (config["text"]["length"], config["text"]["vocab"])


class Layer(NamedTuple):
    """A linear layer, and what each of its outputs (rows of its weight) and inputs (columns) means."""

    linear: nn.Linear
    rows: list[tuple]
    columns: list[tuple]


def _inherit_heads(
    heads: HierarchicalHeads, config: dict, old_heads: HierarchicalHeads, old: dict
) -> dict[str, tuple[int, int]]:
    """Copy what both heads have; returns {attribute: (number of outputs kept, number of outputs)}."""
    kept, rescale, before = {}, _rescale(config, old), list(_levels(old_heads, old))
    for names, layers in _levels(heads, config):
        matches = [was for theirs, was in before if set(theirs) & set(names) and len(was) == len(layers)]
        match = matches[0] if matches else []  # where two levels became one, the first
        for layer, was in zip(layers, match, strict=False):
            _copy(layer, was, rescale)
        known = set(match[-1].rows) if match else set()
        for name in names:
            outputs = [row for row in layers[-1].rows if row[0] == name]
            kept[name] = (len(known.intersection(outputs)), len(outputs))
    return kept


def _rescale(config: dict, old: dict) -> dict[tuple, tuple[float, float]]:
    """{output of a number: (a, b)}, where z in the old scale is a z + b in the new one."""
    scales = [{x["name"]: x for x in about["attributes"] if x["kind"] == "number"} for about in (config, old)]
    shared = ((name, new, scales[1][name]) for name, new in scales[0].items() if name in scales[1])
    return {
        (name, NUMBER): (was["std"] / new["std"], (was["mean"] - new["mean"]) / new["std"]) for name, new, was in shared
    }


def _levels(heads: HierarchicalHeads, config: dict) -> Iterator[tuple[list[str], list[Layer]]]:
    """The attributes of each level, and its layers: one, or two with hidden units between them."""
    attributes = {a["name"]: a for a in config["attributes"]}
    text = TEXT_WIDTH if config["text"] else 0
    seen: list[tuple] = [("image", i) for i in range(heads.levels[0].in_features - text)]  # of the embedding
    seen += [("text", i, json.dumps(_tokens(config))) for i in range(text)]
    for names, level in zip(heads.by_level, heads.levels, strict=True):
        outputs = []
        for a in (attributes[name] for name in names):
            outputs += [(a["name"], label) for label in (a["labels"] if a["kind"] == "class" else [NUMBER])]
        *hidden, last = [module for module in level.modules() if isinstance(module, nn.Linear)]
        between = [("hidden", i) for i in range(last.in_features)] if hidden else seen
        yield names, [Layer(linear, between, seen) for linear in hidden] + [Layer(last, outputs, between)]
        seen = seen + outputs


@torch.no_grad()
def _copy(new: Layer, old: Layer, rescale: dict) -> None:
    """Copy the rows that both layers have, in the columns that both have; new columns of these rows become zero."""
    rows, old_rows = _shared(new.rows, old.rows)
    columns, old_columns = _shared(new.columns, old.columns)
    row_a, row_b = torch.tensor([rescale.get(new.rows[i], (1.0, 0.0)) for i in rows]).view(-1, 2).unbind(1)
    column_a, column_b = torch.tensor([rescale.get(new.columns[i], (1.0, 0.0)) for i in columns]).view(-1, 2).unbind(1)
    come = old.linear.weight[old_rows][:, old_columns] / column_a
    new.linear.weight[rows] = 0.0
    new.linear.weight[rows[:, None], columns] = come * row_a[:, None]
    new.linear.bias[rows] = (old.linear.bias[old_rows] - come @ column_b) * row_a + row_b


def _shared(mine: list[tuple], theirs: list[tuple]) -> tuple[Tensor, Tensor]:
    """The positions of the items that both lists hold, in `mine` and in `theirs`."""
    place = {meaning: i for i, meaning in enumerate(theirs)}
    pairs = [(i, place[meaning]) for i, meaning in enumerate(mine) if meaning in place]
    here, there = torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(1)
    return here, there
