from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from image_files import HTML, UNSAFE_NAMES, jpeg

from lightning_xai.cli import main
from lightning_xai.data.sample import Sample, encode_sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shards import Manifest
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
        left_out: Counter[str] = Counter()
        samples = list(read_rsicd(self.images, self.path(), split, left_out))
        for sample in samples:
            encode_sample(sample)  # every sample keeps the contract
        return samples, dict(+left_out)

    def path(self) -> Path:
        path = self.folder / "dataset_rsicd.json"
        path.write_text(json.dumps(self.dataset))
        return path


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_images_of_a_split_with_all_their_captions(world: World) -> None:
    (sample,), left_out = world.read()
    assert (sample.key, sample.size, sample.source) == ("airport_1", (224, 224), "rsicd/train/airport_1.jpg")
    assert sample.captions == ("Many planes .", "many planes are parked", "Many planes .")
    assert (sample.image, sample.regions) == (jpeg((224, 224)), ())
    assert left_out == {}
    assert [sample.key for sample in world.read("test+train")[0]] == ["airport_1", "viaduct_7"]


def test_bad_images_and_captions_are_counted_and_the_rest_survives(world: World) -> None:
    world.add("broken.jpg", "train", ["a field"], HTML)
    world.add("missing.jpg", "train", ["a field"])
    (world.images / "missing.jpg").unlink()
    world.add("silent.jpg", "train", ["", None])
    world.add("port.tif", "train", [" ", "a port"])
    world.add("airport_1.jpg", "train", ["again"])
    samples, left_out = world.read()
    assert [sample.captions for sample in samples[1:]] == [("a port",)]
    assert left_out == {
        "image_does_not_decode": 1,
        "image_missing": 1,
        "image_without_caption": 1,
        "caption_empty": 3,
        "image_twice": 1,
    }


@pytest.mark.parametrize("name", [*UNSAFE_NAMES[:3], *UNSAFE_NAMES[4:]])
def test_a_file_name_that_leaves_the_images_folder_is_never_opened(world: World, name: str) -> None:
    secret = world.folder / "secret.jpg"
    secret.write_bytes(jpeg())
    world.add(name.format(absolute=secret), "train", ["a secret"])
    samples, left_out = world.read()
    assert len(samples) == 1
    assert left_out == {"image_name_unsafe": 1}


def test_nonsense_is_an_error_that_says_what_was_expected(world: World) -> None:
    with pytest.raises(ValueError, match=r"no split 'val'; it has \['test', 'train'\]"):
        world.read("val")
    with pytest.raises(FileNotFoundError, match=r"^images: .*nowhere"):
        read_rsicd(world.folder / "nowhere", world.path(), "train")
    world.dataset = {"info": {}}
    with pytest.raises(ValueError, match="has no list 'images'"):
        world.read()


def test_no_image_at_all_is_an_error_that_says_why(world: World) -> None:
    (world.images / "airport_1.jpg").unlink()
    with pytest.raises(ValueError, match=r"image_missing.*belong to .*dataset_rsicd\.json"):
        world.read()


def test_shards_are_written_and_read_back(world: World) -> None:
    world.add("broken.jpg", "train", ["a field"], HTML)
    samples, _ = world.read()
    out = world.folder / "out"
    options = {"images": world.images, "karpathy": world.path(), "split": "train", "out": out}
    main(["prepare", "rsicd", *(f"--{option}={value}" for option, value in options.items())])
    manifest = Manifest.load(out)
    assert (manifest.name, manifest.captions) == ("rsicd/train", 3)
    assert manifest.left_out == {"image_does_not_decode": 1}
    assert [sample for _, sample in read_samples(out, manifest, [0], 0, 1)] == samples
