from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from lightning_xai.data.tar_records import TarRecord, TarRecords


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_members_of_one_name_are_a_record_and_unknown_extensions_are_ignored(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [("x.TXT", b"1"), ("x.pyd", b"cos\nsystem"), ("x.json", b"{}"), ("sub/y.txt", b"2")]
    )
    records = TarRecords(path, ("txt", "json"))
    assert list(records) == [TarRecord("x", {"txt": b"1", "json": b"{}"}, ""), TarRecord("sub/y", {"txt": b"2"}, "")]
    assert (records.damage, records.seen) == ("", 2)


def test_only_the_slice_that_was_asked_for_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{number}.txt", b"%d" % number) for number in range(5)])
    records = TarRecords(path, ("txt",), start=1, stop=3)
    assert [record.key for record in records] == ["1", "2"]
    assert records.damage == ""


def test_what_names_alone_show_to_be_wrong_is_noted_by_record(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, b"") for name in ("a.txt", "a.txt", "b.txt", "c.txt", "b.json")])
    faults = {record.key: record.fault for record in TarRecords(path, ("txt", "json"), stop=3)}
    assert faults == {"a": "its .txt member comes twice", "b": "", "c": ""}
    assert [record.fault for record in TarRecords(path, ("txt", "json"))][-1].startswith("its key comes twice")


def test_a_tar_file_without_members_is_whole(tmp_path: Path) -> None:
    records = TarRecords(write_tar(tmp_path / "a.tar", []), ("txt",))
    assert list(records) == []
    assert records.damage == ""


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"no tar file " * 100])
def test_another_kind_of_file_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    records = TarRecords(tmp_path / "a.tar", ("txt",))
    assert list(records) == []
    assert records.damage == "it is not an uncompressed tar file"


def test_a_truncated_file_gives_what_is_whole_and_says_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"1" * 600), ("b.txt", b"2" * 600)])
    path.write_bytes(path.read_bytes()[: 512 + 1024 + 512 + 100])
    records = TarRecords(path, ("txt",))
    assert [record.key for record in records] == ["a"]
    assert records.damage


def test_a_sparse_member_that_stands_for_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"1"), ("b.txt", b"2")])
    data = bytearray(path.read_bytes())
    data[156:157] = b"S"  # GNU's sparse type: four pieces (begin, length), then the real size
    data[386:482] = b"00000000000\0" * 8
    data[483:495] = b"77777777777\0"
    data[257:265] = b"ustar  \0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert tar.getmember("a.txt").issparse()
    assert [record.key for record in TarRecords(path, ("txt",))] == ["b"]
