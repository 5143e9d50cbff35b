"""Files from strangers: what is damaged, crafted or a pickle is refused in one line, and none of it is loaded."""

import json
import pickle
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save

from errors import UserError
from models.backbone import DEMO, DEMO_WEIGHTS, create_backbone
from models.checkpoint import (
    adapt,
    attach,
    load_checkpoint,
    load_tensors,
    read_config,
    save_checkpoint,
    sealed,
    trained_params,
)
from tests.conftest import OWN_PATCHES

MUTANTS = 1000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    backbone, fingerprint = create_backbone(DEMO)
    preprocess = {"canvas": [64, 64], "size": [64, 64], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    plain = {"name": "gender", "level": 1, "column": "gender", "derive": None, "kind": "class"}
    plain |= {"weight": 1.0, "parents": []}
    number = plain | {"name": "price", "kind": "number", "mean": 9.0, "std": 2.0, "median": 8.0}
    config = {
        "backbone": {"name": DEMO, **OWN_PATCHES, "fingerprint": fingerprint},
        "lora": {"targets": ["query"], "rank": 2, "alpha": 4, "dropout": 0.1, "layers": [0]},
        "attributes": [plain | {"labels": ["a", "b"], "counts": [3, 4], "aliases": None}, number],
        "paths": [{"attributes": ["gender"], "known": [[0], [1]]}],
        "title": "productDisplayName",
        "inputs": "image+title",
        "text": {"vocab": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "shirt"], "length": 5, "mask": True},
        "preprocess": preprocess,
        "data": {"fingerprint": "x"},
    }
    folder = tmp_path_factory.mktemp("checkpoint") / "best"
    save_checkpoint(folder, attach(adapt(backbone, config), config), config)
    return folder


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bits flipped, bytes put in, taken out or doubled, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        # Half of all damage goes into the first kilobyte, where a header is.
        at = rng.randrange(min(len(data), 1000) if rng.random() < 0.5 else len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 2:
            del data[at : at + rng.randint(1, 9)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 99)]
        elif at > 0:
            del data[at:]
    return bytes(data)


def refused_or(load, same) -> int:
    """1 where the load is refused in one line; 0 where what it gives is `same` as the undamaged one."""
    try:
        loaded = load()
    except UserError as error:
        assert "\n" not in str(error)
        return 1
    assert same(loaded), "a damaged file was taken for a good one"
    return 0


def test_mutated_adapters_are_all_refused(checkpoint, tmp_path):
    folder, rng = shutil.copytree(checkpoint, tmp_path / "best"), random.Random(0)
    data = (folder / "adapter.safetensors").read_bytes()
    for _ in range(MUTANTS):
        damaged = mutated(data, rng)
        (folder / "adapter.safetensors").write_bytes(damaged)
        assert refused_or(lambda: read_config(folder), lambda _: damaged == data) == (damaged != data)  # noqa: B023


def test_mutated_adapters_whose_checksum_was_forged_do_not_crash(checkpoint, tmp_path):
    """No checksum can tell these; what loads has every tensor, of the right shape, and finite."""
    folder, rng = shutil.copytree(checkpoint, tmp_path / "best"), random.Random(1)
    data, config = (folder / "adapter.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())
    model = attach(adapt(create_backbone(DEMO)[0], config), config)
    finite = lambda _: all(p.isfinite().all() for p in trained_params(model).values())  # noqa: E731
    refused = 0
    for _ in range(MUTANTS):
        damaged = mutated(data, rng)
        (folder / "adapter.safetensors").write_bytes(damaged)
        (folder / "config.json").write_bytes(sealed(config, {"adapter.safetensors": damaged}))
        now = read_config(folder)
        refused += refused_or(lambda: load_tensors(folder, model, now), finite)  # noqa: B023
    assert refused > MUTANTS / 2


def test_mutated_configs_are_refused_or_say_the_same(checkpoint, tmp_path):
    folder, rng = shutil.copytree(checkpoint, tmp_path / "best"), random.Random(2)
    data = (folder / "config.json").read_bytes()
    good = json.loads(data)
    refused = 0
    for _ in range(MUTANTS):
        (folder / "config.json").write_bytes(mutated(data, rng))
        refused += refused_or(lambda: read_config(folder), lambda config: config == good)
    assert refused > 0.9 * MUTANTS, "the rest is white space"


def values(config, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    if path:
        yield path
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        yield from values(value, (*path, key))


def test_crafted_configs_with_a_right_checksum_never_crash(checkpoint, tmp_path):
    """Every value in turn, and some pairs, replaced by what nobody expects."""
    folder, rng = shutil.copytree(checkpoint, tmp_path / "best"), random.Random(3)
    config = json.loads((folder / "config.json").read_text())
    data = (folder / "adapter.safetensors").read_bytes()
    odd = [
        None,
        True,
        -1,
        0,
        10**9,
        10**30,
        10**400,
        1e308,
        float("nan"),
        "",
        "../../etc/passwd",
        [],
        [[]],
        {},
        {"x": 1},
        "demo",
    ]
    places = [path for path in values(config) if path[0] not in ("format", "sha256")]
    for _ in range(300):
        crafted = json.loads(json.dumps(config))
        for path in rng.sample(places, rng.choice((1, 1, 2))):
            inner = crafted
            try:
                for key in path[:-1]:
                    inner = inner[key]
                if rng.random() < 0.2:
                    del inner[path[-1]]
                else:
                    inner[path[-1]] = rng.choice(odd)
            except (TypeError, KeyError, IndexError):
                continue  # the other of the pair has taken this place away
        (folder / "config.json").write_bytes(sealed(crafted, {"adapter.safetensors": data}))
        refused_or(lambda: load_checkpoint(folder), lambda loaded: loaded[0] is not None)


def test_mutated_base_weights_are_refused_or_are_the_same_numbers(checkpoint, tmp_path):
    rng, path = random.Random(4), tmp_path / "model.safetensors"
    data, good = DEMO_WEIGHTS.read_bytes(), load_file(DEMO_WEIGHTS)
    for _ in range(MUTANTS // 5):  # each makes a model
        path.write_bytes(mutated(data, rng))
        refused_or(
            lambda: load_checkpoint(checkpoint, path)[0].state_dict(),
            lambda state: all(
                torch.equal(tensor, good[name.removeprefix("backbone.")])
                for name, tensor in state.items()
                if name.removeprefix("backbone.") in good
            ),
        )


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def header(tensors: dict, data: bytes = bytes(64)) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps(Bomb()), "a pickle, by its first bytes"),
        (pickle.dumps(Bomb(), 2), "a pickle, by its first bytes"),
        (b"PK\x03\x04" + bytes(99), "a pickle, by its first bytes"),
        (header({"x": F32 | {"shape": [10**6, 10**6]}}), "not a safetensors file"),
        (header({"x": F32 | {"shape": [2**63, 4]}}), "not a safetensors file"),
        (header({"x": F32 | {"shape": [-4, -4]}}), "not a safetensors file"),
        (header({"x": F32 | {"data_offsets": [0, 2**62]}}), "not a safetensors file"),
        (header({"x": F32, "y": F32}), "not a safetensors file"),
        (header({"x": F32 | {"dtype": "F33"}}), "not a safetensors file"),
        (struct.pack("<Q", 2**60) + bytes(99), "not a safetensors file"),
        (b"", "not a safetensors file"),
        (save({"x": torch.zeros(2)}), "does not fit its config.json|does not hold the weights"),
    ],
)
def test_what_is_no_safetensors_of_this_model_is_refused_with_the_reason(checkpoint, tmp_path, data, reason):
    folder = shutil.copytree(checkpoint, tmp_path / "best")
    config = json.loads((folder / "config.json").read_text())
    (folder / "adapter.safetensors").write_bytes(data)
    (folder / "config.json").write_bytes(sealed(config, {"adapter.safetensors": data}))
    for load in (lambda: load_checkpoint(folder), lambda: load_checkpoint(checkpoint, folder / "adapter.safetensors")):
        with pytest.raises(UserError, match=reason):
            load()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["attributes"][0].update(labels=list("abc"), counts=[1] * 3), r"misshaped heads\.levels\.0"),
        (lambda c: c["attributes"][0].update(labels=[*map(str, range(10**6))], counts=[1] * 10**6), "too small for so"),
        (lambda c: c["text"]["vocab"].extend(map(str, range(10**6))), "too small for so many labels or words"),
        (lambda c: c["attributes"][0]["labels"].append("a"), "labels of gender are none, or one comes twice"),
        (lambda c: c["lora"].update(rank=10**9), r"lora\.rank is missing or not what it should be"),
        (lambda c: c["lora"].update(rank=3), r"misshaped backbone"),
        (lambda c: c["lora"].update(layers=[0, 1]), r"missing backbone"),
        (lambda c: c["lora"].update(code="x"), r"lora\.code is missing or not"),
        (lambda c: c["preprocess"].update(size=[10**6, 10**6]), r"preprocess\.size\[0\]"),
        (lambda c: c.pop("attributes"), "attributes is missing"),
        (lambda c: c["preprocess"].update(canvas=[32, 32], size=[32, 32]), r"its preprocess\.size is not what its"),
        (lambda c: c["preprocess"].update(canvas=[32]), r"preprocess\.canvas is missing or not"),
        (lambda c: c["preprocess"].update(canvas=[4096, 64]), r"its preprocess\.canvas is larger than the size"),
        (lambda c: c["preprocess"].update(mean=[0.5] * 4), r"preprocess\.mean is missing or not"),
        (lambda c: c["preprocess"].update(std=[0, 0, 0]), r"preprocess\.std\[0\]"),
        (lambda c: c["backbone"].update(keep_patches=-3), r"backbone\.keep_patches"),
        (lambda c: c["backbone"].update(img_size=4096, patch_size=4096), r"backbone\.patch_size"),
        (lambda c: c["attributes"][0].update(parents=["nope"]), "its nope is a parent of gender, and no"),
        (lambda c: c["attributes"][0].update(parents=["gender"]), "its gender is a parent of gender, and no"),
        (lambda c: c["attributes"][1].update(name="image"), "an attribute is called like another column"),
        (lambda c: c["attributes"][1].update(name="gender_decision"), "an attribute is called like another column"),
        (lambda c: c["attributes"][1].update(mean=10**20), r"attributes\[1\] is missing or not what"),
        (lambda c: c["attributes"].pop(0), "none of its attributes has labels"),
        (lambda c: c["backbone"].update(img_size=4096, patch_size=1), "its img_size has more than 256 patches a side"),
        (lambda c: c.pop("data"), "data is missing"),
        (lambda c: c["attributes"][0].pop("counts"), r"attributes\[0\]"),
        (lambda c: c["attributes"][0].update(counts=[]), "counts of gender are not of its labels"),
        (lambda c: c.update(calibration={"temperature": {"gender": 0}}), r"calibration\.target_precision"),
        (lambda c: c["backbone"].update(name="hf_hub:stranger/model"), "unknown backbone"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_one_clear_line(checkpoint, tmp_path, change, reason):
    folder = shutil.copytree(checkpoint, tmp_path / "best")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    data = (folder / "adapter.safetensors").read_bytes()
    (folder / "config.json").write_bytes(sealed(config, {"adapter.safetensors": data}))
    with pytest.raises(UserError, match=reason):
        load_checkpoint(folder)


def test_a_checksum_list_that_points_outside_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "best")
    config, data = json.loads((folder / "config.json").read_text()), (folder / "adapter.safetensors").read_bytes()
    files = {"adapter.safetensors": data, "../secret": b""}
    (folder / "config.json").write_bytes(sealed(config, files))
    with pytest.raises(UserError, match="names a file outside its folder"):
        read_config(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(inputs="image"),
        lambda c: c.update(text=None),
        lambda c: c.update(title=None),
        lambda c: c["text"]["vocab"].remove("[CLS]"),
    ],
)
def test_inputs_that_do_not_go_with_the_text_are_refused(checkpoint, tmp_path, change):
    folder = shutil.copytree(checkpoint, tmp_path / "best")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    files = {"adapter.safetensors": (folder / "adapter.safetensors").read_bytes()}
    (folder / "config.json").write_bytes(sealed(config, files))
    with pytest.raises(UserError, match="its inputs and its text do not go together"):
        load_checkpoint(folder)
