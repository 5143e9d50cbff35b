"""Pictures of one article stay together."""

import numpy as np

from data.split import SHARED, SPLITS, in_split, keys_of_articles

HASHES = np.random.default_rng(0).integers(1, 2**64, 4000, dtype=np.uint64)
ARTICLES = [f"A{i // 4}" for i in range(4000)]


def split_of(keys):
    return np.stack([in_split(keys, name) for name in SPLITS]).argmax(0)


def test_an_article_is_in_one_split_wherever_its_rows_are_and_whatever_else_there_is():
    keys = keys_of_articles(HASHES, ARTICLES)
    assert (keys.reshape(-1, 4) == keys[::4, None]).all()
    assert len(set(keys.tolist())) == 1000
    assert np.allclose(np.bincount(split_of(keys)) / 4000, [0.8, 0.1, 0.1], atol=0.03)
    some = np.random.default_rng(1).permutation(4000)[:1500]
    assert (keys_of_articles(HASHES[some], [ARTICLES[i] for i in some]) == keys[some]).all()


def test_identical_pictures_tie_their_articles_together_unless_they_show_none_of_them():
    hashes = HASHES[:400].copy()
    hashes[3] = hashes[4]  # of articles 0 and 1
    hashes[7] = hashes[8]  # of 1 and 2
    hashes[100 : 100 + 4 * (SHARED + 1) : 4] = 77  # "no photo yet", of many
    hashes[200 : 200 + 4 * SHARED : 4] = 78  # of as many as may share one
    keys = keys_of_articles(hashes, ARTICLES[:400]).reshape(-1, 4)
    assert (keys == keys[:, :1]).all()
    assert len(set(keys[:3].flat)) == 1 and keys[3, 0] != keys[2, 0]
    assert len(set(keys[25 : 25 + SHARED + 1].flat)) == SHARED + 1
    assert len(set(keys[50 : 50 + SHARED].flat)) == 1


def test_rows_without_an_article_go_by_their_pixels():
    hashes = np.array([5, 6, 5, 7], dtype=np.uint64)
    assert (keys_of_articles(hashes, [None] * 4) == hashes).all()
    keys = keys_of_articles(hashes, [None, "A", None, "A"])
    assert keys[0] == keys[2] == 5 and keys[1] == keys[3]
    assert keys_of_articles(hashes[:0], []).shape == (0,)
