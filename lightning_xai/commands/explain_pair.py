"""An image and a caption: what makes them similar, in arrays, a picture and a record of every setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_xai.commands.inputs import (
    Box,
    Entry,
    InputError,
    Span,
    find_phrase,
    parse_box,
    read_input,
    span_positions,
    transformed_box,
)
from lightning_xai.commands.outputs import PICTURE, numpy_of, own_positions, shown_tokens, write_arrays
from lightning_xai.report.explanation import Saliency, Scale, comparison_sheet, explanation_sheet
from lightning_xai.report.plots import Example, heat_fault, save_figure
from lightning_xai.results.schema import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from lightning_xai.attribution import Attribution
    from lightning_xai.attribution.method_options import ChosenMethod
    from lightning_xai.models.encoder import TwoTowerEncoder

ARRAYS = {
    "image": "[H, W] what each patch adds to the similarity with the whole caption, as the method returns it",
    "text": "[L] the same of each token with the whole image; 0 for padding",
    "interactions": "[L, H, W] what each pair of token and patch adds; only of methods with token-patch attributions",
    "prefix": "[L] what each token adds together with the image's CLS and register tokens; where interactions is",
    "similarity": "cosine similarity of image and caption",
    "completeness_error": "sum of all attributions minus what they should sum to; only of methods with such a sum",
    "shown_image": "[H, W] the heat map of the picture: the sum of interactions over the span, or image",
    "shown_text": "[L] the values of the tokens in the picture: the sum of interactions over the box, or text",
    "box_mask": "[H, W] the patches of the box",
    "tokens": "[L] token ids of the caption",
    "span_mask": "[L] the tokens of the span",
}
"""What `attribution.npz` holds. With several methods, those above `tokens` are named `<method>/image` and so on."""

# Averages of scores and capacities have no zero of their own: only differences within a map mean something.
_WITHOUT_ZERO = ("m2ib", "rise")


@dataclass(frozen=True)
class Question:
    """An entry as the model sees it.

    Attributes:
        entry: what was asked.
        size: (width, height) of the image file.
        pixels: [3, height, width].
        tokens: [L] token ids.
        spans: character spans of the phrase.
        positions: its tokens' positions.
        box: (x0, y0, x1, y1) in pixels of the transformed image.
    """

    entry: Entry
    size: tuple[int, int]
    pixels: Tensor
    tokens: Tensor
    spans: list[Span]
    positions: list[int]
    box: Box | None


@dataclass(frozen=True)
class Answer:
    """What one method says of one entry: arrays as `ARRAYS` names them, and its own description."""

    name: str
    options: Mapping[str, Any]
    arrays: dict[str, NDArray[Any]]

    @property
    def scale(self) -> Scale:
        """How the values are shown."""
        if self.name in _WITHOUT_ZERO:
            return "range"
        negative = min(self.arrays["image"].min(), self.arrays["text"].min()) < 0
        return "signed" if negative else "positive"


def ask(encoder: TwoTowerEncoder, entry: Entry) -> Question:
    """Read an entry's image, and find its phrase and box.

    Raises:
        InputError: the image does not decode, the caption is empty or lacks the phrase, the box is of no use.
    """
    if entry.span is not None and entry.box is not None:
        raise InputError("a span asks about words, a box about a part of the image: give one of them")
    if not entry.caption.strip():
        raise InputError(f"the caption of {entry.image} is empty")
    pixels, size = read_input(encoder, entry.image)
    spans: list[Span] = []
    positions: list[int] = []
    if entry.span is not None:
        spans, positions = span_positions(encoder.tokenizer, entry.caption, entry.span)
    box = None
    if entry.box is not None:
        box = transformed_box(encoder, parse_box(entry.box), size)
    tokens = encoder.tokenizer.encode([entry.caption])[0].to(pixels.device)
    own_positions(encoder.tokenizer, entry.caption, tokens)  # refuses a caption that the tokenizer empties
    return Question(entry, size, pixels, tokens, spans, positions, box)


def answer(chosen: ChosenMethod, questions: Sequence[Question]) -> Iterator[Answer]:
    """What a method says of some entries, all in one batch."""
    import torch

    result = chosen.method.attribute(
        torch.stack([question.pixels for question in questions]),
        torch.stack([question.tokens for question in questions]),
    )
    for row, question in enumerate(questions):
        yield Answer(chosen.name, chosen.options, _arrays(result, row, question))


def _arrays(result: Attribution, row: int, question: Question) -> dict[str, NDArray[Any]]:
    from lightning_xai.metrics import patch_mask

    arrays = {
        name: numpy_of(values[row])
        for name in ("image", "text", "interactions", "prefix", "similarity", "completeness_error")
        if (values := getattr(result, name)) is not None
    }
    arrays["shown_image"], arrays["shown_text"] = arrays["image"], arrays["text"]
    if question.positions:
        arrays["shown_image"] = arrays["interactions"][question.positions].sum(axis=0)
    if question.box is not None:
        import torch

        height, width = question.pixels.shape[1:]
        mask = patch_mask(torch.tensor([question.box]), arrays["image"].shape, (height, width))
        arrays["box_mask"] = numpy_of(mask[0])
        arrays["shown_text"] = (arrays["interactions"] * arrays["box_mask"]).sum(axis=(1, 2))
    return arrays


def write(
    folder: Path,
    encoder: TwoTowerEncoder,
    question: Question,
    answers: Sequence[Answer],
    missing: Mapping[str, str],
    settings: Mapping[str, Any],
) -> Path:
    """Write picture, arrays and record of one entry; returns the picture's path.

    Args:
        folder: where to.
        encoder: the model.
        question: the entry.
        answers: one for each method.
        missing: methods that do not serve the model, and why.
        settings: what the record says of command and model.
    """
    arrays: dict[str, NDArray[Any]] = {"tokens": numpy_of(question.tokens)}
    if question.positions:
        arrays["span_mask"] = np.isin(np.arange(len(question.tokens)), question.positions)
    for each in answers:
        own = (
            each.arrays if len(answers) + len(missing) == 1 else {f"{each.name}/{k}": v for k, v in each.arrays.items()}
        )
        arrays |= own
    write_arrays(folder / "attribution.npz", arrays)
    write_json(folder / "explanation.json", {**settings, **_record(encoder, question, answers, missing)})
    picture = folder / PICTURE
    save_figure(_sheet(encoder, question, answers, missing), picture)
    return picture


def _record(
    encoder: TwoTowerEncoder, question: Question, answers: Sequence[Answer], missing: Mapping[str, str]
) -> dict[str, Any]:
    entry = question.entry
    tokens = encoder.tokenizer.token_strings(question.tokens)
    record: dict[str, Any] = {
        "image": str(entry.image),
        "image_size": list(question.size),
        "caption": entry.caption,
        "token_strings": [text for text in tokens if text],
        "span": None,
        "box": None,
    }
    if entry.span is not None:
        record["span"] = {
            "phrase": entry.span,
            "characters": [list(span) for span in question.spans],
            "positions": question.positions,
            "tokens": [tokens[position] for position in question.positions],
        }
    if entry.box is not None and question.box is not None:
        record["box"] = {"x,y,width,height": list(parse_box(entry.box)), "x0,y0,x1,y1 transformed": list(question.box)}
    own = own_positions(encoder.tokenizer, entry.caption, question.tokens)
    record["methods"] = {each.name: _scores(each, own) for each in answers}
    return record | {"not_served": dict(missing), "arrays": ARRAYS}


def faults(encoder: TwoTowerEncoder, question: Question, answer: Answer) -> dict[str, str | None]:
    """What is wrong with the maps for image and text that are shown, as `heat_fault` says it."""
    own = own_positions(encoder.tokenizer, question.entry.caption, question.tokens)
    return {name: heat_fault(values) for name, values in _shown(answer, own).items()}


def _shown(answer: Answer, own: Sequence[int]) -> dict[str, NDArray[Any]]:
    return {"image": answer.arrays["shown_image"], "text": answer.arrays["shown_text"][list(own)]}


def _scores(answer: Answer, own: Sequence[int]) -> dict[str, Any]:
    maps = _shown(answer, own)
    error = answer.arrays.get("completeness_error")
    return {
        "options": dict(answer.options),
        "similarity": float(answer.arrays["similarity"]),
        "completeness_error": None if error is None else float(error),
        "scale": answer.scale,
        "patches": list(answer.arrays["image"].shape),
        "range": {name: [float(values.min()), float(values.max())] for name, values in maps.items()},
        "fault": {name: heat_fault(values) for name, values in maps.items()},
    }


def _sheet(
    encoder: TwoTowerEncoder, question: Question, answers: Sequence[Answer], missing: Mapping[str, str]
) -> Figure:
    entry = question.entry
    own, tokens = shown_tokens(encoder.tokenizer, entry.caption, question.tokens, question.positions)
    picture = numpy_of(encoder.pictures(question.pixels[None])[0].permute(1, 2, 0))
    example = Example(picture, entry.span or "", entry.caption, tuple(question.spans), question.box)
    saliencies = [_saliency(each, own) for each in answers]
    if len(answers) + len(missing) > 1:
        return comparison_sheet(example, tokens, saliencies, missing=missing)
    notes = _notes(question, answers[0], own, tokens[-1].text)
    return explanation_sheet(example, tokens, saliencies[0], asked=_asked(entry), notes=notes)


def _saliency(answer: Answer, own: Sequence[int]) -> Saliency:
    error = answer.arrays.get("completeness_error")
    return Saliency(
        answer.name,
        answer.arrays["shown_image"],
        answer.arrays["shown_text"][list(own)],
        float(answer.arrays["similarity"]),
        answer.scale,
        None if error is None else float(error),
    )


def _asked(entry: Entry) -> str:
    if entry.span is not None:
        return f"where the image matches \u201c{entry.span}\u201d"
    return "which words match the box" if entry.box is not None else "what image and caption share"


def _notes(question: Question, answer: Answer, own: Sequence[int], last: str) -> list[str]:
    """What the picture leaves out, and how the question was understood."""
    notes = []
    if question.box is not None:
        mask = answer.arrays["box_mask"]
        notes.append(f"Tokens: coloured by the {mask.sum()} of {mask.size} patches that the box covers.")
    elif question.positions:
        notes.append("Heat map: of the phrase alone. Tokens: coloured by the whole image.")
    found = find_phrase(question.entry.caption, question.entry.span) if question.entry.span else []
    if len(found) > 1:
        read = "all of them" if len(question.spans) == len(found) else f"the {len(question.spans)} that the model reads"
        notes.append(f"The phrase stands {len(found)} times in the caption; {read} count.")
    error = answer.arrays.get("completeness_error")
    if error is not None and "steps" in answer.options and abs(error) > 0.05 * abs(answer.arrays["similarity"]):
        notes.append("The sum is far from complete: more --options.steps or another --options.rule come closer.")
    if own and own[-1] >= len(question.tokens) - 2 and not question.entry.caption.rstrip().lower().endswith(last):
        notes.append(f"The model reads {len(question.tokens)} tokens; the rest of the caption is cut off.")
    rest = answer.arrays["shown_text"].sum() - answer.arrays["shown_text"][list(own)].sum()
    if "interactions" in answer.arrays:
        outside = (
            f", and {answer.arrays['prefix'].sum():+.2g} of the image's CLS or registers" if _has_prefix(answer) else ""
        )
        notes.append(f"Not shown: marks of start and end of the text, {rest:+.2g} together{outside}.")
    return notes


def _has_prefix(answer: Answer) -> bool:
    return bool(answer.arrays["prefix"].any())
