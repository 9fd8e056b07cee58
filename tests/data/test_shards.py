from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import pickle
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_xai.data.sample import RecordError, Region, Sample, encode_sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shards import (
    BROKEN_RECORD,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    ShardError,
    ShardsExistError,
    describe,
    write_shards,
)


def make_sample(number: int, image_format: str = "JPEG", key: str | None = None) -> Sample:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, image_format)
    caption = f"dog {number} ünder a cat"
    return Sample(
        key=key or f"sample_{number:04d}",
        image=file.getvalue(),
        size=(8, 6),
        captions=(caption, "nothing to see"),
        regions=(
            Region("dog", (0.5, 1.0, 3.25, 2.0), {0: ((0, 3),)}),
            Region("cat", (4.0, 0.0, 4.0, 6.0), {0: ((len(caption) - 3, len(caption)),)}, crowd=number % 2 == 0),
        ),
        source=f"made/{number}",
    )


def make_samples(count: int) -> list[Sample]:
    return [make_sample(number, ("JPEG", "PNG", "WEBP")[number % 3]) for number in range(count)]


def write(out: Path, samples: Sequence[Sample], samples_per_shard: int = 4) -> Manifest:
    return write_shards(samples, out, name="made", samples_per_shard=samples_per_shard, progress=False)


def read(folder: Path, manifest: Manifest) -> list[Sample | RecordError]:
    return [item for _, item in read_samples(folder, manifest, range(len(manifest.shards)), 0, manifest.samples)]


def write_by_hand(folder: Path, members: Sequence[tuple[str, bytes]], samples: int) -> Manifest:
    """A shard with any members at all, and a manifest that claims `samples` records."""
    folder.mkdir()
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Manifest("made", (ShardEntry(path.name, samples, path.stat().st_size, "0" * 64),), (), {}, samples)


def members_of(sample: Sample) -> list[tuple[str, bytes]]:
    return [(f"{sample.key}.{extension}", data) for extension, data in sorted(encode_sample(sample).items())]


def edit_manifest(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / MANIFEST_NAME
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def test_samples_come_back_exactly_and_in_order(tmp_path: Path) -> None:
    samples = make_samples(10)
    written = write(tmp_path / "out", samples)
    loaded = Manifest.load(tmp_path / "out")
    assert loaded == written
    assert [entry.samples for entry in loaded.shards] == [4, 4, 2]
    assert (loaded.samples, loaded.captions, loaded.labels) == (10, 20, ("cat", "dog"))
    assert read(tmp_path / "out", loaded) == samples
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert tar.getnames()[:4] == ["sample_0000.jpg", "sample_0000.json", "sample_0001.json", "sample_0001.png"]
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "nobody")}


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a", make_samples(5))
    time.sleep(1.1)  # tar times have a resolution of one second
    second = write(tmp_path / "b", make_samples(5))
    assert first == second
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_longest_allowed_key_is_written_and_read(tmp_path: Path) -> None:
    sample = make_sample(0, key="k" * 200)
    manifest = write(tmp_path / "out", [sample])
    assert read(tmp_path / "out", manifest) == [sample]


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
    padding = b"\0" * 100_000  # behind the image's end, where decoders do not look
    samples = [dataclasses.replace(sample, image=sample.image + padding) for sample in make_samples(50)]
    manifest = write(tmp_path, samples, samples_per_shard=50)
    before = _bytes_read()
    items = [item for _, item in read_samples(tmp_path, manifest, [0], 2, 5)]
    assert _bytes_read() - before < 0.2 * manifest.bytes
    assert items == samples[2:5]


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize(
    ("order", "start", "stop"), [([0], 0, 5), ([0], -1, 2), ([0], 3, 2), ([1], 0, 1), ([-1], 0, 1)]
)
def test_a_slice_that_leaves_the_shards_is_refused_at_once(
    tmp_path: Path, order: list[int], start: int, stop: int
) -> None:
    manifest = write(tmp_path / "out", make_samples(4))
    with pytest.raises(ValueError, match=r"expected 0 <= start|shard indices from 0 to 0"):
        read_samples(tmp_path / "out", manifest, order, start, stop)


def test_the_order_is_a_permutation_of_seed_and_epoch() -> None:
    entries = tuple(ShardEntry(f"shard-{number:06d}.tar", 1, 1, "0" * 64) for number in range(50))
    manifest = Manifest("made", entries, (), {}, 50)
    assert sorted(manifest.order(1, 2)) == list(range(50))
    assert manifest.order(1, 2) == manifest.order(1, 2)
    assert len({tuple(manifest.order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_a_sample_that_breaks_the_contract_is_counted_and_the_rest_survives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_out = Counter({"empty caption": 2})
    samples = make_samples(3)
    broken = dataclasses.replace(samples[1], captions=("", "x"))
    manifest = write_shards(
        [samples[0], broken, samples[2]], tmp_path / "out", name="made", left_out=left_out, progress=False
    )
    assert read(tmp_path / "out", manifest) == [samples[0], samples[2]]
    assert Manifest.load(tmp_path / "out").left_out == {"empty caption": 2, BROKEN_RECORD: 1} == dict(left_out)
    assert "sample_0001" in caplog.text


def test_what_the_source_leaves_out_while_it_is_read_is_in_the_manifest(tmp_path: Path) -> None:
    left_out: Counter[str] = Counter()

    def source() -> Iterator[Sample]:
        for number, sample in enumerate(make_samples(6)):
            if number % 2:
                left_out["odd"] += 1
            else:
                yield sample

    manifest = write_shards(source(), tmp_path / "out", name="made", left_out=left_out, progress=False)
    assert manifest.left_out == {"odd": 3}
    assert Manifest.load(tmp_path / "out").samples == 3


def test_a_duplicate_key_is_an_error_that_names_it_and_leaves_nothing(tmp_path: Path) -> None:
    samples = [*make_samples(6), make_sample(2)]
    with pytest.raises(ShardError, match=r"'sample_0002' comes twice \(now from made/2\)"):
        write(tmp_path / "out", samples)
    assert list(tmp_path.iterdir()) == []


def test_no_sample_at_all_is_an_error_that_tells_what_was_left_out(tmp_path: Path) -> None:
    broken = dataclasses.replace(make_sample(0), captions=())
    with pytest.raises(ShardError, match=r"no sample to write for 'made'; left out: \{'broken record': 1\}"):
        write(tmp_path / "out", [broken])
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def source() -> Iterator[Sample]:
        yield from make_samples(6)
        raise RuntimeError("the disk of the source failed")

    with pytest.raises(RuntimeError, match="the disk of the source failed"):
        write_shards(source(), tmp_path / "out", name="made", samples_per_shard=4, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_killed_halfway_leaves_no_half_made_folder(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from lightning_xai.data.shapes import read_shapes
from lightning_xai.data.shards import write_shards
def source():
    yield from read_shapes("val", 25)
    os.kill(os.getpid(), signal.SIGKILL)
write_shards(source(), Path(sys.argv[1]), name="made", samples_per_shard=10, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert [path.name[:12] for path in tmp_path.iterdir()] == [".out.partial"]  # so it did get halfway
    write(tmp_path / "out", make_samples(2))
    assert Manifest.load(tmp_path / "out").samples == 2


def test_shards_are_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, make_samples(9))
    with pytest.raises(ShardsExistError, match="already holds shards"):
        write(out, make_samples(2))
    assert Manifest.load(out).samples == 9
    write_shards(make_samples(2), out, name="made", progress=False, overwrite=True)
    assert Manifest.load(out).samples == 2
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST_NAME, "shard-000000.tar"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_with_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ShardsExistError, match="not empty and holds no shards"):
        write_shards(make_samples(2), tmp_path, name="made", progress=False, overwrite=True)
    with pytest.raises(ShardsExistError, match="is a file"):
        write_shards(make_samples(2), tmp_path / "thesis.txt", name="made", progress=False, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", make_samples(1))
    write(tmp_path / "a" / "b" / "c", make_samples(1))
    assert Manifest.load(tmp_path / "empty") == Manifest.load(tmp_path / "a" / "b" / "c")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_others_may_read_the_shards_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write(tmp_path / "out", make_samples(1))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_a_shard_size_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="samples_per_shard has to be at least 1; got 0"):
        write(tmp_path / "out", make_samples(1), samples_per_shard=0)


def test_the_progress_bar_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(make_samples(3), tmp_path / "out", name="made [x]", total=3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "made [x]" in shown.err
    assert "3/3" in shown.err


HOSTILE_NAMES = [
    "pipe:touch owned",
    "pipe:touch owned #.tar",
    "../x.tar",
    "/etc/x.tar",
    "a/b.tar",
    "x.tar\n",
    "x.tgz",
    "",
]


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "http://host/x.tar", "{0..9}.tar", "$HOME.tar", None, 3])
def test_a_hostile_shard_name_is_refused(tmp_path: Path, name: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "out", make_samples(2))
    shard = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["shards"][0]
    edit_manifest(tmp_path / "out", lambda record: record.update(shards=[shard | {"name": name}]))
    with pytest.raises(ShardError, match=r"manifest\.json: shard name .* is not allowed"):
        Manifest.load(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(version=99), "manifest version 99, expected 1"),
        (lambda record: record.pop("labels"), r"field missing or of the wrong type \(KeyError\('labels'\)\)"),
        (lambda record: record.update(shards=7), "field missing or of the wrong type"),
        (lambda record: record.update(shards=["shard-000000.tar"]), "field missing or of the wrong type"),
        (lambda record: record.update(shards=[]), "no shard is listed"),
        (lambda record: record.update(shards=record["shards"] * 2), "a shard is listed twice"),
        (lambda record: record.update(name=None), "'name' is not a text"),
        (lambda record: record.update(labels=["dog", "cat"]), "'labels' are not sorted texts"),
        (lambda record: record.update(labels=[1, "cat"]), "'labels' are not sorted texts"),
        (lambda record: record.update(captions="many"), "'captions' is not a count"),
        (lambda record: record.update(left_out={"x": -1}), "'left_out' does not hold counts"),
        (lambda record: record["shards"][0].update(samples=0), "samples and bytes have to be positive"),
        (lambda record: record["shards"][0].update(samples=True), "samples and bytes have to be positive"),
        (lambda record: record["shards"][0].update(sha256="ABC"), "64 hexadecimal digits"),
    ],
)
def test_a_wrong_manifest_is_refused_with_file_and_remedy(
    tmp_path: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    write(tmp_path, make_samples(2))
    edit_manifest(tmp_path, change)
    with pytest.raises(ShardError, match=rf"{MANIFEST_NAME}: .*{message}.*(again|positive)"):
        Manifest.load(tmp_path)


def test_a_missing_or_broken_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"manifest\.json: not found; check the path, or make the shards"):
        Manifest.load(tmp_path)
    for broken in (b"{", b"\xff\xfe", b"[" * 100_000, b"[]"):
        (tmp_path / MANIFEST_NAME).write_bytes(broken)
        with pytest.raises(ShardError, match=r"manifest\.json: (broken JSON|manifest version None).*again"):
            Manifest.load(tmp_path)


def test_a_missing_shard_and_a_wrong_size_are_found_at_loading(tmp_path: Path) -> None:
    write(tmp_path, make_samples(8))
    shard = tmp_path / "shard-000001.tar"
    with shard.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ShardError, match=r"shard-000001\.tar: has \d+ bytes, the manifest says \d+; copy it again"):
        Manifest.load(tmp_path)
    shard.unlink()
    with pytest.raises(ShardError, match=r"shard-000001\.tar: the shard is missing; copy it again"):
        Manifest.load(tmp_path)


def test_verify_finds_a_single_changed_bit(tmp_path: Path) -> None:
    manifest = write(tmp_path, make_samples(8))
    manifest.verify(tmp_path)
    shard = tmp_path / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    Manifest.load(tmp_path)
    with pytest.raises(ShardError, match=r"shard-000001\.tar: SHA-256 is .* the file has changed"):
        manifest.verify(tmp_path)


class Bomb:
    """Leaves a file behind when it is unpickled."""

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


def test_missing_records_are_errors_so_that_the_count_is_right(tmp_path: Path) -> None:
    a, b = make_samples(2)
    manifest = write_by_hand(tmp_path / "out", [*members_of(a), *members_of(b)], samples=5)
    items = read(tmp_path / "out", manifest)
    assert items[:2] == [a, b]
    assert len(items) == 5
    assert all("cannot be read (the shard ends after 2 records)" in str(item) for item in items[2:])
    later = list(read_samples(tmp_path / "out", manifest, [0], 3, 5))
    assert [index for index, _ in later] == [3, 4]
    assert [str(item) for _, item in later] == [str(item) for item in items[3:]]


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


def test_random_damage_never_crashes_and_never_changes_the_count(tmp_path: Path) -> None:
    samples = make_samples(6)
    manifest = write(tmp_path, samples, samples_per_shard=6)
    shard = tmp_path / "shard-000000.tar"
    whole = np.frombuffer(shard.read_bytes(), dtype=np.uint8)
    rng = np.random.default_rng(0)
    errors = 0
    for _ in range(150):
        damaged = whole.copy()
        where = 512 * rng.integers(len(whole) // 512, size=3)  # headers lie on multiples of 512
        for begin in where:
            area = slice(begin + rng.integers(512), begin + 512)
            damaged[area] = rng.integers(0, 256, size=len(damaged[area]))
        shard.write_bytes(damaged.tobytes())
        items = read(tmp_path, manifest)
        assert len(items) == 6
        errors += sum(isinstance(item, RecordError) for item in items)
    assert errors > 100


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


def test_the_description_lists_the_reasons_by_number() -> None:
    entry = ShardEntry("a.tar", 12_345, 2_500_000_000, "0" * 64)
    text = describe(Manifest("coco-val", (entry,), ("cat",), {"rare": 1, "frequent": 1_234}, 61_725))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["coco-val"]
    assert ["samples", "12,345"] in lines
    assert ["bytes", "2.50", "GB"] in lines
    assert lines[-3:] == [["left", "out", "1,235"], ["frequent", "1,234"], ["rare", "1"]]
