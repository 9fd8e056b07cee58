"""Write arrays and settings, and show captions token by token."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from lightning_xai.atomic_file import replaced_at_once, write_json
from lightning_xai.commands.inputs import InputError
from lightning_xai.commands.model_choice import ModelChoice
from lightning_xai.report.explanation import Token
from lightning_xai.report.plots import save_figure
from lightning_xai.results.record import package_versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from lightning_xai.data import CaptionTokenizer
    from lightning_xai.models.encoder import TwoTowerEncoder

PICTURE = "explanation.png"  # never named after the image, which it would replace in the same folder
PAGE = "explanation.html"
PAGE_OF_MANY = "explanations.html"
_NEAR = 8  # characters that a tokenizer's cleaning may have dropped between two tokens


def write_all(
    folder: Path, arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any], sheet: Figure, page: str | None = None
) -> str:
    """Write arrays (none of which needs pickle), record and picture of an explanation; returns the line that says so.

    A reader sees each file whole, or the one before it.

    Args:
        folder: where to.
        arrays: by their names in the file.
        record: of everything else.
        sheet: the picture.
        page: the explorer; without one, that of an earlier explanation is removed.
    """
    with replaced_at_once(folder / "attribution.npz") as part:
        np.savez_compressed(part, **arrays)  # type: ignore[arg-type]  # numpy's stub reads names as its own options
    write_json(folder / "explanation.json", record)
    save_figure(sheet, folder / PICTURE)
    if page is None:
        (folder / PAGE).unlink(missing_ok=True)
    else:
        write_page(folder / PAGE, page)
    explorer = "" if page is None else f" and the explorer {PAGE}"
    return (
        f"Saved {folder / PICTURE}{explorer}, with all numbers in attribution.npz and all settings in explanation.json"
    )


def write_page(path: Path, page: str) -> None:
    """Write a page of HTML."""
    with replaced_at_once(path) as part:
        part.write_text(page, encoding="utf-8", newline="")


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a table: floats with all their digits, NaN as nan, None and missing values as empty fields."""
    with (
        replaced_at_once(path) as part,
        # Captions may hold lone surrogates, which are no UTF-8: spell them out rather than lose the table.
        part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def describe(command: Mapping[str, Any], choice: ModelChoice, encoder: TwoTowerEncoder) -> dict[str, Any]:
    """Describe the command's settings, the model, and versions of what computes attributions, as in every record."""
    return {
        "command": {key: value for key, value in command.items() if value is not None},
        "model": {
            "name": choice.name,
            "pretrained": choice.pretrained,
            "random_weights_seed": choice.seed if choice.is_random else None,
            "device": str(next(encoder.parameters()).device),
            "architecture": encoder.name,
            "image_size": list(encoder.image_shape[1:]) if encoder.has_image_tower else None,
            "preprocessing": encoder.preprocessing,
            "context_length": encoder.tokenizer.context_length,
            "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        },
        "versions": package_versions(),
    }


def progress_bar() -> Progress:
    """A progress bar that leaves standard output to results."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def numpy_of(tensor: Tensor) -> NDArray[Any]:
    """A tensor's values, wherever it lies."""
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def shown_tokens(
    tokenizer: CaptionTokenizer, caption: str, tokens: Tensor, marked: Sequence[int] = ()
) -> tuple[list[list[int]], list[Token]]:
    """A caption's own tokens, without marks of start and end and padding: their positions, and how they are shown.

    Tokens that are bytes of one character are shown as one.

    Args:
        tokenizer: made the tokens.
        caption: the text.
        tokens: [L] token ids.
        marked: positions of the phrase that is asked about.

    Raises:
        InputError: the caption has no token.
    """
    own: list[int] = tokenizer.content_mask(tokens[None].cpu())[0].nonzero()[:, 0].tolist()
    if not own:
        raise InputError(f"nothing of the caption {caption!r} is left by the tokenizer")
    groups = _by_character(tokenizer, caption, own)
    # Some vocabularies mark a word piece that continues a word.
    pieces = [tokenizer.joint_string(tokens[group].tolist()).removeprefix("##") for group in groups]
    joined = _joined(caption, pieces)
    return groups, [
        Token(piece, continues, group[0] in marked)
        for piece, continues, group in zip(pieces, joined, groups, strict=True)
    ]


def _by_character(tokenizer: CaptionTokenizer, caption: str, own: Sequence[int]) -> list[list[int]]:
    """Positions of tokens, those that share a character together."""
    offsets = None if caption.isascii() else tokenizer.offsets(caption)
    groups: list[list[int]] = []
    for row, position in enumerate(own):
        if offsets is not None and 0 < row < len(offsets) and offsets[row][0] < offsets[row - 1][1]:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


def sums_of(values: NDArray[Any], groups: Sequence[Sequence[int]]) -> NDArray[Any]:
    """The sum of the values of each group of positions along the first axis."""
    return np.stack([values[list(group)].sum(axis=0) for group in groups])


def _joined(caption: str, pieces: Sequence[str]) -> list[bool]:
    """Tell for each token whether it follows the one before without a blank.

    >>> _joined("Two skate-boards.", ["two", "skate", "-", "board", "s", "."])
    [False, False, True, True, True, True]
    """
    text, place, joined = caption.lower(), 0, []
    for piece in pieces:
        piece = piece.lower()
        found = text.find(piece, place, place + len(piece) + _NEAR)
        joined.append(bool(piece) and 0 < place == found)
        place = place if found < 0 else found + len(piece)
    return joined
