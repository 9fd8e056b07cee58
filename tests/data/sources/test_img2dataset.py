from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import HTML, jpeg
from PIL import ExifTags, Image
from source_files import World

from lightning_xai.data.sample import decode_image, read_image

Members = list[tuple[str, bytes]]

NO_CAPTION = {"caption_empty": 1, "image_without_caption": 1}


def about(key: str, **changes: Any) -> bytes:
    """The .json member, as img2dataset writes it."""
    record = {
        "caption": f"caption of {key}",
        "url": "http://example.org/a.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 40,
        "height": 30,
        "original_width": 400,
        "original_height": 300,
        "exif": "{}",
        "sha256": "0" * 64,
    }
    return json.dumps(record | changes, indent=4).encode()


def triple(key: str, caption: str = "a bus", image: bytes | None = None, **changes: Any) -> Members:
    return [
        (f"{key}.jpg", jpeg() if image is None else image),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", about(key, **changes)),
    ]


class TarWorld(World):
    """A folder as img2dataset leaves it, with side files; tests write tar files before it is read."""

    source = "conceptual-captions"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "_tmp")
        (folder / "00000.parquet").write_bytes(b"PAR1")
        (folder / "00000_stats.json").write_text('{"count": 10, "successes": 1}')
        self.write("00000", triple("000000001"))

    def write(self, name: str, members: Members) -> Path:
        path = self.folder / f"{name}.tar"
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        return path

    def options(self) -> dict[str, Any]:
        return {"shards": self.folder, "split": "val"}


@pytest.fixture
def world(tmp_path: Path) -> TarWorld:
    return TarWorld(tmp_path / "cc3m")


def test_triples_become_samples_in_the_order_of_the_files(world: TarWorld) -> None:
    world.write("00010", triple("000100000", "the last", jpeg((30, 40))))
    world.write("00002", triple("000020000", " in the middle\n"))
    (first, second, third), excluded = world.read()
    assert excluded == {}
    assert (first.key, first.captions, first.size, first.image) == ("00000-000000001", ("a bus",), (40, 30), jpeg())
    assert first.source == "conceptual-captions/val/00000-000000001"
    assert (second.captions, third.captions, third.size) == (("in the middle",), ("the last",), (30, 40))


def test_keys_stay_unique_where_each_file_counts_from_0(world: TarWorld) -> None:
    world.write("00001", triple("000000001"))
    samples, excluded = world.read()
    assert [sample.key for sample in samples] == ["00000-000000001", "00001-000000001"]
    assert excluded == {}


def test_other_image_formats_and_names_in_folders_are_read(world: TarWorld) -> None:
    world.write("00001", [("../../a b.webp", jpeg()), ("../../a b.TXT", b"a bus"), ("../../a b.cls", b"7")])
    (_, sample), excluded = world.read()
    assert (sample.captions, excluded) == (("a bus",), {})
    assert ".." not in sample.key + sample.source


def test_the_json_gives_the_caption_where_there_is_no_text(world: TarWorld) -> None:
    world.write("00001", [member for member in triple("9") if not member[0].endswith("txt")])
    (_, sample), excluded = world.read()
    assert sample.captions == ("caption of 9",)
    assert excluded == {}


@pytest.mark.parametrize(
    ("members", "reasons"),
    [
        (triple("9", status="failed_to_download"), {"image_not_fetched": 1}),
        (triple("9", status=None), {"image_not_fetched": 1}),
        (triple("9")[1:], {"image_missing": 1}),
        (triple("9", image=HTML), {"image_does_not_decode": 1}),
        (triple("9", image=jpeg()[:300]), {"image_does_not_decode": 1}),
        (triple("9", " "), NO_CAPTION),
        (triple("9")[:1], NO_CAPTION),
        ([triple("9")[0], ("9.json", about("9", caption=None))], NO_CAPTION),
        ([triple("9")[0], ("9.json", about("9", caption=["a", "bus"]))], NO_CAPTION),
        ([triple("9")[0], ("9.txt", b"a caf\xe9")], {"caption_not_utf8": 1}),
        ([*triple("9")[:2], ("9.json", b"{")], {"record_malformed": 1}),
        ([*triple("9")[:2], ("9.json", b"[" * 200_000)], {"record_malformed": 1}),
        ([*triple("9")[:2], ("9.json", b"\xff\xfe{}")], {"record_malformed": 1}),
        ([*triple("9")[:2], ("9.json", b"[1]")], {"record_malformed": 1}),
        ([*triple("9"), ("9.png", jpeg())], {"record_malformed": 1}),
        ([*triple("9"), ("9.txt", b"another caption")], {"record_malformed": 1}),
    ],
)  # fmt: skip
def test_bad_records_are_counted_and_the_rest_stays(world: TarWorld, members: Members, reasons: dict[str, int]) -> None:
    world.write("00000", [*members, *triple("last", "a dog")])
    samples, excluded = world.read()
    assert samples[-1].captions == ("a dog",)
    assert "9" not in {sample.key.rpartition("-")[2] for sample in samples}
    assert excluded == reasons


def test_a_name_that_comes_back_is_no_second_image(world: TarWorld) -> None:
    world.write("00000", [*triple("9"), *triple("8"), *triple("9", "comes back")])
    samples, excluded = world.read()
    assert [sample.captions for sample in samples] == [("a bus",), ("a bus",)]
    assert excluded == {"record_malformed": 1}


def test_what_could_run_or_be_unpickled_is_never_looked_at(world: TarWorld) -> None:
    world.write(
        "00001", [("9.pyd", b"cos\nsystem\n(S'touch owned'\ntR."), ("pipe:touch owned.pickle", b""), *triple("9")]
    )
    samples, excluded = world.read()
    assert [sample.key for sample in samples] == ["00000-000000001", "00001-9"]
    assert excluded == {"member_unknown": 1}
    assert not list(world.folder.rglob("owned*"))


def test_a_truncated_file_gives_what_is_whole_and_is_counted(world: TarWorld, caplog: pytest.LogCaptureFixture) -> None:
    path = world.write("00001", [member for key in "abc" for member in triple(key)])
    with tarfile.open(path) as tar:
        end = tar.getmember("b.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:end])
    world.write("00002", triple("d"))
    samples, excluded = world.read()
    assert [sample.key for sample in samples] == ["00000-000000001", "00001-a", "00002-d"]
    assert excluded == {"shard_damaged": 1}
    assert "00001.tar" in caplog.text


def test_all_that_a_damaged_header_hides_is_counted(world: TarWorld) -> None:
    path = world.write("00001", [member for key in "abcdefg" for member in triple(key)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for number, header in enumerate(headers):
        for place in (3, 130, 150):  # in the name, the size and the checksum
            data = bytearray(whole)
            data[header + place] ^= 4
            path.write_bytes(data)
            samples, excluded = world.read()
            assert len(samples) - 1 == number // 3 + (number == 2)  # the first has image and text; no other is known
            assert excluded == {"shard_damaged": 8 - len(samples)}


def test_a_file_cut_anywhere_is_counted_and_its_stats_tell_how_much_is_lost(world: TarWorld) -> None:
    path = world.write("00001", [member for key in "abcd" for member in triple(key)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(member.offset_data + member.size for member in tar)
    for length in [*range(0, end, 199), *range(512, end, 512)]:
        path.write_bytes(whole[:length])
        samples, excluded = world.read()
        assert excluded["shard_damaged"] >= 1, length
        (world.folder / "00001_stats.json").write_text('{"successes": 4}')
        assert world.read() == (samples, {"shard_damaged": 5 - len(samples)})
        (world.folder / "00001_stats.json").unlink()
    path.unlink()
    (world.folder / "00001_stats.json").write_text('{"successes": 4}')
    assert world.read()[1] == {"shard_damaged": 4}


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_that_only_the_json_keeps_is_applied(world: TarWorld, image_format: str) -> None:
    pixels = Image.effect_noise((40, 30), 80).convert("RGB")
    stated = {
        "Rotated 90 CW": Image.Transpose.ROTATE_270,
        "Rotated 180": Image.Transpose.ROTATE_180,
        "Mirrored horizontal then rotated 90 CCW": Image.Transpose.TRANSPOSE,
        "8": Image.Transpose.ROTATE_90,
        "Horizontal (normal)": None,
        "0": None,
    }
    file = io.BytesIO()
    pixels.save(file, image_format)
    before = np.asarray(read_image(file.getvalue(), "test"))
    extension = image_format.lower()
    members = []
    for number, text in enumerate(stated):
        exif = json.dumps({"Image Make": "x", "Image Orientation": text, "Thumbnail Orientation": "Rotated 180"})
        members += [(f"{number}.{extension}", file.getvalue()), *triple(str(number), exif=exif)[1:]]
    world.write("00001", members)
    (_, *samples), excluded = world.read()
    assert excluded == {}
    for sample, turn in zip(samples, stated.values(), strict=True):
        expected = before if turn is None else np.asarray(Image.fromarray(before).transpose(turn))
        assert np.array_equal(np.asarray(decode_image(sample)), expected)


def test_an_orientation_that_the_file_states_itself_is_applied_once(world: TarWorld) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "JPEG", exif=exif)
    world.write("00001", triple("9", image=file.getvalue(), exif='{"Image Orientation": "Rotated 90 CW"}'))
    (_, sample), _ = world.read()
    assert (sample.image, sample.size) == (file.getvalue(), (30, 40))


@pytest.mark.parametrize("exif", [None, "", "{", "[1]", 3, {"Image Orientation": None}])
def test_an_exif_field_of_any_form_leaves_the_image_as_it_is(world: TarWorld, exif: Any) -> None:
    world.write("00001", triple("9", exif=exif))
    (_, sample), excluded = world.read()
    assert (sample.image, excluded) == (jpeg(), {})


def test_a_caption_that_stands_for_none_is_none(world: TarWorld) -> None:
    world.write("00001", [*triple("8", "nan")[:2], ("8.json", about("8", caption=None)), *triple("9", "None")])
    samples, excluded = world.read()
    assert [sample.captions for sample in samples] == [("a bus",), ("None",)]
    assert excluded == NO_CAPTION


def test_what_follows_the_end_of_a_file_is_counted(world: TarWorld) -> None:
    first, second = (world.write(key, [*triple(key), *triple(f"{key}2")]) for key in "bc")
    first.write_bytes(first.read_bytes() + second.read_bytes())
    second.unlink()
    samples, excluded = world.read()
    assert [sample.key for sample in samples] == ["00000-000000001", "b-b", "b-b2"]
    assert excluded == {"shard_damaged": 2}


@pytest.mark.parametrize(
    "names",
    [
        [f"photo v2.{n} (final){end}" for n in range(3) for end in (".jpg", ".txt")],
        [f"{n:09d}.{end}" for n in range(3) for end in ("input.jpg", "outputs.txt")],
        ["._9.jpg", "README", "7.gif"],
        [f"9.v{n}.{end}" for n in range(3) for end in ("jpg", "json", "seg.png")],
    ],
)
def test_members_that_no_sample_is_made_of_are_counted(
    world: TarWorld, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    world.write("00001", [*((name, jpeg()) for name in names), *triple("9")])
    samples, excluded = world.read()
    assert [sample.key for sample in samples] == ["00000-000000001", "00001-9"]
    assert excluded == {"member_unknown": 3}
    assert f"00001.tar: records read: 1; not read: 3, {names[0]!r} the first" in caplog.text


def test_files_that_are_not_read_are_counted(world: TarWorld) -> None:
    world.write("00001", triple("9")).rename(world.folder / "00001.tar.gz")
    (world.folder / "part").mkdir()
    world.write("part/00002", triple("9"))
    world.prepare()  # its shards lie below, too
    assert world.read()[1] == {"shard_not_read": 2}
    (world.folder / "00000.tar").unlink()
    (world.folder / "00000_stats.json").unlink()
    with pytest.raises(ValueError, match=r"holds no \.tar file, but .*00001\.tar\.gz: unpack compressed files"):
        world.read()


@pytest.mark.parametrize("content", [b"", HTML * 100])
def test_a_file_that_is_no_tar_file_is_counted(world: TarWorld, content: bytes) -> None:
    (world.folder / "00001.tar").write_bytes(content)
    samples, excluded = world.read()
    assert len(samples) == 1
    assert excluded == {"shard_damaged": 1}


def test_a_file_without_a_fetched_image_is_not_damaged(world: TarWorld) -> None:
    world.write("00001", [])
    assert world.read()[1] == {}


def test_shards_are_written_and_read_back(world: TarWorld) -> None:
    world.write("00001", [*triple("9"), *triple("8", status="failed_to_resize")])
    samples, _ = world.read()
    half_a_character = about("7", caption="a bus \ud83d")
    world.write("00002", [triple("7")[0], ("7.json", half_a_character)])
    manifest, stored = world.prepare()
    assert (manifest.name, stored) == ("conceptual-captions/val", samples)
    assert manifest.excluded == {"image_not_fetched": 1, "broken record": 1}


def test_a_folder_without_tar_files_says_what_is_expected(world: TarWorld) -> None:
    with pytest.raises(FileNotFoundError, match=r"^shards: .*nowhere"):
        world.read(shards=world.folder / "nowhere")
    (world.folder / "00000.tar").unlink()
    with pytest.raises(ValueError, match=r"holds no \.tar file.*--output_format webdataset"):
        world.read()
