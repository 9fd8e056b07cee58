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


def test_sentences_that_are_no_text_keep_their_place(tmp_path: Path) -> None:
    sentences = [{"raw": None}, "A dog.", {"raw": "A cat."}, {"tokens": ["a"]}, {"raw": ["A dog."]}]
    (entry,) = read_karpathy(written(tmp_path, image("a.jpg", sentences=sentences)), "val", KarpathyImage)
    assert entry.captions == [None, None, "A cat.", None, ["A dog."]]


@pytest.mark.parametrize("split", ["dev", "", "val+", "val,train"])
def test_an_unknown_split_is_an_error_that_lists_what_exists(tmp_path: Path, split: str) -> None:
    path = written(tmp_path, image("a.jpg"), image("b.jpg", "train"))
    with pytest.raises(ValueError, match=r"\['train', 'val'\], which '\+' joins"):
        read_karpathy(path, split, KarpathyImage)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (image(3), r"Expected `str`, got `int` - at `\$\.images\[1\]\.filename`"),
        (image("a.jpg", None), r"Expected `str`, got `null` - at `\$\.images\[1\]\.split`"),
        (image("a.jpg", ["val"]), r"Expected `str`, got `array` - at `\$\.images\[1\]\.split`"),
        (image("a.jpg", sentences={"raw": "A dog."}), r"got `object` - at `\$\.images\[1\]\.sentences`"),
        (["a.jpg", "val"], r"Expected `object`, got `array` - at `\$\.images\[1\]`"),
    ],
)
def test_a_broken_record_is_named_with_its_place(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_karpathy(written(tmp_path, image("a.jpg"), record), "val", KarpathyImage)


class WithId(KarpathyImage, frozen=True, kw_only=True):
    cocoid: int


def test_a_data_set_may_need_a_further_field(tmp_path: Path) -> None:
    (entry,) = read_karpathy(written(tmp_path, image("a.jpg", cocoid=42)), "val", WithId)
    assert entry.cocoid == 42
    with pytest.raises(ValueError, match=r"Expected `int`, got `str` - at `\$\.images\[0\]\.cocoid`"):
        read_karpathy(written(tmp_path, image("a.jpg", cocoid="42")), "val", WithId)


def test_another_kind_of_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected `array`, got `object` - at `\$\.images`"):
        read_karpathy(written(tmp_path, images={"1": {}}), "val", KarpathyImage)
    with pytest.raises(FileNotFoundError, match=r"^karpathy: .*nowhere"):
        read_karpathy(tmp_path / "nowhere", "val", KarpathyImage)
