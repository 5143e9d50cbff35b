"""Which brand a title names. The catalogue has no such column, and its titles spell one brand in many ways.

A title's *phrase* is its words before the gender word ("Peter England | Men Party Blue Jeans"), or all of it where
there is none. "X by Y" is brand X: "SDL by Sweet Dreams" is "SDL", since titles also say "Gliders" alone for "Gliders
by Liberty". `fit` learns the brands and their variants from train titles as a plain dict; `find` looks a title up.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

OTHER = "Other"  # the label of all brands too rare to have their own

LONGEST = 32  # words of a brand's name, and more than most titles have

GENDER = re.compile(r"\W*(men|women|boy|girl|kid|unisex|infant|teen)('?s)*\W*(-.*)?", re.IGNORECASE)
_OWN_NAME = {"leecooper"}  # brands that begin with another brand's name and yet are no product line of it
_SLIP_RATIO = 10  # a spelling this many times rarer than one that differs by one slip is taken for a misspelling of it


def phrase(title: str) -> tuple[list[str], bool]:
    """The words that begin with the brand, and whether a gender word or "by" ended them (else they run on).

    The first word is never the gender word ("Kids Ville Girls Top"), nor is the one after "Mr." ("Mr. Men").
    """
    words = title.split()
    for i in range(1, len(words)):
        if words[i].casefold() == "by" or _is_gender_word(words, i):
            return words[:i], True
    return words, False


def _is_gender_word(words: list[str], i: int) -> bool:
    return bool(GENDER.fullmatch(words[i])) and words[i - 1].casefold() not in ("mr", "mr.")


def key(words: list[str]) -> str:
    """A spelling without case, accents, punctuation, spaces and inner "and": "U.S.Polo Assn" -> "uspoloassn"."""
    text = unicodedata.normalize("NFKD", "".join(words[:1] + [word for word in words[1:] if word.casefold() != "and"]))
    return "".join(filter(str.isalnum, text.casefold()))


def _prefixes(words: list[str]) -> Iterator[list[str]]:
    """The phrase itself, then ever shorter beginnings of it; of a text that is no title, only those of `LONGEST`."""
    return (words[:length] for length in range(min(len(words), LONGEST), 0, -1))


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter inserted, dropped or changed, or two neighbours swapped, turns `a` into `b`.

    A digit or the first letter never is a slip; short names are different brands ("Nyk", "Nike"; "Basics", "Asics").
    """
    if min(len(a), len(b)) < 5 or max(len(a), len(b)) < 6 or a[0] != b[0]:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    if a[:1].isdigit() or b[:1].isdigit():
        return False
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[1::-1] == b[:2] and a[2:] == b[2:])


def _shortened(name: str) -> Iterator[str]:
    """The name, and the name without each letter but the first: two names that are one slip apart share one of these.

    A name that is too short for a slip, or longer than any brand's, yields nothing.
    """
    if 5 <= len(name) <= 64:
        yield name
        yield from (name[:i] + name[i + 1 :] for i in range(1, len(name)))


def find(title: str, aliases: dict[str, str]) -> str | None:
    """The brand whose name is the longest beginning of the title's phrase; None if no fitted brand's name is."""
    return next((aliases[k] for words in _prefixes(phrase(title)[0]) if (k := key(words)) in aliases), None)


def length(title: str, aliases: dict[str, str]) -> int:
    """The number of words at a title's beginning that name its brand and maker ("SDL by Sweet Dreams"): those before
    the gender word; without one, its phrase if "by" ends it, else the fitted brand's name, else the first word.
    """
    words = title.split()
    if gender := next((i for i in range(1, len(words)) if _is_gender_word(words, i)), None):
        return gender
    words, ended = phrase(title)
    return len(words) if ended else next((len(part) for part in _prefixes(words) if key(part) in aliases), 1)


def fit(titles: Iterable[str], min_count: int) -> dict[str, str]:
    """Learn key -> label for all brands with at least `min_count` titles, and for their misspellings.

    A phrase that begins with such a brand is a product line of it ("Jockey ZONE", "Wildcraft Wiki 4") and needs no
    entry, as `find` looks for the beginning. A label is the brand's most frequent spelling.

    Args:
        titles: iterated over twice. Only their brands are kept, which are few, however many titles there are.
    """
    names = {key(list(words)) for words in {tuple(words) for words, ended in map(phrase, titles) if ended}}
    spelt = Counter()
    for words, ended in map(phrase, titles):
        if not ended:  # "Red Tape Brown Shoes": the longest name that other titles show, else the first word
            words = next((prefix for prefix in _prefixes(words) if key(prefix) in names), words[:1])
        if not (len(words) == 1 and GENDER.fullmatch(words[0])):
            spelt[" ".join(words)] += 1
    spellings: dict[str, Counter] = defaultdict(Counter)
    for spelling, times in spelt.items():
        if name := key(spelling.split(" ")):
            spellings[name][spelling] = times

    counts = {name: variants.total() for name, variants in spellings.items()}
    aliases: dict[str, str] = {}
    alike: dict[str, list[str]] = defaultdict(list)  # {a result of `_shortened`: aliases that have it}
    for name in sorted(counts, key=lambda name: (-counts[name], name)):  # the frequent first: the rare fold into them
        label = spellings[name].most_common(1)[0][0]
        beginnings = map(key, list(_prefixes(label.split()))[1:])
        if name not in _OWN_NAME and any(counts.get(beginning, 0) >= min_count for beginning in beginnings):
            continue
        near = {k for part in _shortened(name) for k in alike.get(part, ())}
        often = [k for k in near if counts[k] >= _SLIP_RATIO * counts[name] and _one_slip(name, k)]
        if often:
            aliases[name] = aliases[min(often, key=lambda k: (-counts[k], k))]
        elif counts[name] >= min_count:
            aliases[name] = label
        for part in _shortened(name) if name in aliases else ():
            alike[part].append(name)
    return aliases
