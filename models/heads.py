"""Hierarchical heads: each level of attributes sees the embedding and the logits of every level above."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class HierarchicalHeads(nn.Module):
    """Logits of every attribute from one image embedding.

    Level 1 is one linear layer; each deeper level is an MLP over the embedding and the raw logits of all levels above,
    so that `articleType` can lean on what `masterCategory` and `subCategory` said. One layer serves all attributes of
    a level: its output rows are split among them.

    Args:
        dim: width of the embedding.
        hidden: width of the MLPs' hidden layer.
        levels: attribute -> its level, in declaration order.
        classes: attribute -> its number of classes.
    """

    def __init__(self, dim: int, hidden: int, levels: Mapping[str, int], classes: Mapping[str, int]):
        super().__init__()
        self.classes = dict(classes)
        self.by_level = [[name for name in levels if levels[name] == level] for level in sorted(set(levels.values()))]
        self.levels = nn.ModuleList()
        seen = dim
        for depth, names in enumerate(self.by_level):
            width = sum(classes[name] for name in names)
            mlp = nn.Sequential(nn.Linear(seen, hidden), nn.GELU(), nn.Linear(hidden, width))
            self.levels.append(nn.Linear(seen, width) if depth == 0 else mlp)
            seen += width

    def forward(self, embedding: Tensor) -> dict[str, Tensor]:
        """(B, dim) -> {attribute: logits (B, classes)}, in declaration order."""
        seen, logits = embedding, {}
        for names, level in zip(self.by_level, self.levels, strict=True):
            out = level(seen)
            logits |= zip(names, out.split([self.classes[name] for name in names], dim=-1), strict=True)
            seen = torch.cat([seen, out], dim=-1)  # (B, dim + all logits so far)
        return {name: logits[name] for name in self.classes}
