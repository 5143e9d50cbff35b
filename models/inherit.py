"""Starting from a trained checkpoint: a new model takes over what it shares with it, though its attributes may differ.

Adapters come over whole, and so does the text encoder of the same vocabulary. Of the heads, what an attribute's label
was computed from comes over: its output rows, the hidden layer of its level, and the columns that read what both
models know. Columns that read something new start at zero, so that all that is kept answers at first as it did before,
unless an attribute of a level above it was left out; a number too, though the train rows, by which it is scaled, may be
others now.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from errors import UserError
from lora import get_adapter_params, load_params
from models.checkpoint import adapter_tensors, make_heads, read_config
from models.classifier import AttributeClassifier
from models.heads import HierarchicalHeads
from models.text import WIDTH as TEXT_WIDTH

NUMBER = "a number"  # what the one output of a number means; a class's outputs mean its labels


def inherit(model: AttributeClassifier, config: dict, folder: Path) -> str:
    """Copy what `model`, described by `config`, shares with a checkpoint, in place; and say what was kept and is new.

    Raises:
        UserError: the checkpoint cannot be read, or is of another backbone or other LoRA layers.
    """
    old = read_config(folder)
    for what, key in (("backbone", "name"), ("base weights", "fingerprint")):
        theirs, ours = old["backbone"][key], config["backbone"][key]
        if theirs != ours:
            raise UserError(f"--init-from {folder} has the {what} {theirs}, not {ours}")
    seen = "image" in old["inputs"] and "image" in config["inputs"]
    theirs, ours = _set(old["lora"]), _set(config["lora"])
    for key in sorted(theirs | ours) if seen else []:
        if theirs.get(key) != ours.get(key):
            raise UserError(f"--init-from {folder} has --{key} {theirs.get(key)}, not {ours.get(key)}")

    state = adapter_tensors(folder, old)
    read = old["text"] is not None and old["text"] == config["text"]
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
    said = [f"kept {' and '.join(['the adapters'] * seen + ['the text encoder'] * read) or 'no adapters'}"]
    whole = [name for name, (have, of) in kept.items() if have == of]
    said += [f"the heads of {', '.join(whole)}"] if whole else []
    said += [f"{have} of {of} labels of {name}" for name, (have, of) in kept.items() if 0 < have < of]
    before = [a["name"] for a in old["attributes"]]
    lost = [name for name, (have, _) in kept.items() if not have]
    changes = {
        "new": [name for name in lost if name not in before],
        "of another kind of level or other labels, so begun anew": [name for name in lost if name in before],
        "left out": [name for name in before if name not in kept],
    }
    changes = [f"{what}: {', '.join(names)}" for what, names in changes.items() if names]
    return f"from {folder}: " + "; ".join([", ".join(said), *changes])


def _set(lora: dict) -> dict:
    """The LoRA options that are on, as JSON has them."""
    return {key: value for key, value in json.loads(json.dumps(lora)).items() if value not in (None, False)}


def _inherit_heads(
    heads: HierarchicalHeads, config: dict, old_heads: HierarchicalHeads, old: dict
) -> dict[str, tuple[int, int]]:
    """Copy what both have; {attribute: (outputs kept, outputs)}."""
    kept, rescale = {}, _rescale(config, old)
    before = list(_levels(old_heads, old))
    for names, linears, columns, rows in _levels(heads, config):
        kept |= {name: (0, sum(row[0] == name for row in rows)) for name in names}
        match = [level for level in before if set(level[0]) & set(names) and len(level[1]) == len(linears)]
        for _, old_linears, old_columns, old_rows in match[:1]:  # of two levels made one, the first
            hidden = list(range(linears[0].out_features))
            if len(linears) == 1:
                _copy(linears[0], old_linears[0], rows, old_rows, columns, old_columns, rescale)
            else:
                _copy(linears[0], old_linears[0], hidden, hidden, columns, old_columns, rescale)
                _copy(linears[1], old_linears[1], rows, old_rows, hidden, hidden, rescale)
            kept |= {name: (sum(r[0] == name and r in old_rows for r in rows), kept[name][1]) for name in names}
    return kept


def _rescale(config: dict, old: dict) -> dict[tuple, tuple[float, float]]:
    """Of each number's output, (a, b): z of the old scale is a z + b of the new one."""
    scales = [{x["name"]: x for x in about["attributes"] if x["kind"] == "number"} for about in (config, old)]
    shared = ((name, new, scales[1][name]) for name, new in scales[0].items() if name in scales[1])
    return {
        (name, NUMBER): (was["std"] / new["std"], (was["mean"] - new["mean"]) / new["std"]) for name, new, was in shared
    }


def _levels(heads: HierarchicalHeads, config: dict) -> Iterator[tuple[list[str], list[nn.Linear], list, list]]:
    """Of each level its attributes, its linear layers, and what each input column and each output row means."""
    attributes = {a["name"]: a for a in config["attributes"]}
    first = next(module for module in heads.levels[0].modules() if isinstance(module, nn.Linear))
    text = TEXT_WIDTH if config["text"] else 0
    columns: list = [("image", i) for i in range(first.in_features - text)]  # of the embedding
    columns += [("text", i, json.dumps(config["text"])) for i in range(text)]
    for names, level in zip(heads.by_level, heads.levels, strict=True):
        rows = []
        for a in (attributes[name] for name in names):
            meanings = a["labels"] if a["kind"] == "class" else [NUMBER]
            rows += [(a["name"], meaning) for meaning in meanings]
        yield names, [module for module in level.modules() if isinstance(module, nn.Linear)], list(columns), rows
        columns += rows


@torch.no_grad()
def _copy(
    linear: nn.Linear, old: nn.Linear, rows: list, old_rows: list, columns: list, old_columns: list, rescale: dict
) -> None:
    """Rows that both layers have, over columns that both have; those columns of the rows that are new become zero."""
    row_of, column_of = ({key: i for i, key in enumerate(keys)} for keys in (old_rows, old_columns))
    to = torch.tensor([i for i, key in enumerate(rows) if key in row_of], dtype=torch.long)
    at = torch.tensor([i for i, key in enumerate(columns) if key in column_of], dtype=torch.long)
    row_a, row_b = torch.tensor([rescale.get(rows[i], (1.0, 0.0)) for i in to]).view(-1, 2).unbind(1)
    column_a, column_b = torch.tensor([rescale.get(columns[i], (1.0, 0.0)) for i in at]).view(-1, 2).unbind(1)
    come = old.weight[[row_of[rows[i]] for i in to]][:, [column_of[columns[i]] for i in at]] / column_a
    linear.weight[to] = 0.0
    linear.weight[to[:, None], at] = come * row_a[:, None]
    linear.bias[to] = (old.bias[[row_of[rows[i]] for i in to]] - come @ column_b) * row_a + row_b
