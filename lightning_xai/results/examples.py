"""Examples of a method's heat maps, as `METHOD/examples.json` in a result folder; their images are in `examples/`.

Of a training, `METHOD/words.safetensors` has the maps of all words of the examples' captions. All its measurements show
the same few examples, whose images are in `RUN/grounding/examples/`, once. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lightning_xai.atomic_file import replaced_at_once, write_json
from lightning_xai.results.record import VERSION, ResultError, read_file

__all__ = [
    "EXAMPLES_NAME",
    "WORDS_NAME",
    "ExampleRecord",
    "read_examples",
    "read_words",
    "words_of",
    "write_examples",
    "write_words",
]

EXAMPLES_NAME = "examples.json"
WORDS_NAME = "words.safetensors"


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


def words_of(caption: str) -> list[tuple[int, int]]:
    """The characters `(start, end)` of what stands between spaces in a caption.

    >>> words_of("a red dog")
    [(0, 1), (2, 5), (6, 9)]
    """
    return [word.span() for word in re.finditer(r"\S+", caption)]


def write_words(folder: Path, maps: Mapping[int, NDArray[np.float32]]) -> None:
    """Write `folder/words.safetensors`: the maps [n, H, W] of the words of examples, by their places in the file."""
    with replaced_at_once(folder / WORDS_NAME) as part:
        part.write_bytes(save({str(place): np.ascontiguousarray(found) for place, found in maps.items()}))


def read_words(folder: Path) -> dict[int, NDArray[np.float32]]:
    """Read `folder/words.safetensors`; nothing where there is no such file.

    Raises:
        ResultError: the file is broken.
    """
    path = folder / WORDS_NAME
    if not path.is_file():
        return {}
    try:
        return {int(name): np.asarray(found, dtype=np.float32) for name, found in load_file(path).items()}
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:  # numpy lacks types
        raise ResultError(f"{path} cannot be read ({error}); run it again, or delete it") from error
