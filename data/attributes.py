"""What is to be predicted, as a schema file declares it; and what is fitted to that on train rows alone: the classes of
each class attribute, text -> index, and the scale of each number."""

import difflib
import functools
import graphlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tomllib

from data import brand, price
from data.cells import number
from errors import UserError

MISSING = -1  # the catalogue has no value here
UNSEEN = -2  # it has one that no train row had

KINDS = ("class", "number")
DERIVED = {"brand": "class", "price": "number"}  # what `derive` may say, and the kind it gives

Columns = dict[str, list[str | None]]


@dataclass(frozen=True)
class Attribute:
    """One thing to predict: a table `[attributes.NAME]` of a schema file, whose keys are these but for `name`.

    Args:
        name: of its task, in reports and checkpoints.
        level: 1 is coarsest; the head of each level sees what the levels above said. By default one below the deepest
            parent; 1 without parents.
        column: of the catalogue, where the value comes from; by default the one called `name`.
        derive: "brand": the label is to be found inside the column's text, see `data.brand`. "price": simulated, see
            `data.price`, which needs columns of its own.
        kind: "class", one of the labels of train rows; or "number".
        weight: of its loss.
        parents: classes above it in a hierarchy: its label is chosen together with theirs, as train rows combine them.
    """

    name: str
    level: int
    column: str
    derive: str | None = None
    kind: str = "class"
    weight: float = 1.0
    parents: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that a catalogue must have for it."""
        return price.COLUMNS if self.derive == "price" else (self.column,)


@dataclass(frozen=True)
class Schema:
    """Attributes, classes first, and the column that holds titles, None where there is none."""

    attributes: tuple[Attribute, ...]
    title: str | None = None


FIELDS = {  # of a table in a schema file: type, and what the type is called
    "level": (int, "a whole number from 1 to 99"),
    "column": (str, "a text"),
    "derive": (str, "a text"),
    "kind": (str, "a text"),
    "weight": (int | float, "a number above 0"),
    "parents": (list, "a list of attributes"),
}
MOST = {"level": 100, "weight": math.inf}


def read_schema(path: Path, extra: Sequence[str] = ()) -> Schema:
    """Read a schema file, with those of its `[optional]` attributes that `extra` names.

    Raises:
        UserError: it cannot be read or contradicts itself; the message names the attribute and the key.
    """
    try:
        text = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as TOML: {error}") from None
    for key in text.keys() - {"title", "attributes", "optional"}:
        raise UserError(f"{path}: {key!r} means nothing here; there are title, [attributes.NAME] and [optional.NAME]")
    tables, optional, title = text.get("attributes", {}), text.get("optional", {}), text.get("title")
    if (
        not isinstance(tables, dict)
        or not isinstance(optional, dict)
        or not isinstance(title, str | None)
        or title == ""
    ):
        raise UserError(f'{path}: write [attributes.NAME] for each attribute, and title = "COLUMN"')
    for name in extra:
        if name not in optional:
            raise UserError(f"{path} has no [optional.{name}]{nearest(name, optional)}")
        tables[name] = optional[name]
    for name, table in tables.items():
        _check_table(f"{path}: {name}", table)
    _check_parents(path, tables)

    levels: dict[str, int] = {}
    for name in _parents_first(path, tables):
        below = 1 + max((levels[parent] for parent in tables[name].get("parents", [])), default=0)
        levels[name] = tables[name].get("level", below)
        if levels[name] < below:
            raise UserError(f"{path}: {name} is on level {levels[name]}, and a parent of it on level {below - 1}")
    attributes = [
        Attribute(name, levels[name], **{"column": name} | table | {"parents": tuple(table.get("parents", ()))})
        for name, table in ((name, {k: v for k, v in table.items() if k != "level"}) for name, table in tables.items())
    ]
    if not any(a.kind == "class" for a in attributes):
        raise UserError(f'{path} declares no [attributes.NAME] of kind "class"; at least one is needed')
    return Schema(tuple(sorted(attributes, key=lambda a: KINDS.index(a.kind))), title)


def _check_table(where: str, table) -> None:
    if not isinstance(table, dict):
        raise UserError(f"{where} is no table of keys and values")
    for key, value in table.items():
        if key not in FIELDS:
            raise UserError(f"{where} has an unknown key {key!r}{nearest(key, FIELDS)}; there are {', '.join(FIELDS)}")
        kind, called = FIELDS[key]
        right = isinstance(value, kind) and not isinstance(value, bool) and value != ""
        if not right or (key in MOST and not 0 < value < MOST[key]):
            raise UserError(f"{where}: {key} = {value!r} is not {called}")
    kind = table.get("kind", "class")
    if kind not in KINDS:
        raise UserError(f"{where}: kind = {kind!r} is neither {' nor '.join(KINDS)}")
    if (derive := table.get("derive")) and DERIVED.get(derive) != kind:
        allowed = ", ".join(f"{name} (a {gives})" for name, gives in DERIVED.items())
        raise UserError(f"{where}: derive = {derive!r} does not give a {kind}; there are {allowed}")


def _check_parents(path: Path, tables: dict[str, dict]) -> None:
    for name, table in tables.items():
        for parent in table.get("parents", []):
            if parent not in list(tables):  # which may be no text at all
                near = nearest(str(parent), tables)
                raise UserError(f"{path}: {name} has the parent {parent!r}, which is no attribute{near}")
            if "number" in (tables[parent].get("kind"), table.get("kind")):
                raise UserError(f"{path}: {name} has the parent {parent}; numbers neither have nor are parents")


def _parents_first(path: Path, tables: dict[str, dict]) -> Iterable[str]:
    try:
        return list(graphlib.TopologicalSorter({n: t.get("parents", []) for n, t in tables.items()}).static_order())
    except graphlib.CycleError as error:
        raise UserError(f"{path}: the parents go round in a circle: {' > '.join(error.args[1])}") from None


def nearest(word: str, words: Iterable[str]) -> str:
    """Such as "; nearest: baseColour", for the end of a message about a name that is not there."""
    by_case = {name.casefold(): name for name in words}
    near = difflib.get_close_matches(word.casefold(), by_case, cutoff=0.65)
    return f"; nearest: {', '.join(by_case[name] for name in near)}" if near else ""


FASHION_FILE = Path(__file__).with_name("fashion.toml")
FASHION = read_schema(FASHION_FILE).attributes


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


@dataclass(frozen=True)
class Scale:
    """Of a number, over train rows: `mean` and `std`, by which it is scaled, and `median`, the best constant guess."""

    mean: float
    std: float
    median: float


def fit_label_maps(
    columns: Columns, train_rows: Sequence[int], attributes: Sequence[Attribute] = FASHION, min_brand_count: int = 10
) -> dict[str, LabelMap]:
    """Labels of each class attribute, sorted, from `train_rows` alone; brands with under `min_brand_count` rows are
    "Other".

    Raises:
        UserError: an attribute has no value in any train row, or one value in all.
    """
    maps = {}
    for a in (a for a in attributes if a.kind == "class"):
        texts = [text for row in train_rows if (text := columns[a.column][row]) is not None]
        aliases = brand.fit(texts, min_brand_count) if a.derive == "brand" else None
        said = texts if aliases is None else (brand.find(text, aliases) or brand.OTHER for text in texts)
        maps[a.name] = LabelMap(sorted(set(said)), aliases)
        rarer = ", or lower --min-brand-count" if aliases is not None else ""
        _check_varied(a, maps[a.name].labels, f"leave it out{rarer}")
    return maps


def fit_scales(columns: Columns, train_rows: Sequence[int], attributes: Sequence[Attribute]) -> dict[str, Scale]:
    """The scale of each number, from `train_rows` alone. Raises what `fit_label_maps` and `numbers` raise."""
    scales = {}
    for a in (a for a in attributes if a.kind == "number"):
        values = numbers(columns, a)[train_rows]
        values = values[~np.isnan(values)]
        _check_varied(a, np.unique(values).tolist(), "leave it out")
        scales[a.name] = Scale(float(values.mean()), float(values.std()), float(np.median(values)))
    return scales


def _check_varied(a: Attribute, values: list, remedy: str) -> None:
    if not values:
        raise UserError(f"no train row has a value of {a.name} (column {a.column}): nothing to learn; leave it out")
    if len(values) == 1:
        raise UserError(f"{a.name} is {values[0]!r} in every train row (column {a.column}): nothing to learn; {remedy}")


def numbers(columns: Columns, attribute: Attribute) -> np.ndarray:
    """All values of a number: float64 (N,), NaN where the catalogue has none.

    Raises:
        UserError: a cell is no number; the message names the row.
    """
    if attribute.derive == "price":
        return price.simulate(columns)
    cells = zip(columns[attribute.column], columns["id"], strict=True)
    return np.array([number(text, attribute.column, id) for text, id in cells])


def encode_labels(columns: Columns, maps: dict[str, LabelMap], attributes: Sequence[Attribute] = FASHION) -> np.ndarray:
    """All rows -> int64 (N, A), one column a class attribute: class index, `MISSING` or `UNSEEN`."""
    codes = [[maps[a.name].encode(text) for text in columns[a.column]] for a in attributes if a.kind == "class"]
    return np.array(codes, dtype=np.int64).T


def encode_numbers(columns: Columns, scales: dict[str, Scale], attributes: Sequence[Attribute]) -> np.ndarray:
    """All rows -> float32 (N, M), one column a number, in standard deviations from the mean of train rows; NaN where
    there is none."""
    scaled = np.empty((len(columns["id"]), len(scales)), dtype=np.float32)
    for column, a in enumerate(a for a in attributes if a.kind == "number"):
        scaled[:, column] = (numbers(columns, a) - scales[a.name].mean) / scales[a.name].std
    return scaled


def families(attributes: Sequence[Attribute]) -> list[list[str]]:
    """The attributes that parents join, directly or through others: the names of each hierarchy, coarse to fine."""
    groups: list[list[str]] = []
    for a in sorted(attributes, key=lambda a: a.level):
        joined = [group for group in groups if set(group) & set(a.parents)]
        groups = [group for group in groups if group not in joined] + [[*itertools.chain(*joined), a.name]]
    return [group for group in groups if len(group) > 1]


def known_paths(labels: np.ndarray, attributes: Sequence[Attribute] = FASHION) -> list[dict]:
    """Of each hierarchy, {"attributes": its names, "known": the distinct class paths (P, names)}.

    The paths are those of labels (N, A) that are labelled in full, sorted.
    """
    names, known = [a.name for a in attributes if a.kind == "class"], []
    for family in families(attributes):
        paths = labels[:, [names.index(name) for name in family]]  # (N, names)
        known.append({"attributes": family, "known": np.unique(paths[(paths >= 0).all(1)], axis=0).tolist()})
    return known


def class_counts(labels: np.ndarray, maps: dict[str, LabelMap]) -> dict[str, list[int]]:
    """How many of the rows (N, A) have each class of each attribute."""
    columns = zip(maps.items(), labels.T, strict=True)
    return {name: np.bincount(column[column >= 0], minlength=len(m)).tolist() for (name, m), column in columns}


def of_config(kind: type, entries: list[dict]) -> dict:
    """{name: `kind`} of the attributes of a checkpoint's config that have the fields of `kind`, a dataclass above."""
    wanted = [field.name for field in fields(kind)]
    return {e["name"]: kind(**{key: e[key] for key in wanted}) for e in entries if set(wanted) <= e.keys()}
