"""Combine the heads' predictions with the labels of the most similar train pictures.

A catalogue shows an article again in another colour, or the next article of the same line. A few million weights do not
memorise each article, so train pictures are looked up, as in kNN-LM (Khandelwal et al. 2020, arXiv:1911.00172):

    p = (1 - share) softmax(logits / T) + share * votes

for each attribute, where the nearest train pictures vote for their labels. A number is mixed with the mean of the
neighbours' numbers. `refit.py` builds the neighbours and fits share and T on validation rows.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.functional import without_autocast

FILE = "neighbours.safetensors"  # in a checkpoint's folder
COMPONENTS = {"hog": 512, "embedding": 256}  # principal components, at most
WEIGHTS = {"hog": 2 / 3, "embedding": 1 / 3}  # in the similarity of two pictures
FLOOR = 0.01  # this share of the largest component's deviation is added to each one's: the smallest are noise
NEAREST = 16
SHARPNESS = 25.0  # a neighbour whose cosine is 0.04 higher has e times the vote
# A neighbour whose edges are more alike than this counts as the same picture, whose label is no second opinion, and has
# no vote. For 4 of 4,005 validation rows this is a mistake: the neighbour is the same article in another colour.
SAME = 0.9995
ID_BYTES = 255  # kept of each id: as many as a file's name may have
LARGEST = 1e9  # number that such a file may hold: larger ones could turn into NaN in an answer
FLOATS = (torch.float16, torch.float32)  # dtypes that a file may hold; the last one is computed with
# The same for the tensors that have other dtypes.
KINDS = {
    "labels": (torch.int32, torch.int64),
    "values": (torch.float32,),
    "ids": (torch.uint8,),
    "hashes": (torch.int64,),
}


class Alike(NamedTuple):
    """The train pictures most similar to each of B pictures, the most similar first; the same picture keeps its place.

    Attributes:
        cosines: (B, K) from -1 to 1; -1 for the same picture.
        rows: (B, K), their row numbers in `Neighbours`.
    """

    cosines: Tensor
    rows: Tensor


class Voter(NamedTuple):
    """A train picture: its id, the hash of its pixels, its similarity, and its labels, negative where missing."""

    id: str
    hash: int
    cosine: float
    labels: list[int]


class Neighbours(nn.Module):
    """Train pictures with their labels, numbers and ids. The similarity of two pictures is two thirds that of their
    edges (`models.hog`) and one third that of their embeddings, each the cosine of whitened principal components.

    Args:
        classes: attribute -> its number of classes, in the order of the columns of `labels`.
        numbers: attributes that are numbers, in the order of the columns of `values`.
        tensors: `{hog,embedding}_{mean,basis}` (n,), (n, c), which whiten; `bank` (N, sum of c), the pictures; `labels`
            (N, A), negative where missing; `values` (N, M) of numbers, scaled, NaN where missing; `ids` (N, W), UTF-8
            padded with zeros; `hashes` (N,) of their pixels; `temperature` (A,); `share` (A + M,).

    Raises:
        ValueError: `tensors` has other names, or they do not fit together.
    """

    def __init__(self, classes: Mapping[str, int], numbers: Sequence[str], tensors: Mapping[str, Tensor]):
        super().__init__()
        self.classes, self.numbers = dict(classes), list(numbers)
        if what := _misfit(self.classes, self.numbers, tensors):
            raise ValueError(what)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(KINDS.get(name, FLOATS)[-1]))

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        classes: Mapping[str, int],
        numbers: Sequence[str],
        hog: Tensor,
        embedding: Tensor,
        ids: Sequence[str],
        known: Mapping[str, Tensor],
    ) -> "Neighbours":
        """Build it from N train pictures: edges (N, n), embeddings (N, m), ids, and `known`, the tensors `labels`,
        `values` and `hashes` as above. All shares are 0, so votes do not count yet."""
        shares = torch.zeros(len(classes) + len(numbers))
        tensors = {"ids": _as_bytes(ids), "temperature": torch.ones(len(classes)), "share": shares} | dict(known)
        for name, seen in (("hog", hog), ("embedding", embedding)):
            tensors[f"{name}_mean"], tensors[f"{name}_basis"] = _whitening(seen, COMPONENTS[name])
        width = sum(tensors[f"{name}_basis"].shape[1] for name in COMPONENTS)
        made = cls(classes, numbers, tensors | {"bank": torch.zeros(len(ids), width)})
        made.bank = made.describe(hog, embedding)
        return made

    def tensors(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint; `bank` is in fp16, which changes similarities by 1e-5."""
        return self.state_dict() | {"bank": self.bank.half(), "labels": self.labels.int()}

    def forward(self, alike: Alike, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mix the heads' outputs, (B, classes) or (B, 1) of a number, with the neighbours'; shapes do not change."""
        heard = zip(self.heard(alike, logits).items(), self.share, strict=True)
        mixed = {name: torch.lerp(*pair, share) for (name, pair), share in heard}
        return {name: mixed[name].clamp(min=1e-12).log() if name in self.classes else mixed[name] for name in logits}

    def heard(self, alike: Alike, logits: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """{attribute: (the heads' prediction, the neighbours' prediction)}, probabilities (B, classes) or a number
        (B, 1). Neighbours whose label is missing vote as the heads predict, and so does the same picture."""
        weights = (alike.cosines * SHARPNESS).softmax(1) * (alike.cosines > -1)  # (B, K)
        labels = self.labels[alike.rows]  # (B, K, A)
        found = {}
        for name, T, label in zip(self.classes, self.temperature, labels.unbind(2), strict=True):
            p, known = (logits[name].float() / T).softmax(1), weights * (label >= 0)
            votes = torch.zeros_like(p).scatter_add(1, label.clamp(min=0), known)
            found[name] = p, votes + (1 - known.sum(1, keepdim=True)) * p
        for name, value in zip(self.numbers, self.values[alike.rows].unbind(2), strict=True):
            said, known = logits[name].float(), weights * value.isfinite()
            mean = (known * value.nan_to_num()).sum(1, keepdim=True)
            found[name] = said, mean + (1 - known.sum(1, keepdim=True)) * said
        return found

    @without_autocast
    def nearest(self, hog: Tensor, embedding: Tensor) -> Alike:
        """The train pictures nearest to pictures with edges (B, n) and embeddings (B, m)."""
        described, n = self.describe(hog, embedding), self.hog_basis.shape[1]
        near, rows = (described @ self.bank.T).topk(min(NEAREST, len(self.bank)))
        by_edges = (self.bank[rows][..., :n] @ described[:, :n, None])[..., 0]
        return Alike(near.masked_fill(by_edges > SAME * WEIGHTS["hog"], -1.0), rows)

    def voters(self, alike: Alike, most: int) -> list[list[Voter]]:
        """For each of B pictures, up to `most` neighbours that vote, the most similar first."""
        cosines, order = alike.cosines.topk(min(most, alike.cosines.shape[1]))
        rows = alike.rows.gather(1, order)
        told = (self.ids[rows], self.hashes[rows], cosines, self.labels[rows])
        of_each = zip(*(tensor.tolist() for tensor in told), strict=True)
        found = [[Voter(_as_text(id), *rest) for id, *rest in zip(*one, strict=True)] for one in of_each]
        return [[voter for voter in some if voter.cosine > -1] for some in found]

    def describe(self, hog: Tensor, embedding: Tensor) -> Tensor:
        """Edges (B, n) and embeddings (B, m) -> (B, D) of length 1, whose products are similarities."""
        parts = (
            ("hog", hog, self.hog_mean, self.hog_basis),
            ("embedding", embedding, self.embedding_mean, self.embedding_basis),
        )
        return torch.cat(
            [WEIGHTS[name] ** 0.5 * F.normalize((x.float() - mean) @ basis) for name, x, mean, basis in parts], dim=1
        )

    def _apply(self, fn, recurse: bool = True):
        # Tensors move with the model but keep their dtype, fp32: small differences decide which picture is nearest.
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)


def _whitening(seen: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Mean (n,) and basis (n, c) of rows (N, n): `(x - mean) @ basis` has the largest principal components, nearly of
    variance 1. There are at most N - 1, as N rows vary in no more: further ones would count as much, as mere noise."""
    components = max(1, min(components, len(seen) - 1))
    mean = seen.float().mean(0)
    centred = seen.float() - mean
    variance, axes = torch.linalg.eigh((centred.T @ centred / len(seen)).double())
    axes, deviation = axes.flip(1)[:, :components], variance.flip(0).clamp(min=0).sqrt()
    floor = (FLOOR * deviation[0]).clamp(min=1e-6)  # rows may be all alike
    return mean, (axes / (deviation[:components] + floor)).float().contiguous()


def _as_bytes(ids: Sequence[str]) -> Tensor:
    """Ids as UTF-8 bytes (N, W), padded with zeros."""
    cut = [id.encode(errors="replace")[:ID_BYTES] for id in ids]
    width = max(1, *map(len, cut))
    filled = bytearray(b"".join(id.ljust(width, b"\0") for id in cut))
    return torch.frombuffer(filled, dtype=torch.uint8).view(-1, width)


def _as_text(id: list[int]) -> str:
    return bytes(id).rstrip(b"\0").decode(errors="ignore")


def _in_range(tensor: Tensor, gaps: bool) -> bool:
    """Whether no number is too large and, unless `gaps` allows it, none is NaN."""
    return not tensor.is_floating_point() or bool(((tensor.abs() < LARGEST) | (tensor.isnan() & gaps)).all())


def _misfit(classes: Mapping[str, int], numbers: Sequence[str], tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with tensors that may come from a stranger; None if nothing is."""
    names = {"bank", *KINDS, "temperature", "share"} | {f"{x}_{y}" for x in COMPONENTS for y in ("mean", "basis")}
    if tensors.keys() != names:
        return f"it holds {', '.join(sorted(tensors.keys() ^ names))} too much or too little"
    flat = {"temperature", "share", "hashes"} | {f"{name}_mean" for name in COMPONENTS}
    if wrong := sorted(name for name in names if tensors[name].ndim != (1 if name in flat else 2)):
        return f"its {wrong[0]} is of shape {tuple(tensors[wrong[0]].shape)}"
    widths = [tensors[f"{name}_basis"].shape[1] for name in COMPONENTS]
    count, sizes = len(tensors["labels"]), torch.tensor(list(classes.values()))
    shapes = {"bank": (count, sum(widths)), "labels": (count, len(sizes))}
    shapes |= {"ids": (count, tensors["ids"].shape[1]), "hashes": (count,), "values": (count, len(numbers))}
    shapes |= {"temperature": (len(sizes),), "share": (len(sizes) + len(numbers),)}
    shapes |= {f"{name}_basis": (len(tensors[f"{name}_mean"]), w) for name, w in zip(COMPONENTS, widths, strict=True)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape)) or not (tensor.numel() or name == "values"):
            return f"its {name} is of shape {tuple(tensor.shape)}"
        if tensor.dtype not in KINDS.get(name, FLOATS) or not _in_range(tensor, gaps=name == "values"):
            return f"its {name} are not the numbers they should be"
    if (tensors["labels"] >= sizes).any():
        return "its labels name a class that there is not"
    if not ((tensors["share"] >= 0) & (tensors["share"] <= 1)).all() or not (tensors["temperature"] > 1e-3).all():
        return "its share or temperature is out of its range"
    return None
