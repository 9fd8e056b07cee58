"""The Python interface: `import lightning_xai as lx`, then `lx.explain("dog.jpg", "a dog", model="ViT-B-16")`.

It runs the same code as `python -m lightning_xai explain`, and errors are the same sentences.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from lightning_xai.commands.explain_entries import (
    MOST_ITEMS,
    Asked,
    Explained,
    Explainer,
    ListWriter,
    Skipped,
    usable,
)
from lightning_xai.commands.inputs import Entry, is_list, load_model, read_entries
from lightning_xai.commands.model_choice import ModelChoice
from lightning_xai.commands.outputs import PICTURE, sums_of
from lightning_xai.report.explorer import explorer_frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL import Image

    from lightning_xai.commands.explain_pair import Explanation, PreparedEntry
    from lightning_xai.models.encoder import TwoTowerEncoder

__all__ = ["Result", "Results", "explain", "load"]

_MOST_IN_NAME = 60  # characters of a caption that `repr` shows
_CHANNELS = (1, 3, 4)


def load(  # noqa: PLR0913 - each option is a setting that files may lack
    name: str | Path,
    pretrained: str | Path | None = None,
    *,
    device: str | None = None,
    seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
    image_mean: tuple[float, float, float] | None = None,
    image_std: tuple[float, float, float] | None = None,
    interpolation: str | None = None,
    resize_mode: str | None = None,
    fit: str | None = None,
    quick_gelu: bool | None = None,
) -> TwoTowerEncoder:
    """Load a model in evaluation mode, to explain many images with it.

    Args:
        name: an open_clip name (`"ViT-B-16"`), a JSON model config, a checkpoint of `fit`, `"hf:FOLDER"`,
            `"hf-hub:OWNER/NAME"`, `"imagebind:FILE"`, ...: what `explain` takes as `--model.name`.
        pretrained: an open_clip tag (`"openai"`, downloaded on first use) or a file of weights; None: those that the
            name brings, random ones otherwise.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ...; None: a GPU where there is one.
        seed: of the weights, where they are random.
        image_size: (height, width) of images in pixels, or one number for both.
        image_mean: mean of each channel, of pixel values in [0, 1].
        image_std: standard deviation of each channel, likewise.
        interpolation: of resizing images: `"bicubic"`, `"bilinear"` or `"random"`.
        resize_mode: `"shortest"`, `"longest"`, `"letterbox"` or `"squash"`.
        fit: `"crop"` or `"letterbox"`, which shows the model the whole photo.
        quick_gelu: whether the transformers compute with OpenAI's QuickGELU.

    Returns:
        The encoder: `explain` takes it as its `model`, every method of `METHODS` as its first argument.

    Raises:
        ValueError: an unknown name, tag or device, or a broken file.
    """
    return load_model(
        ModelChoice(
            name=str(name),
            pretrained=None if pretrained is None else str(pretrained),
            device=device,
            seed=seed,
            image_size=image_size,
            image_mean=image_mean,
            image_std=image_std,
            interpolation=interpolation,
            resize_mode=resize_mode,
            fit=fit,
            quick_gelu=quick_gelu,
        )
    )


def explain(  # noqa: PLR0913 - the options of the command
    image: Any,
    caption: str | Sequence[str] | None = None,
    *,
    model: str | Path | TwoTowerEncoder,
    pretrained: str | Path | None = None,
    method: str = "feature_pair",
    options: Mapping[str, Any] | None = None,
    at_inputs: bool = False,
    span: str | Sequence[str | None] | None = None,
    box: str | Iterable[Any] | None = None,
    against: str | Sequence[str] | Sequence[Sequence[str] | None] | None = (),
    target: str | None = None,
    target_options: Mapping[str, Any] | None = None,
    fit: str | None = None,
    device: str | None = None,
    captions: str | Path | None = None,
    batch_size: int = 8,
) -> Any:  # whether a path is one image or many is known only when it is looked at
    """Explain which patches of an image and which words of a caption make their similarity.

    Args:
        image: a path, a PIL image, or an array [height, width, 3] of uint8 or of floats in [0, 1]; a list of these; or
            the path of a folder or of a CSV list, as on the command line.
        caption: the text, or a list of them. One caption counts for all images, one image for all captions.
        model: a name or file, see `load`, or what `load` has returned.
        pretrained: a tag or file of weights, where `model` is a name.
        method: a name of `METHODS`; `"all"` for all that serve the model.
        options: of the method, such as `{"steps": 50}`.
        at_inputs: read `feature_pair` twice, at the inputs of both towers and at the last blocks; not together with a
            layer in `options`. Each word costs a backward pass through the whole image tower.
        span: a phrase of the caption: the heat map shows where the image matches it; for lists one, or one for each.
        box: (x, y, width, height) in pixels of the image: the words show what matches it; likewise.
        against: a caption, or several, to compare the caption with; for lists the same for all, or a list for each.
        target: what is explained of captions that are compared: `"contrast"` (default) or `"probability"`.
        target_options: of the target.
        fit: `"crop"` or `"letterbox"`, where `model` is a name.
        device: where to put the model, where `model` is a name; None: a GPU where there is one.
        captions: for a folder, a CSV list of image, caption, span, box.
        batch_size: images of a list that are explained at a time.

    Returns:
        A `Result`; of lists and folders `Results`, one for each entry that can be used.

    Raises:
        ValueError: settings that exclude each other, or input that cannot be used (of a list all of it: else such
            entries are in `Results.skipped`, and a warning names them).

    Example:
        >>> result = explain("dog.jpg", "a dog on a mat", model="ViT-B-16", pretrained="openai")  # doctest: +SKIP
        >>> result.span("a dog").plot()  # doctest: +SKIP
    """
    entries, of_list = _entries(image, caption, captions, span, box, against)
    asked = Asked(method, dict(options or {}), target, dict(target_options or {}), batch_size, of_list, at_inputs)
    chosen = _chosen(model, pretrained=pretrained, fit=fit, device=device)
    explainer = Explainer.of(chosen, asked, entries, _command(entries, asked, fit))
    from lightning_xai.models.at_layer import evaluating

    with evaluating(explainer.encoder):
        if of_list:
            return Results(explainer.explain_each(entries))
        return Result(explainer.explain_one(entries[0]))


class Result:
    """What a method, or several, say about an image and a caption.

    Notebooks show it as the explorer: point at a word, and its heat map appears on the image.
    """

    def __init__(self, explained: Explained) -> None:
        self._explained = explained

    @property
    def image(self) -> str:
        """The image's file, or `"image"`."""
        return str(self._prepared.entry.image)

    @property
    def caption(self) -> str:
        """The caption."""
        return self._prepared.entry.caption

    @property
    def tokens(self) -> list[str]:
        """The caption's own tokens [n], as they are shown."""
        return [token.text for token in self._prepared.shown]

    @property
    def methods(self) -> list[str]:
        """The explanations' labels: a method's name, with its layers where it is read at two pairs of them."""
        return [each.label for each in self._explained.explanations]

    @property
    def similarity(self) -> float:
        """The cosine similarity of image and caption, in [-1, 1]."""
        return self._explained.explanations[0].saliency.similarity

    @property
    def completeness_error(self) -> dict[str, float]:
        """By label: the sum of all attributions minus what they should sum to; only of methods with such a sum."""
        errors = {each.label: each.saliency.completeness_error for each in self._explained.explanations}
        return {label: error for label, error in errors.items() if error is not None}

    @property
    def maps(self) -> dict[str, NDArray[Any]]:
        """By label: the heat map [H, W] of the patches, for the phrase or the whole caption."""
        return {each.label: each.saliency.image for each in self._explained.explanations}

    @property
    def words(self) -> dict[str, NDArray[Any]]:
        """By label: the values [n] of the tokens, for the box or the whole image."""
        return {each.label: each.saliency.text for each in self._explained.explanations}

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that `save` writes to attribution.npz, by the same names."""
        return self._explained.arrays()[0]

    @property
    def record(self) -> dict[str, Any]:
        """Everything that `save` writes to explanation.json: settings, numbers, and what the arrays are."""
        return self._explained.record()

    @property
    def missing(self) -> dict[str, str]:
        """Methods that do not serve the model or the entry, and why."""
        return self._explained.missing | self._explained.failed

    def span(self, phrase: str) -> Result:
        """The same explanations, of a phrase of the caption: where does the image match it? No method runs again.

        Args:
            phrase: whole words of the caption, in any case; every place where it stands counts.

        Raises:
            ValueError: the caption lacks it, it is no text, or the method has no token-patch attributions.
        """
        if not isinstance(phrase, str):
            raise ValueError(
                f"a span is one phrase of the caption, as text; got {phrase!r}: ask for each phrase by itself, such as "
                "[result.span(phrase) for phrase in phrases]"
            )
        return Result(self._explained.about(span=phrase))

    def box(self, x: float, y: float, width: float, height: float) -> Result:
        """The same explanations, of a part of the image: which words match it? No method runs again.

        Args:
            x: left edge, in pixels of the image.
            y: upper edge.
            width: of the box.
            height: of the box.

        Raises:
            ValueError: the box leaves the image or has no area, or the method has no token-patch attributions.
        """
        return Result(self._explained.about(box=_box((x, y, width, height))))

    def plot(self) -> Figure:
        """Draw the picture that `save` writes: red is for the similarity, blue against it."""
        return self._explained.picture()

    def save(self, folder: str | Path) -> Path:
        """Write what `python -m lightning_xai explain` writes: picture, explorer, arrays and settings.

        Args:
            folder: to write to; what an earlier call wrote there is replaced.

        Returns:
            The folder.

        Raises:
            ValueError: it is a file, or holds the image under the name of the picture.
        """
        folder = _folder(folder)
        if self._prepared.entry.image.resolve() == (folder / PICTURE).resolve():
            raise ValueError(f"{folder / PICTURE} is the image itself, and would be replaced: choose another folder")
        self._explained.write(folder)
        return folder

    def to_frame(self) -> pd.DataFrame:
        """Every number as a table, a line for each pair of token and patch.

        Returns:
            The columns method, caption, part, token, position (of the token in the tokenizer's output), row and column
            (of the patch) and value. The part is `"pair"`; methods without token-patch attributions have lines
            `"image"` without a token and lines `"text"` without a patch. Of a phrase its tokens, of a box its patches.
        """
        import pandas as pd

        tables = [
            pd.DataFrame(lines)
            for each in self._explained.explanations
            for lines in _tables(self._prepared, each)
            if len(lines["value"])
        ]
        table = pd.concat(tables, ignore_index=True)
        return table.astype({name: "Int64" for name in ("position", "row", "column")})

    def __repr__(self) -> str:
        """Image, caption, methods and similarity."""
        caption = self.caption if len(self.caption) <= _MOST_IN_NAME else f"{self.caption[:_MOST_IN_NAME]}..."
        methods = " and ".join(self.methods) if len(self.methods) <= 2 else f"{len(self.methods)} methods"
        return f"<Result: {self.image}, {caption!r}, {methods}, similarity {self.similarity:.3f}>"

    def _repr_html_(self) -> str:
        """The explorer, in a frame."""
        return explorer_frame([self._explained.item()], title=f"Explorer: {self.caption}")

    @property
    def _prepared(self) -> PreparedEntry:
        return self._explained.prepared


class Results(Sequence[Result]):
    """The results of a list, in its order, without the entries that cannot be used.

    Args:
        found: what was found of each entry.

    Attributes:
        places: the place in the list of each result.
        skipped: the place in the list of each entry that cannot be used -> why.

    Raises:
        ValueError: not one entry can be used.
    """

    def __init__(self, found: Iterator[Explained | Skipped]) -> None:
        self._found = list(found)
        _, lines = usable([row for each in self._found for row in each.rows()], len(self._found))
        self.skipped: dict[int, str] = {}
        self.places: list[int] = []
        for place, each in enumerate(self._found):
            if isinstance(each, Explained) and each.explanations:
                self.places.append(place)
            else:
                self.skipped[place] = each.reason if isinstance(each, Skipped) else "; ".join(each.failed.values())
        self._results = [Result(each) for each in self._found if isinstance(each, Explained) and each.explanations]
        if lines:
            warnings.warn("\n".join(lines), stacklevel=3)

    @overload
    def __getitem__(self, place: int) -> Result: ...
    @overload
    def __getitem__(self, place: slice) -> list[Result]: ...
    def __getitem__(self, place: int | slice) -> Result | list[Result]:
        return self._results[place]

    def __len__(self) -> int:
        return len(self._results)

    def save(self, folder: str | Path) -> Path:
        """Write each result into its own folder, and summary.csv, as `python -m lightning_xai explain` does.

        Args:
            folder: to write to.

        Returns:
            The folder.

        Raises:
            ValueError: it is a file.
        """
        writer = ListWriter(_folder(folder))
        for each in self._found:
            writer.add(each)
        writer.close()
        return writer.out

    def to_frame(self) -> pd.DataFrame:
        """The tables of all results, with the place in the list in front as the column item."""
        import pandas as pd

        tables = [result.to_frame() for result in self._results]
        for place, table in zip(self.places, tables, strict=True):
            table.insert(0, "item", place)
        return pd.concat(tables, ignore_index=True)

    def _repr_html_(self) -> str:
        """The explorer of the first 200 of them, in a frame."""
        items = [result._explained.item(small=True) for result in self._results[:MOST_ITEMS]]
        return explorer_frame(items, title=f"Explorer: {len(items)} images", mode="strip")

    def __repr__(self) -> str:
        """The results, one to a line."""
        return "\n".join([f"<Results: {len(self)}, {len(self.skipped)} skipped>", *map(repr, self._results)])


def _tables(prepared: PreparedEntry, explanation: Explanation) -> Iterator[dict[str, Any]]:
    """Columns of the tables of one explanation: of pairs, or of patches and of tokens."""
    arrays = explanation.arrays
    texts: list[tuple[Any, ...]] = [(prepared.entry.caption, prepared.shown, prepared.content, None)]
    texts += [(other.text, other.shown, other.content, place) for place, other in enumerate(prepared.against)]
    if "interactions" not in arrays:
        rows, columns = (each.ravel() for each in np.indices(arrays["image"].shape))
        yield _lines(explanation, prepared.entry.caption, "image", arrays["image"].ravel(), row=rows, column=columns)
    for caption, shown, content, place in texts:
        words = np.array([token.text for token in shown], dtype=object)
        positions = np.array([group[0] for group in content])
        if "interactions" not in arrays:
            values = arrays["text"] if place is None else arrays["against_text"][place]
            yield _lines(explanation, caption, "text", sums_of(values, content), token=words, position=positions)
            continue
        values = sums_of(arrays["interactions"] if place is None else arrays["against_interactions"][place], content)
        asked = np.ones(values.shape, dtype=bool)
        if prepared.positions:
            asked &= np.array([token.marked for token in shown])[:, None, None]
        if "box_mask" in arrays:
            asked &= arrays["box_mask"].astype(bool)
        token, row, column = asked.nonzero()
        yield _lines(
            explanation,
            caption,
            "pair",
            values[asked],
            token=words[token],
            position=positions[token],
            row=row,
            column=column,
        )


def _lines(
    explanation: Explanation, caption: str, part: str, values: NDArray[Any], **where: NDArray[Any]
) -> dict[str, Any]:
    nowhere: dict[str, Any] = dict.fromkeys(("token", "position", "row", "column"))
    given: dict[str, Any] = {"method": explanation.label, "caption": caption, "part": part}
    return given | nowhere | where | {"value": values}


def _command(entries: Sequence[Entry], asked: Asked, fit: str | None) -> dict[str, Any]:
    """The settings as the record of the command has them; of lists, a list of each."""
    rows = [entry.row() | {"image": str(entry.image)} for entry in entries]
    names = ("image", "caption", "span", "box", "against")
    given = {name: [row[name] for row in rows] if asked.of_list else rows[0][name] for name in names}
    return (
        given
        | {name: getattr(asked, name) for name in ("method", "options", "target", "target_options", "at_inputs")}
        | {"fit": fit}
    )


def _folder(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"results are saved in a folder, but {path} is a file: choose another")
    return path


def _chosen(
    model: str | Path | TwoTowerEncoder, *, pretrained: str | Path | None, **options: Any
) -> ModelChoice | TwoTowerEncoder:
    """The model as `Explainer.of` takes it."""
    if isinstance(model, (str, Path)):
        weights = None if pretrained is None else str(pretrained)
        return ModelChoice(name=str(model), pretrained=weights, **options)
    from lightning_xai.models.encoder import TwoTowerEncoder

    if not isinstance(model, TwoTowerEncoder):
        raise ValueError(
            f"model is a name, a file, or what lightning_xai.load returns; got {type(model).__name__} (a training's "
            "module has the encoder as its attribute `encoder`)"
        )
    given = [name for name, value in {"pretrained": pretrained, **options}.items() if value is not None]
    if given:
        raise ValueError(f"the model is loaded already: leave out {', '.join(given)}, or give them to load")
    return model


def _entries(
    image: Any, caption: Any, captions: str | Path | None, span: Any, box: Any, against: Any
) -> tuple[list[Entry], bool]:
    """The entries to explain, and whether they are a list."""
    against = () if against is None else against
    if isinstance(image, (str, Path)):
        path = Path(image)
        for each in (path, captions):
            if each is not None and not Path(each).exists():
                raise ValueError(f"{each} does not exist")
        if is_list(path):
            if not isinstance(caption, (str, type(None))):
                raise ValueError(f"{path} stands for many images: give one caption for them all, or a list of images")
            rather_than = [against] if isinstance(against, str) else list(against)
            file = None if captions is None else Path(captions)
            return read_entries(path, caption, file, span, _box(box), rather_than), True
    if captions is not None:
        raise ValueError("captions is a CSV list for a folder of images; give caption a list of texts")
    many = isinstance(image, (list, tuple)), isinstance(caption, (list, tuple))
    count = max([1, *(len(each) for each, several in zip((image, caption), many, strict=True) if several)])
    if any(many) and not all(len(each) for each, several in zip((image, caption), many, strict=True) if several):
        raise ValueError("the list is empty: give at least one image and one caption")
    pictures = [_picture(each) for each in _each(image, many[0], count, "images")]
    texts = _each(caption, many[1], count, "captions")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("give a caption: a text, or a list with one for each image")
    spans = _each(span, isinstance(span, (list, tuple)), count, "spans")
    if not all(isinstance(each, (str, type(None))) for each in spans):
        raise ValueError("a span is a phrase of the caption, as text; for lists one, or one for each")
    boxes = [_box(each) for each in _each(box, _are_boxes(box), count, "boxes")]
    of_each = not isinstance(against, str) and any(not isinstance(each, str) for each in against)
    others = [
        (each,) if isinstance(each, str) else tuple(each or ()) for each in _each(against, of_each, count, "against")
    ]
    return [
        Entry(f"{i:04d}-{path.stem}" if any(many) else path.stem, path, text, of_span, of_box, other, pixels)
        for i, ((path, pixels), text, of_span, of_box, other) in enumerate(
            zip(pictures, texts, spans, boxes, others, strict=True)
        )
    ], any(many)


def _each(value: Any, many: bool, count: int, what: str) -> list[Any]:
    """One value for each of `count` entries, from as many or from one for all."""
    values = list(value) if many else [value]
    if len(values) not in (1, count):
        raise ValueError(f"expected one or {count} {what}, for as many entries; got {len(values)}")
    return values * count if len(values) == 1 else values


def _are_boxes(box: Any) -> bool:
    """True for several boxes, False for the four numbers of one."""
    if isinstance(box, (list, tuple)):
        return any(each is None or isinstance(each, str) or np.ndim(each) > 0 for each in box)
    return getattr(box, "ndim", 1) > 1


def _box(box: Any) -> str | None:
    """A box as the command line takes it, from numbers of any library."""
    if box is None or isinstance(box, str):
        return box
    if not hasattr(box, "__iter__"):
        raise ValueError(f"a box is (x, y, width, height) in pixels of the image; got {box!r}")
    return ",".join(str(each.item() if hasattr(each, "item") else each) for each in box)


def _picture(image: Any) -> tuple[Path, Image.Image | None]:
    """A name for an image, and its pixels where they are not to be read from the file of this name.

    Raises:
        ValueError: it is no image.
    """
    from PIL import Image

    if isinstance(image, (str, Path)):
        return Path(image), None
    if isinstance(image, Image.Image):
        return Path(getattr(image, "filename", "") or "image"), image
    if not hasattr(image, "__array__"):
        raise ValueError(f"an image is a path, a PIL image or an array [height, width, 3]; got {type(image).__name__}")
    pixels = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if pixels.ndim > 3:
        raise ValueError(f"an array is one image, [height, width, 3]; got the shape {list(pixels.shape)}: give a list")
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in _CHANNELS) or not pixels.size:
        raise ValueError(
            f"an array is [height, width, 3], channels last; got the shape {list(pixels.shape)}: transpose it"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN is neither
            raise ValueError(
                f"an array of floats has values in [0, 1]; got {pixels.min():g} to {pixels.max():g}: divide pixels by "
                "255, and undo a normalisation"
            )
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"an array has values of uint8, or floats in [0, 1]; got {pixels.dtype}: convert it")
    return Path("image"), Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)
