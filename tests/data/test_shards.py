from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shard_files import make_sample, make_samples, read, write
from stopped_runs import start

from lightning_xai.data.excluded import BROKEN_RECORD
from lightning_xai.data.sample import Sample
from lightning_xai.data.shards import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    ShardError,
    ShardsExistError,
    describe,
    write_shards,
)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
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


def test_the_order_is_a_permutation_of_seed_and_epoch() -> None:
    entries = tuple(ShardEntry(f"shard-{number:06d}.tar", 1, 1, "0" * 64) for number in range(50))
    manifest = Manifest("made", entries, (), {}, 50)
    assert sorted(manifest.order(1, 2)) == list(range(50))
    assert manifest.order(1, 2) == manifest.order(1, 2)
    assert len({tuple(manifest.order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_a_sample_that_breaks_the_contract_is_counted_and_the_rest_survives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    excluded = Counter({"empty caption": 2})
    samples = make_samples(3)
    broken = dataclasses.replace(samples[1], captions=("", "x"))
    manifest = write_shards(
        [samples[0], broken, samples[2]], tmp_path / "out", name="made", excluded=excluded, progress=False
    )
    assert read(tmp_path / "out", manifest) == [samples[0], samples[2]]
    assert Manifest.load(tmp_path / "out").excluded == {"empty caption": 2, BROKEN_RECORD: 1} == dict(excluded)
    assert "sample_0001" in caplog.text


def test_what_the_source_excludes_while_it_is_read_is_in_the_manifest(tmp_path: Path) -> None:
    excluded: Counter[str] = Counter()

    def source() -> Iterator[Sample]:
        for number, sample in enumerate(make_samples(6)):
            if number % 2:
                excluded["odd"] += 1
            else:
                yield sample

    manifest = write_shards(source(), tmp_path / "out", name="made", excluded=excluded, progress=False)
    assert manifest.excluded == {"odd": 3}
    # The file keeps the name that it had before 0.2: shards that users have prepared stay readable.
    assert json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["left_out"] == {"odd": 3}
    assert Manifest.load(tmp_path / "out").samples == 3


def test_a_duplicate_key_is_an_error_that_names_it_and_leaves_nothing(tmp_path: Path) -> None:
    samples = [*make_samples(6), make_sample(2)]
    with pytest.raises(ShardError, match=r"'sample_0002' comes twice \(now from made/2\)"):
        write(tmp_path / "out", samples)
    assert list(tmp_path.iterdir()) == []


def test_no_sample_at_all_is_an_error_that_tells_what_was_excluded(tmp_path: Path) -> None:
    broken = dataclasses.replace(make_sample(0), captions=())
    with pytest.raises(ShardError, match=r"no sample to write for 'made'; excluded: \{'broken record': 1\}"):
        write(tmp_path / "out", [broken])
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def source() -> Iterator[Sample]:
        yield from make_samples(6)
        raise RuntimeError("the disk of the source failed")

    with pytest.raises(RuntimeError, match="the disk of the source failed"):
        write_shards(source(), tmp_path / "out", name="made", samples_per_shard=4, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_preparing_that_is_told_to_end_clears_away_what_is_half_made(tmp_path: Path) -> None:
    arguments = ["prepare", "shapes", f"--out={tmp_path / 'out'}", "--train=1000000"]
    process = start(arguments, tmp_path / "log")
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.tar")) and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    assert [path for path in tmp_path.rglob("*") if path.name not in ("log", "out")] == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_killed_halfway_leaves_no_half_made_folder(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from typing import Any
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
    "-x.tar",
    "",
    "http://host/x.tar",
    "{0..9}.tar",
    "$HOME.tar",
]


def test_hostile_shard_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "out", make_samples(2))
    path = tmp_path / "out" / MANIFEST_NAME
    record = json.loads(path.read_text())
    for name in HOSTILE_NAMES:
        record["shards"][0]["name"] = name
        path.write_text(json.dumps(record))
        with pytest.raises(ShardError, match=r"manifest\.json: shard name .* is not allowed"):
            Manifest.load(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


WRONG_MANIFESTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda record: record.update(version=99), "schema version 99, expected 1"),
    *(
        (change, rf"field missing or of the wrong type \(.*{place}")
        for change, place in (
            (lambda record: record.pop("labels"), "labels"),
            (lambda record: record.update(shards=7), "shards"),
            (lambda record: record.update(shards=["shard-000000.tar"]), "shards"),
            (lambda record: record.update(name=None), "name"),
            (lambda record: record.update(labels=[1, "cat"]), "labels"),
            (lambda record: record.update(captions="many"), "captions"),
            (lambda record: record.update(left_out={"x": -1}), "left_out"),
            (lambda record: record["shards"][0].update(name=3), "name"),
            (lambda record: record["shards"][0].update(samples=0), "samples"),
            (lambda record: record["shards"][0].update(samples=True), "samples"),
            (lambda record: record["shards"][0].update(sha256="ABC"), "sha256"),
        )
    ),
    (lambda record: record.update(shards=[]), "no shard is listed"),
    (lambda record: record.update(shards=record["shards"] * 2), "a shard is listed twice"),
    (lambda record: record.update(labels=["dog", "cat"]), "'labels' are not sorted texts"),
]


def test_a_wrong_manifest_is_refused_with_file_and_remedy(tmp_path: Path) -> None:
    write(tmp_path, make_samples(2))
    whole = (tmp_path / MANIFEST_NAME).read_text()
    for change, message in WRONG_MANIFESTS:
        (tmp_path / MANIFEST_NAME).write_text(whole)
        edit_manifest(tmp_path, change)
        with pytest.raises(ShardError, match=rf"{MANIFEST_NAME}: .*{message}.*again"):
            Manifest.load(tmp_path)


def test_a_missing_or_broken_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"manifest\.json: not found; check the path, or make the shards"):
        Manifest.load(tmp_path)
    for broken in (b"{", b"\xff\xfe", b"[" * 100_000, b"[]"):
        (tmp_path / MANIFEST_NAME).write_bytes(broken)
        with pytest.raises(ShardError, match=r"manifest\.json: (broken JSON|schema version None).*again"):
            Manifest.load(tmp_path)


def test_missing_and_resized_shards_are_found_at_loading_all_at_once(tmp_path: Path) -> None:
    write(tmp_path, make_samples(12))
    size = (tmp_path / "shard-000001.tar").stat().st_size
    with (tmp_path / "shard-000001.tar").open("ab") as file:
        file.write(b"x")
    (tmp_path / "shard-000002.tar").unlink()
    told = (
        f"{tmp_path}: 2 of 3 shards are not as manifest.json says: shard-000001.tar has {size + 1:,} bytes, not "
        f"{size:,}; shard-000002.tar is missing. Copy them again, or prepare the shards again"
    )
    with pytest.raises(ShardError) as caught:
        Manifest.load(tmp_path)
    assert str(caught.value) == told
    assert Manifest.read(tmp_path).samples == 12


def test_the_description_lists_the_reasons_by_number() -> None:
    entry = ShardEntry("a.tar", 12_345, 2_500_000_000, "0" * 64)
    text = describe(Manifest("coco-val", (entry,), ("cat",), {"rare": 1, "frequent": 1_234}, 61_725))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["coco-val"]
    assert ["samples", "12,345"] in lines
    assert ["bytes", "2.50", "GB"] in lines
    assert lines[-3:] == [["excluded", "1,235"], ["frequent", "1,234"], ["rare", "1"]]
