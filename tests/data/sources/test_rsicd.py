from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from image_files import HTML, UNSAFE_NAMES, jpeg
from source_files import prepare, read_all

from lightning_xai.data.sample import Sample
from lightning_xai.data.sources.rsicd import read_rsicd


class World:
    """RSICD in its publishers' format; tests add images before it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "RSICD_images"
        self.images.mkdir(parents=True)
        self.dataset: dict[str, Any] = {"dataset": "rsicd", "images": []}
        self.add("airport_1.jpg", "train", ["Many planes .", "many planes are parked", "Many planes ."])
        self.add("viaduct_7.jpg", "test", ["a viaduct"])

    def add(self, name: str, split: str, raws: list[Any], data: bytes | None = None) -> None:
        number = len(self.dataset["images"])
        sentences = [{"tokens": [], "raw": raw, "imgid": number, "sentid": index} for index, raw in enumerate(raws)]
        record = {"filename": name, "imgid": number, "sentences": sentences, "split": split, "sentids": [0]}
        self.dataset["images"].append(record)
        if "/" not in name and "\\" not in name and "\0" not in name:
            (self.images / name).write_bytes(jpeg((224, 224)) if data is None else data)

    def read(self, split: str = "train") -> tuple[list[Sample], dict[str, int]]:
        return read_all(read_rsicd, images=self.images, karpathy=self.path(), split=split)

    def path(self) -> Path:
        path = self.folder / "dataset_rsicd.json"
        path.write_text(json.dumps(self.dataset))
        return path


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_images_of_a_split_with_all_their_captions(world: World) -> None:
    (sample,), excluded = world.read()
    assert (sample.key, sample.size, sample.source) == ("airport_1", (224, 224), "rsicd/train/airport_1.jpg")
    assert sample.captions == ("Many planes .", "many planes are parked", "Many planes .")
    assert (sample.image, sample.regions) == (jpeg((224, 224)), ())
    assert excluded == {}
    assert [sample.key for sample in world.read("test+train")[0]] == ["airport_1", "viaduct_7"]


def test_bad_images_and_captions_are_counted_and_the_rest_survives(world: World) -> None:
    world.add("broken.jpg", "train", ["a field"], HTML)
    world.add("missing.jpg", "train", ["a field"])
    (world.images / "missing.jpg").unlink()
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


def test_file_names_that_leave_the_images_folder_are_never_opened(world: World) -> None:
    secret = world.folder / "secret.jpg"
    secret.write_bytes(jpeg())
    names = [name for name in UNSAFE_NAMES if not name.startswith("C:")]  # a file here, which `add` would write
    for name in names:
        world.add(name.format(absolute=secret), "train", ["a secret"])
    samples, excluded = world.read()
    assert len(samples) == 1
    assert excluded == {"image_name_unsafe": len(names)}


def test_nonsense_is_an_error_that_says_what_was_expected(world: World) -> None:
    with pytest.raises(ValueError, match=r"no split 'val'; it has \['test', 'train'\]"):
        world.read("val")
    with pytest.raises(FileNotFoundError, match=r"^images: .*nowhere"):
        read_all(read_rsicd, images=world.folder / "nowhere", karpathy=world.path(), split="train")
    world.dataset = {"info": {}}
    with pytest.raises(ValueError, match="missing required field `images`"):
        world.read()


def test_no_image_at_all_is_an_error_that_says_why(world: World) -> None:
    (world.images / "airport_1.jpg").unlink()
    with pytest.raises(ValueError, match=r"image_missing.*belong to .*dataset_rsicd\.json"):
        world.read()


def test_shards_are_written_and_read_back(world: World) -> None:
    world.add("broken.jpg", "train", ["a field"], HTML)
    samples, excluded = world.read()
    options = {"images": world.images, "karpathy": world.path(), "split": "train"}
    manifest, stored = prepare("rsicd", world.folder / "out", **options)
    assert (manifest.name, manifest.captions, stored) == ("rsicd/train", 3, samples)
    assert manifest.excluded == excluded == {"image_does_not_decode": 1}
