"""Train pictures whose labels count beside what the heads say."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from data.shards import Row
from errors import UserError
from labeller import Labeller
from lora import merge_lora
from models.checkpoint import load_checkpoint, read_config, sealed
from models.hog import hog
from models.neighbours import COMPONENTS, FILE, ID_BYTES, NEAREST, Neighbours, _whitening
from teacher import load_teacher


def seen(count, kinds=2):
    """Edges and embeddings of pictures of several kinds, and of which kind each is."""
    drawing = torch.Generator().manual_seed(0)
    kind = torch.arange(count) % kinds
    centres = torch.randn(kinds, 42, generator=drawing) * 3
    x = centres[kind] + torch.randn(count, 42, generator=drawing)
    return x[:, :12], x[:, 12:], kind


def made(*pictures, labels, kinds=2):
    count = len(labels)
    known = {"labels": labels, "values": torch.zeros(count, 0), "hashes": torch.arange(count)}
    return Neighbours.of({"kind": kinds}, [], *pictures, [f"id {i}" for i in range(count)], known)


def votes_of(neighbours, *pictures, kinds=2):
    """Where the heads say nothing."""
    return neighbours.heard(neighbours.nearest(*pictures), {"kind": torch.zeros(len(pictures[0]), kinds)})["kind"][1]


def test_votes_by_hand():
    eye = {f"{x}_{y}": t for x in COMPONENTS for y, t in (("mean", torch.zeros(2)), ("basis", torch.eye(2)))}
    bank = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]) * torch.tensor([2, 2, 1, 1]).div(3).sqrt()
    labels = torch.tensor([[0], [1], [-1]])
    ids = torch.tensor([[97, 0, 0], [195, 164, 0], [98, 98, 98]], dtype=torch.uint8)
    fitted = {"temperature": torch.tensor([2.0]), "share": torch.tensor([0.25, 0.5])}
    values = torch.tensor([[10.0], [torch.nan], [20.0]])
    known = {"labels": labels, "values": values, "ids": ids, "hashes": torch.tensor([7, 8, 9])}
    neighbours = Neighbours({"kind": 3}, ["width"], eye | fitted | known | {"bank": bank})
    logits = torch.tensor([[0.0, 2.0, 4.0]])
    alike = neighbours.nearest(torch.tensor([[4.0, 3.0]]), torch.tensor([[3.0, 4.0]]))
    said = neighbours(alike, {"kind": logits, "width": torch.tensor([[4.0]])})
    p = (logits / 2).softmax(1)[0]
    # Cosines of edges and embeddings: (0.8, 0.6), (0.6, 0.6), (0.6, 0.8); the third has no label, so the heads speak.
    vote = (torch.tensor([2 * 0.8 + 0.6, 2 * 0.6 + 0.6, 2 * 0.6 + 0.8]) / 3 / 0.04).softmax(0)
    votes = torch.stack([vote[0], vote[1], torch.tensor(0.0)]) + vote[2] * p
    torch.testing.assert_close(said["kind"][0].exp(), 0.75 * p + 0.25 * votes)
    mean = 10 * vote[0] + 4 * vote[1] + 20 * vote[2]  # the second has none
    torch.testing.assert_close(said["width"], (0.5 * 4 + 0.5 * mean)[None, None])
    expected = [("a", 7, pytest.approx(2.2 / 3), [0]), ("bbb", 9, pytest.approx(2 / 3), [-1])]
    assert [tuple(voter) for voter in neighbours.voters(alike, 2)[0]] == expected
    assert [voter.id for voter in neighbours.voters(alike, 50)[0]] == ["a", "bbb", "ä"]
    for wrong in (values * torch.inf, values * 1e9, values.double()):  # a gap in them is none
        with pytest.raises(ValueError, match="its values are not the numbers they should be"):
            Neighbours({"kind": 3}, ["width"], eye | fitted | known | {"bank": bank, "values": wrong})


def test_ids_come_back_as_they_were():
    hog, embedding, kind = seen(40)
    ids = ["", "1", "ä" * ID_BYTES, *(f"shop/{i}.jpg" for i in range(37))]
    known = {"labels": kind[:, None], "values": torch.zeros(40, 0), "hashes": torch.arange(40) - 20}
    neighbours = Neighbours.of({"kind": 2}, [], hog, embedding, ids, known)
    drawing = torch.Generator().manual_seed(1)
    near = hog + 0.1 * torch.randn(40, 12, generator=drawing)
    first = [some[0] for some in neighbours.voters(neighbours.nearest(near, embedding), 1)]
    assert [voter.id for voter in first] == ["", "1", "ä" * (ID_BYTES // 2), *ids[3:]], "as much as is kept"
    assert [(voter.hash, voter.labels) for voter in first] == [(i - 20, [i % 2]) for i in range(40)]
    others = neighbours.voters(neighbours.nearest(hog, embedding), 50)
    assert all(i - 20 not in [voter.hash for voter in some] for i, some in enumerate(others)), "no vote of its own"
    assert {len(some) for some in others} == {NEAREST - 1}


def test_pictures_that_are_alike_vote():
    *pictures, kind = seen(400, kinds=20)
    neighbours = made(*(x[:300] for x in pictures), labels=kind[:300, None], kinds=20)
    others = [x[300:] for x in pictures]
    votes = votes_of(neighbours, *others, kinds=20)
    torch.testing.assert_close(votes.sum(1), torch.ones(100))
    assert (votes.argmax(1) == kind[300:]).float().mean() > 0.95
    neighbours.share.fill_(0.0)
    said = neighbours(neighbours.nearest(*others), {"kind": torch.zeros(100, 20)})["kind"]
    torch.testing.assert_close(said.exp(), torch.full((100, 20), 0.05))


def test_a_picture_is_no_neighbour_of_its_own():
    hog, embedding, _ = seen(60)
    labels = torch.zeros(60, 1, dtype=torch.long)
    labels[7] = 1
    neighbours = made(hog, embedding, labels=labels)
    votes = votes_of(neighbours, hog[7:8], embedding[7:8])
    assert votes[0, 1] < 1e-6, "the only one of that label is itself"
    drawing = torch.Generator().manual_seed(1)
    other = embedding[7:8] + 0.3 * torch.randn(1, 30, generator=drawing)  # as a model that computes otherwise embeds it
    votes = votes_of(neighbours, hog[7:8], other)
    assert votes[0, 1] < 1e-6, "it is known by its pixels alone"
    near = hog[7:8] + 0.1 * torch.randn(1, 12, generator=drawing)
    votes = votes_of(neighbours, near, other)
    assert votes[0, 1] > 0.9
    copies = [torch.cat([x, x[7:8].expand(NEAREST, -1)]) for x in (hog, embedding)]  # such as of "no photo yet"
    neighbours = made(*copies, labels=torch.ones(len(copies[0]), 1, dtype=torch.long))
    torch.testing.assert_close(votes_of(neighbours, hog[7:8], embedding[7:8]), torch.full((1, 2), 0.5))


@pytest.mark.parametrize("count", [1, 3, 500])
def test_few_pictures_or_all_alike_give_numbers(count):
    hog, embedding, kind = seen(count)
    neighbours = made(torch.ones(count, 12), embedding, labels=kind[:, None])
    neighbours.share.fill_(1.0)
    said = neighbours(neighbours.nearest(hog, embedding), {"kind": torch.zeros(count, 2)})["kind"]
    assert said.isfinite().all()
    assert len(neighbours.bank) == count


def test_few_pictures_have_few_components():
    """Another picture, which differs in what they all share, would differ in hardly anything else."""
    torch.manual_seed(0)
    seen = torch.randn(6, 40)
    mean, basis = _whitening(seen, 20)
    assert basis.shape == (40, 5)
    other = seen[0] + 0.1 * torch.randn(40)
    near = torch.nn.functional.cosine_similarity((seen - mean) @ basis, ((other - mean) @ basis)[None])
    assert near.argmax() == 0 and near[0] > 0.95


def test_it_stays_in_fp32_and_comes_with_every_copy(with_neighbours, demo_run):
    folder = with_neighbours(demo_run / "best")
    model, _ = load_checkpoint(folder)
    images = torch.randn(5, 3, 64, 64)
    with torch.inference_mode():
        exact, merged = model(images), merge_lora(model).to(torch.bfloat16)
        assert {b.dtype for b in merged.neighbours.buffers()} == {torch.float32, torch.int64, torch.uint8}
        for name, z in merged(images.bfloat16()).items():
            assert (z.exp() - exact[name].exp()).abs().max() < 0.05, name
        model.neighbours = None
        alone = model(images)
    assert any((exact[name].softmax(1) - z.softmax(1)).abs().max() > 0.05 for name, z in alone.items())
    assert load_teacher(folder, None, {"backbone": {"fingerprint": None}}, None)[0].neighbours is None


def test_edges_are_of_the_pictures_before_they_are_rounded(with_neighbours, demo_run, monkeypatch):
    """In bf16 near white every other level of grey is lost, and a picture of the bank would not be known again."""
    labeller = Labeller(with_neighbours(demo_run / "best"), None, torch.device("cpu"), True, 3, 8, torch.bfloat16)
    pixels = np.random.default_rng(0).integers(240, 256, (*labeller.preprocess.canvas, 3), dtype=np.uint8)
    looked_at = []
    monkeypatch.setattr("models.classifier.hog", lambda images: looked_at.append(images) or hog(images))
    (answer,) = labeller([Row("white.jpg", pixels)])
    assert answer["like"]
    torch.testing.assert_close(looked_at, [labeller.preprocess(torch.from_numpy(pixels)[None])], rtol=0, atol=0)


def without(name):
    return lambda tensors: tensors.pop(name)


def put(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("share"), "it holds share too much or too little"),
        (put("bank", lambda t: t[:-1]), "its bank is of shape"),
        (put("bank", lambda t: t[0]), "its bank is of shape"),
        (put("labels", lambda t: t[:0]), "is of shape"),
        (put("labels", lambda t: t + 1000), "its labels name a class that there is not"),
        (put("labels", lambda t: t.float()), "its labels are not the numbers they should be"),
        (put("bank", lambda t: t * torch.nan), "its bank are not the numbers they should be"),
        (put("share", lambda t: t + 1), "its share or temperature is out of its range"),
        (put("labels", lambda t: t.to(torch.uint64)), "its labels are not the numbers they should be"),
        (put("bank", lambda t: t.to(torch.float8_e4m3fn)), "its bank are not the numbers they should be"),
        (put("bank", lambda t: t.double()), "its bank are not the numbers they should be"),
        (put("embedding_basis", lambda t: t + 1e30), "its embedding_basis are not the numbers they should be"),
        (put("ids", lambda t: t[:, :0]), "its ids is of shape"),
        (put("ids", lambda t: t[:-1]), "its ids is of shape"),
        (put("ids", lambda t: t.int()), "its ids are not the numbers they should be"),
        (put("values", lambda t: torch.zeros(len(t), 1)), "its values is of shape"),
        (put("hashes", lambda t: t[:-1]), "its hashes is of shape"),
        (put("hashes", lambda t: t.float()), "its hashes are not the numbers they should be"),
        (put("temperature", lambda t: t * 0), "its share or temperature is out of its range"),
        (put("hog_basis", lambda t: t[:-1].clone()), "its hog_basis is of shape"),
    ],
)
def test_a_crafted_file_is_refused(with_neighbours, demo_run, tmp_path, change, message):
    folder = with_neighbours(demo_run / "best")
    tensors = load_file(folder / FILE)
    change(tensors)
    files = {FILE: save(tensors), "adapter.safetensors": (folder / "adapter.safetensors").read_bytes()}
    (folder / FILE).write_bytes(files[FILE])
    (folder / "config.json").write_bytes(sealed(read_config_text(folder), files))
    with pytest.raises(UserError, match=f"{FILE} does not fit its config.json: .*{message}"):
        load_checkpoint(folder)


def read_config_text(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", ["hog", "embedding"])
def test_neighbours_of_another_width_are_refused(with_neighbours, demo_run, tmp_path, part):
    folder = with_neighbours(demo_run / "best")
    tensors = load_file(folder / FILE)
    for name in ("mean", "basis"):
        tensors[f"{part}_{name}"] = tensors[f"{part}_{name}"][:-1].clone()
    files = {FILE: save(tensors), "adapter.safetensors": (folder / "adapter.safetensors").read_bytes()}
    (folder / FILE).write_bytes(files[FILE])
    (folder / "config.json").write_bytes(sealed(read_config(demo_run / "best"), files))
    with pytest.raises(UserError, match="it is of another version or another backbone"):
        load_checkpoint(folder)


def test_a_damaged_file_is_refused(with_neighbours, demo_run, tmp_path):
    folder = with_neighbours(demo_run / "best")
    data = bytearray((folder / FILE).read_bytes())
    data[-1] ^= 1
    (folder / FILE).write_bytes(data)
    with pytest.raises(UserError, match=f"{FILE} is damaged: its checksum differs"):
        load_checkpoint(folder)
