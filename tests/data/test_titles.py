"""Titles: what is masked in them, how they become tokens, and which vocabulary is used."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from data import fashion
from data.attributes import fit_label_maps
from data.schema import FASHION
from data.titles import HUB_VOCABULARY, LeakMask, TitleReader, read_vocabulary, stem, train_vocabulary
from errors import UserError

ROOT = Path(__file__).parents[2]


def entry(name, labels=None, **changed):
    made = {"name": name, "kind": "class", "derive": None, "labels": labels, "aliases": None}
    return made | changed


FASHION_LIKE = [
    entry("gender", ["Men", "Women", "Boys"]),
    entry("articleType", ["Tshirts", "Flip Flops", "Watches", "Dresses", "Casual Shoes", "Scarves"]),
    entry("baseColour", ["Navy Blue", "Black", "Gold"]),
    entry(
        "brand", ["Nike", "Peter England"], derive="brand", aliases={"nike": "Nike", "peterengland": "Peter England"}
    ),
]


@pytest.mark.parametrize(
    ("title", "rest"),
    [
        ("Peter England Men Party Blue T-shirt", "Party"),
        ("Nike Air Max Women Black Running Shoe", "Running"),  # all before the gender word is the brand's phrase
        ("Peter England Striped Navy Dress", "Striped"),  # no gender word: the fitted brand's name
        ("Unheard Striped Dress", "Striped"),  # nor a known brand: the first word
        ("NIKE Kids' Fun flip-flops", "Fun"),  # a word for a gender that is no label
        ("Nike Men's Blue/Black Analog Watch", "Analog"),
        ("Nike Men", ""),
        ("Nike Women Ladies Golden Scarf Kidswear", ""),
        ("Nike by Just Dreams Women Printed Dress", "Printed"),  # who makes it names the brand as well
        ("Peter England Men Peter Pan Nike", "Pan Nike"),  # the brand's own words again; others' stay
    ],
)
def test_words_that_labels_were_made_from_are_taken_out(title, rest):
    assert LeakMask(FASHION_LIKE)(title) == rest


def test_other_catalogues_mask_words_of_their_own_labels_and_numbers():
    attributes = [entry("piece", ["Coffee Table", "Bookcase"]), entry("finish", ["White", "Oak"])]
    width = entry("width", kind="number")
    title = "Oak coffee-table Svala, 120 cm, for Men"
    assert LeakMask(attributes)(title) == "Svala 120 cm for Men"
    assert LeakMask([*attributes, width])(title) == "Svala cm for Men"
    assert LeakMask([*attributes, width])("Bookcase 120cm x 80") == "x"


def test_plurals_are_the_same_word():
    pairs = ("Dress", "Dresses"), ("watch", "Watches"), ("Shoe", "SHOES"), ("Accessory", "Accessories")
    for one, many in (*pairs, ("Scarf", "scarves"), ("Gold", "golden")):
        assert stem(one) == stem(many)
    different = ("Shirt", "Skirt", "Short", "Shoe", "Sock", "Green", "Grey", "Men", "Women", "SS", "ES", "S")
    assert len({stem(word) for word in different}) == len(different)


def test_of_a_drawn_title_nothing_is_left():
    """All of it is brand, gender, colour and article; so what is learnt from masked demo titles is a constant."""
    rows = [fashion.draw(i)[0] for i in range(300)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    maps = fit_label_maps(columns, range(300), FASHION, 10)
    config = [
        entry(a.name, maps[a.name].labels, derive=a.derive, aliases=maps[a.name].aliases) for a in FASHION
    ]  # fmt: skip
    mask = LeakMask(config)
    assert {mask(title) for title in columns["productDisplayName"] if title} == {""}


def reader(vocab, length=6, mask=False):
    return TitleReader({"text": {"vocab": vocab, "length": length, "mask": mask}, "attributes": FASHION_LIKE})


VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "run", "##ning", "shoe", "a"]


def test_tokens_by_hand():
    titles = ["Running SHOE", None, "", "shoe, xyz", "a a a a a a"]
    tokens, cut = reader(VOCAB)(titles)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [
        [2, 4, 5, 6, 3, 0],
        [2, 3, 0, 0, 0, 0],
        [2, 3, 0, 0, 0, 0],
        [2, 6, 1, 1, 3, 0],  # the comma is a word too, and unknown
        [2, 7, 7, 7, 7, 3],  # cut, and [SEP] stays
    ]
    assert cut == 1 / 5


def test_accents_and_case_do_not_count():
    assert reader(VOCAB)(["Shöe"])[0].tolist() == reader(VOCAB)(["SHOE"])[0].tolist()


def test_a_fitted_vocabulary_is_the_same_in_every_process():
    """The library's own is not: a run could not be resumed."""
    titles = [fashion.draw(i)[0]["productDisplayName"] or "" for i in range(200)]
    fitted = train_vocabulary(titles)
    script = (
        "import json, sys; from data import titles; print(json.dumps(titles.train_vocabulary(json.load(sys.stdin))))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script], input=json.dumps(titles), capture_output=True, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert json.loads(done.stdout) == fitted, done.stderr
    assert fitted[:4] == VOCAB[:4]
    assert {"men", "blue", "brackenby"} <= set(fitted)
    assert len(train_vocabulary(titles, 60)) <= 60 + len({c for t in titles for c in t.lower()})
    tokens, _ = reader(fitted, 13)(titles)
    assert (tokens != fitted.index("[UNK]")).all(), "what it was fitted to has no unknown word"


def test_vocabulary_of_a_file(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    assert read_vocabulary(tmp_path / "vocab.txt") == VOCAB
    (tmp_path / "vocab.txt").write_text("\r\n".join([*VOCAB, "\u2028", "\x85"]), encoding="utf-8")
    assert read_vocabulary(tmp_path / "vocab.txt") == [*VOCAB, "\u2028", "\x85"]
    for text in ("[PAD]\n[UNK]\nshoe\n", "\n".join([*VOCAB, "shoe"])):
        (tmp_path / "vocab.txt").write_text(text)
        with pytest.raises(UserError, match="is no WordPiece vocabulary"):
            read_vocabulary(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match=r"cannot read --vocab .*gone.txt"):
        read_vocabulary(tmp_path / "gone.txt")


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub of one file, as `huggingface_hub` asks for it."""

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        data = ("\n".join(VOCAB) + "\n").encode()
        self.send_response(200 if self.path in ("/", "/bert-base-uncased/resolve/main/vocab.txt") else 404)
        for name, value in {"ETag": '"abc"', "X-Repo-Commit": "0" * 40, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_berts_own_vocabulary_where_the_hub_is_reachable(tmp_path):
    """In a process of its own, as the libraries read their environment when imported."""
    script = "from data.titles import choose_vocabulary; print(choose_vocabulary(['red shoe']))"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "no_proxy": "*"}
        env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        words = [sys.executable, "-c", script]
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert done.stdout == f"{(VOCAB, HUB_VOCABULARY)}\n", done.stderr
    env["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{(VOCAB, HUB_VOCABULARY)}\n", "from the local cache"
    env["HF_HOME"] = str(tmp_path / "empty")
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert "trained on the train split's titles" in done.stdout


def test_of_the_real_titles_little_is_left(real):
    """A mask takes no word it does not know: some 75 titles still say "Tee". Most of what tells labels is gone."""
    catalogue, store = real
    maps = fit_label_maps(catalogue.columns, store.rows("train"), FASHION, 10)
    config = [entry(a.name, maps[a.name].labels, derive=a.derive, aliases=maps[a.name].aliases) for a in FASHION]
    titles = [title for title in catalogue.columns["productDisplayName"] if title]
    mask = LeakMask(config)
    left = [mask(title).casefold().split() for title in titles]
    assert 0.15 < sum(map(len, left)) / sum(len(title.split()) for title in titles) < 0.3
    words = {word for title in left for word in title}
    assert not words & {"men", "women", "boys", "girls", "kids", "tshirt", "shirts", "shoe", "watch", "navy", "black"}
    assert not words & {"woman", "lady", "kidswear", "scarf", "golden"}
    brands = sum("sweet dreams" in " ".join(title) for title in left)  # SDL by Sweet Dreams, in 126 titles
    assert brands == 2, "those without a gender word, where nothing ends the phrase"
    assert {"printed", "striped", "dial"} <= words
    tokens, cut = reader(train_vocabulary(titles[:2000]), 13)(titles)
    assert tokens.shape == (len(titles), 13)
    assert 0.0 < cut < 0.2
