"""Read what is given on the command line: a model, images, captions, phrases and boxes."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_xai.commands.model_choice import IMAGEBIND, SENTENCES, ModelChoice

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from lightning_xai.data import CaptionTokenizer
    from lightning_xai.data.sample import Box, Span
    from lightning_xai.models.encoder import TwoTowerEncoder

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".wav", ".flac", ".ogg", ".mp3")
_COLUMNS = ("image", "caption", "span", "box", "against")
_BETWEEN = "|"  # captions in one field of a list
_MOST_OUTSIDE = 1.0  # pixels: data sets round the edges of their boxes


class InputError(ValueError):
    """An image, caption, phrase or box that cannot be used; in a list it is skipped and counted."""


@dataclass(frozen=True)
class Entry:
    """An image and a caption, and the part of either that is asked about.

    Attributes:
        name: names what is written for it.
        image: the image file, or what names an image that was given as pixels.
        caption: the text.
        span: a phrase of the caption.
        box: `"x,y,width,height"` in pixels of the upright image file.
        against: captions that the caption is compared with.
        pixels: the image itself, where it is not to be read from its file.
    """

    name: str
    image: Path
    caption: str
    span: str | None = None
    box: str | None = None
    against: tuple[str, ...] = ()
    pixels: Image.Image | None = field(default=None, repr=False, compare=False)

    @property
    def source(self) -> Path | Image.Image:
        """Where the pixels come from: `pixels`, or the file."""
        return self.image if self.pixels is None else self.pixels

    def row(self) -> dict[str, Any]:
        """The entry as a row of a table."""
        shown = {name: getattr(self, name) for name in ("name", "image", "caption", "span", "box")}
        return shown | {"against": f" {_BETWEEN} ".join(self.against)}


def _refuse_run(name: str) -> None:
    """Raise a ValueError that names the best model of a run, where its folder was given: the file says which it was."""
    if not Path(name).is_dir():
        return  # no need for what trains, which takes seconds to import
    from lightning_xai.training.run_folder import run_of

    run = run_of(Path(name))
    if run is not None:
        raise ValueError(f"{name} is the folder of a run; give the model itself, --model.name={run.model().path}")


def load_model(choice: ModelChoice) -> TwoTowerEncoder:
    """Load the chosen model, in evaluation mode, on its device.

    Raises:
        ValueError: an unknown name, tag or device; a broken file.
    """
    import torch

    from lightning_xai.models import load_clap, load_dual_encoder, load_imagebind, load_sentence_encoder
    from lightning_xai.models.clap import is_clap

    device = find_device(choice.device)
    _refuse_run(choice.name)
    folder = Path(choice.name.removeprefix("hf:"))
    is_sounds = folder.is_dir() and is_clap(folder)
    given = [name for name, value in {"pretrained": choice.pretrained, **choice.options}.items() if value is not None]
    is_whole = (folder / "config.json").is_file()  # else loading says what the folder lacks
    if given and ((is_sounds and is_whole) or choice.name.startswith((SENTENCES, IMAGEBIND))):
        takes = "takes no images" if choice.compares_texts_only else "knows its own transform"
        raise ValueError(
            f"{choice.name} holds its own weights and {'takes sounds, no images' if is_sounds else takes}: leave out "
            f"{', '.join(f'--model.{name}' for name in given)}"
        )
    if choice.compares_texts_only:
        return load_sentence_encoder(choice.name.removeprefix(SENTENCES), device).eval()
    if choice.name.startswith(IMAGEBIND):
        images, _ = load_imagebind(choice.name.removeprefix(IMAGEBIND), device)
        return images.eval()
    if is_sounds:
        return load_clap(folder, device).eval()
    if choice.is_random:
        torch.manual_seed(choice.seed)
        print(  # noqa: T201
            f"{choice.name} has random weights (seed {choice.seed}): it has learned nothing. Give --model.pretrained a "
            "tag or a file, or --model.name a checkpoint, to explain a trained model",
            file=sys.stderr,
        )
    return load_dual_encoder(choice.name, choice.pretrained, device, **choice.options).eval()


def find_device(name: str | None) -> torch.device:
    """The device of that name; without one a GPU where there is one.

    Raises:
        ValueError: no such device, or none on this machine.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device; give cpu, cuda or cuda:1") from error
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ["cpu"] + ([] if here is None else [f"{here.type}:{i}" for i in range(torch.accelerator.device_count())])
    found = device.type == "cpu" or f"{device.type}:{device.index or 0}" in known
    if not found:
        raise ValueError(f"PyTorch finds no device {name} on this machine; it has {', '.join(known)}")
    return device


def parse_box(text: str) -> Box:
    """Read `"x,y,width,height"`.

    Raises:
        InputError: other than four finite numbers, or no area.

    >>> parse_box("10, 20, 64, 48.5")
    (10.0, 20.0, 64.0, 48.5)
    """
    try:
        x, y, width, height = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"a box is x,y,width,height in pixels, such as 10,20,64,48; got {text!r}") from error
    if not all(map(math.isfinite, (x, y, width, height))) or width <= 0 or height <= 0:
        raise InputError(f"a box needs a positive width and height (x,y,width,height); got {text!r}")
    return x, y, width, height


def is_list(image: Path) -> bool:
    """True for a path that stands for many images: a folder, or a CSV list."""
    return image.is_dir() or image.suffix.lower() == ".csv"


def read_entries(
    image: Path,
    caption: str | None,
    captions: Path | None,
    span: str | None = None,
    box: str | None = None,
    against: Sequence[str] = (),
) -> list[Entry]:
    """The entry of a single image, or those of a CSV list or of a folder of images.

    Args:
        image: an image; a CSV file with the columns image and caption, and if need be span, box and against (empty:
            none; several captions to compare with are separated by |); or a folder.
        caption: the text of the image, or of every image of a folder.
        captions: instead, for a folder, a CSV file as above, with paths relative to the folder.
        span: a phrase of the caption of a single image.
        box: a box on a single image.
        against: captions to compare that of a single image, or of every image of a folder, with.

    Raises:
        ValueError: nothing to explain, captions for what has some already, or a broken list.
    """
    if not is_list(image):
        if caption is None or captions is not None:
            raise ValueError(f"{image} is a single image: give its caption (--caption TEXT), and no --captions")
        return [Entry(image.stem, image, caption, span, box, tuple(against))]
    if span is not None or box is not None:
        raise ValueError("a list has its spans and boxes in columns of these names: leave out --span and --box")
    if against and (captions is not None or not image.is_dir()):
        raise ValueError("a list has captions to compare with in its column against: leave out --against")
    root = image if image.is_dir() else image.parent
    if not image.is_dir():
        if caption is not None or captions is not None:
            raise ValueError(f"{image} is a list and has its own captions: leave out --caption and --captions")
        rows = _read_list(image)
    elif (caption is None) == (captions is None):
        raise ValueError(
            f"{image} is a folder: give one --caption for all its images, or --captions FILE.csv with the columns "
            "image,caption"
        )
    elif captions is not None:
        rows = _read_list(captions)
    else:
        names = sorted(path.name for path in image.iterdir() if path.suffix.lower() in _SUFFIXES)
        if not names:
            raise ValueError(f"{image} holds no image or sound ({', '.join(_SUFFIXES)})")
        rows = [{"image": name, "caption": caption or ""} for name in names]
    return [
        Entry(
            f"{i:04d}-{path.stem}",
            path,
            row["caption"],
            row.get("span") or None,
            row.get("box") or None,
            tuple(each.strip() for each in row["against"].split(_BETWEEN)) if row.get("against") else tuple(against),
        )
        for i, row in enumerate(rows)
        for path in [root / row["image"]]
    ]


def _read_list(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV list by its header; a ValueError names what is no such file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark in front
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
            rows = []
            for fields in filter(None, lines):
                if len(fields) != len(header):
                    message = f"expected {len(header)} fields as in the header, found {len(fields)}"
                    raise ValueError(f"{path}, line {lines.line_num}: {message}; put fields with commas in quotes")
                rows.append(dict(zip(header, fields, strict=True)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error}); write it again") from error
    if not rows:
        raise ValueError(f"{path} lists no image: give a line for each, below the header image,caption")
    if not {"image", "caption"} <= rows[0].keys() <= set(_COLUMNS):
        raise ValueError(
            f"{path}: expected the columns image,caption and if need be span,box,against; got {','.join(rows[0])}"
        )
    return rows


def read_input(encoder: TwoTowerEncoder, source: Path | Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """Read what a model sees of a file or of an image, on its device, and its (width, height) in pixels.

    Images are JPEG, PNG or WebP files; no other format is ever looked into. A model of sounds reads sound files.

    Raises:
        InputError: there is no such file, or it does not decode.
    """
    try:
        pixels, size = encoder.read(source)
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(str(error)) from error
    return pixels.to(next(encoder.parameters())), size


def find_phrase(caption: str, phrase: str) -> list[Span]:
    """Find every place of a phrase in a caption, as whole words, in any case: character spans, end exclusive.

    Raises:
        InputError: the caption does not have it.

    >>> find_phrase("A dog, another dog and two dogs", "DOG")
    [(2, 5), (15, 18)]
    """
    from lightning_xai.data.phrase_finder import find_phrases

    if not phrase.strip():
        raise InputError("the span is empty; give a phrase of the caption, or leave it out")
    spans = find_phrases(caption, [phrase], exact=False)
    if not spans:
        within = " as whole words" if " ".join(phrase.split()).lower() in " ".join(caption.split()).lower() else ""
        raise InputError(f"the span {phrase!r} is not in the caption{within}: {caption!r}")
    return spans


def span_positions(tokenizer: CaptionTokenizer, caption: str, phrase: str | None) -> tuple[list[Span], list[int]]:
    """Find a phrase in a caption: character spans, and positions of their tokens; empty without a phrase.

    Where it occurs several times, all of its occurrences that the model reads count.

    Raises:
        InputError: it is not in the caption, is cut off by the context length, or shares a token with other words.
    """
    from lightning_xai.data.spans import SpanCutOffError, SpanError

    if phrase is None:
        return [], []
    spans: list[Span] = []
    positions: list[int] = []
    for span in find_phrase(caption, phrase):
        try:
            tokens = tokenizer.token_span(caption, span)
        except SpanCutOffError as error:
            cut_off = str(error)
            continue
        except SpanError as error:
            raise InputError(f"the span does not consist of whole tokens: {error}") from error
        spans.append(span)
        positions += range(tokens.start, tokens.stop)
    if not spans:
        raise InputError(f"the span is cut off: {cut_off}; shorten the caption")
    return spans, positions


def transformed_box(encoder: TwoTowerEncoder, text: str | None, size: tuple[int, int]) -> Box | None:
    """Find a box in what the model sees: (x0, y0, x1, y1) in its pixels; None without a box.

    Args:
        encoder: the model, whose image transform resizes and crops.
        text: `"x,y,width,height"` in pixels of the image file.
        size: (width, height) of the image file.

    Raises:
        InputError: the box is none, it leaves the image, or the crop leaves nothing of it.
    """
    import torch

    if text is None:
        return None
    box_xywh = x, y, width, height = parse_box(text)
    plain = ",".join(f"{value:g}" for value in box_xywh)
    over = max(-x, -y, x + width - size[0], y + height - size[1])
    if over > _MOST_OUTSIDE:
        raise InputError(f"the box {plain} (x,y,width,height) leaves the image, which has {size[0]} x {size[1]} pixels")
    x0, y0, x1, y1 = encoder.boxes(torch.tensor([box_xywh]), size)[0].tolist()
    if x1 <= x0 or y1 <= y0:
        _, rows, columns = encoder.image_shape
        raise InputError(
            f"nothing of the box {plain} is left of an image of {size[0]} x {size[1]} pixels after the model's "
            f"resize and crop to {columns} x {rows}"
        )
    return x0, y0, x1, y1
