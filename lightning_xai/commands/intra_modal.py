"""Two images, an image and a sound, or two captions: what in each of them makes them similar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_xai.commands.explain_pair import box_mask
from lightning_xai.commands.inputs import InputError, read_input, span_positions, transformed_box
from lightning_xai.commands.outputs import numpy_of, shown_tokens, sums_of, write_csv
from lightning_xai.report.explanation import image_pair_sheet, text_pair_sheet
from lightning_xai.report.plots import Example

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_xai.attribution import ImageComparison, IntraModalAttribution, PairwiseMethod
    from lightning_xai.models.at_layer import TowerAtLayer
    from lightning_xai.models.encoder import TwoTowerEncoder

    # Arrays, record, picture, and of captions the pairs of tokens, the largest attribution first.
    Compared = tuple[dict[str, NDArray[Any]], dict[str, Any], Figure, list[dict[str, Any]]]

COMPARED_ARRAYS = {
    "interactions": "what each pair of parts adds to the similarity: [H, W, H, W] for images, [L, L] for captions",
    "first": "of each part of the first input, with the whole second one",
    "second": "of each part of the second input, with the whole first one",
    "shown_second": "as in the picture: of each part of the second input, with the box or the span of the first one",
    "similarity": "cosine similarity of the two",
    "completeness_error": "sum of all attributions minus what they should sum to",
}
_FILE = "pairs.csv"
_PAIRS = ("token", "other_token", "attribution", "position", "other_position")


def compare_images(method: Any, image: Path, other: Path, box: str | None, by: Any = None) -> Compared:
    """Compare two images; with a box on the first one, show what in the second one matches it.

    Args:
        method: one that compares images.
        image: the first file.
        other: the second file.
        box: on the first.
        by: the same method of the encoder that reads the second file, where that is another one: a sound's.

    Raises:
        InputError: an image or the box cannot be used.
    """
    encoder, other_encoder = method.encoder, (by or method).encoder
    (pixels, size), (other_pixels, other_size) = read_input(encoder, image), read_input(other_encoder, other)
    seen = transformed_box(encoder, box, size)
    arrays = _arrays(method.attribute_images(pixels[None], other_pixels[None], **({} if by is None else {"by": by})))
    if seen is not None:
        arrays["box_mask"] = box_mask(seen, arrays["first"], pixels)
        arrays["shown_second"] = arrays["interactions"][arrays["box_mask"]].sum(axis=0)
    first, second = (
        Example(numpy_of(owner.pictures(each[None])[0].permute(1, 2, 0)), "", "", (), place)
        for owner, each, place in ((encoder, pixels, seen), (other_encoder, other_pixels, None))
    )
    sheet = image_pair_sheet(
        first,
        second,
        (arrays["first"] if seen is None else None, arrays["shown_second"]),
        similarity=arrays["similarity"].item(),
        error=arrays["completeness_error"].item() if "completeness_error" in arrays else None,
        scale="signed" if method.signed else "positive" if method.has_zero else "range",
        kinds="Two images" if by is None else "Image and sound",
        where=_where(method, "image"),
    )
    record: dict[str, Any] = {
        "images": [str(image), str(other)],
        "where": _where(method, "image"),
        "images_seen": [encoder.seen(size), other_encoder.seen(other_size)],
        "box": box,
        "box transformed": seen,
    }
    if by is not None:
        record["other"] = {"architecture": other_encoder.name, "preprocessing": other_encoder.preprocessing}
    return arrays, record, sheet, []


def compare_captions(
    encoder: TwoTowerEncoder, method: PairwiseMethod, caption: str, other: str, span: str | None
) -> Compared:
    """Compare two captions; with a span of the first one, show what in the second one matches it.

    Raises:
        InputError: a caption is empty, or the first one lacks the phrase.
    """
    if not (caption.strip() and other.strip()):
        raise InputError("one of the captions is empty")
    tokenizer = encoder.tokenizer
    spans, positions = span_positions(tokenizer, caption, span)
    tokens = tokenizer.encode([caption, other]).to(next(encoder.parameters()).device)
    arrays = _arrays(method.attribute_texts(tokens[:1], tokens[1:]))
    arrays |= {"tokens": numpy_of(tokens[0]), "other_tokens": numpy_of(tokens[1])}
    if positions:
        arrays["span_mask"] = np.isin(np.arange(tokens.shape[1]), positions)
        arrays["shown_second"] = arrays["interactions"][positions].sum(axis=0)
    rows, first = shown_tokens(tokenizer, caption, tokens[0], positions)
    columns, second = shown_tokens(tokenizer, other, tokens[1])
    matrix = sums_of(sums_of(arrays["interactions"], rows).T, columns).T
    sheet = text_pair_sheet(
        first,
        second,
        matrix,
        (sums_of(arrays["first"], rows), sums_of(arrays["shown_second"], columns)),
        similarity=arrays["similarity"].item(),
        error=arrays["completeness_error"].item(),
        where=_where(method, "text"),
    )
    places = ((row, column) for row in range(len(rows)) for column in range(len(columns)))
    table = [
        {
            "token": first[row].text,
            "other_token": second[column].text,
            "attribution": float(matrix[row, column]),
            "position": rows[row][0],
            "other_position": columns[column][0],
        }
        for row, column in sorted(places, key=lambda place: -matrix[place])
    ]
    where = _where(method, "text")
    record = {"captions": [caption, other], "where": where, "span": span, "characters": spans, "positions": positions}
    return arrays, record, sheet, table


def _where(method: Any, tower: str) -> str:
    """The layer that a method with token-patch attributions is read at, in words; empty for others."""
    if not method.pairwise:
        return ""
    at: TowerAtLayer = getattr(method, tower)
    if at.layer == 0:
        return "at the inputs (layer 0)"
    return f"at the last block ({at.layer})" if at.layer == at.layers[-1] else f"at layer {at.layer}"


def _arrays(result: IntraModalAttribution | ImageComparison) -> dict[str, NDArray[Any]]:
    names = [name for name in COMPARED_ARRAYS if hasattr(result, name)]
    arrays = {name: numpy_of(getattr(result, name)[0]) for name in names}
    return arrays | {"shown_second": arrays["second"]}


def write_pairs(folder: Path, table: Sequence[Mapping[str, Any]]) -> str:
    """Write the pairs of tokens; returns the line that says so, with the largest of them."""
    write_csv(folder / _FILE, table, _PAIRS)
    pairs = [f"{row['token']} - {row['other_token']} {row['attribution']:+.3f}" for row in table[:3]]
    return f"Saved {folder / _FILE}: {', '.join(pairs)}{', ...' if len(table) > 3 else ''}"
