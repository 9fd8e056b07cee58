"""Two images, or two captions: what in each of them makes them similar."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_xai.commands.inputs import InputError, parse_box, read_input, span_positions, transformed_box
from lightning_xai.commands.outputs import PICTURE, numpy_of, shown_tokens, write_arrays
from lightning_xai.report.explanation import image_pair_sheet, text_pair_sheet
from lightning_xai.report.plots import Example, save_figure
from lightning_xai.results.schema import write_json

if TYPE_CHECKING:
    from lightning_xai.attribution import IntraModalAttribution, PairwiseMethod
    from lightning_xai.attribution.method_options import ChosenMethod
    from lightning_xai.models.encoder import TwoTowerEncoder

_ARRAYS = {
    "interactions": "what each pair of parts adds to the similarity: [H, W, H, W] for images, [L, L] for captions",
    "first": "of each part of the first input, with the whole second one",
    "second": "of each part of the second input, with the whole first one",
    "shown_second": "as in the picture: of each part of the second input, with the box or the span of the first one",
    "similarity": "cosine similarity of the two",
    "completeness_error": "sum of all attributions minus what they should sum to",
}


def compare_images(
    out: Path,
    encoder: TwoTowerEncoder,
    chosen: ChosenMethod,
    images: tuple[Path, Path],
    box: str | None,
    settings: Mapping[str, Any],
) -> None:
    """Explain the similarity of two images; with a box, what in the second one matches that part of the first.

    Args:
        out: folder to write to.
        encoder: the model.
        chosen: a method that compares inputs of one modality.
        images: the image files.
        box: `"x,y,width,height"` in pixels of the first one.
        settings: what the record says of command and model.

    Raises:
        InputError: an image or the box cannot be used.
    """
    import torch

    from lightning_xai.metrics import patch_mask

    inputs, sizes = zip(*(read_input(encoder, path) for path in images), strict=True)
    seen = None if box is None else transformed_box(encoder, parse_box(box), sizes[0])
    pixels = [each[None] for each in inputs]
    result = _method(chosen).attribute_images(*pixels)
    arrays = _arrays(result)
    if seen is not None:
        size = (int(pixels[0].shape[2]), int(pixels[0].shape[3]))
        arrays["box_mask"] = numpy_of(patch_mask(torch.tensor([seen]), arrays["first"].shape, size)[0])
        arrays["shown_second"] = arrays["interactions"][arrays["box_mask"]].sum(axis=0)
    shown = [encoder.pictures(each)[0].permute(1, 2, 0) for each in pixels]
    first, second = (
        Example(numpy_of(each), "", "", (), place) for each, place in zip(shown, (seen, None), strict=True)
    )
    heats = (arrays["first"] if seen is None else None, arrays["shown_second"])
    sheet = image_pair_sheet(
        first, second, heats, similarity=result.similarity.item(), error=result.completeness_error.item()
    )
    record = {"images": [str(path) for path in images], "box": box, "box transformed": seen}
    _write(out, chosen, arrays, sheet, {**settings, **record})


def compare_captions(
    out: Path,
    encoder: TwoTowerEncoder,
    chosen: ChosenMethod,
    captions: tuple[str, str],
    span: str | None,
    settings: Mapping[str, Any],
) -> None:
    """Explain the similarity of two captions; with a span, what in the second one matches that part of the first.

    Args:
        out: folder to write to.
        encoder: the model.
        chosen: a method that compares inputs of one modality.
        captions: the texts.
        span: a phrase of the first one.
        settings: what the record says of command and model.

    Raises:
        InputError: a caption is empty, or the first one lacks the phrase.
    """
    if not all(caption.strip() for caption in captions):
        raise InputError("one of the captions is empty")
    spans, positions = ([], []) if span is None else span_positions(encoder.tokenizer, captions[0], span)
    tokens = encoder.tokenizer.encode(captions).to(next(encoder.parameters()).device)
    result = _method(chosen).attribute_texts(tokens[:1], tokens[1:])
    arrays = _arrays(result) | {"tokens": numpy_of(tokens[0]), "other_tokens": numpy_of(tokens[1])}
    if positions:
        arrays["span_mask"] = np.isin(np.arange(tokens.shape[1]), positions)
        arrays["shown_second"] = arrays["interactions"][positions].sum(axis=0)
    rows, first = shown_tokens(encoder.tokenizer, captions[0], tokens[0], positions)
    columns, second = shown_tokens(encoder.tokenizer, captions[1], tokens[1])
    sheet = text_pair_sheet(
        first,
        second,
        arrays["interactions"][np.ix_(rows, columns)],
        (arrays["first"][rows], arrays["shown_second"][columns]),
        similarity=result.similarity.item(),
        error=result.completeness_error.item(),
    )
    record = {"captions": list(captions), "span": span, "characters": spans, "positions": positions}
    _write(out, chosen, arrays, sheet, {**settings, **record})


def _method(chosen: ChosenMethod) -> PairwiseMethod:
    from lightning_xai.attribution import PairwiseMethod

    assert isinstance(chosen.method, PairwiseMethod)  # the command has checked the name
    return chosen.method


def _arrays(result: IntraModalAttribution) -> dict[str, NDArray[Any]]:
    names = ("interactions", "first", "second", "similarity", "completeness_error")
    arrays = {name: numpy_of(getattr(result, name)[0]) for name in names}
    return arrays | {"shown_second": arrays["second"]}


def _write(
    out: Path,
    chosen: ChosenMethod,
    arrays: Mapping[str, NDArray[Any]],
    sheet: Figure,
    record: Mapping[str, Any],
) -> None:
    scores = {each: float(arrays[each]) for each in ("similarity", "completeness_error")}
    method = {chosen.name: {"options": chosen.options, **scores}}
    write_arrays(out / "attribution.npz", arrays)
    write_json(out / "explanation.json", {**record, "methods": method, "arrays": _ARRAYS})
    save_figure(sheet, out / PICTURE)
    print(f"Look at {out / PICTURE}; all numbers: {out / 'attribution.npz'}")  # noqa: T201
