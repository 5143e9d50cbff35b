"""The attributes, declared once; and their labels: text -> class index, fitted on train rows alone."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data import brand
from errors import UserError

MISSING = -1  # the catalogue has no value here
UNSEEN = -2  # it has one that no train row had

Columns = dict[str, list[str | None]]


@dataclass(frozen=True)
class Attribute:
    """One thing to predict.

    Args:
        name: of its task, in reports and checkpoints.
        level: 1 is coarsest; the head of each level sees the logits of the levels above.
        column: of the catalogue, where the value comes from.
        derive: if the label is to be found inside the column's text: (train texts, least count) -> `LabelMap.aliases`.
    """

    name: str
    level: int
    column: str
    derive: Callable[[Sequence[str], int], dict[str, str]] | None = None


FASHION = (
    Attribute("gender", 1, "gender"),
    Attribute("masterCategory", 1, "masterCategory"),
    Attribute("usage", 1, "usage"),
    Attribute("subCategory", 2, "subCategory"),
    Attribute("articleType", 3, "articleType"),
    Attribute("baseColour", 4, "baseColour"),
    Attribute("brand", 4, "productDisplayName", brand.fit),
)
PATH = ("masterCategory", "subCategory", "articleType")  # from coarse to fine, nearly a tree


@dataclass(frozen=True)
class LabelMap:
    """Text -> class index. Plain fields: `dataclasses.asdict` writes it as JSON, `LabelMap(**fields)` reads it back.

    Args:
        labels: the classes in order; an index into it is a class.
        aliases: for an attribute found inside a longer text, what to look for there -> label (see `data.brand`); text
            that holds none is "Other", if train rows had such. None where the text is the label.
    """

    labels: list[str]
    aliases: dict[str, str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {label: i for i, label in enumerate(self.labels)}

    def encode(self, text: str | None) -> int:
        """A cell of the attribute's column -> class index, `MISSING` or `UNSEEN`."""
        if text is None:
            return MISSING
        label = text if self.aliases is None else brand.find(text, self.aliases) or brand.OTHER
        return self._index.get(label, UNSEEN)


def fit_label_maps(
    columns: Columns, train_rows: Sequence[int], attributes: Sequence[Attribute] = FASHION, min_brand_count: int = 10
) -> dict[str, LabelMap]:
    """Labels of each attribute, sorted, from `train_rows` alone; brands with under `min_brand_count` rows are "Other".

    Raises:
        UserError: an attribute has no value in any train row.
    """
    maps = {}
    for attribute in attributes:
        texts = [text for row in train_rows if (text := columns[attribute.column][row]) is not None]
        if not texts:
            raise UserError(
                f"no train row has a value of {attribute.name} (column {attribute.column}): nothing to learn"
            )
        if attribute.derive is None:
            maps[attribute.name] = LabelMap(sorted(set(texts)))
        else:
            aliases = attribute.derive(texts, min_brand_count)
            maps[attribute.name] = LabelMap(
                sorted({brand.find(text, aliases) or brand.OTHER for text in texts}), aliases
            )
    return maps


def encode_labels(columns: Columns, maps: dict[str, LabelMap], attributes: Sequence[Attribute] = FASHION) -> np.ndarray:
    """All rows -> int64 (N, A), one column an attribute: class index, `MISSING` or `UNSEEN`."""
    codes = [[maps[a.name].encode(text) for text in columns[a.column]] for a in attributes]
    return np.array(codes, dtype=np.int64).T


def known_paths(labels: np.ndarray, attributes: Sequence[Attribute] = FASHION) -> list[list[int]]:
    """The distinct class paths along `PATH` of labels (N, A), those labelled in full, sorted."""
    names = [attribute.name for attribute in attributes]
    paths = labels[:, [names.index(name) for name in PATH]]  # (N, 3)
    return np.unique(paths[(paths >= 0).all(axis=1)], axis=0).tolist()


def class_counts(labels: np.ndarray, maps: dict[str, LabelMap]) -> dict[str, list[int]]:
    """How many of the rows (N, A) have each class of each attribute."""
    columns = zip(maps.items(), labels.T, strict=True)
    return {name: np.bincount(column[column >= 0], minlength=len(m)).tolist() for (name, m), column in columns}
