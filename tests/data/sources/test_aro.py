from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import HTML, jpeg
from PIL import Image
from source_files import SourceTests, World

from lightning_xai.data.sample import WrongCaption

LEFT = ("the man is to the left of the dog", "the dog is to the left of the man")


def noise(size: tuple[int, int]) -> bytes:
    """A JPEG file of random pixels."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


class AroWorld(World):
    source = "aro"
    advice = "Check that it is ARO's file"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.records: list[Any] = []
        self.add("2415036.jpg", (5, 4, 20, 10), *LEFT, relation_name="to the left of", data=noise((40, 30)))

    def add(
        self, name: str, box: tuple[int, ...], true: Any, wrong: Any, data: bytes | None = None, **more: Any
    ) -> None:
        sides = {f"bbox_{side}": value for side, value in zip("xywh", box, strict=True)}
        record = {"image_id": "7", "image_path": name, "true_caption": true, "false_caption": wrong}
        self.records.append(record | sides | more)
        if data is not None:
            (self.images / name).write_bytes(data)

    def refer_to(self, name: str) -> None:
        self.add(name, (0, 0, 9, 9), "the red car", "the blue car", attributes=["red", "blue"])

    def entries(self) -> int:
        return len({str([record["image_path"], record["bbox_x"]]) for record in self.records})

    def options(self) -> dict[str, Any]:
        return {"images": self.images, "annotations": self.json("visual_genome_relation.json", self.records)}


@pytest.fixture
def world(tmp_path: Path) -> AroWorld:
    return AroWorld(tmp_path)


class TestSource(SourceTests):
    def test_a_broken_json_file_is_named_with_its_option_and_the_place(self, world: World) -> None:
        with pytest.raises(ValueError, match=r"^annotations: .*: Expected `array`, got `object`; is it ARO's"):
            world.read(annotations=world.json("other.json", {}))


def test_a_part_of_an_image_is_cut_out_without_loss(world: AroWorld) -> None:
    world.add("2415036.jpg", (5, 4, 20, 10), "the black dog", "the white dog", attributes=["black", "white"])
    world.add("2415036.jpg", (-3, 20, 20, 99), *LEFT, relation_name="near")
    (sample, edge), excluded = world.read()
    assert excluded == {}
    assert (sample.key, sample.source) == ("2415036-5-4-20-10", "aro/2415036.jpg")
    assert sample.captions == (LEFT[0], "the black dog")
    wrong = (WrongCaption(LEFT[1], 0, "to the left of"), WrongCaption("the white dog", 1, "black_white"))
    assert sample.wrong_captions == wrong
    whole = np.asarray(Image.open(io.BytesIO(noise((40, 30)))).convert("RGB"))
    assert sample.size == (20, 10)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), whole[4:14, 5:25])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(edge.image))), whole[20:, :17])


def test_bad_images_and_pairs_are_counted_and_the_rest_survives(world: AroWorld) -> None:
    samples, _ = world.read()
    world.add("broken.jpg", (0, 0, 9, 9), *LEFT, data=HTML)
    world.add("outside.jpg", (40, 0, 9, 9), *LEFT, data=jpeg())
    world.add("flat.jpg", (4, 4, 0, 9), *LEFT, data=jpeg())
    world.add("silent.jpg", (4, 4, 5, 9), "", "the dog", data=jpeg())
    world.add("same.jpg", (4, 4, 5, 9), "the dog", "the dog", data=jpeg())
    world.add("text.jpg", ("left", 4, 5, 9), *LEFT, data=jpeg())  # type: ignore[arg-type]
    assert world.read() == (
        samples,
        {
            "image_does_not_decode": 1,
            "image_part_outside": 2,
            "image_without_choice": 2,
            "choice_caption_empty": 1,
            "choice_captions_equal": 1,
            "choice_malformed": 1,
        },
    )
