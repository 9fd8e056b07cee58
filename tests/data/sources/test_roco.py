from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from image_files import HTML, UNSAFE_NAMES, jpeg

from lightning_xai.cli import main
from lightning_xai.data.sample import Sample, encode_sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shards import Manifest
from lightning_xai.data.sources.roco import read_roco


class World:
    """ROCO's folders with one split; tests add rows before it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "validation" / "radiology" / "images"
        self.images.mkdir(parents=True)
        self.add_image("ROCO_00002")
        self.captions = folder / "validation" / "radiology" / "captions.txt"
        (folder / "validation" / "radiology" / "keywords.txt").write_text("ROCO_00002\tct\n")
        self.content = b'ROCO_00002\t Computed tomography scan, "axial" view.\n'

    def add_image(self, name: str, data: bytes | None = None) -> None:
        (self.images / f"{name}.jpg").write_bytes(jpeg(mode="L") if data is None else data)

    def read(self) -> tuple[list[Sample], dict[str, int]]:
        self.captions.write_bytes(self.content)
        left_out: Counter[str] = Counter()
        samples = list(read_roco(self.folder, "validation", left_out))
        for sample in samples:
            encode_sample(sample)  # every sample keeps the contract
        return samples, dict(+left_out)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "roco")


def test_rows_become_samples_in_order(world: World) -> None:
    world.add_image("ROCO_00001", jpeg((30, 40)))
    world.content += "ROCO_00001\tArrows\tat 5 µm\r\n".encode()
    (first, second), left_out = world.read()
    assert (first.key, first.source) == ("ROCO_00002", "roco/validation/ROCO_00002.jpg")
    assert first.captions == ('Computed tomography scan, "axial" view.',)
    assert (first.size, first.image, first.regions) == ((40, 30), jpeg(mode="L"), ())
    assert (second.captions, second.size) == (("Arrows\tat 5 µm",), (30, 40))
    assert left_out == {}


@pytest.mark.parametrize(
    ("row", "reasons"),
    [
        (b"ROCO_00003\tnever fetched", {"image_missing": 1}),
        (b"\tno id", {"image_missing": 1}),
        (b"ROCO_00009\tno image", {"image_does_not_decode": 1}),
        (b"ROCO_00002\tagain", {"image_twice": 1}),
        (b"ROCO_00002\t ", {"caption_empty": 1, "image_without_caption": 1}),
        (b"ROCO_00002 no tab", {"row_malformed": 1}),
        (b"ROCO_00002\t5 \xb5m", {"row_not_utf8": 1}),
    ],
)
def test_bad_rows_are_counted_and_the_rest_survives(world: World, row: bytes, reasons: dict[str, int]) -> None:
    world.add_image("ROCO_00009", HTML)
    world.content += row + b"\n"
    samples, left_out = world.read()
    assert [sample.key for sample in samples] == ["ROCO_00002"]
    assert left_out == reasons


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_an_id_that_leaves_the_images_folder_is_never_opened(world: World, name: str) -> None:
    secret = world.images.parent / "secret.jpg"
    secret.write_bytes(jpeg())
    identity = name.format(absolute=secret).removesuffix(".jpg")
    world.content += f"{identity}\ta secret\n".encode()
    samples, left_out = world.read()
    assert len(samples) == 1
    assert left_out == {"image_name_unsafe": 1}


def test_another_split_is_an_error_that_lists_those_there(world: World) -> None:
    world.read()
    with pytest.raises(ValueError, match=r"no split 'val' .*it has \['validation'\]"):
        read_roco(world.folder, "val")
    with pytest.raises(ValueError, match="it has none"):
        read_roco(world.images, "val")
    with pytest.raises(FileNotFoundError, match=r"^folder: .*nowhere"):
        read_roco(world.folder / "nowhere", "validation")


def test_no_image_at_all_is_an_error_that_says_why(world: World) -> None:
    (world.images / "ROCO_00002.jpg").unlink()
    with pytest.raises(ValueError, match=r"image_missing.*Check that the images were fetched"):
        world.read()


def test_shards_are_written_and_read_back(world: World) -> None:
    world.content += b"ROCO_00003\tnever fetched\n"
    samples, _ = world.read()
    out = world.folder / "out"
    main(["prepare", "roco", "--folder", str(world.folder), "--split", "validation", "--out", str(out)])
    manifest = Manifest.load(out)
    assert (manifest.name, manifest.left_out) == ("roco/validation", {"image_missing": 1})
    assert [sample for _, sample in read_samples(out, manifest, [0], 0, 1)] == samples
