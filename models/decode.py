"""From logits to labels that fit together, each with its calibrated confidence."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError


class Answers(NamedTuple):
    """What is said of a batch, attributes in declaration order.

    Attributes:
        labels: (B, A) classes.
        confidence: (B, A) calibrated probability of each of these labels.
        accepted: (B, A) whether it is high enough to go unseen by a person.
        probabilities: {attribute: (B, classes)}.
    """

    labels: Tensor
    confidence: Tensor
    accepted: Tensor
    probabilities: dict[str, Tensor]


class Decoder:
    """Logits -> `Answers`.

    Each attribute's probabilities are `softmax(logits / T)` with its fitted temperature (Guo et al. 2017,
    arXiv:1706.04599). The attributes along `path` are decoded together: of all paths that occur in training, the one
    with the highest sum of log-probabilities, found by scoring every one. Paths are few (158 in the real catalogue), so
    this is exact. Other attributes, and with `joint=False` all, take their most probable class. A label's confidence
    is its own probability either way, so it is low where the path overrules the most probable class.

    Args:
        config: a checkpoint's: `attributes`, `paths` and, once calibrated, `calibration`. Without the latter
            temperatures are 1 and nothing is accepted.
        path: the attributes that `config["paths"]` has a column for.

    Raises:
        UserError: the paths or the temperatures are not those of the attributes.
    """

    def __init__(self, config: dict, path: Sequence[str], joint: bool = True):
        _check_fit(config, path)
        self.names = [attribute["name"] for attribute in config["attributes"]]
        self.path = path
        self.paths = torch.tensor(config["paths"]) if joint and config["paths"] else None  # (P, len(path))
        calibration = config.get("calibration")
        self.temperature = calibration["temperature"] if calibration else dict.fromkeys(self.names, 1.0)
        thresholds = calibration["threshold"]["joint" if joint else "independent"] if calibration else {}
        self.threshold = {name: thresholds.get(name) for name in self.names}  # None: no confidence is enough

    def __call__(self, logits: Mapping[str, Tensor]) -> Answers:
        """{attribute: (B, classes)} -> what to say of each of B pictures."""
        log_p = {name: (logits[name].float() / self.temperature[name]).log_softmax(-1) for name in self.names}
        labels = {name: scores.argmax(-1) for name, scores in log_p.items()}
        if self.paths is not None:
            paths = self.paths.to(log_p[self.path[0]].device)
            total = sum(log_p[name][:, paths[:, i]] for i, name in enumerate(self.path))  # (B, P)
            labels |= zip(self.path, paths[total.argmax(-1)].unbind(-1), strict=True)
        probabilities = {name: scores.exp() for name, scores in log_p.items()}
        said = torch.stack([labels[name] for name in self.names], dim=1)
        confidence = torch.stack(
            [p.gather(1, said[:, [i]]).squeeze(1) for i, p in enumerate(probabilities.values())], dim=1
        )
        needed = [float("inf") if self.threshold[name] is None else self.threshold[name] for name in self.names]
        return Answers(said, confidence, confidence >= torch.tensor(needed, device=confidence.device), probabilities)


def _check_fit(config: dict, path: Sequence[str]) -> None:
    """A stranger may have written the config: a class that is not there would be an index out of range later."""
    classes = {attribute["name"]: range(len(attribute["labels"])) for attribute in config["attributes"]}
    if any(
        len(p) != len(path) or any(c not in classes[n] for n, c in zip(path, p, strict=True)) for p in config["paths"]
    ):
        raise UserError("the checkpoint's config.json contradicts itself: a path names a class that no label has")
    if (fitted := config.get("calibration")) and fitted["temperature"].keys() != classes.keys():
        raise UserError("the checkpoint's config.json contradicts itself: its temperatures are of other attributes")
