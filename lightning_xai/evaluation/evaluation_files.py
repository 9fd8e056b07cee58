"""Writes what an evaluation has found: result file, tables and examples, in the form that reports read."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_xai.evaluation.example_gallery import Candidate, Pixels
from lightning_xai.evaluation.phrase_grounding import class_rows
from lightning_xai.metrics.grounding import GroundingSummary
from lightning_xai.report.tables import per_pair_csv, replaced_at_once
from lightning_xai.results.schema import TABLES, EvaluationResult, ExampleRecord, write_examples

__all__ = ["Shown", "write_evaluation"]

_ORDER = ("seed", "index", "caption_index", "label", "other_label", "replacement")
_QUALITY = 92


@dataclass(frozen=True)
class Shown:
    """An example that was chosen: why, what it is, and its picture [H, W, 3]."""

    why: tuple[str, ...]
    candidate: Candidate
    pixels: Pixels


def write_evaluation(
    out: Path,
    result: EvaluationResult,
    rows: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    classes: Mapping[str, GroundingSummary],
    shown: Mapping[str, Sequence[Shown]],
) -> None:
    """Write everything; `result.json` comes last, so that where it lies all else does.

    Args:
        out: folder of the evaluation.
        result: the numbers.
        rows: label -> table -> rows of all ranks.
        classes: label -> the grounding by class, of the first seed.
        shown: label -> examples.
    """
    for label, tables in rows.items():
        for table, lines in tables.items():
            # The file is the same at any number of ranks and workers.
            ordered = sorted(lines, key=lambda row: tuple(row[name] for name in _ORDER if name in row))
            per_pair_csv(out / label / f"{table}.csv", ordered, TABLES[table])
        if label in classes:
            by_class = class_rows(classes[label])
            per_pair_csv(out / label / "classes.csv", by_class, tuple(by_class[0]) if by_class else ("label",))
        write_examples(out / label, [_record(example) for example in shown.get(label, ())])
    # Written anew in any case: an earlier run in this folder may have been of a model that sees another size.
    pictures = {_picture(example): example.pixels for examples in shown.values() for example in examples}
    for name, pixels in pictures.items():
        _save_picture(pixels, out / name)
    result.save(out)


def _record(example: Shown) -> ExampleRecord:
    candidate = example.candidate
    return ExampleRecord(
        why=example.why,
        image=_picture(example),
        label=candidate.label,
        gamma=candidate.gamma,
        **{**candidate.record, "heat": tuple(map(tuple, candidate.record["heat"]))},
    )


def _picture(example: Shown) -> str:
    """The file of a sample's picture, whose key holds letters, digits, '_' and '-' only."""
    return f"examples/{re.sub(r'[^A-Za-z0-9_-]', '_', example.candidate.record['key'])}.jpg"


def _save_picture(pixels: Pixels, path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    with replaced_at_once(path) as part:
        part.write_bytes(buffer.getvalue())
