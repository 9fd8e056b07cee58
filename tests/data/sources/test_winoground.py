from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from image_files import HTML, jpeg
from source_files import SourceTests, World

from lightning_xai.data.sample import WrongCaption

OLD = ("an old person kisses a young person", "a young person kisses an old person")


class WinogroundWorld(World):
    source = "winoground"
    advice = "Check that it is Winoground's file"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.records: list[Any] = []
        self.partner = 0
        self.add("ex_0_img_0", "ex_0_img_1", *OLD, "Relation")

    def add(self, first: str, second: str, *texts: Any, data: bytes | None = None) -> None:
        self.record(first, second, *texts)
        for name in (first, second):
            (self.images / f"{name}.jpg").write_bytes(jpeg() if data is None else data)

    def record(self, first: str, second: str, caption: Any, other: Any, tag: str = "Object") -> None:
        images, captions = {"image_0": first, "image_1": second}, {"caption_0": caption, "caption_1": other}
        more = {"tag": "Adjective-Age", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": tag}
        self.records.append({"id": len(self.records), **images, **captions, **more})

    def refer_to(self, name: str) -> None:
        self.record(name, name, "a dog and a cat", "a cat and a dog")

    def entries(self) -> int:
        return 2 * len(self.records)

    def options(self) -> dict[str, Any]:
        examples = self.folder / "examples.jsonl"
        examples.write_text("".join(f"{json.dumps(record)}\n" for record in self.records))
        return {"images": self.images, "examples": examples}


@pytest.fixture
def world(tmp_path: Path) -> WinogroundWorld:
    return WinogroundWorld(tmp_path)


class TestSource(SourceTests):
    def test_names_that_leave_the_images_folder_are_never_opened(self, world: World) -> None:
        (world.folder / "secret.png").write_bytes(jpeg())
        samples, _ = world.read()
        world.refer_to("../secret")
        world.refer_to(str(world.folder / "secret"))
        assert world.read() == (samples, {"image_name_unsafe": 4})


def test_each_image_chooses_between_both_captions_of_its_pair(world: WinogroundWorld) -> None:
    (first, second), excluded = world.read()
    assert excluded == {}
    assert (first.key, first.group, second.key, second.group) == ("0-0", "0", "0-1", "0")
    assert (first.captions, first.wrong_captions) == ((OLD[0],), (WrongCaption(OLD[1], 0, "Relation"),))
    assert (second.captions, second.wrong_captions) == ((OLD[1],), (WrongCaption(OLD[0], 0, "Relation"),))
    assert first.source == "winoground/ex_0_img_0.jpg"


def test_bad_lines_and_images_are_counted_and_the_rest_survives(world: WinogroundWorld) -> None:
    samples, _ = world.read()
    world.add("a", "b", *OLD, data=HTML)
    (world.images / "b.jpg").write_bytes(jpeg())
    world.add("c", "d", "a dog", " a dog")
    world.records += [{"id": 9}, "no record"]
    assert world.read() == (
        samples,
        {
            "image_does_not_decode": 1,
            "image_without_pair": 1,
            "image_without_choice": 2,
            "choice_captions_equal": 2,
            "row_malformed": 2,
        },
    )
