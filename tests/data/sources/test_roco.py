from __future__ import annotations

from pathlib import Path

import pytest
from image_files import HTML, UNSAFE_NAMES, jpeg
from source_files import prepare, read_all

from lightning_xai.data.sample import Sample
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
        return read_all(read_roco, folder=self.folder, split="validation")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "roco")


def test_rows_become_samples_in_order(world: World) -> None:
    world.add_image("ROCO_00001", jpeg((30, 40)))
    world.content += "ROCO_00001\tArrows\tat 5 µm\r\n".encode()
    (first, second), excluded = world.read()
    assert (first.key, first.source) == ("ROCO_00002", "roco/validation/ROCO_00002.jpg")
    assert first.captions == ('Computed tomography scan, "axial" view.',)
    assert (first.size, first.image, first.regions) == ((40, 30), jpeg(mode="L"), ())
    assert (second.captions, second.size) == (("Arrows\tat 5 µm",), (30, 40))
    assert excluded == {}


def test_bad_rows_are_counted_and_the_rest_survives(world: World) -> None:
    world.add_image("ROCO_00009", HTML)
    world.content += b"ROCO_00003\tnever fetched\n\tno id\nROCO_00009\tno image\nROCO_00002\tagain\n"
    world.content += b"ROCO_00002\t \nROCO_00002 no tab\nROCO_00002\t5 \xb5m\n"
    samples, excluded = world.read()
    assert [sample.key for sample in samples] == ["ROCO_00002"]
    assert excluded == {
        "image_missing": 2,
        "image_does_not_decode": 1,
        "image_twice": 1,
        "caption_empty": 1,
        "image_without_caption": 1,
        "row_malformed": 1,
        "row_not_utf8": 1,
    }


def test_ids_that_leave_the_images_folder_are_never_opened(world: World) -> None:
    secret = world.images.parent / "secret.jpg"
    secret.write_bytes(jpeg())
    for name in UNSAFE_NAMES:
        world.content += f"{name.format(absolute=secret).removesuffix('.jpg')}\ta secret\n".encode()
    samples, excluded = world.read()
    assert len(samples) == 1
    assert excluded == {"image_name_unsafe": len(UNSAFE_NAMES)}


def test_another_split_is_an_error_that_lists_those_there(world: World) -> None:
    world.read()
    with pytest.raises(ValueError, match=r"no split 'val' .*it has \['validation'\]"):
        read_all(read_roco, folder=world.folder, split="val")
    with pytest.raises(ValueError, match="it has none"):
        read_all(read_roco, folder=world.images, split="val")
    with pytest.raises(FileNotFoundError, match=r"^folder: .*nowhere"):
        read_all(read_roco, folder=world.folder / "nowhere", split="val")


def test_no_image_at_all_is_an_error_that_says_why(world: World) -> None:
    (world.images / "ROCO_00002.jpg").unlink()
    with pytest.raises(ValueError, match=r"image_missing.*Check that the images were fetched"):
        world.read()


def test_shards_are_written_and_read_back(world: World) -> None:
    world.content += b"ROCO_00003\tnever fetched\n"
    samples, excluded = world.read()
    manifest, stored = prepare("roco", world.folder / "out", folder=world.folder, split="validation")
    assert (manifest.name, stored) == ("roco/validation", samples)
    assert manifest.excluded == excluded == {"image_missing": 1}
