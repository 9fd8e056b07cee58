"""`prepare`: convert COCO, Flickr30k, HNC and others to shards; `prepare shapes` makes a data set, no download."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_xai.data.photo_size import PhotoSize
    from lightning_xai.data.sample import Sample

__all__ = ["SOURCES"]

_COMMON_HELP = """\
    out: folder to make.
    samples_per_shard: images in a shard.
    overwrite: replace a folder of shards that is there already.
    short_side: store photos resized, so that their shorter side has so many pixels (288 for models of 224), and boxes
        and masks along. Smaller photos stay as they are. By default files go in as they are.
    jpeg_quality: of photos that are resized, 1 to 100 (default: 90).
"""


def prepare_shapes(
    out: Path, train: int | None = None, val: int | None = None, seed: int = 0, class_images: int = 0
) -> None:
    """Make the embedded world of coloured shapes: images, captions, boxes and phrases.

    Args:
        out: folder to make; train/ and val/ come below it.
        train: number of training images (default: as the demo uses).
        val: number of validation images.
        seed: the same seed gives the same bytes.
        class_images: also make classes/, with so many images of one object in a folder for each colour and shape, for
            zero-shot classification.
    """
    from lightning_xai.data import shapes
    from lightning_xai.data.shards import Manifest, describe

    counts = shapes.TRAIN_SAMPLES if train is None else train, shapes.VAL_SAMPLES if val is None else val
    shapes.prepare_shapes(out, *counts, seed)
    for split in ("train", "val"):
        print(describe(Manifest.load(out / split)))  # noqa: T201 - the summary is the command's output
    if class_images:
        from lightning_xai.data.shape_classes import prepare_shape_classes

        prepare_shape_classes(out / "classes", class_images, seed)
        print(f"{out / 'classes'}: {class_images} images in each of 32 classes")  # noqa: T201 - likewise


def _command(name: str) -> Callable[..., None]:
    """The function that prepares a data set: the options of its source, and those that all have."""
    from lightning_xai.data import sources

    read = sources.SOURCES[name]

    def prepare(
        *,
        out: Path,
        samples_per_shard: int = 1000,
        overwrite: bool = False,
        short_side: int | None = None,
        jpeg_quality: int | None = None,
        **options: Any,
    ) -> None:
        from lightning_xai.data.shards import describe, write_shards

        photo_size = _photo_size(short_side, jpeg_quality)
        split, excluded = options.get("split"), Counter[str]()
        manifest = write_shards(
            _checked(read(**options, excluded=excluded), name),
            out,
            name=name if split is None else f"{name}/{split}",
            samples_per_shard=samples_per_shard,
            excluded=excluded,
            overwrite=overwrite,
            photo_size=photo_size,
        )
        print(describe(manifest))  # noqa: T201 - the summary is the command's output

    *common, _ = inspect.signature(prepare, eval_str=True).parameters.values()
    parameters = [*sources.source_options(read).values(), *common]
    parameters.sort(key=lambda parameter: parameter.default is not parameter.empty)
    prepare.__name__ = f"prepare_{name.replace('-', '_')}"
    # The first line of the source's docstring, and the texts of its options.
    summary, _, rest = (inspect.getdoc(read) or "").partition("\n\n")
    arguments = rest.partition("Args:\n")[2].partition("\n\n")[0]
    prepare.__doc__ = f"{summary}\n\nArgs:\n{arguments}\n{_COMMON_HELP}"
    # Parsers read these rather than the code.
    prepare.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    prepare.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return prepare


def _photo_size(short_side: int | None, jpeg_quality: int | None) -> PhotoSize | None:
    from lightning_xai.data.photo_size import JPEG_QUALITY, PhotoSize

    if short_side is None:
        if jpeg_quality is not None:
            raise ValueError("jpeg_quality is of photos that are resized; give short_side, too")
        return None
    return PhotoSize(short_side, JPEG_QUALITY if jpeg_quality is None else jpeg_quality)


def _checked(samples: Iterable[Sample], name: str) -> Iterator[Sample]:
    """The samples of a source; anything else is an error that names the package that it comes from."""
    from lightning_xai.data import Sample
    from lightning_xai.data.sources import SOURCES
    from lightning_xai.registry import PluginError

    where = f"plug-in {SOURCES.origin(name)}, entry {name!r} of {SOURCES.group}"
    if not isinstance(samples, Iterable):
        raise PluginError(f"{where}: a source yields lightning_xai.data.Samples; it returned {samples!r}")
    for sample in samples:
        if not isinstance(sample, Sample):
            raise PluginError(f"{where}: a source yields lightning_xai.data.Samples; got a {type(sample).__name__}")
        yield sample


class _Commands(Mapping[str, Callable[..., None]]):
    """The function that prepares each data set, made when it is looked up: listing the names imports no source."""

    def __getitem__(self, name: str) -> Callable[..., None]:
        return prepare_shapes if name == "shapes" else _command(name)

    def __iter__(self) -> Iterator[str]:
        from lightning_xai.data.sources import SOURCES

        yield from ("shapes", *SOURCES)

    def __len__(self) -> int:
        return sum(1 for _ in self)  # a list would ask for the length


SOURCES = _Commands()
"""`prepare NAME` calls the function; its parameters are the options, its docstring the help."""
