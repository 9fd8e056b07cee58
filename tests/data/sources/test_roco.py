from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from image_files import HTML, jpeg
from source_files import SourceTests, World


class RocoWorld(World):
    source = "roco"
    advice = "Check that the images were fetched"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "validation/radiology/images")
        self.add_image("ROCO_00002")
        (self.images.parent / "keywords.txt").write_text("ROCO_00002\tct\n")
        self.content = b'ROCO_00002\t Computed tomography scan, "axial" view.\n'

    def add_image(self, name: str, data: bytes | None = None) -> None:
        (self.images / f"{name}.jpg").write_bytes(jpeg(mode="L") if data is None else data)

    def refer_to(self, name: str) -> None:
        self.content += f"{name.removesuffix('.jpg')}\ta caption\n".encode()

    def entries(self) -> int:
        return self.content.count(b"\n")

    def options(self) -> dict[str, Any]:
        (self.images.parent / "captions.txt").write_bytes(self.content)
        return {"folder": self.folder, "split": "validation"}


@pytest.fixture
def world(tmp_path: Path) -> RocoWorld:
    return RocoWorld(tmp_path)


class TestSource(SourceTests):
    pass


def test_rows_become_samples_in_order(world: RocoWorld) -> None:
    world.add_image("ROCO_00001", jpeg((30, 40)))
    world.content += "ROCO_00001\tArrows\tat 5 µm\r\n".encode()
    (first, second), excluded = world.read()
    assert (first.key, first.source) == ("ROCO_00002", "roco/validation/ROCO_00002.jpg")
    assert first.captions == ('Computed tomography scan, "axial" view.',)
    assert (first.size, first.image, first.regions) == ((40, 30), jpeg(mode="L"), ())
    assert (second.captions, second.size) == (("Arrows\tat 5 µm",), (30, 40))
    assert excluded == {}


def test_bad_rows_are_counted_and_the_rest_survives(world: RocoWorld) -> None:
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


def test_another_split_is_an_error_that_lists_those_there(world: RocoWorld) -> None:
    with pytest.raises(ValueError, match=r"no split 'val' .*it has \['validation'\]"):
        world.read(split="val")
    with pytest.raises(ValueError, match="it has none"):
        world.read(folder=world.images)
