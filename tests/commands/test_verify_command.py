from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from captioned_shards import make_samples, make_shards
from damaged_shards import damage_image, make_damaged, rewrite, shard_path

from lightning_xai.cli import main
from lightning_xai.commands.verify import Verify
from lightning_xai.data.sample import RecordError
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shards import Manifest, write_shards
from lightning_xai.data.verification import read_reports


def reported(place: Path | str, quick: bool = False, workers: int = 0) -> str:
    """What the command fails with."""
    with pytest.raises(ValueError, match=r"\d fault|manifest\.json: ") as caught:
        Verify([str(place)], quick=quick, workers=workers, retries=0)()
    return str(caught.value)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    folder = make_damaged(tmp_path / "damaged")
    shard_path(folder, 5).unlink()
    return folder


@pytest.mark.parametrize(("quick", "workers"), [(False, None), (True, 2), (False, 0)])
def test_sound_shards_are_ok(
    shards: Path, quick: bool, workers: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    Verify([str(shards)], quick=quick, workers=workers)()
    shown = capsys.readouterr()
    assert shown.out.startswith("ok: 57 samples in 6 shards")
    assert ("--quick decodes nothing" in shown.out) == quick
    assert shown.out.count("\n") == 1
    assert "57/57" in shown.err


def test_as_many_processes_read_as_there_are_cores_that_may_be_used(
    shards: Path, one_core: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(*args: Any, workers: int, **options: Any) -> Any:
        asked.append(workers)
        return read_reports(*args, workers=0, **options)

    monkeypatch.setattr("lightning_xai.data.verification.read_reports", counted)
    Verify([str(shards)])()
    assert asked == [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_that_is_wrong_is_reported_by_shard(
    damaged: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    error = reported(damaged, workers=workers)
    assert error == (
        f"{damaged}: 10 faults in shard-000004.tar (4 unreadable shard, 1 wrong checksum), shard-000001.tar (1 corrupt "
        "image, 1 wrong checksum), shard-000002.tar (1 member without its pair), shard-000003.tar (1 duplicate key), "
        "shard-000005.tar (1 missing shard). Copy these shards again from where they are whole, or prepare the data "
        "again"
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"{damaged}:",
        "shard             fault                    count",
        "shard-000004.tar  unreadable shard             4",
    ]
    (lost,) = (line for line in lines if "are lost" in line)
    assert lost == "shard-000004.tar: 4 of 10 records are lost (a header is damaged)"
    assert sum("the image does not decode" in line for line in lines) == 1
    assert "shard-000005.tar is missing" in lines
    assert not any("more" in line for line in lines)


def test_quick_looks_at_sizes_and_checksums_alone(damaged: Path) -> None:
    with shard_path(damaged, 0).open("ab") as file:
        file.write(b"x")
    assert (
        "4 faults in shard-000000.tar (1 wrong size), shard-000001.tar (1 wrong checksum), shard-000004.tar (1 wrong "
        "checksum), shard-000005.tar (1 missing shard)."
    ) in reported(damaged, quick=True)


def test_a_broken_image_is_found_though_the_checksum_is_right(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", 30, broken=[17])
    Verify([str(folder)], quick=True, workers=0)()
    assert "1 fault in shard-000001.tar (1 corrupt image)." in reported(folder)


def test_a_mask_that_does_not_fit_its_image_is_found_though_the_record_is_read(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", 3)

    def with_mask(name: str, data: bytes) -> bytes:
        if name != "k1.json":
            return data
        record = json.loads(data)
        record["regions"][0]["mask"] = {"size": [12, 12], "counts": "o" * 30}
        return json.dumps(record).encode()

    rewrite(folder, 0, lambda members: [(name, with_mask(name, data)) for name, data in members])
    assert "1 fault in shard-000000.tar (1 broken record" in reported(folder)
    items = [item for _, item in read_samples(folder, Manifest.load(folder), [0], 0, 3)]
    assert not any(isinstance(item, RecordError) for item in items)


def test_one_changed_byte_between_the_records_is_found(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", 20)
    data = bytearray(shard_path(folder, 1).read_bytes())
    data[-1] ^= 1  # after the end of the archive, where tar does not look
    shard_path(folder, 1).write_bytes(data)
    assert "1 fault in shard-000001.tar (1 wrong checksum)." in reported(folder)


def test_a_key_in_two_shards_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_shards(tmp_path / "s", 30)
    rewrite(folder, 2, lambda members: [(name.replace("k23.", "k4."), data) for name, data in members])
    assert "1 fault in shard-000002.tar (1 duplicate key)." in reported(folder, workers=2)
    assert "shard-000002.tar: record 3 has the key of record 4 of shard-000000.tar (from 0)" in capsys.readouterr().out


def test_too_many_and_too_few_records_are_found(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", 30)
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard, samples in enumerate((8, 10, 11)):
        manifest["shards"][shard]["samples"] = samples
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "3 faults in shard-000000.tar (2 wrong count), shard-000002.tar (1 unreadable shard)." in reported(folder)


def test_members_that_no_sample_is_made_of_are_counted_by_shard(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", 20)
    rewrite(
        folder,
        1,
        lambda members: [
            (name.replace(".", ".v1.") if n < 4 else name, data) for n, (name, data) in enumerate(members)
        ],
    )
    rewrite(folder, 0, lambda members: [*members, ("._a.jpg", b"x"), ("b.gif", b"x"), (members[0][0] + ".bak", b"x")])
    error = reported(folder)
    assert "4 faults in shard-000000.tar (2 unknown member), shard-000001.tar (2 unreadable shard)" in error
    manifest = Manifest.load(folder)
    items = [item for _, item in read_samples(folder, manifest, [0, 1], 0, 20)]
    faults = [item for item in items if isinstance(item, RecordError)]
    assert len(faults) == 2
    assert "not read: 2" in str(faults[0])


def test_sums_of_the_manifest_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_shards(tmp_path / "s", 10)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"captions": 31, "labels": ["cat"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "2 faults in manifest.json (2 wrong count)" in reported(folder)
    printed = capsys.readouterr().out
    assert "manifest.json says captions: 31, the shards hold 30" in printed
    assert "manifest.json says labels: ('cat',), the shards hold ('cat', 'dog')" in printed


def test_a_folder_of_sets_and_several_sets_are_all_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("train", 20), ("val", 10)):
        make_shards(tmp_path / "set" / name, count)
    Verify([str(tmp_path / "set")], workers=0)()
    assert capsys.readouterr().out == "ok: 30 samples in 3 shards\n"
    damage_image(tmp_path / "set" / "val", 0, 0)
    (tmp_path / "set" / "train" / "manifest.json").write_text("{")
    first, second = reported(tmp_path / "set").splitlines()
    assert "train/manifest.json: broken JSON" in first
    assert "val: 2 faults in shard-000000.tar (1 corrupt image, 1 wrong checksum)" in second


def test_a_folder_without_shards_says_how_to_make_some(tmp_path: Path) -> None:
    assert "manifest.json: not found; check the path, or make the shards with" in reported(tmp_path)


def test_what_a_command_fetches_is_checked_as_well(damaged: Path, shards: Path) -> None:
    Verify([f"pipe:cat {shards}/{{}}"], workers=0, retries=0)()
    error = reported(f"pipe:cat {damaged}/{{}}")
    assert "shard-000001.tar (1 corrupt image, 1 wrong checksum)" in error
    assert "shard-000005.tar (10 unreadable shard)" in error


def test_many_faults_are_counted_and_ten_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(make_samples(30, broken=range(12)), tmp_path / "s", name="s", samples_per_shard=10, progress=False)
    error = reported(tmp_path / "s")
    assert "12 faults in shard-000000.tar (10 corrupt image), shard-000001.tar (2 corrupt image)." in error
    printed = capsys.readouterr().out
    assert printed.count("does not decode") == 10
    assert printed.endswith("and 2 more\n")


def test_the_command_line_ends_with_status_one_and_the_reason(
    damaged: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", str(shards), "--workers", "0"])
    assert capsys.readouterr().out == "ok: 57 samples in 6 shards\n"
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(shards), str(damaged), "--quick", "--workers=0"])
    # A text as the exit's code is printed, with status 1.
    assert f"lightning_xai verify: {damaged}: 3 faults in shard-000001.tar (1 wrong checksum), " in str(
        caught.value.code
    )
    assert "ok" not in capsys.readouterr().out
