"""A file of answers, whole."""

import pyarrow.parquet as pq

from output import Output


def test_a_parquet_of_several_row_groups_has_each_answer_once_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("output.GROUP_ROWS", 5)
    names = [f"{i}.jpg" for i in range(13)]
    with Output(tmp_path / "a.parquet", []) as output:
        for start in range(0, 13, 4):
            output.write([{"image": name, "error": "not an image"} for name in names[start : start + 4]])
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert file.num_row_groups == 2
    assert file.read()["image"].to_pylist() == names
