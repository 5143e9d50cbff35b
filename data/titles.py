"""Titles as input: WordPiece tokens as in BERT (Devlin et al. 2019, arXiv:1810.04805), and the removal of the words of
a title that give its labels away."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import hub
from data import brand
from errors import UserError

PAD, UNKNOWN, START, END = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
HUB_VOCABULARY = "bert-base-uncased"
AT_ONCE = 8192  # titles
TRAINED = 4000  # tokens of a vocabulary that we train, at most


def stem(word: str) -> str:
    """A word without case, plural ending and the "en" of "golden": "Dresses", "dress" -> "dr"; "scarves" -> "scarf"."""
    short = re.sub("(?<=..)(en)?[es]*$", "", word.casefold()[:64])  # no word is longer
    return re.sub("v$", "f", re.sub("y$", "i", short))


# Words for a gender besides those that end a brand's phrase (`brand.GENDER`): "Arrow Woman" is a line of Arrow.
GENDERED = {stem(word) for word in ("man", "woman", "lady", "male", "female", "him", "her", "kidswear")}


class LeakMask:
    """Removes from a title the words that its labels were made from, or that say the same: the beginning that names the
    brand, and its words wherever they recur; words of any label; all gender words if a label is a gender; and numbers
    if a number is to be predicted.

    It does not use the row's labels, so it does the same for rows without labels. Words that hint at a label without
    being a word of it, such as the name of a product line, stay.

    Args:
        attributes: those of a checkpoint's config.
    """

    def __init__(self, attributes: Sequence[dict]):
        said = [label for a in attributes if a["kind"] == "class" and not a["derive"] for label in a["labels"]]
        self.stems = {stem(word) for label in said for word in re.findall(r"\w+", label)}
        self.stems |= {stem("".join(re.findall(r"\w+", label))) for label in said}
        self.brands = next((a["aliases"] for a in attributes if a["derive"] == "brand"), None)
        self.genders = any(map(brand.GENDER.fullmatch, said))
        self.numbers = any(a["kind"] == "number" and not a["derive"] for a in attributes)

    def __call__(self, title: str) -> str:
        parts = title.split()
        beginning = brand.length(title, self.brands) if self.brands is not None else 0
        named = set(map(stem, re.findall(r"\w+", " ".join(parts[:beginning]))))
        words = re.findall(r"\w+", " ".join(parts[beginning:]))
        out = {i for i, word in enumerate(words) if self.leaks(word) or stem(word) in named}
        for i, pair in enumerate(itertools.pairwise(words)):  # "T-shirt", "Flip flops"
            out |= {i, i + 1} if stem("".join(pair)) in self.stems else set()
        return " ".join(word for i, word in enumerate(words) if i not in out)

    def leaks(self, word: str) -> bool:
        gender = self.genders and (brand.GENDER.fullmatch(word) or stem(word) in GENDERED)
        number = self.numbers and word[0].isdecimal()  # "120", "120cm"
        return bool(gender) or stem(word) in self.stems or number


class TitleReader:
    """Titles -> tokens, as a checkpoint's config says in `text`, and in `attributes` for the words to remove."""

    def __init__(self, config: dict):
        text = config["text"]
        self.length = text["length"]
        self.mask = LeakMask(config["attributes"]) if text["mask"] else None
        self.tokenizer = tokenizer(text["vocab"])

    def cleaned(self, titles: Sequence[str | None]) -> list[str]:
        """The part of each title that is read; an empty text for a missing title."""
        return [(self.mask(title) if self.mask else title) if title else "" for title in titles]

    def __call__(self, titles: Sequence[str | None]) -> tuple[np.ndarray, float]:
        """Tokens int32 (N, length), and the share of titles that had to be cut."""
        tokens = np.full((len(titles), self.length), self.tokenizer.token_to_id(PAD), dtype=np.int32)
        rows, titles, cut = iter(tokens), iter(titles), 0
        while some := list(itertools.islice(titles, AT_ONCE)):
            for encoding in self.tokenizer.encode_batch(self.cleaned(some)):
                ids, row = encoding.ids, next(rows)
                if len(ids) > self.length:
                    ids, cut = [*ids[: self.length - 1], ids[-1]], cut + 1  # [SEP] stays
                row[: len(ids)] = ids
        return tokens, cut / max(1, len(tokens))


def tokenizer(vocab: list[str]) -> Tokenizer:
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token=UNKNOWN))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing((END, vocab.index(END)), (START, vocab.index(START)))
    return made


def choose_vocabulary(titles: Sequence[str]) -> tuple[list[str], str]:
    """The default vocabulary and its origin: BERT's own, from the hub, else one trained on `titles`."""
    hub.reachable()  # if it is not, the library answers from its cache at once
    try:
        return read_vocabulary(Path(huggingface_hub.hf_hub_download(HUB_VOCABULARY, "vocab.txt"))), HUB_VOCABULARY
    except Exception as error:  # several libraries raise here; our own vocabulary does as well
        print(f"no vocabulary of {HUB_VOCABULARY} from the hub ({type(error).__name__})")
    return train_vocabulary(titles), "trained on the train split's titles"


def read_vocabulary(file: Path) -> list[str]:
    """The tokens in the order of their numbers.

    Raises:
        UserError: the file cannot be read or is not a vocabulary.
    """
    try:
        vocab = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a rarer line break may be a token
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --vocab {file}: {error}") from None
    if not set(SPECIAL) <= set(vocab) or len(set(vocab)) < len(vocab):
        raise UserError(
            f"--vocab {file} is no WordPiece vocabulary: a token a line, each once, {', '.join(SPECIAL)} too"
        )
    return vocab


def train_vocabulary(titles: Sequence[str], size: int = TRAINED) -> list[str]:
    """The tokens of a WordPiece vocabulary fitted to titles; the same for the same titles, so that a run can resume.

    For this, the characters come first, sorted: the library would number them in the order of a hash table, and break
    ties by number.
    """
    empty = tokenizer(list(SPECIAL))
    words = (word for title in titles for word, _ in _words(empty, title))
    letters = sorted({letter for word in words for letter in word})
    first = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=first, show_progress=False)
    empty.train_from_iterator(titles, trainer)
    vocab = empty.get_vocab()
    return sorted(vocab, key=vocab.get)


def _words(reader: Tokenizer, title: str) -> list:
    return reader.pre_tokenizer.pre_tokenize_str(reader.normalizer.normalize_str(title))
