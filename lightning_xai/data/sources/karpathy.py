"""Karpathy's splits: one form of file for several data sets.

They are `dataset_coco.json` and `dataset_flickr30k.json`; others took the form over, such as `dataset_rsicd.json`.

The file holds `images`, and each has a `filename`, its `split` and `sentences`, of which `raw` is the caption as it was
written; COCO's also have a `filepath` (folder) and a `cocoid`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lightning_xai.data.sources.files import joined_names, read_json


class KarpathyImage(msgspec.Struct, frozen=True):
    """One image of a split, as the file has it.

    Attributes:
        filename: its file's name, without folder.
        split: the split that it belongs to.
        sentences: its captions, each with its `raw` text.
        filepath: its file's folder.
    """

    filename: str
    split: str
    sentences: list[Any]
    filepath: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Where the file may lie below the images folder: as `filename`, and in its `filepath`."""
        return (self.filename, f"{self.filepath}/{self.filename}") if self.filepath else (self.filename,)

    @property
    def captions(self) -> list[object]:
        """The raw sentences; None stands for a sentence without."""
        return [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in self.sentences]


Image = TypeVar("Image", bound=KarpathyImage)


def read_karpathy(path: Path, split: str, kind: type[Image]) -> list[Image]:
    """The images of one or several splits, in the order of the file.

    Args:
        path: a file of Karpathy's form.
        split: which of its splits to take; several joined by "+" ("train+restval").
        kind: the form of an image; a data set may need further fields.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken or of another form, or it has no such split (the message lists those it has).
    """
    dataset = msgspec.defstruct("Dataset", [("images", list[kind])])  # type: ignore[valid-type]
    found = read_json(path, "karpathy", dataset, "the dataset_*.json file of this data set")
    images: list[Image] = found.images  # type: ignore[attr-defined]
    wanted = joined_names(split, {image.split for image in images}, f"karpathy: {path} has no split")
    return [image for image in images if image.split in wanted]
