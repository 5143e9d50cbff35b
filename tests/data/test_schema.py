"""Schema files: what they declare, and every mistake in them told in one line."""

import re

import numpy as np
import pytest

from data.attributes import Scale, encode_numbers, far_off, fit_scales, read_numbers
from data.cells import to_numbers
from data.schema import FASHION, FASHION_FILE, Attribute, read_schema
from errors import UserError


def write(tmp_path, text):
    (tmp_path / "own.toml").write_text(text)
    return tmp_path / "own.toml"


def test_what_is_not_said_follows_from_the_rest(tmp_path):
    schema = read_schema(write(tmp_path, """
        title = "name"
        [attributes.width]
        column = "width_cm"
        kind = "number"
        weight = 0.5
        [attributes.piece]
        parents = ["room", "maker"]
        [attributes.maker]
        level = 3
        [attributes.room]
    """))  # fmt: skip
    assert schema.title == "name"
    assert schema.attributes == (
        Attribute("piece", 4, "piece", parents=("room", "maker")),
        Attribute("maker", 3, "maker"),
        Attribute("room", 1, "room"),
        Attribute("width", 1, "width_cm", kind="number", weight=0.5),
    ), "classes first, and a level below the deepest parent"


def test_the_built_in_schema_has_optional_attributes():
    assert read_schema(FASHION_FILE).attributes == FASHION
    more = read_schema(FASHION_FILE, ["price_in_vnd", "season"]).attributes
    assert [a.name for a in more if a not in FASHION] == ["season", "price_in_vnd"]
    assert {a.level for a in more if a not in FASHION} == {4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[attributes.a", "cannot read .*own.toml as TOML"),
        ("", r'declares no \[attributes.NAME\] of kind "class"'),
        ("[attributes.a]\nkind = 'number'", r'declares no \[attributes.NAME\] of kind "class"'),
        ("attributes = 3", r"write \[attributes.NAME\] for each"),
        ("[attributes.a]\nlevel = 100", "a: level = 100 is not a whole number from 1 to 99"),
        ("[attributes.a]\nparents = [['a']]", "has the parent \\['a'\\], which is no attribute"),
        ("title = ''\n[attributes.a]", 'and title or article = "COLUMN"'),
        ("article = 3", 'and title or article = "COLUMN"'),
        ("[attribute.a]", "'attribute' means nothing here"),
        ("attributes.a = 3", "a is no table"),
        ("[attributes]\na_decision = {}\na = 3", "a is no table"),
        ("[attributes.image]", "image is a column of what infer.py writes; give the attribute another name"),
        ("[attributes.a]\n[attributes.a_decision]", "infer.py writes a_decision of a; give the attribute another name"),
        ("[attributes.a]\n[attributes.a_confidence]", "infer.py writes a_confidence of a"),
        ("[attributes.a]\ncolum = 'x'", "a has an unknown key 'colum'; nearest: column; there are level, column"),
        ("[attributes.a]\nlevel = 0", "a: level = 0 is not a whole number from 1 to 99"),
        ("[attributes.a]\nlevel = true", "a: level = True is not a whole number from 1 to 99"),
        ("[attributes.a]\nweight = -1.0", r"a: weight = -1.0 is not a number above 0"),
        ("[attributes.a]\nweight = nan", r"a: weight = nan is not a number above 0"),
        (f"[attributes.a]\nweight = {10**400}", r"a: weight = 10+ is not a number above 0"),
        (f"x = {'[' * 3000}", "cannot read .* as TOML"),
        ("[attributes.a]\ncolumn = ''", "a: column = '' is not a text"),
        ("[attributes.a]\nkind = 'colour'", "a: kind = 'colour' is neither class nor number"),
        ("[attributes.a]\nderive = 'price'", r"derive = 'price' does not give a class; there are brand \(a class\), "),
        ("[attributes.a]\nderive = 'maker'", "derive = 'maker' does not give a class"),
        (
            "[attributes.room]\n[attributes.a]\nparents = ['rom']",
            "the parent 'rom', which is no attribute; nearest: room",
        ),
        ("[attributes.b]\nkind = 'number'\n[attributes.a]\nparents = ['b']", "numbers neither have nor are parents"),
        ("[attributes.a]\nparents = ['a']", "the parents go round in a circle: a > a"),
        (
            "[attributes.a]\nparents = ['b']\n[attributes.b]\nparents = ['c']\n[attributes.c]\nparents = ['a']",
            "the parents go round in a circle: . > . > . > .",
        ),
        ("[attributes.a]\nlevel = 2\n[attributes.b]\nlevel = 2\nparents = ['a']", "b is on level 2, and a parent .* 2"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_schema(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_names_that_infer_writes_of_no_attribute_are_free(tmp_path):
    tables = ["[attributes.a]", "kind = 'number'", "[attributes.a_confidence]", "[attributes.a_confidence_decision_x]"]
    assert len(read_schema(write(tmp_path, "\n".join(tables))).attributes) == 3


def test_an_optional_attribute_replaces_none_of_ones_own(tmp_path):
    with pytest.raises(UserError, match=r"has year twice, in \[attributes\] and in \[optional\]"):
        read_schema(write(tmp_path, "[attributes.year]\n[optional.year]\nkind = 'number'"), ["year"])


def test_a_file_that_is_not_there_and_an_optional_attribute_that_is_not(tmp_path):
    with pytest.raises(UserError, match=r"cannot read --attributes gone\.toml: No such file"):
        read_schema(tmp_path.__class__("gone.toml"))
    with pytest.raises(UserError, match=r"has no \[optional.price_in_vnd\]; nearest: price_vnd"):
        read_schema(write(tmp_path, "[attributes.a]\n[optional.price_vnd]"), ["price_in_vnd"])


WIDTH = [Attribute("width", 1, "cm", kind="number")]


def test_numbers_are_scaled_by_train_rows_alone():
    columns = {"id": list("abcde"), "cm": ["1", "3.0", None, "8", "1e3"]}
    scales = fit_scales(read_numbers(columns, WIDTH), [0, 1, 2, 3], WIDTH)
    assert scales == {"width": Scale(4.0, pytest.approx(np.std([1, 3, 8])), 3.0)}
    scaled = encode_numbers(read_numbers(columns, WIDTH), scales, len(columns["id"]))
    assert (scaled.dtype, scaled.shape) == (np.float32, (5, 1))
    assert np.isnan(scaled[2, 0])
    assert scaled[[0, 1, 3, 4], 0] == pytest.approx((np.array([1, 3, 8, 1000]) - 4) / np.std([1, 3, 8]))


def test_a_barcode_among_widths_spoils_no_width():
    widths = [str(40 + i % 160) for i in range(500)]
    columns = {"id": list(map(str, range(500))), "cm": [*widths[:499], "4006381333931"]}
    rows = range(500)
    (usual,), (scale,) = (
        fit_scales(read_numbers(given, WIDTH), rows, WIDTH).values() for given in (columns | {"cm": widths}, columns)
    )
    assert (scale.mean, scale.std) == (pytest.approx(usual.mean, rel=0.01), pytest.approx(usual.std, rel=0.01))
    assert usual.std == pytest.approx(np.std(np.array(widths, float)))
    numbers = read_numbers(columns, WIDTH)
    assert far_off(numbers["width"], scale).tolist() == [499]
    scaled = encode_numbers(numbers, {"width": scale}, 500)[:, 0]
    assert np.isfinite(scaled).all() and scaled[:499].max() < 3
    assert scale.mean + scale.std * scaled[:499].astype(float) == pytest.approx(np.array(widths[:499], float))


@pytest.mark.parametrize("rare", [1, 4, 8, 50])
def test_a_number_that_is_mostly_the_same_keeps_its_variety(rare):
    values = ["0"] * (500 - rare) + [str(10 + i % 40) for i in range(rare)]
    columns = {"id": list(map(str, range(500))), "cm": values}
    scale = fit_scales(read_numbers(columns, WIDTH), range(500), WIDTH)["width"]
    assert scale.std == pytest.approx(np.std(np.array(values, float)))
    assert far_off(np.array(values, float), scale).size == 0


def test_one_value_too_large_for_arithmetic_is_far_off_in_silence(recwarn):
    columns = {"id": list(map(str, range(50))), "cm": [*(f"0.{i}" for i in range(10, 59)), "1e308"]}
    numbers = read_numbers(columns, WIDTH)
    (scale,) = fit_scales(numbers, range(50), WIDTH).values()
    assert scale.std < 1 and far_off(numbers["width"], scale).tolist() == [49]
    assert encode_numbers(numbers, {"width": scale}, 50)[49, 0] == 1e6
    assert not recwarn.list


@pytest.mark.parametrize("text", ["wide", "1,200", "nan cm", "inf", "-inf", "NaN", "12_5"])
def test_a_number_that_is_none_is_named(text):
    columns = {"id": ["a", "b", "c"], "cm": ["1", "2", text]}
    with pytest.raises(UserError, match=rf"column cm has a cell that is no number: '{text}' \(id c\); write"):
        fit_scales(read_numbers(columns, WIDTH), [0, 1], WIDTH)


def test_of_many_numbers_that_are_none_the_first_are_named():
    for count, more in (8, ""), (9, " and 1 more"):
        columns = {"id": list("abcdefghi")[:count], "cm": ["1", "x", None, "3", "y", "z", "u", "v", "w"][:count]}
        named = "'x' (id b), 'y' (id e), 'z' (id f), 'u' (id g), 'v' (id h)"
        message = f"column cm has {count - 3} cells that are no numbers: {named}{more}; write 1250.00 without"
        with pytest.raises(UserError, match=re.escape(message)):
            read_numbers(columns, WIDTH)


def test_a_number_too_large_for_a_mean_is_an_error():
    with pytest.raises(UserError, match=r"width is up to 1e\+308 \(column cm\), too large for a mean"):
        fit_scales(read_numbers({"id": ["a", "b"], "cm": ["1e308", "-1e308"]}, WIDTH), [0, 1], WIDTH)


def test_a_number_without_variety_is_an_error():
    with pytest.raises(UserError, match=r"width is 2.0 in every train row \(column cm\)"):
        fit_scales(read_numbers({"id": list("abc"), "cm": ["2", "2.0", "3"]}, WIDTH), [0, 1], WIDTH)
    with pytest.raises(UserError, match="no train row has a value of width"):
        fit_scales(read_numbers({"id": list("abc"), "cm": [None, None, "3"]}, WIDTH), [0, 1], WIDTH)


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (["1.000,00", "12,5", None, "7", "-1.250", "1.250.000"], [1000, 12.5, None, 7, -1250, 1250000]),
        (["1,250", "12,5"], [1.25, 12.5]),
        (["1,250", "2,400"], None),  # thousands as well
        (["12,5", "12.5"], None),
        (["12,5", "1,5 cm"], None),
        (["1,250.00"], None),
    ],
)
def test_decimal_commas_are_read_where_they_can_be_nothing_else(capsys, cells, numbers):
    if numbers is None:
        with pytest.raises(UserError, match=r"no number.*; write 1250\.00 without a currency"):
            to_numbers(cells, "price", range(len(cells)))
        return
    wanted = np.array(numbers, dtype=float)
    assert np.array_equal(to_numbers(cells, "price", range(len(cells))), wanted, equal_nan=True)
    assert capsys.readouterr().err == "column price: commas are read as decimal points\n"


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (["1.250", "999", None, "-2.500"], True),
        (["1.250", "12.5"], False),
        (["1.250", "0.125"], False),
        (["1.250", "1250"], False),
        (["999", "2012"], False),
    ],
)
def test_points_that_may_be_of_thousands_are_told(capsys, cells, told):
    found = to_numbers(cells, "price", range(len(cells)))
    assert found[0] == float(cells[0]), "read as decimals all the same"
    said = "column price: 1.250 is read as 1.25; if points mark thousands, take them out\n"
    assert capsys.readouterr().err == said * told
