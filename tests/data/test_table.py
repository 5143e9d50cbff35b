"""Tables as spreadsheets and shops write them, good or damaged."""

import os
import threading
import unicodedata

import pytest

from data.catalogue import Skipped
from data.csv_folder import Names
from data.sources import load_source
from data.table import LINES, read_rows
from data.title_table import TitleTable
from errors import UserError
from tests.data.conftest import picture


def rows(path, text: str | bytes) -> list:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [cells if isinstance(cells, str) else tuple(cells.values()) for _, cells in read_rows(path)]


def write(path, text: str):
    path.write_text(text)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_cell_in_quotes_holds_line_breaks(tmp_path, end):
    text = end.join(
        ["id,about,room", '1,"First', "", 'a ""wide"" bed",Bedroom', "2,Short,Office", '3,"Last', 'one",Hall']
    )
    assert rows(tmp_path / "shop.csv", text) == [
        ("1", 'First\n\na "wide" bed', "Bedroom"), ("2", "Short", "Office"), ("3", "Last\none", "Hall")
    ]  # fmt: skip
    assert [number for number, _ in read_rows(tmp_path / "shop.csv")] == [2, 5, 6]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_cells_are_separated_as_those_of_the_first_line(tmp_path, mark):
    lines = [["id", " about ", "room"], ["1", '"A, B; C\tD"', "Hall"], ["", "", ""], ["2", " ", "Office"], ["3"]]
    text = "\r\n".join(mark.join(cells) for cells in lines) + "\r\n"
    assert rows(tmp_path / "shop.csv", text) == [
        ("1", "A, B; C\tD", "Hall"), ("2", None, "Office"), ("3", None, None)
    ]  # fmt: skip
    assert next(read_rows(tmp_path / "shop.csv", ["about"]))[1]["about"] == "A, B; C\tD"


@pytest.mark.parametrize("mark", [";", "|", "\t"])
def test_a_line_before_the_header_may_say_what_separates_cells(tmp_path, mark):
    text = f"\ufeffsep={mark}\r\n" + "".join(f"{id_}{mark}{about}\r\n" for id_, about in [("id", "a,b,c"), ("1", "x")])
    assert rows(tmp_path / "shop.csv", text) == [("1", "x")]
    assert [number for number, _ in read_rows(tmp_path / "shop.csv", ["a,b,c"])] == [3]


def test_the_id_may_be_written_in_capitals(tmp_path):
    assert next(read_rows(write(tmp_path / "a.csv", "ID,Room\n1,Hall\n")))[1] == {"id": "1", "Room": "Hall"}
    assert next(read_rows(write(tmp_path / "b.csv", "ID,id\n1,2\n")))[1] == {"ID": "1", "id": "2"}
    with pytest.raises(UserError, match="the column id twice"):
        next(read_rows(write(tmp_path / "c.csv", "ID,Id\n1,2\n")))


def test_missing_cells_by_all_their_names(tmp_path):
    cells = ["", "NA", "n/a", "#N/A", "None", "null", "NaN", "<NA>", "nap"]
    found = rows(tmp_path / "shop.csv", "id,room\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells)))
    assert [room for _, room in found] == [None] * 8 + ["nap"]


def test_a_table_that_excel_saved_on_windows(tmp_path, capsys):
    text = "id;about\n1;Caf\u00e9 chair, 5 \u20ac\n2;Plain\n3;\u00dcber\n"
    assert rows(tmp_path / "shop.csv", text.encode("cp1252")) == [
        ("1", "Caf\u00e9 chair, 5 \u20ac"), ("2", "Plain"), ("3", "\u00dcber")
    ]  # fmt: skip
    assert capsys.readouterr().err == f"{tmp_path / 'shop.csv'} is not in UTF-8: read as Windows-1252\n"
    assert rows(tmp_path / "shop.csv", text) == rows(tmp_path / "shop.csv", "\ufeff" + text)


@pytest.mark.parametrize("text", ["id\tabout\troom\n5\tBed\t Hall\t\n", "id, about, room\n5, Bed, Hall,\n"])
def test_a_space_is_no_sign_of_a_comma_where_all_cells_have_one_or_cells_end_otherwise(tmp_path, text):
    assert rows(tmp_path / "shop.csv", text) == [("5", "Bed", "Hall")]


def test_a_semicolon_of_a_text_s_own_moves_no_cell(tmp_path):
    assert rows(tmp_path / "shop.csv", "id;about;room\n5;Bed; with drawers;\n") == ["4 cells under 3 columns"]


def test_letters_of_windows_that_are_one_of_utf_8_by_chance(tmp_path):
    text = "id;about\n1;Caf\u00e9\n2;CHLO\u00c9\u00ae\n3;gr\u00fcn\n"
    assert rows(tmp_path / "shop.csv", text.encode("cp1252")) == [
        ("1", "Caf\u00e9"), ("2", "CHLO\u00c9\u00ae"), ("3", "gr\u00fcn")
    ]  # fmt: skip
    pasted = text.replace("Caf\u00e9", "It\u00e2\u20ac\u2122s") + "4;caf\u00e9\n" * 11
    assert ("4", "caf\u00e9") in rows(tmp_path / "shop.csv", pasted.encode("cp1252"))
    damaged = text.encode() + b"4;caf\xe9\n" * 5
    assert rows(tmp_path / "shop.csv", damaged)[1:] == [
        ("2", "CHLO\u00c9\u00ae"), ("3", "gr\u00fcn"), *["not UTF-8, or no CSV"] * 5
    ]  # fmt: skip


@pytest.mark.parametrize("line", [b"1;Caf\xc3\xa9 \xdc", b"1;\x81\xe9", b"1;\xe9\0"])
def test_where_some_of_it_is_utf_8_or_no_letter_the_rest_is_damage(tmp_path, line):
    assert rows(tmp_path / "shop.csv", b"id;about\n" + line) == ["not UTF-8, or no CSV"]


def test_a_table_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("id,about\n1,Bed\n",))
    writer.start()
    assert [cells for _, cells in read_rows(tmp_path / "pipe")] == [{"id": "1", "about": "Bed"}]
    writer.join()


@pytest.mark.parametrize("column", ["first", "last"])
def test_a_quote_left_open_takes_no_other_row_with_it(tmp_path, column):
    bad = '"1,Bed,Bedroom' if column == "first" else '1,Bed,"Bedroom'
    text = "\n".join(["id,about,room", bad, *(f'{i},"A, B",Office' for i in range(2, 6))])
    assert rows(tmp_path / "shop.csv", text) == [
        "a quote that is left open",
        *((str(i), "A, B", "Office") for i in range(2, 6)),
    ]


def test_a_quote_left_open_in_the_last_column_does_not_take_the_rest_of_the_table(tmp_path):
    text = "\n".join(["id,room", '1,"Bedroom', *(f"{i},Office" for i in range(2, 3 * LINES))])
    found = rows(tmp_path / "shop.csv", text)
    assert found == ["a quote that is left open", *((str(i), "Office") for i in range(2, 3 * LINES))]


def test_where_titles_have_commas_of_their_own_no_cell_goes_on_in_the_next_line(tmp_path):
    text = "\n".join(
        ["id,about,room,productDisplayName", '1,"First', 'second",Bedroom,A Bed', '2,"Short",Hall,"A Lamp, Red']
    )
    found = rows(tmp_path / "shop.csv", text)
    assert found == [
        "a quote that is left open",
        ('second"', "Bedroom", "A Bed", None),
        ("2", "Short", "Hall", "A Lamp, Red"),
    ]


@pytest.mark.parametrize("column", ["room", "productDisplayName"])
def test_a_row_that_ends_early_lacks_the_rest_as_spreadsheets_write_it(tmp_path, column):
    text = "\n".join([f"id,kind,{column},about", "", "1", "2,Bed", "3,Bed,Hall", "4,Bed,Hall,x,"])
    assert rows(tmp_path / "shop.csv", text) == [
        ("1", None, None, None), ("2", "Bed", None, None), ("3", "Bed", "Hall", None), ("4", "Bed", "Hall", "x")
    ]  # fmt: skip


def test_a_comma_more_than_there_are_columns_is_the_titles_or_of_no_cell(tmp_path):
    lines = "1,Bed,Hall,", '2,"Bed, wide",Hall,', ",,,", "3,Bed, large,Hall", "4,Bed, large, red,"
    first = [("1", "Bed", "Hall"), ("2", "Bed, wide", "Hall")]
    assert rows(tmp_path / "shop.csv", "\n".join(["id,about,room", *lines])) == [
        *first, "4 cells under 3 columns", "5 cells under 3 columns"
    ]  # fmt: skip
    assert rows(tmp_path / "shop.csv", "id,about,room,colour\n5,Bed, large,Hall,\n6,Bed,Hall,Red,,\n") == [
        "5 cells under 4 columns", ("6", "Bed", "Hall", "Red")
    ]  # fmt: skip
    title = ["id,productDisplayName,room", *lines]
    expected = [("3", "Bed, large", "Hall"), ("4", "Bed, large, red", None)]
    assert rows(tmp_path / "shop.csv", "\n".join(title)) == first + expected
    spare = [f"{line}," for line in title]  # a spreadsheet's empty column, below an empty header
    assert rows(tmp_path / "shop.csv", "\n".join(spare)) == first + expected
    last = ["id,room,productDisplayName", "1,Hall,Bed,", "2,Hall,Bed, large", "3,Hall,Bed, large,"]
    assert rows(tmp_path / "shop.csv", "\n".join(last)) == [
        ("1", "Hall", "Bed"), ("2", "Hall", "Bed, large"), ("3", "Hall", "Bed, large")
    ]  # fmt: skip


def test_lines_of_a_cell_whose_row_ends_early_are_no_rows(tmp_path):
    text = "\n".join(["id,about,room", '7,"Sizes:', "12", "13,cm", '"', '12,"A, B",Office', "14,Bed", ""])
    assert rows(tmp_path / "shop.csv", text) == [
        "a quote that is left open",
        "1 cells under 3 columns, perhaps of a row before it that lacks some",
        "2 cells under 3 columns, perhaps of a row before it that lacks some",
        "a quote that is left open",
        ("12", "A, B", "Office"),
        ("14", "Bed", None),
    ]


def test_a_file_that_breaks_off_makes_no_class_of_half_a_cell(tmp_path):
    found = rows(tmp_path / "shop.csv", "id,kind,room\n1,Bed,Hall\n2,Wardr")
    assert found == [("1", "Bed", "Hall"), "2 cells under 3 columns, where the file breaks off"]


def test_a_mark_of_inches_is_no_quote(tmp_path):
    assert rows(tmp_path / "shop.csv", 'id,about\n1,A 15" screen\n2,x\n') == [("1", 'A 15" screen'), ("2", "x")]


def test_empty_columns_of_a_spreadsheet_are_none(tmp_path):
    assert rows(tmp_path / "shop.csv", "id,room,,\n1,Bedroom,,\n2,Office\n") == [("1", "Bedroom"), ("2", "Office")]
    with pytest.raises(UserError, match="has the column without a name twice"):
        rows(tmp_path / "shop.csv", "id,,room,,x\n")


def test_a_file_whose_lines_end_in_carriage_returns_alone_says_what_to_do(tmp_path):
    for text in ("id,room\r1,Bedroom\r", 'id,"ro\nom"\n1,Bedroom\n'):
        with pytest.raises(UserError, match="is not UTF-8 text with a row in each line"):
            rows(tmp_path / "shop.csv", text)


def test_a_picture_is_found_in_its_own_folder_and_no_other(tmp_path):
    for name in ("500/front.png", "501/front.png", "front.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(len(name) + int(name[2] == "1")))
    lines = [
        "1,500/front.png",
        "2,/my/images/shop/images/501/front.png",
        "3,front.png",
        r"4,C:\shop\images\500\front.png",
        "5,502/front.png",
        "6,https://cdn.shop.com/images/501/front%2Epng?v=3",
        "7,https://cdn.shop.com/a/front.png#x",
        "8,http://[a/b.png",
    ]
    (tmp_path / "items.csv").write_text("\n".join(["id,image", *lines]))
    catalogue = load_source(str(tmp_path), tmp_path / "cache")
    wanted = ["500/front.png", "501/front.png", "front.png", "500/front.png", "501/front.png", "front.png"]
    assert [catalogue.read(row) for row in range(6)] == [(tmp_path / "images" / name).read_bytes() for name in wanted]
    assert catalogue.skipped == [Skipped(id, "what its column image names is not in images/") for id in "58"]
    literal = Names(["a.png", "a%20b.png", "a b.png", "a.png?v=3"])
    asked = "https://x/a%20b.png", "https://x/images/a.png?v=3", "https://x/a.png?v=4"
    assert [literal.find(name) for name in asked] == ["a%20b.png", "a.png?v=3", "a.png"]


def test_id_and_image_may_be_in_capitals(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("3.png", "17.png"):
        (tmp_path / "images" / name).write_bytes(picture(int(name[:-4])))
    (tmp_path / "items.csv").write_text("ID;IMAGE\n3;17.png\n")
    catalogue = load_source(str(tmp_path), tmp_path / "cache")
    assert (list(catalogue.ids), catalogue.read(0)) == (["3"], picture(17))


def test_an_accent_of_its_own_names_the_same_picture(tmp_path):
    """As in the names of files that come from macOS."""
    name = "caf\xe9"
    apart = unicodedata.normalize("NFD", name)
    (tmp_path / "images").mkdir()
    for i, path in enumerate([f"{apart} 1.png", f"{name} 2.png", f"{apart} 3.png"]):
        (tmp_path / "images" / path).write_bytes(picture(i))
    (tmp_path / "items.csv").write_text(f"id,image,name\n1,{name} 1.png,A\n2,{apart} 2.png,B\n{name} 3,,C\n", "utf-8")
    catalogue = load_source(str(tmp_path), tmp_path / "cache")
    assert [catalogue.read(row) for row in range(len(catalogue))] == [picture(i) for i in range(3)]
    titles = TitleTable(tmp_path / "items.csv", "name")
    assert [titles(f"photos/{path}") for path in (f"{apart} 1.png", f"{name} 2.png", f"{apart} 3.png")] == list("ABC")
