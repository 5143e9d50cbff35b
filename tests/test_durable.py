"""Files are on the disk before they have their name."""

import os

from durable import give_name, replace_file


def test_what_is_renamed_is_on_the_disk_and_then_its_name_too(monkeypatch, tmp_path):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(("synced", os.fstat(handle).st_ino)) or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("named", os.stat(a).st_ino)) or replace(a, b))
    (tmp_path / "b.part").write_bytes(b"y")
    for finish in (
        lambda: replace_file(tmp_path / "a", b"x"),
        lambda: give_name(tmp_path / "b.part", tmp_path / "b"),
    ):
        done.clear()
        finish()
        file = done[0][1]
        assert done == [("synced", file), ("named", file), ("synced", tmp_path.stat().st_ino)]
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"x", b"y"]


def test_a_link_by_the_name_of_an_unfinished_file_is_not_written_through(tmp_path):
    """As it may lie in a folder from a stranger."""
    (tmp_path / "mine").write_bytes(b"kept")
    (tmp_path / "config.json.part").symlink_to(tmp_path / "mine")
    replace_file(tmp_path / "config.json", b"new")
    assert (tmp_path / "mine").read_bytes() == b"kept"
    assert not (tmp_path / "config.json").is_symlink()
    assert (tmp_path / "config.json").read_bytes() == b"new"
