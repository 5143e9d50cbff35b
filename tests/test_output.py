"""A file of answers, whole."""

import pyarrow.parquet as pq

from output import Output, labelled_in


def test_a_parquet_of_several_row_groups_has_each_answer_once_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("output.GROUP_ROWS", 5)
    names = [f"{i}.jpg" for i in range(13)]
    with Output(tmp_path / "a.parquet", []) as output:
        for start in range(0, 13, 4):
            output.write([{"image": name, "error": "not an image"} for name in names[start : start + 4]])
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert file.num_row_groups == 2
    assert file.read()["image"].to_pylist() == names


def test_results_in_a_folder_count_together_and_as_a_spreadsheet_saves_them(tmp_path):
    (tmp_path / ".a.csv.part").write_text("of a job that was killed")
    assert labelled_in(tmp_path) == set()
    for name, images in {"a.csv": ["=1.jpg", "2.jpg"], "b.parquet": ["3.jpg"], "c.jsonl": ["4.jpg"]}.items():
        with Output(tmp_path / name, []) as output:
            output.write(
                [{"image": image, "attributes": {}} for image in images] + [{"image": "5.jpg", "error": "cut"}]
            )
    assert labelled_in(tmp_path) == {"=1.jpg", "2.jpg", "3.jpg", "4.jpg"}
    table = tmp_path / "a.csv"
    table.write_text("\ufeff" + table.read_text().replace(",\n", "\n").replace(",", ";"), encoding="utf-8")
    assert labelled_in(table) == {"=1.jpg", "2.jpg"}
    table.write_text(table.read_text("utf-8-sig").replace("2.jpg", "gr\xfcn.jpg"), encoding="cp1252")
    assert labelled_in(table) == {"=1.jpg", "gr\xfcn.jpg"}
