"""The files that `predict` writes: parts of a split's embeddings and maps, in the safetensors format.

A folder holds `settings.json`, which says what the numbers depend on, and `rank_R-000000.safetensors`, ... A part is
complete or not there; together the parts hold each usable sample once. Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lightning_xai.atomic_file import replaced_at_once
from lightning_xai.results.record import ResultError

__all__ = ["PredictionPart", "part_paths", "read_part", "read_predictions", "write_part"]

_FORMAT = "lightning_xai predictions 1"
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class PredictionPart:
    """N images, their C captions and, with maps, the R phrases in these; each list and array is in that order.

    Attributes:
        arrays: `index` [N] int64, the sample's number in its split; `image` [N, K] and `text` [C, K] float32,
            embeddings of unit length; `caption_image` [C] int64, the row of a caption's image; `caption_index` [C]
            int64, which caption of its image it is. With maps: `phrase_caption` [R] int64, the row of a phrase's
            caption; `span_mask` [R, L] bool, its tokens; `boxes` [R, 4] float32, `(x0, y0, x1, y1)` of its object in
            pixels of the image that the model sees; `image_size` [2] int64, height and width of that image; and `maps`
            [R, H, W] float32, or `interactions` [C, L, H, W] float32, of which a phrase's map is the sum over its
            tokens.
        texts: `keys` (N), `captions` (C) and, with maps, `phrases`, `labels` (classes of their objects) and `excluded`
            (why a phrase cannot be measured against its box, empty where it can), R each.
    """

    arrays: Mapping[str, NDArray[Any]]
    texts: Mapping[str, Sequence[str]]


def write_part(path: Path, part: PredictionPart) -> None:
    """Write a part; a reader sees the whole file or none."""
    texts = {name: json.dumps(list(values)) for name, values in part.texts.items()}
    with replaced_at_once(path, durable=True) as unfinished:
        arrays = {name: np.ascontiguousarray(array) for name, array in part.arrays.items()}
        # Not save_file, whose files only their owner may read.
        unfinished.write_bytes(save(arrays, texts | {"format": _FORMAT}))


def read_predictions(folder: Path) -> Iterator[PredictionPart]:
    """Read what `predict` has written, one part after the other, so that memory does not grow with the data.

    Raises:
        ResultError: there is no part, or one cannot be read.
    """
    paths = part_paths(folder)
    if not paths:
        raise ResultError(f"{folder} holds no predictions: expected rank_0-000000{_SUFFIX}, which `predict` writes")
    for path in paths:
        yield read_part(path)


def part_paths(folder: Path) -> list[Path]:
    """The parts in a folder, those of each process in their order."""
    return sorted(folder.glob(f"rank_*-*{_SUFFIX}"))


def read_part(path: Path, names: Sequence[str] | None = None) -> PredictionPart:
    """Read one part, or only some of its arrays.

    Raises:
        ResultError: it is no such file.
    """
    try:
        with safe_open(path, "numpy") as file:
            about = dict(file.metadata() or {})
            if about.pop("format", None) != _FORMAT:
                raise ResultError(f"{path}: not a part of predictions; delete it and run `predict` again")
            texts = {name: msgspec.json.decode(text, type=list[str]) for name, text in about.items()}
            return PredictionPart({name: file.get_tensor(name) for name in names or file.keys()}, texts)
    except (OSError, SafetensorError, msgspec.MsgspecError) as error:
        raise ResultError(f"{path} cannot be read ({error}); delete it and run `predict` again") from error
