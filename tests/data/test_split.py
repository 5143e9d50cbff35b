"""Pictures of one article stay together."""

import numpy as np

from data.split import SPLITS, in_split, keys_of_articles

HASHES = np.random.default_rng(0).integers(1, 2**64, 4000, dtype=np.uint64)
ARTICLES = [f"A{i // 4}" for i in range(4000)]


def split_of(keys):
    return np.stack([in_split(keys, name) for name in SPLITS]).argmax(0)


def test_an_article_is_in_one_split_wherever_its_rows_are_and_whatever_other_articles_there_are():
    keys = keys_of_articles(HASHES, ARTICLES)
    assert (keys.reshape(-1, 4) == keys[::4, None]).all()
    assert len(set(keys.tolist())) == 1000
    assert np.allclose(np.bincount(split_of(keys)) / 4000, [0.8, 0.1, 0.1], atol=0.03)
    some = np.random.default_rng(1).permutation(4000)[:1500]
    assert (keys_of_articles(HASHES[some], [ARTICLES[i] for i in some]) == keys[some]).all()


def test_a_picture_of_several_articles_goes_by_its_pixels():
    hashes = HASHES[:400].copy()
    hashes[[1, 2]] = 77  # twice in one article
    hashes[[3, 4, 9]] = 78  # of articles 0, 1 and 2
    before, keys = keys_of_articles(HASHES[:400], ARTICLES[:400]), keys_of_articles(hashes, ARTICLES[:400])
    assert (keys[[3, 4, 9]] == 78).all()
    assert np.flatnonzero(keys != before).tolist() == [3, 4, 9]


def test_rows_without_an_article_go_by_their_pixels():
    hashes = np.array([5, 6, 5, 7], dtype=np.uint64)
    assert (keys_of_articles(hashes, [None] * 4) == hashes).all()
    keys = keys_of_articles(hashes, [None, "A", None, "A"])
    assert keys[0] == keys[2] == 5 and keys[1] == keys[3] not in (6, 7)
    assert (keys_of_articles(hashes, [None, "A", "A", "A"])[[0, 2]] == 5).all()
    assert keys_of_articles(hashes[:0], []).shape == (0,)
