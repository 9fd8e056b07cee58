from __future__ import annotations

import io
import random
import tarfile
import tracemalloc
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from webdataset.tariterators import base_plus_ext, group_by_keys

from lightning_xai.data.tar_records import TarRecord, TarRecords, open_file


def opened(path: Path, extensions: Collection[str], **options: Any) -> TarRecords:
    return TarRecords(partial(open_file, path), extensions, **options)


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
    records = opened(path, ("txt", "json"))
    assert list(records) == [TarRecord("x", {"txt": b"1", "json": b"{}"}, ""), TarRecord("sub/y", {"txt": b"2"}, "")]
    assert (records.damage, records.seen) == ("", 2)


def test_only_the_slice_that_was_asked_for_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{number}.txt", b"%d" % number) for number in range(5)])
    records = opened(path, ("txt",), start=1, stop=3)
    assert [record.key for record in records] == ["1", "2"]
    assert records.damage == ""


def test_what_names_alone_show_to_be_wrong_is_noted_by_record(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, b"") for name in ("a.txt", "a.txt", "b.txt", "c.txt", "b.json")])
    faults = {record.key: record.fault for record in opened(path, ("txt", "json"), stop=3)}
    assert faults == {"a": "its .txt member comes twice", "b": "", "c": ""}
    assert [record.fault for record in opened(path, ("txt", "json"))][-1].startswith("its key comes twice")


def test_a_tar_file_without_members_is_whole(tmp_path: Path) -> None:
    records = opened(write_tar(tmp_path / "a.tar", []), ("txt",))
    assert list(records) == []
    assert records.damage == ""


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"no tar file " * 100])
def test_another_kind_of_file_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    records = opened(tmp_path / "a.tar", ("txt",))
    assert list(records) == []
    assert records.damage == "it is not an uncompressed tar file"


def test_a_truncated_file_gives_what_is_whole_and_says_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"1" * 600), ("b.txt", b"2" * 600)])
    path.write_bytes(path.read_bytes()[: 512 + 1024 + 512 + 100])
    records = opened(path, ("txt",))
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
    assert [record.key for record in opened(path, ("txt",))] == ["b"]


# --- passing over ----------------------------------------------------------------------------------------------------


def by_tarfile(data: bytes) -> tuple[list[dict[str, Any]], str]:
    """The records of a whole file as tarfile reads it member by member, and what it says of the damage."""
    damage: list[str] = []

    def members() -> Iterator[dict[str, Any]]:
        seen: list[str] = []
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
                for entry in tar:
                    key, extension = base_plus_ext(entry.name)
                    if entry.isreg() and not entry.issparse() and extension in ("txt", "json"):
                        if not seen or seen[0] != key:
                            seen = [key]
                        if extension not in seen[1:]:
                            file = tar.extractfile(entry)
                            assert file is not None
                            yield {"fname": entry.name, "data": file.read(), "__url__": ""}
                        seen.append(extension)
        except Exception as error:
            damage.append(str(error))

    return list(group_by_keys(members())), "".join(damage)


def make_tar(rng: random.Random) -> bytes:
    """A tar file as some tool or other writes it: one of three formats, with long, foreign and repeated names."""
    stream = io.BytesIO()
    kind = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for number in range(rng.randrange(1, 9)):
            name = rng.choice(("{}", "{}", "deep/{}", "ä{}", "{}" + "x" * 98, "{}" + "y" * 140, "a" * 99 + "/{}"))
            if kind == tarfile.USTAR_FORMAT and len(name) > 90 and "/" not in name:
                name = "{}"  # it has no place for such names
            key = number if rng.random() < 0.8 else number % 2
            for extension in rng.sample(("txt", "json", "other", "TXT"), rng.randrange(1, 4)):
                entry = tarfile.TarInfo(f"{name.format(key)}.{extension.lower()}")
                if kind == tarfile.PAX_FORMAT and rng.random() < 0.2:
                    entry.mtime = 0.5  # makes a header of its own
                entry.size = rng.choice((0, 1, 100, 512, 513, 3000))
                tar.addfile(entry, io.BytesIO(rng.randbytes(entry.size)))
            if rng.random() < 0.2:
                link = tarfile.TarInfo(f"link{number}.txt")
                link.type = rng.choice((tarfile.SYMTYPE, tarfile.DIRTYPE))
                tar.addfile(link)
    return stream.getvalue()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file whole, cut off anywhere, or with some bytes of a block changed."""
    choice = rng.randrange(3)
    if choice == 0:
        return data
    if choice == 1:
        return data[: rng.randrange(len(data))]
    begin = 512 * rng.randrange(len(data) // 512) + rng.randrange(512)
    noise = rng.randbytes(rng.choice((1, 8, 512)))
    return (data[:begin] + noise + data[begin + len(noise) :])[: len(data)]


class OneWay(io.BytesIO):
    """A stream that cannot seek, as that of a command."""

    def seekable(self) -> bool:
        return False

    def seek(self, *place: int) -> int:
        raise io.UnsupportedOperation(f"seek {place}")


@pytest.mark.parametrize("stream", [io.BytesIO, OneWay])
def test_any_records_of_any_file_are_what_tarfile_reads_also_where_it_is_damaged(stream: type[io.BytesIO]) -> None:
    rng = random.Random(0)
    damages = 0
    for _ in range(600):
        data = damaged(make_tar(rng), rng)
        expected, damage = by_tarfile(data)
        whole = TarRecords(partial(stream, data), ("txt", "json"))
        records = list(whole)
        if data[257:262] == b"ustar":
            found = [{"__key__": record.key, "__url__": "", **record.members} for record in records]
            assert (found, whole.damage) == (expected, damage)
        damages += bool(whole.damage)
        start = rng.randrange(10)
        stop = rng.randrange(start, 11)
        passed_over = {number for number in range(start, stop) if rng.random() < 0.4}
        some = TarRecords(partial(stream, data), ("txt", "json"), start, stop, passed_over)
        wanted = [number for number in range(start, stop) if number not in passed_over]
        assert list(some) == [records[number] for number in wanted if number < len(records)]
        if wanted and wanted[-1] >= len(records):
            assert (some.damage, some.seen) == (whole.damage, whole.seen)
    assert damages > 100


class Counted(io.BytesIO):
    """A stream that counts the bytes it hands out."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


@pytest.mark.parametrize("length", [10, 180])
def test_only_the_headers_of_passed_over_records_are_read_and_tarfile_parses_none_of_them(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Counted()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(40):
            entry = tarfile.TarInfo(f"{number:0{length}}.txt")
            entry.size = 50_000
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    stream.seek(0)
    monkeypatch.setattr(tarfile, "open", None)
    records = TarRecords(lambda: stream, ("txt",), 20, 30, set(range(21, 29)))
    assert [int(record.key) for record in records] == [20, 29]
    assert stream.taken <= 2 * 50_000 + 31 * 3 * 512


def test_a_member_that_promises_gigabytes_takes_no_memory_for_them() -> None:
    entry = tarfile.TarInfo("a.txt")
    entry.size = 8**11 - 1
    data = entry.tobuf() + b"only this"
    for stream in (io.BytesIO, OneWay):
        tracemalloc.start()
        records = TarRecords(partial(stream, data), ("txt",))
        assert list(records) == []
        assert records.damage == "unexpected end of data"
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()


def test_a_record_ends_where_the_next_one_begins_also_where_that_is_passed_over(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in ("a.txt", "b.txt", "a.txt", "b.json")])
    records = list(opened(path, ("txt", "json"), start=0, stop=3, passed_over={1}))
    assert [(record.key, record.members, bool(record.fault)) for record in records] == [
        ("a", {"txt": b"a.txt"}, False),
        ("a", {"txt": b"a.txt"}, True),
    ]
    path.write_bytes(path.read_bytes()[: 2 * 1024 + 512])  # ends behind the header of the third record
    for passed_over in ((), (1,)):
        cut = opened(path, ("txt", "json"), stop=2, passed_over=passed_over)
        assert next(iter(cut)).key == "a"
        assert cut.damage == ""
