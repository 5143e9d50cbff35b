"""For a checkpoint with neighbours: the train pictures that are most like another, which its answers depend on."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from data.batches import Batch, epoch_batches, make_loader
from memory import in_parts

SHOWN = 3  # train pictures beside another
BATCH_SIZE = 64


class Like(NamedTuple):
    """A train picture.

    Attributes:
        id: in its catalogue.
        labels: {attribute: its label, or None where it is missing}.
        row: a row of the store with the same picture; None where there is none.
    """

    id: str
    labels: dict[str, str | None]
    row: int | None


@torch.inference_mode()
def most_alike(task, rows: Sequence[int]) -> dict[int, list[Like]]:
    """{row of the store: the train pictures that are most like it}, of a `task.Task`; {} without neighbours."""
    neighbours = task.model.neighbours
    if neighbours is None:
        return {}
    voters, rows = [], np.unique(np.array(rows, int))
    most = None

    def look(batch: Batch, part: slice) -> list:
        _, alike = task.model.explained(task.preprocess(batch.pixels[part]), batch.tokens[part])
        return neighbours.voters(alike, SHOWN)

    for batch in make_loader(task.store, task.known, epoch_batches(rows, BATCH_SIZE), task.device):
        parts, most = in_parts(partial(look, batch.to(task.device)), len(batch.pixels), most)
        voters += itertools.chain(*parts)
    hashes = task.store.hashes.view(np.int64)
    there = np.flatnonzero(np.isin(hashes, [voter.hash for some in voters for voter in some]))
    place = dict(zip(hashes[there].tolist(), there.tolist(), strict=True))

    def like(voter) -> Like:
        labels = zip(task.classes.items(), voter.labels, strict=True)
        said = {name: texts[label] if label >= 0 else None for (name, texts), label in labels}
        return Like(voter.id, said, place.get(voter.hash))

    return {row: list(map(like, some)) for row, some in zip(rows.tolist(), voters, strict=True)}
