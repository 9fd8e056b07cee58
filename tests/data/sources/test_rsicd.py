from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from image_files import HTML, jpeg
from source_files import SourceTests, World


class RsicdWorld(World):
    source = "rsicd"
    advice = r"belong to .*dataset_rsicd\.json"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "RSICD_images")
        self.dataset: dict[str, Any] = {"dataset": "rsicd", "images": []}
        self.add("airport_1.jpg", "train", ["Many planes .", "many planes are parked", "Many planes ."])
        self.add("viaduct_7.jpg", "test", ["a viaduct"])

    def add(self, name: str, split: str, raws: list[Any], data: bytes | None = None) -> None:
        self.refer_to(name, split, raws)
        (self.images / name).write_bytes(jpeg((224, 224)) if data is None else data)

    def refer_to(self, name: str, split: str = "train", raws: Sequence[Any] = ("a field",)) -> None:
        number = len(self.dataset["images"])
        sentences = [{"tokens": [], "raw": raw, "imgid": number, "sentid": index} for index, raw in enumerate(raws)]
        record = {"filename": name, "imgid": number, "sentences": sentences, "split": split, "sentids": [0]}
        self.dataset["images"].append(record)

    def entries(self) -> int:
        return sum(image["split"] == "train" for image in self.dataset["images"])

    def options(self) -> dict[str, Any]:
        return {"images": self.images, "karpathy": self.json("dataset_rsicd.json", self.dataset), "split": "train"}


@pytest.fixture
def world(tmp_path: Path) -> RsicdWorld:
    return RsicdWorld(tmp_path)


class TestSource(SourceTests):
    pass


def test_images_of_a_split_with_all_their_captions(world: RsicdWorld) -> None:
    (sample,), excluded = world.read()
    assert (sample.key, sample.size, sample.source) == ("airport_1", (224, 224), "rsicd/train/airport_1.jpg")
    assert sample.captions == ("Many planes .", "many planes are parked", "Many planes .")
    assert (sample.image, sample.regions) == (jpeg((224, 224)), ())
    assert excluded == {}
    assert [sample.key for sample in world.read(split="test+train")[0]] == ["airport_1", "viaduct_7"]


def test_bad_images_and_captions_are_counted_and_the_rest_survives(world: RsicdWorld) -> None:
    world.add("broken.jpg", "train", ["a field"], HTML)
    world.refer_to("missing.jpg")
    world.add("silent.jpg", "train", ["", None])
    world.add("port.tif", "train", [" ", "a port"])
    world.add("airport_1.jpg", "train", ["again"])
    samples, excluded = world.read()
    assert [sample.captions for sample in samples[1:]] == [("a port",)]
    assert excluded == {
        "image_does_not_decode": 1,
        "image_missing": 1,
        "image_without_caption": 1,
        "caption_empty": 3,
        "image_twice": 1,
    }
