"""What is to be predicted, as a schema file declares it (`--attributes FILE.toml`; `data/fashion.toml` is built in)."""

import difflib
import graphlib
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import price
from errors import UserError

KINDS = ("class", "number")
DERIVED = {"brand": "class", "price": "number"}  # the values of `derive`, and the kind that each gives


@dataclass(frozen=True)
class Attribute:
    """One thing to predict: a table `[attributes.NAME]` of a schema file, whose keys are these except `name`.

    Args:
        name: its name in reports and checkpoints.
        level: 1 is coarsest; the head of each level sees the outputs of the levels above. By default one below the
            deepest parent; 1 without parents.
        column: the catalogue's column that the value comes from; by default the one called `name`.
        derive: "brand": the label is found inside the column's text, see `data.brand`. "price": the value is simulated,
            see `data.price`, which needs columns of its own.
        kind: "class", one of the labels of train rows; or "number".
        weight: the weight of its loss.
        parents: class attributes above it in a hierarchy: its label is chosen together with theirs, and with those of
            other attributes below the same parents, in combinations that train rows show.
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
    """What a schema file declares.

    Attributes:
        attributes: classes first.
        title: the column that holds titles, or None.
        article: the column that says which article a picture shows, or None: see `data.split`.
    """

    attributes: tuple[Attribute, ...]
    title: str | None = None
    article: str | None = None


FIELDS = {  # of a table in a schema file: type, and what the type is called
    "level": (int, "a whole number from 1 to 99"),
    "column": (str, "a text"),
    "derive": (str, "a text"),
    "kind": (str, "a text"),
    "weight": (int | float, "a number above 0"),
    "parents": (list, "a list of attributes"),
}
MOST = {"level": 100, "weight": sys.float_info.max}
TAKEN = ("image", "images", "error")  # names that no attribute can have


def read_schema(path: Path, extra: Sequence[str] = ()) -> Schema:
    """Read a schema file, with those of its `[optional]` attributes that `extra` names.

    Raises:
        UserError: it cannot be read or contradicts itself; the message names the attribute and the key.
    """
    try:
        text = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read --attributes {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as TOML: {error}") from None
    tables, optional = text.pop("attributes", {}), text.pop("optional", {})
    if unknown := text.keys() - {"title", "article"}:
        there = "title, article, [attributes.NAME] and [optional.NAME]"
        raise UserError(f"{path}: {sorted(unknown)[0]!r} means nothing here; there are {there}")
    columns = all(isinstance(column, str) and column for column in text.values())
    if not (isinstance(tables, dict) and isinstance(optional, dict) and columns):
        raise UserError(f'{path}: write [attributes.NAME] for each attribute, and title or article = "COLUMN"')
    for name in extra:
        if name not in optional:
            raise UserError(f"{path} has no [optional.{name}]{nearest(name, optional)}")
        if name in tables:
            raise UserError(f"{path} has {name} twice, in [attributes] and in [optional]; call one otherwise")
        tables[name] = optional[name]
    for name, table in tables.items():
        _check_table(f"{path}: {name}", table)
    for name in tables:
        if name in TAKEN:
            raise UserError(f"{path}: {name} is a column of what infer.py writes; give the attribute another name")
        other = next((name.removesuffix(end) for end in ("_confidence", "_decision") if name.endswith(end)), None)
        if other in tables and tables[other].get("kind", "class") == "class":
            raise UserError(f"{path}: infer.py writes {name} of {other}; give the attribute another name")
    _check_parents(path, tables)

    levels: dict[str, int] = {}
    for name in _parents_first(path, tables):
        below = 1 + max((levels[parent] for parent in tables[name].get("parents", [])), default=0)
        levels[name] = tables[name].get("level", below)
        if levels[name] < below:
            raise UserError(f"{path}: {name} is on level {levels[name]}, and a parent of it on level {below - 1}")
    attributes = []
    for name, table in tables.items():
        fitted = {"level": levels[name], "parents": tuple(table.get("parents", ()))}
        attributes.append(Attribute(**{"name": name, "column": name} | table | fitted))
    if not any(a.kind == "class" for a in attributes):
        raise UserError(f'{path} declares no [attributes.NAME] of kind "class"; at least one is needed')
    return Schema(tuple(sorted(attributes, key=lambda a: KINDS.index(a.kind))), **text)


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
            if parent not in list(tables):  # `parent` may not even be text
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
    """A hint such as "; nearest: baseColour", for the end of a message about an unknown name."""
    by_case = {name.casefold(): name for name in words}
    near = difflib.get_close_matches(word.casefold(), by_case, cutoff=0.65)
    return f"; nearest: {', '.join(by_case[name] for name in near)}" if near else ""


FASHION_FILE = Path(__file__).with_name("fashion.toml")
FASHION = read_schema(FASHION_FILE).attributes
