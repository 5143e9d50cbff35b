"""Turn logits into labels that are consistent with each other, each with its calibrated confidence."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.schema import labels_of

# Upper bounds, so that intermediate results do not grow with the number of pictures.
AT_ONCE = 8192  # pictures decoded together
SCORES = 2**24  # path scores computed together


class Answers(NamedTuple):
    """The answers for a batch; the A columns are the class attributes in declaration order.

    Attributes:
        labels: (B, A) class indices.
        confidence: (B, A) calibrated probability of each of these labels.
        accepted: (B, A) whether the confidence is high enough to accept the label without review by a person.
    """

    labels: Tensor
    confidence: Tensor
    accepted: Tensor


class Decoder:
    """Logits -> `Answers`.

    Each attribute's probabilities are `softmax(logits / T)` with its fitted temperature (Guo et al. 2017,
    arXiv:1706.04599). The attributes of a hierarchy are decoded together: of the known paths, which are the
    combinations that labels of train rows allow, it takes the one with the highest sum of log-probabilities. Paths are
    few (158 in the real catalogue), so it scores all of them, which is exact. Other attributes, and with `joint=False`
    all, take their most probable class. A label's confidence is its own probability either way, so it is low where the
    path overrules the most probable class.

    Args:
        config: a checkpoint's config, with `attributes`, `paths` (see `data.attributes.known_paths`) and, once
            calibrated, `calibration`. Without `calibration`, temperatures are 1 and nothing is accepted.
    """

    def __init__(self, config: dict, joint: bool = True):
        self.names = list(labels_of(config))
        known = [path for path in config["paths"] if joint and path["known"]]
        self.paths = [(path["attributes"], torch.tensor(path["known"])) for path in known]  # (P, names) each
        calibration = config.get("calibration")
        self.temperature = calibration["temperature"] if calibration else dict.fromkeys(self.names, 1.0)
        thresholds = calibration["threshold"]["joint" if joint else "independent"] if calibration else {}
        self.threshold = {name: thresholds.get(name) for name in self.names}  # None: no confidence is enough

    def __call__(self, logits: Mapping[str, Tensor]) -> Answers:
        """{attribute: logits (B, classes)} -> the answers for B pictures."""
        together = max(1, min(AT_ONCE, SCORES // max((len(known) for _, known in self.paths), default=1)))
        pieces = zip(*(logits[name].split(together) for name in self.names), strict=True)
        said = [self._decode(dict(zip(self.names, piece, strict=True))) for piece in pieces]
        return Answers(*map(torch.cat, zip(*said, strict=True)))

    def probabilities(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{attribute: logits (B, classes)} -> the calibrated probability of every class, in the same shapes."""
        return {name: log_p.exp() for name, log_p in self._log_probabilities(logits).items()}

    def _log_probabilities(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: (logits[name].float() / self.temperature[name]).log_softmax(-1) for name in self.names}

    def _decode(self, logits: Mapping[str, Tensor]) -> Answers:
        log_p = self._log_probabilities(logits)
        labels = {name: scores.argmax(-1) for name, scores in log_p.items()}
        for names, paths in self.paths:
            paths = paths.to(log_p[names[0]].device)
            total = sum(log_p[name][:, paths[:, i]] for i, name in enumerate(names))  # (B, P)
            labels |= zip(names, paths[total.argmax(-1)].unbind(-1), strict=True)
        said = torch.stack([labels[name] for name in self.names], dim=1)
        confidence = torch.cat([p.gather(1, said[:, [i]]) for i, p in enumerate(log_p.values())], dim=1).exp()
        needed = [float("inf") if self.threshold[name] is None else self.threshold[name] for name in self.names]
        return Answers(said, confidence, confidence >= torch.tensor(needed, device=confidence.device))
