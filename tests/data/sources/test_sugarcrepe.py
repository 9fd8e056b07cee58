from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from image_files import HTML, jpeg
from source_files import SourceTests, World, read_all

from lightning_xai.data.sample import WrongCaption
from lightning_xai.data.sources.sugarcrepe import KINDS, read_sugarcrepe

SHIRT = ("A girl with a green shirt and a blue brush.", "A girl with a blue shirt and a green brush.")


class SugarCrepeWorld(World):
    source = "sugarcrepe"
    advice = r"COCO's val2017 images"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "val2017")
        self.annotations = folder / "sugar-crepe"
        self.annotations.mkdir()
        self.files: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        self.add("000000544519.jpg", "swap_att", *SHIRT)
        self.add("000000057597.jpg", "add_obj", " A dog. ", "A dog and a cat.")
        self.add("000000544519.jpg", "replace_rel", SHIRT[0], "A girl without a green shirt and a blue brush.")
        self.add("000000544519.jpg", "swap_obj", "A girl brushes.", "A brush girls.")

    def add(self, name: str, kind: str, true: Any, wrong: Any, data: bytes | None = None) -> None:
        self.record(kind, {"filename": name, "caption": true, "negative_caption": wrong})
        (self.images / name).write_bytes(jpeg() if data is None else data)

    def record(self, kind: str, record: Any) -> None:
        self.files[kind][str(len(self.files[kind]))] = record

    def refer_to(self, name: str) -> None:
        self.record("add_att", {"filename": name, "caption": "A field", "negative_caption": "A red field"})

    def entries(self) -> int:
        return len({record["filename"] for records in self.files.values() for record in records.values()})

    def options(self) -> dict[str, Any]:
        for kind, records in self.files.items():
            self.json(f"sugar-crepe/{kind}.json", records)
        return {"images": self.images, "annotations": self.annotations}


@pytest.fixture
def world(tmp_path: Path) -> SugarCrepeWorld:
    return SugarCrepeWorld(tmp_path)


class TestSource(SourceTests):
    pass


def test_an_image_has_its_captions_of_all_kinds(world: SugarCrepeWorld) -> None:
    (dog, girl), excluded = world.read()
    assert excluded == {}
    assert (girl.key, girl.source, girl.group) == ("000000544519", "sugarcrepe/000000544519.jpg", "")
    assert girl.captions == (SHIRT[0], "A girl brushes.")
    assert girl.wrong_captions == (
        WrongCaption("A girl without a green shirt and a blue brush.", 0, "replace_rel"),
        WrongCaption(SHIRT[1], 0, "swap_att"),
        WrongCaption("A brush girls.", 1, "swap_obj"),
    )
    assert (dog.captions, dog.wrong_captions) == (("A dog.",), (WrongCaption("A dog and a cat.", 0, "add_obj"),))
    ((only,), _) = world.read(kinds="swap_att")
    assert only.wrong_captions == (WrongCaption(SHIRT[1], 0, "swap_att"),)


def test_bad_images_and_pairs_are_counted_and_the_rest_survives(world: SugarCrepeWorld) -> None:
    samples, _ = world.read()
    world.add("broken.jpg", "add_att", "a", "b", HTML)
    world.add("same.jpg", "add_att", "a field", " a field ")
    world.add("000000057597.jpg", "add_att", "a field", "")
    world.add("000000057597.jpg", "add_att", "a field", 7)
    world.record("add_att", ["no record"])
    assert world.read() == (
        samples,
        {
            "image_does_not_decode": 1,
            "image_without_choice": 1,
            "choice_captions_equal": 1,
            "choice_caption_empty": 1,
            "choice_malformed": 2,
        },
    )


def test_a_missing_file_and_an_unknown_kind_are_refused(world: SugarCrepeWorld) -> None:
    with pytest.raises(ValueError, match=r"^kinds: SugarCrepe has no kind 'swap'; it has .*'swap_att'"):
        world.read(kinds="swap_att+swap")
    options = world.options()
    (world.annotations / "swap_obj.json").write_text("[]")
    with pytest.raises(ValueError, match=r"^annotations: .*swap_obj\.json: Expected `object`, got `array`"):
        read_all(read_sugarcrepe, **options)
    (world.annotations / "swap_obj.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"^annotations: .*swap_obj\.json is not a file; give SugarCrepe's"):
        read_all(read_sugarcrepe, **options)
