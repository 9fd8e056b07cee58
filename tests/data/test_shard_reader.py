from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import lzma
import os
import pickle
import random
import tarfile
import tracemalloc
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import pytest
from shard_files import make_sample, make_samples, members_of, read, write, write_by_hand

from lightning_xai.data.excluded import UNREADABLE_SHARD
from lightning_xai.data.sample import RecordError, Sample
from lightning_xai.data.shard_reader import TarRecord, TarRecords, read_samples
from lightning_xai.data.shard_store import open_file


def test_every_slice_of_every_order_is_the_whole_exactly_once(tmp_path: Path) -> None:
    samples = make_samples(11)
    manifest = write(tmp_path / "out", samples)
    for order in ([0, 1, 2], [2, 0, 1], manifest.order(3, 1)):
        whole = list(read_samples(tmp_path / "out", manifest, order, 0, 11))
        assert sorted(index for index, _ in whole) == list(range(11))
        assert all(item == samples[index] for index, item in whole)
        for start in range(12):
            for stop in range(start, 12):
                assert list(read_samples(tmp_path / "out", manifest, order, start, stop)) == whole[start:stop]


def test_shards_outside_the_slice_are_not_opened(tmp_path: Path) -> None:
    samples = make_samples(12)
    manifest = write(tmp_path / "out", samples)
    (tmp_path / "out" / "shard-000000.tar").unlink()
    (tmp_path / "out" / "shard-000002.tar").unlink()
    assert [item for _, item in read_samples(tmp_path / "out", manifest, [0, 1, 2], 4, 8)] == samples[4:8]


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="needs Linux' count of bytes read")
def test_a_slice_at_the_beginning_does_not_read_the_rest_of_the_shard(tmp_path: Path) -> None:
    padding = b"\0" * 100_000  # after the image's end, where decoders do not look
    samples = [dataclasses.replace(sample, image=sample.image + padding) for sample in make_samples(50)]
    manifest = write(tmp_path, samples, samples_per_shard=50)
    before = _bytes_read()
    items = [item for _, item in read_samples(tmp_path, manifest, [0], 2, 5)]
    assert _bytes_read() - before < 0.2 * manifest.bytes
    assert items == samples[2:5]


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


WRONG_SLICES = [([0], 0, 5), ([0], -1, 2), ([0], 3, 2), ([1], 0, 1), ([-1], 0, 1)]


def test_a_slice_that_leaves_the_shards_is_refused_at_once(tmp_path: Path) -> None:
    manifest = write(tmp_path / "out", make_samples(4))
    for order, start, stop in WRONG_SLICES:
        with pytest.raises(ValueError, match=r"expected 0 <= start|shard indices from 0 to 0"):
            read_samples(tmp_path / "out", manifest, order, start, stop)


class Bomb:
    """Leaves a file after when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickled_members_are_never_opened(tmp_path: Path) -> None:
    first, second = make_samples(2)
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    hostile = [(f"{first.key}.{extension}", bomb) for extension in ("pyd", "pickle", "pkl", "pth", "npy", "mask.json")]
    alone = [("sample_9999.pickle", bomb), ("__meta__", bomb), ("noextension", bomb)]
    members = [*hostile, *members_of(first), *alone, *members_of(second)]
    manifest = write_by_hand(tmp_path / "out", members, samples=2)
    assert read(tmp_path / "out", manifest) == [first, second]
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # the bomb would have worked


def test_a_broken_record_is_an_error_and_the_rest_survives(tmp_path: Path) -> None:
    a, b, c, d = make_samples(4)
    members = [
        *members_of(a),
        (f"{b.key}.jpg", b.image),
        (f"{b.key}.json", b"{broken"),
        (f"{c.key}.jpg", c.image),
        *members_of(d),
    ]
    manifest = write_by_hand(tmp_path / "out", members, samples=4)
    items = read(tmp_path / "out", manifest)
    assert (items[0], items[3]) == (a, d)
    assert isinstance(items[1], RecordError)
    assert isinstance(items[2], RecordError)
    assert "shard-000000.tar, record sample_0001: broken JSON" in str(items[1])
    assert "shard-000000.tar, record sample_0002: the .json member is missing" in str(items[2])


def test_a_member_or_a_key_that_comes_twice_is_an_error_and_the_rest_survives(tmp_path: Path) -> None:
    a, b, c = make_samples(3)
    members = [*members_of(a), *members_of(b), (f"{b.key}.JSON", b"{}"), *members_of(a), *members_of(c)]
    manifest = write_by_hand(tmp_path / "out", members, samples=4)
    items = read(tmp_path / "out", manifest)
    assert (items[0], items[3]) == (a, c)
    assert "record sample_0001: its .json member comes twice" in str(items[1])
    assert "record sample_0000: its key comes twice in the shard" in str(items[2])
    assert [str(item) for _, item in read_samples(tmp_path / "out", manifest, [0], 2, 3)] == [str(items[2])]


def test_records_that_the_manifest_does_not_know_are_not_read(tmp_path: Path) -> None:
    samples = make_samples(3)
    members = [member for sample in samples for member in members_of(sample)]
    assert read(tmp_path / "out", write_by_hand(tmp_path / "out", members, samples=2)) == samples[:2]


def test_a_truncated_shard_gives_what_is_whole_and_the_exact_count(tmp_path: Path) -> None:
    samples = make_samples(6)
    manifest = write(tmp_path, samples, samples_per_shard=3)
    shard = tmp_path / "shard-000000.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        ends = [member.offset_data + member.size for member in tar][1::2]
    for length in range(0, len(whole), 97):
        shard.write_bytes(whole[:length])
        items = [item for _, item in read_samples(tmp_path, manifest, [0, 1], 0, 6)]
        intact = sum(end <= length for end in ends)
        assert items[:intact] == samples[:intact]
        assert all(isinstance(item, RecordError) for item in items[intact:3])
        assert items[3:] == samples[3:]


def test_a_record_cut_in_two_is_lost_as_those_after_it_are(tmp_path: Path) -> None:
    manifest = write(tmp_path, make_samples(4), samples_per_shard=4)
    shard = tmp_path / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        second = tar.getmembers()[3]  # of the second record, whose first member is whole
    shard.write_bytes(shard.read_bytes()[: second.offset_data + 10])
    kinds = [item.kind for item in read(tmp_path, manifest) if isinstance(item, RecordError)]
    assert kinds == [UNREADABLE_SHARD] * 3


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_file_is_not_unpacked(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    manifest = write_by_hand(tmp_path / "out", members_of(make_sample(0)), samples=1)
    path = tmp_path / "out" / "shard-000000.tar"
    path.write_bytes(compress(path.read_bytes()))
    (item,) = read(tmp_path / "out", manifest)
    assert "shard-000000.tar: record 0 (counted from 0) cannot be read (it is not an uncompressed tar" in str(item)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_shard_that_vanished_or_is_a_pipe_gives_errors_and_no_hang(tmp_path: Path) -> None:
    manifest = write(tmp_path, make_samples(3))
    (tmp_path / "shard-000000.tar").unlink()
    os.mkfifo(tmp_path / "shard-000000.tar")
    items = read(tmp_path, manifest)
    assert len(items) == 3
    assert all("there is no such file" in str(item) for item in items)


def test_files_are_closed_when_a_reader_stops_early(tmp_path: Path) -> None:
    manifest = write(tmp_path, make_samples(8))
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc")
    before = len(list(descriptors.iterdir()))
    reader = read_samples(tmp_path, manifest, [0, 1], 0, 8)
    next(reader)
    assert len(list(descriptors.iterdir())) == before + 1
    del reader
    assert len(list(descriptors.iterdir())) == before


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file whole, cut off anywhere, or with some bytes of a block or its end changed."""
    choice = rng.randrange(4)
    if choice == 0:
        return data
    if choice == 1:
        return data[: rng.randrange(len(data))]
    begin = 512 * rng.randrange(len(data) // 512) + rng.randrange(512)  # headers begin on multiples of 512
    noise = rng.randbytes(rng.choice((1, 8, 512 - begin % 512)))
    return (data[:begin] + noise + data[begin + len(noise) :])[: len(data)]


def test_any_positions_of_damaged_shards_are_those_of_a_full_read(tmp_path: Path) -> None:
    manifest = write(tmp_path, make_samples(14))
    shards = [tmp_path / entry.name for entry in manifest.shards]
    whole = [shard.read_bytes() for shard in shards]
    rng = random.Random(0)
    broken = 0
    for turn in range(100):
        for shard, data in zip(shards, whole, strict=True):
            shard.write_bytes(damaged(data, rng))
        order = manifest.order(0, turn)
        full = [(index, _shown(item)) for index, item in read_samples(tmp_path, manifest, order, 0, 14)]
        assert sorted(index for index, _ in full) == list(range(14))
        start, stop = sorted(rng.choices(range(15), k=2))
        skipped = {position for position in range(14) if rng.random() < 0.5}
        some = read_samples(tmp_path, manifest, order, start, stop, skipped)
        expected = [full[position] for position in range(start, stop) if position not in skipped]
        assert [(index, _shown(item)) for index, item in some] == expected
        broken += sum(isinstance(item, str) for _, item in expected)
    assert broken > 50


def _shown(item: Sample | RecordError) -> Sample | str:
    return str(item) if isinstance(item, RecordError) else item


def test_shards_whose_positions_are_all_skipped_are_not_opened(tmp_path: Path) -> None:
    samples = make_samples(12)
    manifest = write(tmp_path, samples)
    (tmp_path / "shard-000001.tar").unlink()
    items = list(read_samples(tmp_path, manifest, [0, 1, 2], 2, 12, {3, 4, 5, 6, 7, 11}))
    assert items == [(index, samples[index]) for index in (2, 8, 9, 10)]


# --- tar files ---


def opened(path: Path, extensions: Collection[str], wanted: Collection[int] | None = None) -> TarRecords:
    return TarRecords(partial(open_file, path), extensions, wanted)


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
    assert (records.error, records.seen) == ("", 2)


def test_a_tar_file_without_members_is_whole(tmp_path: Path) -> None:
    records = opened(write_tar(tmp_path / "a.tar", []), ("txt",))
    assert list(records) == []
    assert records.error == ""


NO_TAR_FILES = [b"", b"\0" * 100, b"no tar file " * 100]


def test_another_kind_of_file_says_so(tmp_path: Path) -> None:
    for content in NO_TAR_FILES:
        (tmp_path / "a.tar").write_bytes(content)
        records = opened(tmp_path / "a.tar", ("txt",))
        assert list(records) == []
        assert records.error.startswith("it is not an uncompressed tar file (")


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


def make_tar(rng: random.Random) -> bytes:
    """A tar file as some tool or other writes it: one of two formats, with long, foreign and repeated names."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as tar:
        for number in range(rng.randrange(1, 9)):
            name = rng.choice(("{}", "deep/{}", "ä{}", "{}" + "x" * 98, "{}" + "y" * 140, "a" * 99 + "/{}"))
            key = number if rng.random() < 0.8 else number % 2
            for extension in rng.sample(("txt", "json", "other"), rng.randrange(1, 4)):
                entry = tarfile.TarInfo(f"{name.format(key)}.{extension}")
                entry.type = rng.choice((tarfile.REGTYPE,) * 9 + (tarfile.SYMTYPE,))
                entry.size = rng.choice((0, 1, 100, 512, 513, 3000))
                tar.addfile(entry, io.BytesIO(rng.randbytes(entry.size)))
    return stream.getvalue()


class OneWay(io.BytesIO):
    """A stream that cannot seek, as that of a command."""

    def seekable(self) -> bool:
        return False

    def seek(self, *place: int) -> int:
        raise io.UnsupportedOperation(f"seek {place}")


def test_any_records_of_any_file_are_those_of_a_full_read_also_where_it_is_damaged() -> None:
    rng = random.Random(0)
    damages = 0
    for _ in range(500):
        data = damaged(make_tar(rng), rng)
        whole = TarRecords(partial(io.BytesIO, data), ("txt", "json"))
        records = list(whole)
        wanted = [number for number in range(len(records)) if rng.random() < 0.6]
        for stream in (io.BytesIO, OneWay):
            some = TarRecords(partial(stream, data), ("txt", "json"), wanted)
            assert list(some) == [records[number] for number in wanted]
            assert (some.error, some.seen) == (whole.error, whole.seen)
        damages += bool(whole.error)
    assert damages > 50


class Counted(io.BytesIO):
    """A stream that counts the bytes it hands out."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


@pytest.mark.parametrize("length", [10, 180])
def test_only_the_headers_of_skipped_records_are_read(length: int) -> None:
    stream = Counted()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(40):
            entry = tarfile.TarInfo(f"{number:0{length}}.txt")
            entry.size = 50_000
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    stream.seek(0)
    records = TarRecords(lambda: stream, ("txt",), {20, 29})
    assert [int(record.key) for record in records] == [20, 29]
    assert stream.taken <= 2 * 50_000 + 41 * 4 * 512


def test_a_member_that_promises_gigabytes_takes_no_memory_for_them() -> None:
    entry = tarfile.TarInfo("a.txt")
    entry.size = 8**11 - 1
    data = entry.tobuf() + b"only this"
    for stream in (io.BytesIO, OneWay):
        tracemalloc.start()
        records = TarRecords(partial(stream, data), ("txt",))
        assert list(records) == []
        assert records.error == "unexpected end of data"
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"?"])
def test_a_negative_size_does_not_send_the_reader_back_for_ever(kind: bytes) -> None:
    entry = tarfile.TarInfo("a.txt")
    entry.type = kind
    data = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    data[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    for stream in (io.BytesIO, OneWay):
        records = TarRecords(partial(stream, bytes(data) * 2), ("txt",))
        assert list(records) == []
        assert records.error


def test_a_record_ends_where_the_next_one_begins_also_where_that_is_skipped(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in ("a.txt", "b.txt", "a.txt", "b.json")])
    records = list(opened(path, ("txt", "json"), {0, 2}))
    assert [(record.key, record.members, bool(record.fault)) for record in records] == [
        ("a", {"txt": b"a.txt"}, False),
        ("a", {"txt": b"a.txt"}, True),
    ]
    path.write_bytes(path.read_bytes()[: 2 * 1024 + 512])  # ends after the header of the third record
    for wanted in ({0, 1}, {0}):
        cut = opened(path, ("txt", "json"), wanted)
        assert next(iter(cut)).key == "a"
        assert cut.error == ""
