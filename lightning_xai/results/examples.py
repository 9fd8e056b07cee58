"""Examples of a method's heat maps, as `METHOD/examples.json` in a result folder; their images are in `examples/`.

All measurements of a training show the same few, whose images are in `RUN/grounding/examples/`, once. Nothing here
needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from lightning_xai.atomic_file import write_json
from lightning_xai.results.record import VERSION, read_file

__all__ = ["EXAMPLES_NAME", "ExampleRecord", "read_examples", "write_examples"]

EXAMPLES_NAME = "examples.json"


class ExampleRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A phrase and its heat map.

    Attributes:
        why: the reasons to show it: `"fixed"` (the first ones of the split, whatever the model), `"class"` (the first
            ones of each class) and `"failure"` (lowest gamma).
        image: file name below the result folder; of a training, below `RUN/grounding`.
        key: the sample's key.
        caption: the whole caption.
        phrase: the words that are explained.
        spans: their characters in the caption.
        label: class of the object.
        box: `(x0, y0, x1, y1)` in pixels of the image.
        gamma: in [0, 1]; None where the map has nothing positive.
        hit: whether the largest entry lies inside the box.
        heat: [h][w], the map at patch resolution.
    """

    why: tuple[str, ...]
    image: str
    key: str
    caption: str
    phrase: str
    spans: tuple[tuple[int, int], ...]
    label: str
    box: tuple[float, float, float, float]
    gamma: float | None
    hit: bool
    heat: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        # Windows takes backslashes and drives as well, and no system a NUL.
        if self.image.startswith("/") or ".." in self.image.split("/") or not set(self.image).isdisjoint("\\:\0"):
            raise ValueError(f"the image {self.image!r} lies outside of the result folder")


class _File(msgspec.Struct):
    examples: list[ExampleRecord]


def write_examples(folder: Path, examples: Sequence[ExampleRecord]) -> None:
    """Write `folder/examples.json`."""
    write_json(folder / EXAMPLES_NAME, {"version": VERSION, "examples": msgspec.to_builtins(list(examples))})


def read_examples(folder: Path) -> list[ExampleRecord]:
    """Read `folder/examples.json`; no examples where there is no such file.

    Raises:
        ResultError: the file is broken, of another version, or names an image outside of the result folder.
    """
    path = folder / EXAMPLES_NAME
    return read_file(path, _File).examples if path.is_file() else []
