from __future__ import annotations

from pathlib import Path

import pytest

from lightning_xai.atomic_file import replaced_at_once


def test_a_reader_never_sees_a_part_of_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "table.csv"
    for text in ("old", "new"):
        with replaced_at_once(path) as part:
            part.write_text("half a ta")
            assert not path.exists() or path.read_text() == "old"
            part.write_text(text)
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fail_half_way() -> None:
        with replaced_at_once(path) as part:
            part.write_text("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
