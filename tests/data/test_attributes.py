import dataclasses
import json

import numpy as np
import pytest

from data.attributes import (
    MISSING,
    UNSEEN,
    LabelMap,
    class_counts,
    encode_labels,
    families,
    fit_label_maps,
    known_paths,
    nearly_alike,
    never_answered,
)
from data.schema import FASHION, Attribute
from errors import UserError


def catalogue(**changed):
    columns = {attribute.column: ["a", "b", "c", None] for attribute in FASHION}
    columns["productDisplayName"] = ["Nike Men Shoe", "Puma Women Shoe", "Zzz Men Shoe", None]
    return columns | changed


def test_labels_that_differ_in_case_and_spaces_alone():
    assert nearly_alike(["Jeans", "T-Shirts", "T Shirts", "Tshirts", "jeans ", "jean"]) == [
        ["Jeans", "jeans "],
        ["T-Shirts", "T Shirts", "Tshirts"],
    ]
    assert nearly_alike(["Men", "Women"]) == []
    assert nearly_alike(["Caf\u00e9", "Cafe\u0301"]) == [["Caf\u00e9", "Cafe\u0301"]]


def test_the_declaration():
    assert {a.name: a.level for a in FASHION} == {
        "gender": 1, "masterCategory": 1, "usage": 1, "subCategory": 2, "articleType": 3, "baseColour": 4, "brand": 4
    }  # fmt: skip


def test_labels_are_sorted_and_from_train_rows_alone():
    columns = catalogue(gender=["Women", "Men", "Boys", "Men"])
    maps = fit_label_maps(columns, [0, 1, 3], FASHION, 1)
    assert maps["gender"].labels == ["Men", "Women"]
    assert encode_labels(columns, maps, FASHION)[:, 0].tolist() == [1, 0, UNSEEN, 0]
    columns["gender"][2] = "Unisex"  # what other rows say changes nothing
    assert fit_label_maps(columns, [0, 1, 3], FASHION, 1) == maps


def test_brand_maps_are_from_train_rows_alone():
    titles = ["Nike Men Shoe"] * 10 + ["Zzz Men Shoe"] + ["Puma Men Shoe"] * 10
    maps = fit_label_maps({"t": titles}, range(11), [Attribute("brand", 4, "t", "brand")], 10)
    assert maps["brand"] == LabelMap(["Nike", "Other"], {"nike": "Nike"})


def test_missing_and_unseen_values_are_no_class():
    columns = catalogue()
    labels = encode_labels(columns, fit_label_maps(columns, [0, 1], FASHION, 1), FASHION)
    assert labels.dtype == np.int16
    assert labels.shape == (4, len(FASHION))
    assert (labels[2] == UNSEEN).all()  # brand too: no train row was "Other"
    assert (labels[3] == MISSING).all()


def test_rare_and_unknown_brands_are_other():
    columns = catalogue(productDisplayName=["Nike Men Shoe", "Nike Women Shoe", "Zzz Men Shoe", None])
    brand = fit_label_maps(columns, [0, 1, 2], FASHION, 2)["brand"]
    assert brand.labels == ["Nike", "Other"]
    titles = ("NIKE Men Cap", "Zzz Men Cap", "Unheard Men Cap", None)
    assert [brand.encode(title) for title in titles] == [0, 1, 1, MISSING]


def test_one_value_in_every_train_row_is_an_error():
    with pytest.raises(UserError, match=r"usage is 'Casual' in every train row .*: nothing to learn; leave it out$"):
        fit_label_maps(catalogue(usage=["Casual", "Casual", "Sports", None]), [0, 1], FASHION, 10)
    with pytest.raises(UserError, match=r"brand is 'Other' in every train row .* or lower --min-brand-count"):
        fit_label_maps(catalogue(), [0, 1, 2], FASHION, 10)


def test_a_class_named_other_is_only_itself():
    columns = catalogue(usage=["Other", "Casual", "Sports", None])
    usage = fit_label_maps(columns, [0, 1], FASHION, 1)["usage"]
    assert usage.labels == ["Casual", "Other"]
    assert usage.encode("Sports") == UNSEEN


def test_maps_survive_json():
    maps = fit_label_maps(catalogue(), [0, 1], FASHION, 1)
    read = json.loads(json.dumps({name: dataclasses.asdict(m) for name, m in maps.items()}))
    assert {name: LabelMap(**fields) for name, fields in read.items()} == maps


@pytest.mark.parametrize("at_once", [2, 100])
def test_known_paths_are_those_labelled_in_full(monkeypatch, at_once):
    monkeypatch.setattr("data.attributes.AT_ONCE", at_once)
    attributes = [
        Attribute("piece", 3, "piece", parents=("kind",)),
        Attribute("x", 1, "x"),
        Attribute("room", 1, "room"),
        Attribute("kind", 2, "kind", parents=("room",)),
    ]
    labels = np.array([[5, 0, 1, 2], [4, 9, 1, 2], [5, 1, 1, 2], [MISSING, 0, 1, 2], [3, 0, 1, UNSEEN]])
    found = known_paths(labels, np.arange(5), attributes)
    assert found == [{"attributes": ["room", "kind", "piece"], "known": [[1, 2, 4], [1, 2, 5]]}]
    found = known_paths(labels, np.array([0, 2, 3, 4]), attributes)
    assert found == [{"attributes": ["room", "kind", "piece"], "known": [[1, 2, 5]]}], "of these rows alone"


def test_what_is_never_labelled_in_full_can_be_answered_all_the_same(monkeypatch):
    """Of shoes (class 1) none has a sleeve."""
    attributes = [Attribute("kind", 1, "kind"), Attribute("sleeve", 2, "sleeve", parents=("kind",))]
    labels = np.array([[0, 0], [0, 2], [1, MISSING], [0, MISSING], [MISSING, 1], [MISSING, MISSING], [2, UNSEEN]])
    entries = [
        {"name": name, "kind": "class", "labels": labels}
        for name, labels in {"kind": ["Shirt", "Shoe"], "sleeve": ["Long", "None", "Short"]}.items()
    ]
    (path,) = paths = known_paths(labels, np.arange(7), attributes)
    assert path["known"] == [[0, 0], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert never_answered(paths, entries) == {}
    monkeypatch.setattr("data.attributes.PATHS", 4)
    (path,) = paths = known_paths(labels, np.arange(7), attributes)
    assert path["known"] == [[0, 0], [0, 2]], "too many ways"
    assert never_answered(paths, entries) == {"kind": ["Shoe"], "sleeve": ["None"]}
    assert known_paths(labels, np.array([2, 3, 4]), attributes) == [], "each by itself where no row has all"


def test_each_hierarchy_has_paths_of_its_own():
    two = [Attribute(name, level, name, parents=parents) for name, level, parents in (
        ("room", 1, ()), ("piece", 2, ("room",)), ("material", 1, ()), ("finish", 2, ("material",)), ("colour", 1, ()),
    )]  # fmt: skip
    assert families(two) == [["room", "piece"], ["material", "finish"]]
    joined = [*two, Attribute("model", 3, "model", parents=("piece", "finish"))]
    (family,) = families(joined)
    assert set(family) == {"room", "piece", "material", "finish", "model"}
    assert family[-1] == "model"
    assert families(two[:1]) == []


def test_class_counts_leave_out_what_is_no_class():
    maps = {"a": LabelMap(["x", "y", "z"]), "b": LabelMap(["x"])}
    labels = np.array([[0, 0], [2, MISSING], [1, 0], [2, UNSEEN], [MISSING, 0]])
    assert class_counts(labels, np.array([0, 1, 3, 4]), maps) == {"a": [1, 0, 2], "b": [2]}


def test_an_attribute_without_a_value_is_named():
    with pytest.raises(UserError, match="no train row has a value of usage"):
        fit_label_maps(catalogue(usage=[None, None, "Casual", None]), [0, 1], FASHION, 10)


def test_the_real_catalogue(real):
    columns = real[0].columns
    maps = fit_label_maps(columns, range(len(real[0])), FASHION, 10)
    sizes = {name: len(m) for name, m in maps.items()}
    assert sizes["gender"] == 5
    assert sizes["usage"] == 8
    assert sizes["subCategory"] <= 45
    assert 140 <= sizes["articleType"] <= 142
    assert sizes["baseColour"] == 46
    assert 250 < sizes["brand"] < 320
    labels = encode_labels(columns, maps, FASHION)
    missing = {a.name: int((labels[:, i] == MISSING).sum()) for i, a in enumerate(FASHION)}
    assert missing == dict.fromkeys(missing, 0) | {"usage": 288, "baseColour": 15, "brand": 7}
    assert (labels != UNSEEN).all()
    other = maps["brand"].labels.index("Other")
    assert (labels[:, -1] == other).mean() < 0.02
