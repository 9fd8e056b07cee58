"""One image and caption: their attributions by several methods as arrays, as a record and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_xai.commands.inputs import (
    Entry,
    InputError,
    find_phrase,
    parse_box,
    read_input,
    span_positions,
    transformed_box,
)
from lightning_xai.commands.outputs import numpy_of, shown_tokens, sums_of
from lightning_xai.photo import LONGEST, PhotoGeometry, on_photo
from lightning_xai.report.explanation import OtherText, Saliency, Token, comparison_sheet, explanation_sheet
from lightning_xai.report.plots import Example, Scale, heat_fault

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from lightning_xai.attribution import Attribution, AttributionMethod
    from lightning_xai.attribution.method_options import ChosenMethod
    from lightning_xai.attribution.target_options import ChosenTarget
    from lightning_xai.data.sample import Box, Span
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
    "on_photo": "[height, width] shown_image on the photo's pixels, reduced to 1024 at most; NaN where it is cropped",
    "box_mask": "[H, W] the patches of the box",
    "explained": "the value of the target, where captions are compared",
    "against_similarity": "[M] cosine similarity with each of the other captions",
    "against_text": "[M, L] what each of their tokens adds to the target (of methods without sign: for its caption)",
    "against_interactions": "[M, L, H, W] the same of each pair of token and patch; where interactions is",
    "against_prefix": "[M, L] the same of each token with CLS and register tokens; where interactions is",
    "shown_against": "[M, L] the values of their tokens in the picture",
    "tokens": "[L] token ids of the caption",
    "against_tokens": "[M, L] token ids of the other captions",
    "span_mask": "[L] the tokens of the span",
    "geometry": "scale across and down, and offset (x, y): photo * scale + offset is the model's input, in pixels",
}
"""What `attribution.npz` holds. With several methods, or one at several layers, those above `tokens` are named
`<method>/image`, or `<method>,<image layer>,<text layer>/image`, and so on."""
_RESULT = ("image", "text", "interactions", "prefix", "similarity", "completeness_error", "explained")
_OF_OTHERS = ("similarity", "text", "interactions", "prefix")
_SHOWN = ("shown_image", "on_photo", "box_mask", "shown_text", "shown_against")  # they follow from phrase and box
_LEAST_HEARD = 0.8  # share of a sound below which the picture says so
_INCOMPLETE = 0.05  # share of the similarity from which the picture mentions the completeness error


@dataclass(frozen=True)
class OtherCaption:
    """A caption that an entry's is compared with.

    Attributes:
        text: the caption.
        tokens: [L] token ids.
        content: positions of these tokens, without marks; see `PreparedEntry`.
        shown: these tokens as the picture shows them.
    """

    text: str
    tokens: Tensor
    content: list[list[int]]
    shown: list[Token]

    @classmethod
    def of(cls, encoder: TwoTowerEncoder, text: str, own: Tensor) -> OtherCaption:
        """Read a caption; `own` [L] are the tokens of the one that it is compared with.

        Raises:
            InputError: it is empty, or the same to the model.
        """
        if not text.strip():
            raise InputError("a caption to compare with (--against) is empty")
        tokens = encoder.tokenizer.encode([text])[0].to(own.device)
        if tokens.equal(own):
            raise InputError(
                f"the caption to compare with (--against) {text!r} is the same as the caption to the model, which "
                f"reads {len(own)} tokens: give another one, or one that differs in its first words"
            )
        return cls(text, tokens, *shown_tokens(encoder.tokenizer, text, tokens))


@dataclass(frozen=True)
class PreparedEntry:
    """An entry as the model sees it.

    Attributes:
        entry: image, caption and the part of either that is asked about.
        pixels: [3, height, width].
        size: (width, height) of the file.
        tokens: [L] token ids.
        content: positions of the caption's own tokens, without marks and padding; bytes of one character together.
        shown: these tokens as the picture shows them.
        spans: character spans of the phrase.
        positions: its tokens' positions.
        box_xyxy: the box in pixels of the transformed image.
        geometry: where the model's input lies on the photo; None for sounds.
        photo: [height, width, 3] uint8, reduced; for sounds the spectrogram.
        record: of the entry, as the file has it.
        against: the captions that it is compared with.
    """

    entry: Entry
    pixels: Tensor
    size: tuple[int, int]
    tokens: Tensor
    content: list[list[int]]
    shown: list[Token]
    spans: list[Span]
    positions: list[int]
    box_xyxy: Box | None
    geometry: PhotoGeometry | None
    photo: NDArray[np.uint8]
    record: dict[str, Any]
    against: tuple[OtherCaption, ...] = ()

    @property
    def hidden(self) -> str:
        """The sentence about what the crop hides, if that is more than a fifth."""
        if self.geometry is None or not self.geometry.is_cropped:
            return ""
        return f"The model's crop hides {1 - self.geometry.seen:.0%} of the photo; --fit letterbox shows it all."


@dataclass(frozen=True)
class Explanation:
    """Explanation of one entry by one method.

    Attributes:
        label: names method and layers in files.
        saliency: as it is drawn: values of the patches and of the caption's own tokens.
        arrays: as `ARRAYS` names them.
        record: of the method, as the file has it.
        chosen: the method.
        target: what it explains of captions that are compared.
    """

    label: str
    saliency: Saliency
    arrays: dict[str, NDArray[Any]]
    record: dict[str, Any]
    chosen: ChosenMethod
    target: ChosenTarget | None = None

    def about(self, prepared: PreparedEntry) -> Explanation:
        """What the same attribution says of the same image and caption with another phrase or box; nothing is run."""
        given = {name: values for name, values in self.arrays.items() if name not in _SHOWN}
        return _explanation(self.chosen, self.target, given, prepared)


def prepare_entry(encoder: TwoTowerEncoder, entry: Entry, read: PreparedEntry | None = None) -> PreparedEntry:
    """Read an entry's image, and find its phrase and box.

    Args:
        encoder: reads it.
        entry: image, caption, and what is asked about them.
        read: the same image and caption with another phrase or box: the image is not read again.

    Raises:
        InputError: the image does not decode, the caption is empty or lacks the phrase, the box is of no use.
    """
    if entry.span is not None and entry.box is not None:
        raise InputError("a span asks about words, a box about a part of the image: give one of them")
    if entry.span is not None and entry.against:
        raise InputError(
            "a span asks about a phrase within its caption, against about whole captions: give one of them"
        )
    if not entry.caption.strip():
        raise InputError(f"the caption of {entry.image} is empty")
    pixels, size = read_input(encoder, entry.source) if read is None else (read.pixels, read.size)
    spans, positions = span_positions(encoder.tokenizer, entry.caption, entry.span)
    box = transformed_box(encoder, entry.box, size)
    tokens = encoder.tokenizer.encode([entry.caption])[0].to(pixels.device)
    content, shown = shown_tokens(encoder.tokenizer, entry.caption, tokens, positions)
    strings = encoder.tokenizer.token_strings(tokens)
    geometry = encoder.geometry(size)
    if read is not None:
        photo = read.photo
    else:
        photo = _photo(entry) if geometry else _levels(encoder.pictures(pixels[None])[0])
    record: dict[str, Any] = {
        "image": str(entry.image),
        "image_size": list(size),
        "image_seen": encoder.seen(size),
        "geometry": None if geometry is None else geometry.record(),
        "caption": entry.caption,
        "token_strings": [text for text in strings if text],  # padding has none
        "span": None,
        "box": None,
    }
    if entry.span is not None:
        record["span"] = {
            "phrase": entry.span,
            "characters": [list(each) for each in spans],
            "positions": positions,
            "tokens": [strings[position] for position in positions],
        }
    if entry.box is not None and box is not None:
        record["box"] = {"x,y,width,height": list(parse_box(entry.box)), "x0,y0,x1,y1 transformed": list(box)}
    against = tuple(OtherCaption.of(encoder, text, tokens) for text in entry.against)
    if against:
        record["against"] = list(entry.against)
    prepared = PreparedEntry(
        entry, pixels, size, tokens, content, shown, spans, positions, box, geometry, photo, record, against
    )
    record["hidden"] = prepared.hidden
    return prepared


def _photo(entry: Entry) -> NDArray[np.uint8]:
    """A photo's pixels, reduced to what pictures need."""
    from lightning_xai.data.sample import read_image, upright

    source = entry.source
    image = read_image(source.read_bytes(), str(source)) if isinstance(source, Path) else upright(source, "image")
    image.thumbnail((LONGEST, LONGEST))
    return np.asarray(image, dtype=np.uint8)


def _levels(picture: Tensor) -> NDArray[np.uint8]:
    """A picture [3, height, width] of colours in [0, 1] as [height, width, 3]."""
    return np.asarray((numpy_of(picture.permute(1, 2, 0)) * 255).round(), dtype=np.uint8)


def explain_batch(
    chosen: ChosenMethod, prepared: Sequence[PreparedEntry], target: ChosenTarget | None = None
) -> Iterator[Explanation]:
    """Explain some entries by one method, all in one batch; those with captions to compare with by a target."""
    import torch

    from lightning_xai.attribution.targets import SIMILARITY

    compared = [bool(each.against) for each in prepared]
    if any(compared) and not all(compared):
        for each in prepared:
            yield from explain_batch(chosen, [each], target)
        return
    asked = target.of([each.entry.against for each in prepared]) if target is not None and any(compared) else SIMILARITY
    result = chosen.method.attribute(
        torch.stack([each.pixels for each in prepared]), torch.stack([each.tokens for each in prepared]), asked
    )
    for row, each in enumerate(prepared):
        yield _explanation(chosen, target, _given(result, row, each), each)


def _explanation(
    chosen: ChosenMethod, target: ChosenTarget | None, given: dict[str, NDArray[Any]], prepared: PreparedEntry
) -> Explanation:
    """Put together the explanation of an entry, from what the method has returned of it."""
    arrays = given | _shown(given, prepared)
    saliency = Saliency(
        chosen.name,
        arrays["shown_image"],
        sums_of(arrays["shown_text"], prepared.content),
        similarity=arrays["similarity"].item(),
        scale=_scale(chosen.method),
        completeness_error=arrays["completeness_error"].item() if "completeness_error" in arrays else None,
        where=chosen.where,
        others=_others(prepared, arrays),
    )
    maps = {"image": saliency.image, "text": saliency.text}
    record = {
        "options": chosen.options,
        "layers": None if chosen.layers is None else dict(zip(("image", "text"), chosen.layers, strict=True)),
        "where": chosen.where,
        "similarity": saliency.similarity,
        "completeness_error": saliency.completeness_error,
        "scale": saliency.scale,
        "patches": list(arrays["image"].shape),
        "range": {name: [float(values.min()), float(values.max())] for name, values in maps.items()},
        "fault": {name: heat_fault(values) for name, values in maps.items()},
        "on_padding": _on_padding(prepared.geometry, saliency.image),
    }
    if prepared.against and target is not None:
        record["target"] = {"name": target.name, "options": target.options, "value": arrays["explained"].item()}
        record["against"] = [{"caption": other.caption, "similarity": other.similarity} for other in saliency.others]
    return Explanation(chosen.label, saliency, arrays, record, chosen, target)


def _on_padding(geometry: PhotoGeometry | None, heat: NDArray[Any]) -> dict[str, float] | None:
    """How much of a map [H, W] lies on padding around the photo; None without padding."""
    rows, columns = heat.shape
    padding = np.zeros(heat.shape) if geometry is None else geometry.padding((rows, columns))
    if not padding.any():
        return None
    positive = heat.clip(min=0)
    share = float((positive * padding).sum() / positive.sum()) if positive.any() else float("nan")
    return {
        "patches": float(padding.mean()),
        "sum": float((heat * padding).sum()),
        "share_of_positive": share,
    }


def _others(prepared: PreparedEntry, arrays: Mapping[str, NDArray[Any]]) -> tuple[OtherText, ...]:
    """The other captions as they are drawn."""
    return tuple(
        OtherText(
            other.text,
            other.shown,
            sums_of(arrays["shown_against"][place], other.content),
            arrays["against_similarity"][place].item(),
        )
        for place, other in enumerate(prepared.against)
    )


def _scale(method: AttributionMethod) -> Scale:
    """By what the method knows: a signed one may give an image nothing that is negative, which is then to be seen."""
    if not method.has_zero:
        return "range"
    return "signed" if method.signed else "positive"


def _given(result: Attribution, row: int, prepared: PreparedEntry) -> dict[str, NDArray[Any]]:
    """What a method has returned of one entry of a batch, as `ARRAYS` names it."""
    found = {name: getattr(result, name) for name in _RESULT}
    arrays = {name: numpy_of(values[row]) for name, values in found.items() if values is not None}
    if prepared.against and result.others is not None:
        count = len(prepared.against)  # other entries of the batch may have more
        of_others = {f"against_{name}": getattr(result.others, name) for name in _OF_OTHERS}
        arrays |= {name: numpy_of(values[row, :count]) for name, values in of_others.items() if values is not None}
    return arrays


def _shown(given: Mapping[str, NDArray[Any]], prepared: PreparedEntry) -> dict[str, NDArray[Any]]:
    """The arrays of the picture, which follow from those of the method: they are about the phrase or the box."""
    arrays = {"shown_image": given["image"], "shown_text": given["text"]}
    if prepared.positions:
        arrays["shown_image"] = given["interactions"][prepared.positions].sum(axis=0)
    if prepared.geometry is not None:
        arrays["on_photo"] = on_photo(arrays["shown_image"], prepared.geometry)
    if "against_text" in given:
        arrays["shown_against"] = given["against_text"]
    if prepared.box_xyxy is not None:
        arrays["box_mask"] = box_mask(prepared.box_xyxy, given["image"], prepared.pixels)
        arrays["shown_text"] = (given["interactions"] * arrays["box_mask"]).sum(axis=(1, 2))
        if "against_interactions" in given:
            arrays["shown_against"] = (given["against_interactions"] * arrays["box_mask"]).sum(axis=(2, 3))
    return arrays


def box_mask(box_xyxy: Box, heat: NDArray[Any], pixels: Tensor) -> NDArray[Any]:
    """The patches of a map [H, W] that a box in an image [3, height, width] covers."""
    import torch

    from lightning_xai.metrics import patch_mask

    height, width = pixels.shape[1:]
    return numpy_of(patch_mask(torch.tensor([box_xyxy]), heat.shape, (height, width))[0])


def frame_and_box(prepared: PreparedEntry) -> tuple[Box | None, Box | None]:
    """What the model sees of an entry's photo, and the box that is asked about: (x0, y0, x1, y1) in pixels of it."""
    geometry, box = prepared.geometry, prepared.entry.box
    if geometry is None:
        return None, prepared.box_xyxy
    reduced = prepared.photo.shape[1] / geometry.photo[0]
    x0, y0, x1, y1 = (reduced * edge for edge in geometry.frame_xyxy)
    if box is None:
        return (x0, y0, x1, y1), None
    x, y, width, height = (reduced * edge for edge in parse_box(box))
    return (x0, y0, x1, y1), (x, y, x + width, y + height)


def sheet(
    prepared: PreparedEntry,
    explanations: Sequence[Explanation],
    missing: Mapping[str, str],
) -> Figure:
    """Draw an entry's explanations; `missing` are methods that do not serve the model, and why."""
    entry = prepared.entry
    frame, box = frame_and_box(prepared)
    example = Example(
        prepared.photo / np.float32(255), entry.span or "", entry.caption, tuple(prepared.spans), box, frame=frame
    )
    saliencies = [each.saliency for each in explanations]
    if prepared.against:
        asked = _compared(explanations[0])
        return comparison_sheet(example, prepared.shown, saliencies, missing=missing, asked=asked)
    if missing or len({each.method for each in saliencies}) > 1:
        return comparison_sheet(example, prepared.shown, saliencies, missing=missing)
    return explanation_sheet(
        example, prepared.shown, saliencies, asked=_asked(entry), notes=_notes(prepared, explanations)
    )


def _compared(explanation: Explanation) -> str:
    """The title of a picture that compares captions: the target, and its numbers."""
    record, similarity = explanation.record, explanation.saliency.similarity
    others = [other["similarity"] for other in record["against"]]
    value, target = record["target"]["value"], record["target"]["name"]
    if target != "contrast":
        return f"{target} {value:.3f} of the caption of similarity {similarity:.3f}"
    mean = f"{others[0]:.3f}"
    if len(others) > 1:
        kind = "softmax mean" if record["target"]["options"]["weight"] == "softmax" else "mean"
        mean = f"{similarity - value:.3f} ({kind} of {len(others)})"
    return f"similarity {similarity:.3f} rather than {mean}: difference {value:+.3f}"


def _asked(entry: Entry) -> str:
    if entry.span is not None:
        return f"where the image matches \u201c{entry.span}\u201d"
    return "which words match the box" if entry.box is not None else "what image and caption share"


def _notes(prepared: PreparedEntry, explanations: Sequence[Explanation]) -> list[str]:
    """Lines below the picture: how the phrase or box was understood, and what the picture leaves out."""
    notes, entry = [], prepared.entry
    if prepared.hidden:
        notes.append(prepared.hidden)
    elif prepared.geometry is None and prepared.record["image_seen"] < _LEAST_HEARD:
        notes.append(f"The model hears {prepared.record['image_seen']:.0%} of the sound: the beginning.")
    if prepared.box_xyxy is not None:
        mask = explanations[0].arrays["box_mask"]
        notes.append(f"Tokens: coloured by the {mask.sum()} of {mask.size} patches that the box covers.")
    elif prepared.positions:
        notes.append("Heat map: of the phrase alone. Tokens: coloured by the whole image.")
    found = find_phrase(entry.caption, entry.span) if entry.span else []
    if len(found) > 1:
        read = "all of them" if len(prepared.spans) == len(found) else f"the {len(prepared.spans)} that the model reads"
        notes.append(f"The phrase occurs {len(found)} times in the caption; {read} count.")
    full = prepared.content[-1][-1] >= len(prepared.tokens) - 2  # the end mark follows, in the last place
    if full and not entry.caption.rstrip().lower().endswith(prepared.shown[-1].text):
        notes.append(f"The model reads {len(prepared.tokens)} tokens; the rest of the caption is cut off.")
    return notes + [note for each in explanations for note in _reading_notes(each, several=len(explanations) > 1)]


def not_shown(arrays: Mapping[str, NDArray[Any]], marks: float) -> str:
    """What token-patch attributions give to no word or no patch, `marks` of it to start and end of the text."""
    prefix = arrays["prefix"]
    outside = f", and {prefix.sum():+.2g} of the image's CLS or registers" if prefix.any() else ""
    return f"Not shown: marks of start and end of the text, {marks:+.2g} together{outside}."


def _reading_notes(explanation: Explanation, *, several: bool) -> list[str]:
    """What one reading's maps leave out; with its layers, where there are several."""
    notes, arrays, saliency = [], explanation.arrays, explanation.saliency
    if saliency.where.startswith("first"):
        notes.append("The first layers that can be explained: these towers are not split before them.")
    error, most = saliency.completeness_error, _INCOMPLETE * abs(saliency.similarity)
    if error is not None and "steps" in explanation.record["options"] and abs(error) > most:
        notes.append("The sum is far from complete: more --options.steps or another --options.rule come closer.")
    padding = explanation.record["on_padding"]
    if padding is not None:
        notes.append(
            f"On padding around the photo ({padding['patches']:.0%} of the patches): {padding['sum']:+.2g}, "
            f"{padding['share_of_positive']:.0%} of all positive attribution."
        )
    if "interactions" in arrays:
        notes.append(not_shown(arrays, arrays["shown_text"].sum() - saliency.text.sum()))
    where = saliency.where[:1].upper() + saliency.where[1:]
    return [f"{where}: {note[:1].lower()}{note[1:]}" for note in notes] if several else notes
