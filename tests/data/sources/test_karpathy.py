from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_xai.data.sources.karpathy import KarpathyImage, read_karpathy


def image(filename: Any, split: Any = "val", **fields: Any) -> dict[str, Any]:
    sentences = [{"tokens": ["a", "dog"], "raw": "A dog.", "imgid": 0, "sentid": 0}]
    return {"filename": filename, "imgid": 0, "split": split, "sentences": sentences, "sentids": [0], **fields}


def written(folder: Path, *images: Any, **content: Any) -> Path:
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": "any", "images": list(images), **content}))
    return path


def test_coco_has_folders_and_ids_and_other_sets_have_neither(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        image("COCO_val2014_000000000042.jpg", filepath="val2014", cocoid=42),
        image("1000092795.jpg", filepath=""),
        image("airport_1.tif"),
    )
    coco, flickr, rsicd = read_karpathy(path, "val")
    assert coco == KarpathyImage(
        filename="COCO_val2014_000000000042.jpg",
        files=("COCO_val2014_000000000042.jpg", "val2014/COCO_val2014_000000000042.jpg"),
        captions=("A dog.",),
        cocoid=42,
    )
    assert (flickr.files, flickr.cocoid) == (("1000092795.jpg",), None)
    assert (rsicd.files, rsicd.cocoid) == (("airport_1.tif",), None)


def test_splits_are_joined_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, *(image(f"{number}.jpg", split) for number, split in enumerate(("val", "train", "test"))))
    assert [entry.filename for entry in read_karpathy(path, "test+val")] == ["0.jpg", "2.jpg"]


def test_sentences_that_are_no_text_stay_as_empty_ones(tmp_path: Path) -> None:
    sentences = [{"raw": None}, "A dog.", {"raw": "A cat."}, {"tokens": ["a"]}, {"raw": ["A dog."]}]
    (entry,) = read_karpathy(written(tmp_path, image("a.jpg", sentences=sentences)), "val")
    assert entry.captions == ("", "", "A cat.", "", "")


@pytest.mark.parametrize("split", ["dev", "", "val+", "val,train"])
def test_an_unknown_split_is_an_error_that_lists_what_exists(tmp_path: Path, split: str) -> None:
    path = written(tmp_path, image("a.jpg"), image("b.jpg", "train"))
    with pytest.raises(ValueError, match=r"\['train', 'val'\], which '\+' joins"):
        read_karpathy(path, split)


@pytest.mark.parametrize(
    ("record", "key"),
    [
        (image(3), "filename"),
        (image("a.jpg", None), "split"),
        (image("a.jpg", ["val"]), "split"),
        (image("a.jpg", sentences={"raw": "A dog."}), "sentences"),
        (["a.jpg", "val"], "split"),
    ],
)
def test_a_broken_record_is_named_with_its_place(tmp_path: Path, record: Any, key: str) -> None:
    with pytest.raises(ValueError, match=rf"images\[1\] has no valid '{key}'"):
        read_karpathy(written(tmp_path, image("a.jpg"), record), "val")


def test_cocos_id_is_asked_for_only_where_it_is_needed(tmp_path: Path) -> None:
    path = written(tmp_path, image("a.jpg", cocoid="42"))
    assert read_karpathy(path, "val")[0].cocoid is None
    with pytest.raises(ValueError, match=r"images\[0\] has no valid 'cocoid'"):
        read_karpathy(path, "val", need_cocoid=True)


def test_another_kind_of_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no list 'images'"):
        read_karpathy(written(tmp_path, images={"1": {}}), "val")
    with pytest.raises(FileNotFoundError, match=r"^karpathy: .*nowhere"):
        read_karpathy(tmp_path / "nowhere", "val")
