from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import jpeg
from PIL import Image
from pycocotools.coco import COCO
from source_files import SourceTests, World, read_all

from lightning_xai.data.masks import decode_mask, encode_mask, mask_runs
from lightning_xai.data.phrase_finder import MentionFinder
from lightning_xai.data.sample import read_image
from lightning_xai.data.sources.coco import read_coco
from lightning_xai.data.sources.coco_classes import read_classes

CATEGORIES = [
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "animal", "id": 18, "name": "dog"},
    {"supercategory": "food", "id": 58, "name": "hot dog"},
]
NAN = float("nan")


class CocoWorld(World):
    source = "coco"
    advice = "belong together"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "val2017")
        self.captions: dict[str, Any] = {"info": {}, "licenses": [], "images": [], "annotations": []}
        self.instances: dict[str, Any] = {**self.captions, "images": [], "annotations": [], "categories": CATEGORIES}
        self.karpathy: dict[str, Any] | None = None
        self.add_image(42, ["A dog eats a hot dog. ", "Two dogs", "A man"])
        self.add_box(42, [1.5, 2.0, 10.0, 5.5], segmentation=[outline((1.5, 2.0, 10.0, 5.5))])

    def add_image(
        self, image_id: int, captions: list[Any], data: bytes | None = None, size: tuple[int, int] = (40, 30)
    ) -> None:
        name = f"{image_id:012d}.jpg"
        record = {"id": image_id, "file_name": name, "width": size[0], "height": size[1], "license": 3}
        self.captions["images"].append(dict(record))
        self.instances["images"].append(dict(record))
        for text in captions:
            self.add_caption(image_id, text)
        (self.images / name).write_bytes(jpeg(size) if data is None else data)

    def add_caption(self, image_id: int, text: Any) -> None:
        annotations = self.captions["annotations"]
        annotations.append({"image_id": image_id, "id": 700 + len(annotations), "caption": text})

    def add_box(self, image_id: int, box: Any, category: int = 18, crowd: int = 0, segmentation: Any = ()) -> None:
        annotations = self.instances["annotations"]
        annotations.append(
            {
                "segmentation": segmentation,
                "area": 10.0,
                "iscrowd": crowd,
                "image_id": image_id,
                "bbox": box,
                "category_id": category,
                "id": 900 + len(annotations),
            }
        )

    def refer_to(self, name: str) -> None:
        self.add_image(1000 + len(self.captions["images"]), ["an image"])
        (self.images / self.captions["images"][-1]["file_name"]).unlink()
        self.captions["images"][-1]["file_name"] = name

    def entries(self) -> int:
        return len(self.captions["images"])

    def options(self) -> dict[str, Any]:
        parts = {"captions": self.captions, "instances": self.instances, "karpathy": self.karpathy}
        files = {part: self.json(f"{part}.json", content) for part, content in parts.items() if content is not None}
        return {"images": self.images, "split": "val2017", **files}


def outline(box: tuple[float, float, float, float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


@pytest.fixture
def world(tmp_path: Path) -> CocoWorld:
    return CocoWorld(tmp_path)


class TestSource(SourceTests):
    pass


def test_captions_regions_and_spans_of_an_image(world: CocoWorld) -> None:
    world.add_box(42, [20, 2, 10, 5])
    world.add_box(42, [0, 0, 40, 30], category=1, crowd=1)
    (sample,), excluded = world.read()
    assert excluded == {}
    assert (sample.key, sample.size, sample.source) == ("000000000042", (40, 30), "coco/val2017/000000000042.jpg")
    assert sample.captions == ("A dog eats a hot dog.", "Two dogs", "A man")
    assert sample.image == (world.images / "000000000042.jpg").read_bytes()
    first, second, crowd = sample.regions
    assert (first.label, first.box, first.crowd) == ("dog", (1.5, 2.0, 10.0, 5.5), False)
    assert first.spans == second.spans == {0: ((2, 5),), 1: ((4, 8),)}
    assert (crowd.label, crowd.crowd, crowd.spans) == ("person", True, {2: ((2, 5),)})


def test_a_crowd_is_one_however_that_is_written(world: CocoWorld) -> None:
    for value in (0, "0", 0.0, False, None, 1, "1", True):
        world.add_box(42, [1, 1, 5, 5], crowd=value)  # type: ignore[arg-type]
    (sample,), _ = world.read()
    assert [region.crowd for region in sample.regions[1:]] == [False] * 5 + [True] * 3


def test_images_come_in_the_order_of_the_captions_file(world: CocoWorld) -> None:
    world.add_image(7, ["a cat"])
    world.instances["images"].reverse()
    samples, _ = world.read()
    assert [sample.key for sample in samples] == ["000000000042", "000000000007"]
    assert samples[1].regions == ()


def test_annotation_files_are_checked_before_the_first_sample(world: CocoWorld) -> None:
    options = world.options()
    options["instances"].write_text("{")
    with pytest.raises(ValueError, match="instances"):
        read_coco(**options, excluded=Counter())


@pytest.mark.parametrize("name", ["captions", "instances"])
@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("annotations", {}, r"Expected `array`, got `object` - at `\$\.annotations`"),
        ("annotations", [3], r"Expected `object`, got `int` - at `\$\.annotations\[0\]`"),
        ("annotations", [{"image_id": {}}], r"got `object` - at `\$\.annotations\[0\]\.image_id`"),
        ("images", [{"id": 1}], r"missing required field `(file_name|width)` - at `\$\.images\[0\]`"),
        ("images", [{"id": [1]}], r"got `array` - at `\$\.images\[0\]\.id`"),
        ("images", [{"id": 1, "file_name": "a.jpg", "width": None}], r"got `null` - at `\$\.images\[0\]\.width`"),
        ("images", [{"id": 1, "file_name": "a.jpg", "width": NAN}], r">= 0.* - at `\$\.images\[0\]\.width`"),
    ],
)
def test_another_form_is_named_with_its_place(world: CocoWorld, name: str, part: str, value: Any, message: str) -> None:
    getattr(world, name)[part] = value
    with pytest.raises(ValueError, match=rf"^{name}: .*{name}\.json: .*{message}"):
        world.read()


def test_ids_may_be_written_in_any_way_and_unused_fields_may_be_missing(world: CocoWorld) -> None:
    world.add_image(7, ["a man"])
    world.add_box(7, [1, 1, 5, 5], category=1)
    expected = world.read()
    for image, thing in zip(world.captions["images"], world.instances["images"], strict=True):
        image["id"], thing["id"] = str(image["id"]), float(thing["id"])
        del image["width"], image["height"], thing["file_name"]
    for annotation in (*world.captions["annotations"], *world.instances["annotations"]):
        annotation["image_id"] = f"{annotation['image_id']:03d}"
        del annotation["id"]
    for category in (categories := [dict(category) for category in CATEGORIES]):
        category["id"] = str(category["id"])
    world.instances["categories"] = categories
    assert world.read() == expected


def test_ids_that_are_names_give_keys(world: CocoWorld) -> None:
    for record in (world.captions["images"][0], world.instances["images"][0]):
        record["id"] = "left/42"
    for annotation in (*world.captions["annotations"], *world.instances["annotations"]):
        annotation["image_id"] = "left/42"
    (sample,), excluded = world.read()
    assert sample.key.startswith("left_42-")
    assert (len(sample.regions), excluded) == (1, {})


def test_what_comes_twice_or_without_a_caption_is_counted(world: CocoWorld) -> None:
    world.captions["images"] *= 2
    world.instances["annotations"] *= 2
    world.instances["images"].append({"id": 8, "file_name": "8.jpg", "width": 4, "height": 4})
    (sample,), excluded = world.read()
    assert len(sample.regions) == 1
    assert excluded == {"image_twice": 1, "annotation_twice": 1, "image_without_caption": 1}


def test_own_classes_are_found_by_name_plural_and_synonyms(world: CocoWorld, caplog: pytest.LogCaptureFixture) -> None:
    names = ("person", "hard_hat", "SafetyVest", "forklift truck", "crane")
    world.instances["categories"] = [{"id": 100 + number, "name": name} for number, name in enumerate(names)]
    world.instances["annotations"].clear()
    captions = ["Two workers in hi-vis jackets and Hard Hats", "a man, a safety vest and a helmet by a forklift-truck"]
    world.add_image(7, captions)
    for number in range(len(names)):
        world.add_box(7, [1, 1, 5, 5], category=100 + number)
    spans = [
        {"person": ["workers", "man"], "hard_hat": ["Hard Hats"], "SafetyVest": ["safety vest"]},
        {"hard_hat": ["Hard Hats", "helmet"], "SafetyVest": ["hi-vis jackets", "safety vest"]},
    ]
    forms = (
        "{hard hat: [helmet], safety_vest: 'hi-vis jacket, hi-vis'}",
        '{"hard_hat": ["helmet"], "SafetyVest": "hi-vis jacket"}',
    )
    (world.folder / "synonyms").write_text("")
    for text, expected in ((None, spans[0]), *((form, spans[1]) for form in forms)):
        caplog.clear()
        options = {} if text is None else {"synonyms": world.folder / "synonyms"}
        if text is not None:
            (world.folder / "synonyms").write_text(text)
        samples, excluded = world.read(**options)
        found = {
            region.label: [captions[index][slice(*span)] for index, its in region.spans.items() for span in its]
            for region in samples[1].regions
        }
        assert {label: found[label] for label in expected} == expected
        assert found["forklift truck"] == ["forklift-truck"]
        assert excluded == {}
        assert "No caption names 1 of the 5 classes; their objects (1) are not measured: 'crane'" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{zebra: [stripes]}", r"there is no class 'zebra'; the instances have 'person', 'dog', 'hot dog'"),
        ("{dog: [pet], person: [Pet]}", "'pet' stands for 'dog', 'person'"),
        ("[dog]", "Expected `object`, got `array`; give a YAML or JSON file"),
        ("{dog: 3}", "Expected `str | array`, got `int`"),
        ("{", "give a YAML or JSON file with a line for each class"),
        ("\x00", "give a YAML or JSON file with a line for each class"),
    ],
)
def test_a_file_of_synonyms_of_another_form_is_an_error(world: CocoWorld, text: str, message: str) -> None:
    (world.folder / "synonyms.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"^synonyms: .*synonyms\.yaml: (.|\n)*{message}"):
        world.read(synonyms=world.folder / "synonyms.yaml")


def test_lvis_is_read_and_classes_that_are_not_annotated_to_the_end_are_not_measured(
    world: CocoWorld, caplog: pytest.LogCaptureFixture
) -> None:
    names = {1: ("bow_(weapon)", ["bow_(weapon)"]), 2: ("bow_(decorative_ribbons)", ["bow_(decorative_ribbons)"])}
    names |= {3: ("aerosol_can", ["aerosol_can", "spray_can"]), 4: ("puppet", ["puppet", "marionette"])}
    world.instances = {
        "images": [{"id": 42, "width": 40, "height": 30, "coco_url": "http://x/train2017/000000000042.jpg",
                    "neg_category_ids": [1], "not_exhaustive_category_ids": [3, 2]}],
        "categories": [
            {"id": key, "name": name, "synonyms": synonyms, "frequency": "r", "synset": "x.n.01", "def": "x"}
            for key, (name, synonyms) in names.items()
        ],
        "annotations": [
            {"id": key, "image_id": 42, "category_id": key, "bbox": [1, 2, 3, 4], "area": 12.0, "segmentation": []}
            for key in (1, 3, 4)
        ],
    }  # fmt: skip
    world.add_caption(42, "spray cans, a marionette and a bow")
    (sample,), excluded = world.read()
    regions = [(region.label, region.box is None, region.spans) for region in sample.regions]
    assert regions == [
        ("bow_(weapon)", False, {}),
        ("aerosol_can", False, {3: ((0, 10),)}),
        ("puppet", False, {3: ((14, 24),)}),
        ("aerosol_can", True, {3: ((0, 10),)}),
    ]
    assert excluded == {"instances_not_exhaustive": 1}
    assert "not looked for, as they name several classes: 'bow', 'bows'" in caplog.text


def test_captions_and_instances_in_each_others_place_are_noticed(world: CocoWorld) -> None:
    paths = world.options()
    with pytest.raises(ValueError, match=r"^captions: .* missing required field `caption`"):
        world.read(captions=paths["instances"], instances=paths["captions"])


def test_bad_images_are_counted_and_the_rest_survives(world: CocoWorld) -> None:
    world.add_image(1, ["missing"])
    (world.images / "000000000001.jpg").unlink()
    world.add_image(2, ["no image"], b"<html>404</html>")
    world.add_image(3, ["truncated"], jpeg((40, 30))[:200])
    world.add_image(4, ["another size"], jpeg((41, 30)))
    world.add_image(5, ["turned without saying so"], jpeg((30, 40)))
    world.add_image(6, ["not in the instances"])
    world.instances["images"].pop()
    samples, excluded = world.read()
    assert [sample.key for sample in samples] == ["000000000042"]
    assert excluded == {
        "image_missing": 1,
        "image_does_not_decode": 2,
        "size_mismatch": 2,
        "image_without_record": 1,
    }


def test_bad_captions_are_counted_and_the_rest_survives(world: CocoWorld) -> None:
    world.add_caption(42, " \n")
    world.add_caption(42, None)
    world.add_caption(42, "the last dog")
    world.add_caption(4711, "of an image that is not there")
    world.add_image(1, [])
    world.add_image(2, ["", " "])
    (sample,), excluded = world.read()
    assert sample.captions[3:] == ("the last dog",)
    assert sample.regions[0].spans[3] == ((9, 12),)  # counted without the empty ones
    assert excluded == {"caption_empty": 4, "caption_of_unknown_image": 1, "image_without_caption": 2}


def test_bad_boxes_are_counted_and_their_objects_are_instances_all_the_same(world: CocoWorld) -> None:
    boxes: dict[str, list[Any]] = {
        "box_without_area": [[5, 5, 0, 5], [5, 5, 5, -1]],
        "box_outside_image": [[40, 5, 5, 5], [5, -7, 5, 7]],
        "box_malformed": [[5, 5, 5], [5, 5, 5, "wide"], [NAN, 5, 5, 5], None],
    }
    for box in (box for bad in boxes.values() for box in bad):
        world.add_box(42, box)
    world.add_box(42, [1, 1, 2, 2], category=19)
    for _ in range(2):
        world.add_box(4711, [1, 1, 2, 2])
    world.add_box(42, [1, 1, 2, 2], category=58)
    (sample,), excluded = world.read()
    counts = {reason: len(bad) for reason, bad in boxes.items()}
    assert [region.label for region in sample.regions] == ["dog"] * (1 + sum(counts.values())) + ["hot dog"]
    assert {region.box for region in sample.regions[1:-1]} == {None}
    assert excluded == {**counts, "category_unknown": 1, "annotation_of_unknown_image": 2}


def test_boxes_are_clipped_to_the_image(world: CocoWorld) -> None:
    for box in ([-3, 2, 10, 5], [35, 25.5, 10, 10], [-1, -1, 99, 99], [0.1, 0.2, 0.3, 29.8]):
        world.add_box(42, box)
    (sample,), excluded = world.read()
    assert [region.box for region in sample.regions[1:]] == [
        (0.0, 2.0, 7.0, 5.0),
        (35.0, 25.5, 5.0, 4.5),
        (0.0, 0.0, 40.0, 30.0),
        (0.1, 0.2, 0.3, 29.8),
    ]
    assert excluded == {}


def marked(orientation: int) -> tuple[bytes, tuple[int, int]]:
    """A file of 64x48 stored pixels, grey but for a white mark in the box [8, 16, 24, 8] of the stored pixels."""
    stored = np.full((48, 64), 60, dtype=np.uint8)
    stored[16:24, 8:32] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "JPEG", exif=exif, quality=100)
    return buffer.getvalue(), (48, 64) if orientation >= 5 else (64, 48)


def white_box(data: bytes) -> tuple[float, float, float, float]:
    rows, columns = np.nonzero(np.asarray(read_image(data, "test").convert("L")) > 150)
    x, y = columns.min(), rows.min()
    return float(x), float(y), float(columns.max() + 1 - x), float(rows.max() + 1 - y)


def test_boxes_of_stored_pixels_are_turned_with_the_image_and_those_of_upright_ones_stay(world: CocoWorld) -> None:
    for orientation in range(1, 9):
        data, upright = marked(orientation)
        for number, size in ((orientation, upright), (10 + orientation, (64, 48))):
            world.add_image(number, ["a dog"], data, size=size)
            world.add_box(number, [8, 16, 24, 8])
    samples, excluded = world.read()
    assert excluded == {}
    for sample in samples[1:]:
        orientation, stored = int(sample.key) % 10, int(sample.key) > 10 and int(sample.key) % 10 >= 5
        data, upright = marked(orientation)
        assert sample.size == upright
        assert sample.regions[0].box == (white_box(data) if stored else (8, 16, 24, 8))


# Masks


def test_outlines_and_run_lengths_become_masks_of_the_image(world: CocoWorld) -> None:
    pixels = np.zeros((30, 40), dtype=bool)
    pixels[2:7, 20:30] = True
    runs = [int(run) for run in mask_runs(encode_mask(pixels))]
    halves = [outline((20, 2, 5, 5)), outline((25, 2, 5, 5))]
    packed = {"size": [30, 40], "counts": encode_mask(pixels).counts}
    for segmentation in (halves, {"size": [30, 40], "counts": runs}, packed):
        world.add_box(42, [20, 2, 10, 5], segmentation=segmentation)
    world.add_box(42, [20, 2, 10, 5], crowd=1, segmentation={"size": [30, 40], "counts": runs})
    (sample,), excluded = world.read()
    assert excluded == {}
    for region in sample.regions[1:]:
        assert region.mask is not None
        assert (decode_mask(region.mask) == pixels).all()
    (without,), _ = world.read(masks=False)
    assert all(region.mask is None for region in without.regions)
    assert [replace(region, mask=None) for region in sample.regions] == list(without.regions)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [40, 30], "counts": [1200]}, "mask_size"),
        ({"size": [1 << 40, 1 << 40], "counts": "o" * 9}, "mask_size"),
        ({"size": [30, 40], "counts": "o" * 50}, "mask_malformed"),
        ({"size": [30, 40], "counts": [1 << 70, -(1 << 70) + 1200]}, "mask_malformed"),
        ({"size": [30, 40], "counts": [1199]}, "mask_malformed"),
        ({"size": [30, 40], "counts": None}, "mask_malformed"),
        ({"counts": [1200]}, "mask_malformed"),
        ({"size": [30, 40], "counts": [1200]}, "mask_empty"),
        ("12345678", "mask_malformed"),
        (7, "mask_malformed"),
        ([[1, 2, 3, 4]], "mask_malformed"),
        ([[1, 2, 3, 4, 5, 6, 7]], "mask_malformed"),
        ([["1", "2", "x", "4", "5", "6"]], "mask_malformed"),
        ([[1, 2, NAN, 4, 5, 6]], "mask_malformed"),
        ([[1, 2, 1e18, 4, 5, 6]], "mask_malformed"),
        ([[0, 0, 119, 119] * 60_000], "mask_malformed"),
        ([outline((50, 40, 10, 10))], "mask_empty"),
        ([outline((1, 20, 9, 9))], "mask_off_its_box"),
    ],
)
def test_masks_that_cannot_be_used_are_counted_and_their_boxes_stay(
    world: CocoWorld, segmentation: Any, reason: str
) -> None:
    world.add_box(42, [20, 2, 10, 5], segmentation=segmentation)
    (sample,), excluded = world.read()
    assert excluded == {reason: 1}
    assert sample.regions[1].mask is None
    assert sample.regions[1].box == (20, 2, 10, 5)


def test_outlines_may_leave_the_image(world: CocoWorld) -> None:
    world.add_box(42, [30, 20, 20, 20], segmentation=[outline((30, 20, 20, 20))])
    (sample,), excluded = world.read()
    assert excluded == {}
    mask = sample.regions[1].mask
    assert mask is not None
    assert decode_mask(mask)[20:, 30:].all()
    assert decode_mask(mask).sum() == 100


def test_masks_of_stored_pixels_are_turned_with_the_image(world: CocoWorld) -> None:
    for orientation in range(5, 9):
        world.add_image(orientation, ["a dog"], marked(orientation)[0], size=(64, 48))
        world.add_box(orientation, [8, 16, 24, 8], segmentation=[outline((8, 16, 24, 8))])
    samples, excluded = world.read()
    assert excluded == {}
    for sample in samples[1:]:
        white = np.asarray(read_image(sample.image, "test").convert("L")) > 150
        mask = sample.regions[0].mask
        assert mask is not None
        assert (decode_mask(mask) == white).all()


def test_masks_of_real_coco_are_those_of_pycocotools(coco_mini: Path) -> None:
    annotations = coco_mini / "annotations"
    files = {name: annotations / f"{name}_val2017.json" for name in ("captions", "instances")}
    samples, _ = read_all(read_coco, images=coco_mini / "val2017", **files, split="val2017")
    index = COCO(str(files["instances"]))
    for sample in samples:
        found = [region.mask for region in sample.regions]
        for mask, annotation in zip(found, index.imgToAnns[int(sample.key)], strict=True):
            assert mask is not None
            assert (decode_mask(mask) == index.annToMask(annotation).astype(bool)).all()


def karpathy_image(image_id: int, split: str, raws: list[str], **changes: Any) -> dict[str, Any]:
    sentences = [
        {"tokens": raw.lower().split(), "raw": raw, "imgid": 0, "sentid": index} for index, raw in enumerate(raws)
    ]
    name = f"COCO_val2014_{image_id:012d}.jpg"
    record = {"filepath": "val2014", "sentids": [0], "filename": name, "imgid": 0, "split": split, "cocoid": image_id}
    return {**record, "sentences": sentences, **changes}


@pytest.fixture
def karpathy_world(world: CocoWorld) -> CocoWorld:
    for image_id in (1, 2, 3):
        world.add_image(image_id, ["not this caption"])
    world.karpathy = {
        "dataset": "coco",
        "images": [
            karpathy_image(1, "train", ["one dog"]),
            karpathy_image(2, "restval", ["two dogs"]),
            karpathy_image(3, "test", ["three dogs"]),
            karpathy_image(42, "val", ["The dog .", "a man"]),
        ],
    }
    return world


@pytest.mark.parametrize(
    ("split", "keys"), [("train", [1]), ("val", [42]), ("train+restval", [1, 2]), ("test+val", [3, 42])]
)
def test_karpathys_split_and_captions_are_taken(karpathy_world: CocoWorld, split: str, keys: list[int]) -> None:
    samples, excluded = karpathy_world.read(split=split)
    assert [int(sample.key) for sample in samples] == keys
    assert excluded == {}
    assert samples[-1].source == f"coco/{split}/{keys[-1]:012d}.jpg"


def test_karpathys_sentences_are_joined_with_the_boxes(karpathy_world: CocoWorld) -> None:
    (sample,), _ = karpathy_world.read(split="val")
    assert sample.captions == ("The dog .", "a man")
    assert sample.regions[0].spans == {0: ((4, 7),)}


@pytest.mark.parametrize("place", ["COCO_val2014_000000000042.jpg", "val2014/COCO_val2014_000000000042.jpg"])
def test_images_are_found_under_karpathys_names(karpathy_world: CocoWorld, place: str) -> None:
    (karpathy_world.images / "val2014").mkdir()
    (karpathy_world.images / "000000000042.jpg").rename(karpathy_world.images / place)
    (sample,), _ = karpathy_world.read(split="val")
    assert sample.source == f"coco/val/{place}"


def test_karpathys_images_outside_the_annotations_are_counted(karpathy_world: CocoWorld) -> None:
    assert karpathy_world.karpathy is not None
    images = karpathy_world.karpathy["images"]
    images += [karpathy_image(9, "val", ["a dog"]), images[3], karpathy_image(3, "val", ["", " "])]
    images.append(karpathy_image(2, "val", ["x"], filepath="../.."))
    (karpathy_world.images / "000000000002.jpg").unlink()
    samples, excluded = karpathy_world.read(split="val")
    assert [sample.key for sample in samples] == ["000000000042"]
    assert excluded == {
        "image_without_record": 1,
        "image_twice": 1,
        "caption_empty": 2,
        "image_without_caption": 1,
        "image_name_unsafe": 1,
    }


def test_shards_are_replaced_only_where_that_is_asked_for(karpathy_world: CocoWorld) -> None:
    manifest, _ = karpathy_world.prepare(split="train+restval+test", samples_per_shard=1)
    assert [shard.samples for shard in manifest.shards] == [1, 1, 1]
    with pytest.raises(SystemExit, match="already"):
        karpathy_world.prepare(split="val")
    manifest, stored = karpathy_world.prepare(split="val", overwrite=True)
    assert (manifest.name, len(stored)) == ("coco/val", 1)


def test_real_coco_is_read_without_loss(coco_mini: Path) -> None:
    annotations = coco_mini / "annotations"
    files = {name: annotations / f"{name}_val2017.json" for name in ("captions", "instances")}
    samples, excluded = read_all(read_coco, images=coco_mini / "val2017", **files, split="val2017")
    published = json.loads((annotations / "instances_val2017.json").read_bytes())
    assert excluded == {}
    assert len(samples) == len(published["images"])
    assert sum(len(sample.regions) for sample in samples) == len(published["annotations"])
    assert sum(region.crowd for sample in samples for region in sample.regions) == sum(
        annotation["iscrowd"] for annotation in published["annotations"]
    )
    named = [region for sample in samples for region in sample.regions if region.spans]
    assert len(named) > 300


# The dictionary


@pytest.fixture(scope="module")
def finder() -> MentionFinder:
    return MentionFinder(*read_classes())


CLASSES = """
person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter bench
bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard
sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon
bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table
toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors
teddy_bear hair_drier toothbrush
"""


def test_the_dictionary_has_exactly_cocos_classes_and_every_name_finds_its_class(finder: MentionFinder) -> None:
    classes = [name.replace("_", " ") for name in CLASSES.split()]
    assert len(classes) == 80
    assert set(read_classes()[0]) == set(classes)
    for name in classes:
        if name != "orange":  # the colour
            caption = f"There is a {name}."
            assert finder.find(caption) == {name: ((11, 11 + len(name)),)}, name


def test_the_file_of_phrases_is_read_as_it_was_published() -> None:
    synonyms, blocked = read_classes()
    assert (sum(map(len, synonyms.values())), len(blocked)) == (1733, 5351)
    assert synonyms["bicycle"] == ("bicycle", "bicycles", "bike", "bikes", "mountain bike", "mountain bikes", "bycicle")
    content = json.dumps([{label: list(phrases) for label, phrases in synonyms.items()}, list(blocked)]).encode()
    assert hashlib.sha256(content).hexdigest()[:16] == "5fad0f6f887837c0"  # change it with the file


def test_every_phrase_of_the_dictionary_finds_its_class_and_every_blocked_one_nothing(finder: MentionFinder) -> None:
    synonyms, blocked = read_classes()
    for label, phrases in synonyms.items():
        for phrase in phrases:
            text = phrase.replace("(", "").replace(")", "")
            core = " ".join("".join(part.split(")")[-1] for part in phrase.split("(")).split())
            start = text.index(core)
            assert (start, start + len(core)) in finder.find(text).get(label, ()), phrase
    for phrase in blocked:
        if "(" not in phrase:
            assert finder.find(phrase) == {}, phrase


READ = [
    ("A hot dog and a dog", "hot dog: hot dog; dog: dog"),
    ("a teddy bear holds a black bear's paw", "teddy bear: teddy bear; bear: black bear"),
    (
        "a tennis player with a tennis racquet on a tennis court",
        "person: tennis player; tennis racket: tennis racquet",
    ),
    ("A baseball player hits a baseball at a baseball game", "person: baseball player; sports ball: baseball"),
    ("people throwing a baseball bat", "person: people; baseball bat: baseball bat"),
    ("he is at bat with a bat", "baseball bat: bat"),
    ("a bus at the bus stop by the train station", "bus: bus"),
    (
        "the bus driver stops at a stop light near a stop sign",
        "person: bus driver; traffic light: stop light; stop sign: stop sign",
    ),
    ("an orange cat, orange juice and oranges", "cat: cat; orange: oranges"),
    ("a slice of carrot cake and banana bread with an apple pie", "cake: carrot cake"),
    ("a pizza in a pizza box on the coffee table", "pizza: pizza"),
    ("a dog house, a book shelf, a clock tower, a bed room", ""),
    ("it is five o'clock, five o clock", ""),
    ("A man skis down on skis", "person: man; skis: skis"),
    ("a boy who skateboards with his skateboard", "person: boy; skateboard: skateboard"),
    ("a glass of water and a glass of wine", "wine glass: glass"),
    ("a baby elephant beside a baby", "elephant: elephant; person: baby"),
    ("a horse drawn carriage, a horse riding past", "horse: horse"),
    ("a stuffed sheep, a rocking horse and a statue of a man", ""),
    ("the men's room has urinals", "toilet: urinals"),
    ("a toilet with toilet paper", "toilet: toilet"),
    ("a tv remote beside the tv stand", "remote: tv remote"),
    ("a remote controlled car in a remote area", "car: car"),
    ("a phone in a phone booth", "cell phone: phone"),
    ("a man-made lake", ""),
    ("a pitcher of beer for the pitcher", "person: pitcher"),
    ("a dvd player and two players", "person: players"),
    ("a black cat in a big bed, a bed of lettuce", "cat: cat; bed: bed"),
    ("a cowboy hat on a cowboy", "person: cowboy"),
    ("a bear umbrella", "umbrella: umbrella"),
    ("A train passes, people on a train platform", "train: train; person: people"),
    (
        "a plane, a motor bike, a bike and some mice",
        "airplane: plane; motorcycle: motor bike; bicycle: bike; mouse: mice",
    ),
    ("a microwave oven over an oven and a toaster oven", "microwave: microwave oven; oven: oven"),
    ("a kite flying in the sky", "kite: kite"),
    ("a man tied a tie and ties his shoes", "person: man; tie: tie"),
]


def test_captions_name_what_a_reader_sees_in_them(finder: MentionFinder) -> None:
    for caption, expected in READ:
        found = finder.find(caption)
        named = {label: [caption[start:end] for start, end in spans] for label, spans in found.items()}
        wanted = dict(part.split(": ") for part in expected.split("; ") if part)
        assert named == {label: [phrase] for label, phrase in wanted.items()}, caption
