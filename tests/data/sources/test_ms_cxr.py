from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from image_files import HTML, jpeg
from source_files import SourceTests, World

from lightning_xai.data import CaptionTokenizer, Exclusion, ImageTransform
from lightning_xai.data.batch import EvaluationCollate

FINDINGS = ("Pneumonia", "Pneumothorax")
HEADER = (
    *("dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h"),
    *("image_width", "image_height", "split"),
)
FIRST, SECOND = "02aa804e-bde0afdd-112c0b34", "04564240-d4e9e69c-1dd70a83"


class MsCxrWorld(World):
    """MS-CXR's two files and some images of MIMIC-CXR-JPG."""

    source = "ms-cxr"
    advice = "original resolution"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "mimic-cxr-jpg")
        self.records: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.findings: list[dict[str, Any]] = [
            {"id": number, "name": name, "supercategory": "disease"} for number, name in enumerate(FINDINGS, 1)
        ]
        self.add_image(FIRST)
        self.add_image(SECOND, size=(30, 40))
        self.add(0, "Patchy opacities in both\n lower lobes", [2, 10, 8, 12], finding=1)
        self.add(1, "large right apical pneumothorax", [0, 0, 10, 10], finding=2, split="test")
        self.add(0, "Patchy opacities in both lower lobes", [25, 10, 10, 12], finding=1)
        self.add(0, "left upper lobe pneumonia", [22, 1, 6, 6], finding=1)

    def add_image(self, dicom: str, size: tuple[int, int] = (40, 30)) -> None:
        path = f"files/p10/p10000{len(self.records)}/s5/{dicom}.jpg"
        (self.images / path).parent.mkdir(parents=True)
        (self.images / path).write_bytes(jpeg(size, mode="L"))
        record = {"id": len(self.records) + 7, "file_name": f"{dicom}.jpg", "path": path}
        self.records.append(record | {"width": size[0], "height": size[1], "num_annotations": 1})

    def refer_to(self, name: str) -> None:
        self.records.append({"id": len(self.records) + 7, "file_name": name, "path": name, "width": 40, "height": 30})
        self.add(-1, "a phrase", [1, 1, 5, 5])

    def add(self, image: int, phrase: Any, box: Any, finding: Any = 1, split: str = "train") -> None:
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": self.records[image]["id"],
                "category_id": finding,
                "label_text": phrase,
                "bbox": box,
                "width": self.records[image]["width"],
                "height": self.records[image]["height"],
                "split": split,
            }
        )

    def entries(self) -> int:
        return len(self.records)

    def options(self) -> dict[str, Any]:
        content = {"info": {}, "licenses": [], "categories": self.findings}
        content |= {"images": self.records, "annotations": self.annotations}
        path = self.json("MS_CXR_Local_Alignment_v1.1.0.json", content)
        return {"images": self.images, "annotations": path, "split": "train+test"}

    def csv_file(self) -> Path:
        """The same annotations as the publishers' script writes them."""
        path = self.folder / "MS_CXR_Local_Alignment_v1.1.0.csv"
        images = {image["id"]: image for image in self.records}
        names = {finding["id"]: finding["name"] for finding in self.findings}
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, HEADER)
            rows.writeheader()
            for record in self.annotations:
                image = images[record["image_id"]]
                about = {
                    "dicom_id": image["file_name"].removesuffix(".jpg"),
                    "category_name": names[record["category_id"]],
                    "label_text": record["label_text"],
                    "path": image["path"],
                    "image_width": image["width"],
                    "image_height": image["height"],
                    "split": record["split"],
                }
                rows.writerow(about | dict(zip("xywh", record["bbox"], strict=True)))
        return path


@pytest.fixture
def world(tmp_path: Path) -> MsCxrWorld:
    return MsCxrWorld(tmp_path)


class TestSource(SourceTests):
    pass


def test_each_phrase_is_a_caption_whose_boxes_are_one_target(world: MsCxrWorld) -> None:
    (first, second), excluded = world.read()
    assert excluded == {}
    assert (first.key, second.key) == (FIRST, SECOND)
    assert first.source == f"ms-cxr/train+test/files/p10/p100000/s5/{FIRST}.jpg"
    assert first.captions == ("Patchy opacities in both lower lobes", "left upper lobe pneumonia")
    assert [(region.label, region.box) for region in first.regions] == [
        ("Pneumonia", (2.0, 10.0, 8.0, 12.0)),
        ("Pneumonia", (25.0, 10.0, 10.0, 12.0)),
        ("Pneumonia", (22.0, 1.0, 6.0, 6.0)),
    ]
    assert [region.spans for region in first.regions] == [{0: ((0, 36),)}, {0: ((0, 36),)}, {1: ((0, 25),)}]
    assert first.size == (40, 30)
    assert first.image == jpeg(mode="L")
    assert (second.regions[0].label, second.captions) == ("Pneumothorax", ("large right apical pneumothorax",))


def test_batches_get_all_boxes_of_a_phrase_and_measure_the_phrases_with_one(world: MsCxrWorld) -> None:
    (first, _), _ = world.read()
    tokenizer = CaptionTokenizer(open_clip.SimpleTokenizer())
    transform = ImageTransform((30, 40), mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="squash")
    collate = EvaluationCollate(transform, tokenizer, ("Pneumonia",), captions_per_image=None)
    batch = collate([(0, first)])
    boxes = [[2, 10, 10, 22], [25, 10, 35, 22], [22, 1, 28, 7]]
    assert batch.named is not None
    assert batch.named.caption_row.tolist() == [0, 0, 1]
    torch.testing.assert_close(batch.named.boxes, torch.tensor(boxes, dtype=torch.float32))
    assert [Exclusion(reason).name for reason in batch.phrases.reason.tolist()] == ["SEVERAL_INSTANCES", "MEASURED"]
    assert batch.phrases.text == ["Patchy opacities in both lower lobes", "left upper lobe pneumonia"]


def test_both_files_give_the_same_samples(world: MsCxrWorld) -> None:
    world.add(1, 'quoted "opacity", with comma', [1.5, 2.25, 3, 4], finding=2)
    assert world.read(annotations=world.csv_file()) == world.read()


@pytest.mark.parametrize("split", ["train", "test", "test+train"])
def test_a_split_of_the_publishers_is_taken(world: MsCxrWorld, split: str) -> None:
    samples, excluded = world.read(split=split)
    assert [sample.key for sample in samples] == [
        key for key, its in ((FIRST, "train"), (SECOND, "test")) if its in split
    ]
    assert samples[0].source.startswith(f"ms-cxr/{split}/files/")
    assert excluded == {}
    assert world.read(split=split, annotations=world.csv_file())[0] == samples


def test_an_unknown_split_is_an_error_that_lists_those_there(world: MsCxrWorld) -> None:
    with pytest.raises(ValueError, match=r"no split 'val'; it has \['test', 'train'\]"):
        world.read(split="test+val")
    for record in world.annotations:
        del record["split"]  # as in version 1.0.0
    with pytest.raises(ValueError, match=r"versions before 1\.1\.0"):
        world.read(split="test")
    samples, _ = world.read(split=None)
    assert [sample.source for sample in samples] == [f"ms-cxr/{record['path']}" for record in world.records]
    assert world.prepare(split=None)[0].name == "ms-cxr"


def test_the_images_folder_may_be_files_itself(world: MsCxrWorld) -> None:
    expected, _ = world.read()
    world.images = world.images / "files"
    samples, excluded = world.read()
    assert excluded == {}
    assert [sample.image for sample in samples] == [sample.image for sample in expected]
    assert [sample.key for sample in samples] == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([5, 5, 0, 5], "box_without_area"),
        ([40, 5, 5, 5], "box_outside_image"),
        ([5, 5, "wide", 5], "box_malformed"),
        ([5, 5, float("nan"), 5], "box_malformed"),
    ],
)
def test_a_phrase_is_excluded_where_one_of_its_boxes_is_bad(world: MsCxrWorld, box: Any, reason: str) -> None:
    world.add(0, "Patchy opacities in both lower lobes", box)
    for path in (world.options()["annotations"], world.csv_file()):
        (first, _), excluded = world.read(annotations=path)
        assert first.captions == ("left upper lobe pneumonia",)
        assert [region.spans for region in first.regions] == [{0: ((0, 25),)}]
        assert excluded == {reason: 1, "phrase_incomplete": 1}


@pytest.mark.parametrize(
    ("field", "values", "reason"),
    [("bbox", (None, 3, [5, 5, 5]), "box_malformed"), ("category_id", (3, None, [1]), "category_unknown")],
)
def test_values_of_any_type_are_counted(world: MsCxrWorld, field: str, values: tuple[Any, ...], reason: str) -> None:
    world.add(0, "left upper lobe pneumonia", [1, 1, 5, 5])
    for value in values:
        world.annotations[-1][field] = value
        (first, _), excluded = world.read()
        assert len(first.captions) == 1
        assert excluded == {reason: 1, "phrase_incomplete": 1}


def test_bad_annotations_are_counted_and_the_rest_survives(world: MsCxrWorld) -> None:
    expected, _ = world.read()
    world.add(0, " \n", [1, 1, 5, 5])
    world.add(0, None, [1, 1, 5, 5])
    world.add(0, "left  upper lobe pneumonia", [22, 1, 6, 6])
    world.add(0, "of an image that is not there", [1, 1, 5, 5])
    world.annotations[-1]["image_id"] = [4711]
    samples, excluded = world.read()
    assert samples == expected
    assert excluded == {"phrase_empty": 2, "annotation_twice": 1, "annotation_of_unknown_image": 1}


def test_an_image_without_a_usable_phrase_is_counted(world: MsCxrWorld) -> None:
    world.annotations[1]["bbox"] = [0, 0, -1, 10]
    samples, excluded = world.read()
    assert [sample.key for sample in samples] == [FIRST]
    assert excluded == {"box_without_area": 1, "phrase_incomplete": 1, "image_without_caption": 1}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "image_missing"),
        (HTML, "image_does_not_decode"),
        (jpeg((30, 40))[:300], "image_does_not_decode"),
        (jpeg((15, 20)), "size_mismatch"),
    ],
)
def test_bad_images_are_counted_and_the_rest_survives(world: MsCxrWorld, data: bytes | None, reason: str) -> None:
    path = world.images / world.records[1]["path"]
    path.unlink() if data is None else path.write_bytes(data)
    samples, excluded = world.read()
    assert [sample.key for sample in samples] == [FIRST]
    assert excluded == {reason: 1}


def test_sizes_that_are_none_are_counted(world: MsCxrWorld) -> None:
    for width in (None, "wide", 30.5, float("inf"), [30], 10**400):
        world.records[1]["width"] = width
        assert world.read()[1] == {"size_malformed": 1}


def test_rows_of_an_image_that_contradict_each_other_are_counted(world: MsCxrWorld) -> None:
    path = world.csv_file()
    path.write_text(path.read_text().replace(",40,30,train", ",41,30,train", 1))
    samples, excluded = world.read(annotations=path)
    assert [sample.key for sample in samples] == [SECOND]
    assert excluded == {"size_malformed": 1}


def test_a_byte_order_mark_is_no_part_of_the_first_column(world: MsCxrWorld) -> None:
    path = world.csv_file()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, sorted(HEADER, reverse=True))  # a column that is needed comes first
        writer.writeheader()
        writer.writerows(rows)
    assert world.read(annotations=path) == world.read()


def test_rows_of_another_length_are_counted(world: MsCxrWorld) -> None:
    expected, _ = world.read()
    path = world.csv_file()
    with path.open("a") as file:
        file.write("02aa804e,Pneumonia,too short\n" + ",".join("x" * (len(HEADER) + 1)) + "\n")
    samples, excluded = world.read(annotations=path)
    assert samples == expected
    assert excluded == {"annotation_malformed": 2}


def test_a_row_that_is_cut_off_leaves_its_phrase_incomplete(world: MsCxrWorld) -> None:
    world.add(0, "left upper lobe pneumonia", [1, 1, 5, 5])
    path = world.csv_file()
    path.write_text(path.read_text().rstrip().rpartition(",5,")[0] + "\n")
    samples, excluded = world.read(annotations=path)
    assert [len(sample.captions) for sample in samples] == [1, 1]
    assert excluded.pop("box_malformed") == excluded.pop("annotation_malformed") == 1
    assert excluded == {"phrase_incomplete": 1, "annotation_without_split": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column 'path'"),
        (b"dicom_id,path,label_text\n", "has no column 'category_name'"),
        (",".join(HEADER).encode() + b"\n\xff\xfe", "no CSV text"),
        (",".join(HEADER).encode() + b'\n"never closed', "no CSV text"),
        (",".join(HEADER).encode() + b"\n" + b"x" * 200_000, "no CSV text"),
        (",".join(HEADER).encode() + b"\n", "no image of"),
    ],
)
def test_a_broken_csv_file_is_an_error_that_names_it(world: MsCxrWorld, content: bytes, message: str) -> None:
    path = world.folder / "MS_CXR.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        world.read(annotations=path, split=None)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": 3}', r"Expected `array`, got `int` - at `\$\.images`"),
        (b'{"images": [{"id": 1}], "annotations": [], "categories": []}', r"field `path` - at `\$\.images\[0\]`"),
        (
            b'{"images": [], "annotations": [{"image_id": 1}], "categories": []}',
            r"missing required field `category_id` - at `\$\.annotations\[0\]`",
        ),
        (b'{"images": [], "annotations": [], "categories": [7]}', r"got `int` - at `\$\.categories\[0\]`"),
    ],
)
def test_a_broken_json_file_is_an_error_that_names_it(world: MsCxrWorld, content: bytes, message: str) -> None:
    path = world.folder / "MS_CXR.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        world.read(annotations=path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_neither_is_an_error_that_says_so(world: MsCxrWorld) -> None:
    renamed = world.options()["annotations"].rename(world.folder / "annotations.txt")
    with pytest.raises(ValueError, match=r"neither a \.json nor a \.csv"):
        world.read(annotations=renamed)
