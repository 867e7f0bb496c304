"""Small files appear when they are complete, and an error leaves nothing behind."""

import pytest

from charlm.system import files


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_text(tmp_path / "folder", "text")
    files.write_text(tmp_path / "file", "old")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush_to_disk", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(tmp_path / "file", "new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"] and (tmp_path / "file").read_text() == "old"
