"""Karpathy's splits: one form of file for several data sets.

They are `dataset_coco.json` and `dataset_flickr30k.json`; others took the form over, such as `dataset_rsicd.json`.

The file holds `images`, and each has a `filename`, its `split` and `sentences`, of which `raw` is the caption as it was
written; COCO's also have a `filepath` (folder) and a `cocoid`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_xai.data.sources.files import check_file, load_json


@dataclass(frozen=True)
class KarpathyImage:
    """One image of a split.

    Attributes:
        filename: its file's name, without folder.
        files: where the file may lie below the images folder: as `filename`, and in its `filepath`.
        captions: the raw sentences; "" stands for one that is no text.
        cocoid: COCO's image id; None where the file has none.
    """

    filename: str
    files: tuple[str, ...]
    captions: tuple[str, ...]
    cocoid: int | None


def read_karpathy(path: Path, split: str, *, need_cocoid: bool = False) -> list[KarpathyImage]:
    """The images of one or several splits, in the order of the file.

    Args:
        path: a file of Karpathy's form.
        split: which of its splits to take; several joined by "+" ("train+restval").
        need_cocoid: every image has to have COCO's id.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken or of another form, or it has no such split (the message lists those it has).
    """
    check_file(path, "karpathy", "one of Karpathy's dataset_*.json files")
    records = load_json(path, "karpathy").get("images")
    if not isinstance(records, list):
        raise ValueError(f"karpathy: {path} has no list 'images'; is it one of Karpathy's dataset_*.json files?")
    needed = [("split", str), ("filename", str), ("sentences", list), *([("cocoid", int)] if need_cocoid else [])]
    for index, record in enumerate(records):
        for key, kind in needed:
            if not isinstance(record, dict) or not isinstance(record.get(key), kind):
                raise ValueError(
                    f"karpathy: {path}: images[{index}] has no valid {key!r}; is it the dataset_*.json file of this "
                    "data set?"
                )
    wanted = split.split("+")
    there = sorted({record["split"] for record in records})
    for name in wanted:
        if name not in there:
            raise ValueError(f"karpathy: {path} has no split {name!r}; it has {there}, which '+' joins")
    return [_image(record) for record in records if record["split"] in wanted]


def _image(record: Mapping[str, Any]) -> KarpathyImage:
    filename, filepath, cocoid = record["filename"], record.get("filepath"), record.get("cocoid")
    raws = (sentence.get("raw") if isinstance(sentence, dict) else None for sentence in record["sentences"])
    return KarpathyImage(
        filename=filename,
        files=(filename, f"{filepath}/{filename}") if isinstance(filepath, str) and filepath else (filename,),
        captions=tuple(raw if isinstance(raw, str) else "" for raw in raws),
        cocoid=cocoid if isinstance(cocoid, int) else None,
    )
