"""What is fitted on train rows only: each class attribute's map from text to class index, and each number's scale."""

import functools
import itertools
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from data import brand, price
from data.cells import to_numbers
from data.columns import Chosen
from data.schema import Attribute
from errors import UserError

AT_ONCE = 1 << 16  # rows whose paths are sorted together
MISSING = -1  # the catalogue has no value here
UNSEEN = -2  # the catalogue has a value here that no train row has
PATHS = 10_000  # of a hierarchy, at most, that completing partly labelled rows may lead to
HARDLY_MEANT = 100  # standard deviations from the mean; a value at least so far off is probably a typing mistake
FARTHEST = 1e6  # standard deviations; numbers farther from the mean are clipped

Columns = dict[str, Sequence[str | None]]


@dataclass(frozen=True)
class LabelMap:
    """Text -> class index. Plain fields: `dataclasses.asdict` writes it as JSON, `LabelMap(**fields)` reads it back.

    Args:
        labels: the classes in order; an index into it is a class.
        aliases: for an attribute found inside a longer text, {what to look for: label} (see `data.brand`); text that
            holds none of them is "Other", if train rows had such text. None where the text itself is the label.
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


@dataclass(frozen=True)
class Scale:
    """Statistics of a number over train rows: `mean` and `std` scale it, `median` is the best constant guess.

    If a value is a hundred or more deviations off, like a barcode among widths, mean and deviation are those of the
    values clipped to the 1st and the 99th percentile: otherwise all widths would scale to about the same value. This
    does not apply to a number that is mostly the same, such as a discount, whose rare values are legitimate.
    """

    mean: float
    std: float
    median: float


def fit_label_maps(
    columns: Columns, train_rows: Sequence[int], attributes: Sequence[Attribute], min_brand_count: int
) -> dict[str, LabelMap]:
    """The sorted labels of each class attribute, from `train_rows` only; brands with fewer than `min_brand_count` rows
    become "Other".

    Raises:
        UserError: an attribute has no value in any train row, or one value in all.
    """
    maps = {}
    for a in (a for a in attributes if a.kind == "class"):
        texts, aliases = Chosen(columns[a.column], train_rows), None
        if a.derive == "brand":  # one by one: there are about as many titles as rows
            aliases = brand.fit(texts, min_brand_count)
            texts = (brand.find(text, aliases) or brand.OTHER for text in texts)
        maps[a.name] = LabelMap(sorted(set(texts)), aliases)
        rarer = ", or lower --min-brand-count" if aliases is not None else ""
        _check_varied(a, maps[a.name].labels, f"leave it out{rarer}")
    return maps


def fit_scales(
    numbers: dict[str, np.ndarray], train_rows: Sequence[int], attributes: Sequence[Attribute]
) -> dict[str, Scale]:
    """The scale of each number (see `read_numbers`), from `train_rows` alone. Raises what `fit_label_maps` raises."""
    scales = {}
    for a in (a for a in attributes if a.kind == "number"):
        values = numbers[a.name][train_rows]
        values = values[~np.isnan(values)]
        _check_varied(a, np.unique(values).tolist(), "leave it out")
        low, high = np.quantile(values, 0.01, method="higher"), np.quantile(values, 0.99, method="lower")
        quarter, three_quarters = np.quantile(values, (0.25, 0.75), method="nearest")
        with np.errstate(over="ignore", invalid="ignore"):
            of_all, of_most = (
                Scale(float(some.mean()), float(some.std()), float(np.median(values)))
                for some in (values, values.clip(low, high))
            )
            spoilt = quarter < three_quarters and of_most.std > 0 and len(far_off(values, of_most))
        scales[a.name] = of_most if spoilt else of_all
        if not all(map(math.isfinite, astuple(scales[a.name]))):
            raise UserError(f"{a.name} is up to {abs(values).max():g} (column {a.column}), too large for a mean")
    return scales


def _check_varied(a: Attribute, values: list, remedy: str) -> None:
    if not values:
        raise UserError(f"no train row has a value of {a.name} (column {a.column}): nothing to learn; leave it out")
    if len(values) == 1:
        raise UserError(f"{a.name} is {values[0]!r} in every train row (column {a.column}): nothing to learn; {remedy}")


def read_numbers(columns: Columns, attributes: Sequence[Attribute]) -> dict[str, np.ndarray]:
    """{number: its values in all rows}, float64 (N,), NaN where the catalogue has none.

    Raises:
        UserError: a cell is not a number; the message names its row.
    """
    read = {}
    for a in (a for a in attributes if a.kind == "number"):
        if a.derive == "price":
            read[a.name] = price.simulate(columns)
        else:
            read[a.name] = to_numbers(columns[a.column], a.column, columns["id"])
    return read


def encode_labels(columns: Columns, maps: dict[str, LabelMap], attributes: Sequence[Attribute]) -> np.ndarray:
    """All rows -> int16 (N, A), or int32 if classes are many: each attribute's class index, `MISSING` or `UNSEEN`."""
    count, small = len(columns[attributes[0].column]), max(map(len, maps.values())) < 2**15
    labels = np.empty((count, len(maps)), dtype=np.int16 if small else np.int32)
    for column, a in enumerate(a for a in attributes if a.kind == "class"):
        labels[:, column] = np.fromiter(map(maps[a.name].encode, columns[a.column]), labels.dtype, count)
    return labels


def encode_numbers(numbers: dict[str, np.ndarray], scales: dict[str, Scale], rows: int) -> np.ndarray:
    """float32 (rows, M), one column per number, in standard deviations from the mean of train rows, clipped to
    `FARTHEST`; NaN where the value is missing."""
    scaled = np.empty((rows, len(scales)), dtype=np.float32)
    with np.errstate(over="ignore"):
        for column, (name, scale) in enumerate(scales.items()):
            scaled[:, column] = ((numbers[name] - scale.mean) / scale.std).clip(-FARTHEST, FARTHEST)
    return scaled


def far_off(values: np.ndarray, scale: Scale) -> np.ndarray:
    """The indices of a number's values (N,) that are so far off that they are probably mistakes."""
    with np.errstate(over="ignore"):
        return np.flatnonzero(abs(values - scale.mean) >= HARDLY_MEANT * scale.std)


def families(attributes: Sequence[Attribute]) -> list[list[str]]:
    """The hierarchies: the names of attributes that parents join, directly or through others, coarse to fine."""
    groups: list[list[str]] = []
    for a in sorted(attributes, key=lambda a: a.level):
        joined = [group for group in groups if set(group) & set(a.parents)]
        groups = [group for group in groups if group not in joined] + [[*itertools.chain(*joined), a.name]]
    return [group for group in groups if len(group) > 1]


def known_paths(labels: np.ndarray, rows: np.ndarray, attributes: Sequence[Attribute]) -> list[dict]:
    """For each hierarchy, {"attributes": the names in it, "known": the distinct class paths (P, names)}.

    The paths are those of all fully labelled rows of the labels (N, A), however rare, sorted. Some are mistakes of the
    catalogue, but leaving them out improves no answer (`benchmarks/known_paths.py`). If no path agrees with a partly
    labelled row, such as shoes that have no sleeve, all ways to complete that row become paths too, unless this makes
    more than `PATHS`. A hierarchy of which no row is fully labelled is left out.
    """
    names, known = [a.name for a in attributes if a.kind == "class"], []
    for family in families(attributes):
        columns, found = [names.index(name) for name in family], set()
        for start in range(0, len(rows), AT_ONCE):
            paths = np.unique(labels[np.ix_(rows[start : start + AT_ONCE], columns)], axis=0)  # (n, names)
            found |= set(map(tuple, paths[(paths > UNSEEN).all(1) & (paths != MISSING).any(1)].tolist()))
        sizes = [labels[rows, column].max(initial=MISSING) + 1 for column in columns]
        if completed := _completed(found, sizes):
            known.append({"attributes": family, "known": [list(path) for path in sorted(completed)]})
    return known


def _completed(found: set[tuple[int, ...]], sizes: Sequence[int]) -> set[tuple[int, ...]]:
    """The complete paths in `found`, and all ways to complete those others that no complete path agrees with."""
    complete = {path for path in found if MISSING not in path}
    if not complete:
        return complete  # then each attribute is answered by itself

    def gaps(path: tuple[int, ...]) -> tuple[int, list[bool]]:
        return path.count(MISSING), [c == MISSING for c in path]

    # Fewest gaps first, and of these, gaps at the finest levels first. Paths with the same gaps complete no other.
    for (_, missing), some in itertools.groupby(sorted(found - complete, key=lambda p: (gaps(p), p)), gaps):
        there = [i for i, gap in enumerate(missing) if not gap]
        agreed = {tuple(path[i] for i in there) for path in complete}
        for path in some:
            ways = [range(size) if c == MISSING else [c] for c, size in zip(path, sizes, strict=True)]
            more = math.prod(map(len, ways))
            if tuple(path[i] for i in there) not in agreed and len(complete) + more <= PATHS:
                complete |= set(itertools.product(*ways))
    return complete


def never_answered(paths: Sequence[dict], entries: Sequence[dict]) -> dict[str, list[str]]:
    """{attribute: its labels that are in no known path} of a checkpoint's config, where there are any."""
    labels, lost = {entry["name"]: entry["labels"] for entry in entries if entry["kind"] == "class"}, {}
    for path in paths:
        for name, classes in zip(path["attributes"], zip(*path["known"], strict=True), strict=True):
            if rest := sorted(set(range(len(labels[name]))) - set(classes)):
                lost[name] = [labels[name][c] for c in rest]
    return lost


def nearly_alike(labels: Sequence[str]) -> list[list[str]]:
    """Groups of labels that differ only in case, spaces, hyphens, underscores or the encoding of an accent, as happens
    when several people fill in a table."""
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(re.sub(r"[\s_-]", "", unicodedata.normalize("NFC", label).casefold()), []).append(label)
    return [some for some in alike.values() if len(some) > 1]


def class_counts(labels: np.ndarray, rows: np.ndarray, maps: dict[str, LabelMap]) -> dict[str, list[int]]:
    """How many of these rows of the labels (N, A) have each class of each attribute."""
    counts = {}
    for column, (name, m) in enumerate(maps.items()):
        found = labels[rows, column]  # one at a time: all at once would copy the labels
        counts[name] = np.bincount(found[found >= 0], minlength=len(m)).tolist()
    return counts


def of_config(kind: type, entries: list[dict]) -> dict:
    """{name: `kind` object} for attributes of a checkpoint's config with the fields of `kind`, a dataclass above."""
    wanted = [field.name for field in fields(kind)]
    return {e["name"]: kind(**{key: e[key] for key in wanted}) for e in entries if set(wanted) <= e.keys()}
