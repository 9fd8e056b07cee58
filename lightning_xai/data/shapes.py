"""The embedded world: images of colored shapes on textured backgrounds, with captions that name two of them.

It needs no download and is the same wherever the seed is the same. Each image shows two or three objects. Both of its
captions name the same two ("a red ring and a blue star"), which differ in shape and in color; the third is a
distractor, which no caption names and whose color neither named object has. Mostly its shape differs as well; in about
every tenth image it repeats a named shape, so that "several instances of a class" occurs.

The world is made to be learned in minutes from scratch: few colors, so that telling shapes apart pays off early; shapes
that stand upright, up to three patches wide; and corners on the grid of the demo model's patches, so that few patches
lie half in a box. Of worlds with eight colors, or shapes anywhere, such a model learns the colors alone.

A region's label is the shape, its box the tight box of the whole drawn shape (boxes overlap by less than a tenth), its
mask the pixels of which it covers at least half and no other shape over it does, and its spans are the phrase of color
and shape in each caption.

The pairs of objects that captions name are dealt out to the splits, so that no caption of one split occurs in another.
Images are drawn in chunks with numpy; sample i of a split does not depend on how many samples are asked for.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from lightning_xai.data.masks import Mask, encode_mask
from lightning_xai.data.sample import Box, Region, Sample, Span
from lightning_xai.data.shards import MANIFEST_NAME, Manifest, ShardError, ShardsExistError, write_shards

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (216, 30, 36),
    "green": (30, 160, 60),
    "blue": (40, 70, 225),
    "yellow": (246, 222, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
SPLITS = {"train": 0.7, "val": 0.15, "test": 0.15}
"""Share of the nameable pairs of objects that each split's captions draw from."""

TEMPLATES = (
    "{} and {}",
    "{} next to {}",
    "{} together with {}",
    "there is {} and {}",
    "there is {} next to {}",
    "a picture of {} and {}",
    "we see {} with {}",
    "an image that shows {} and {}",
)
TRAIN_SAMPLES = 12_800
VAL_SAMPLES = 512

Object = tuple[int, int]
"""Index of the color in `COLORS` and of the shape in `SHAPES`."""

_VERSION = 2  # of the generator; part of a prepared folder's settings, so raise it when the images or captions change
_REFERENCE_SIZE = 64  # sizes below are pixels in an image of this width
SHAPE_SIZES = (20, 24)
GRID = 8
_HOLE = 0.55  # of a ring's radius
_SUPERSAMPLING = 4
_FAINTEST = 1 / 8  # pixels of which less is covered are not drawn, so that the box ends where the eye sees it end
_HALF = 0.5  # of a pixel, from which on it belongs to a shape
_OBJECTS = 3
_NAMED = 2
_SAME_SHAPE_RATE = 0.2  # of images with a distractor, which half are: a tenth of all
_PLACES = 28
_MOST_OVERLAP = 0.1  # of a distractor's box
_CHUNK = 64
_COLOR_JITTER = 10
_JPEG_QUALITY = 90

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


def read_shapes(split: str, count: int, seed: int = 0, image_size: int = 64) -> Iterator[Sample]:
    """The first `count` samples of a split of the world with this seed.

    Args:
        split: `"train"`, `"val"` or `"test"`.
        count: number of samples.
        seed: from 0; another seed gives other images and deals other captions to the splits.
        image_size: width and height in pixels, at least 32; shapes grow with it.

    Raises:
        ValueError: the split is unknown, or a number is out of its range.
    """
    if split not in SPLITS:
        raise ValueError(f"expected a split of {', '.join(SPLITS)}; got {split!r}")
    if count < 0 or seed < 0 or image_size < 32:
        raise ValueError(f"expected count >= 0, seed >= 0 and image_size >= 32; got {count}, {seed} and {image_size}")
    return islice(_read_chunks(split, count, seed, image_size), count)


def prepare_shapes(
    out: Path, train: int = TRAIN_SAMPLES, val: int = VAL_SAMPLES, seed: int = 0, *, progress: bool = True
) -> None:
    """Write the shards `out/train` and `out/val`, unless they are there with the same numbers and seed.

    Raises:
        ShardError: `out` holds shards with other settings, corrupt ones, or something else.
    """
    wanted = {"train": train, "val": val}
    missing = [split for split, count in wanted.items() if not _is_prepared(out, split, count, seed)]
    for split in missing:  # only now: nothing is written into a folder that holds something else
        _write_split(out, split, wanted[split], seed, progress)


def split_pairs(split: str, seed: int = 0) -> tuple[tuple[Object, Object], ...]:
    """The unordered pairs of objects that the captions of a split name; no pair belongs to two splits.

    The objects of a pair differ in color and in shape: 336 pairs in all.

    >>> train, val = split_pairs("train"), split_pairs("val")
    >>> len(train), len(val), set(train) & set(val)
    (235, 50, set())
    """
    objects = [(color, shape) for color in range(len(COLORS)) for shape in range(len(SHAPES))]
    pairs = [(a, b) for a, b in combinations(objects, 2) if a[0] != b[0] and a[1] != b[1]]
    dealt = np.random.default_rng((seed, len(pairs))).permutation(len(pairs))
    edges = np.floor(np.cumsum([0.0, *SPLITS.values()]) * len(pairs) + 1e-6).astype(int)
    position = list(SPLITS).index(split)
    return tuple(pairs[i] for i in sorted(dealt[edges[position] : edges[position + 1]]))


def phrase(thing: Object) -> str:
    """The words that captions use for an object.

    >>> phrase((0, 4))
    'red ring'
    """
    return f"{list(COLORS)[thing[0]]} {SHAPES[thing[1]]}"


def render_caption(template: str, first: Object, second: Object) -> tuple[str, Span, Span]:
    """Fill a template of `TEMPLATES` and tell which characters name the first and the second object.

    >>> caption, first, second = render_caption("there is {} next to {}", (0, 4), (2, 3))
    >>> caption, caption[slice(*first)], caption[slice(*second)]
    ('there is a red ring next to a blue star', 'red ring', 'blue star')
    """
    # The places are counted, not searched for: a search compiles a pattern for each pair of phrases, which takes ten
    # times as long as drawing the image.
    caption, *rest = template.split("{}")
    spans: list[Span] = []
    for words, after in zip((phrase(first), phrase(second)), rest, strict=True):
        caption += "a "
        spans.append((len(caption), len(caption) + len(words)))
        caption += words + after
    return caption, spans[0], spans[1]


def draw_shape(shape: str, size: int) -> _Floats:
    """The share of each pixel that a shape covers, cropped to the shape.

    Args:
        shape: one of `SHAPES`.
        size: length of the longer side in pixels.

    Returns:
        [h, w] float32 in [0, 1]; every border row and column holds a covered pixel, so that h and w are the tight box.
    """
    outline = _outline(shape)
    low, high = outline.min(axis=0), outline.max(axis=0)
    scale = size * _SUPERSAMPLING / (high - low).max()
    side = (size + 2) * _SUPERSAMPLING
    points = (outline - (low + high) / 2) * scale + side / 2 - 0.5
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    pen.polygon([(x, y) for x, y in points.tolist()], fill=255)
    if shape == "ring":
        hole = (points - side / 2 + 0.5) * _HOLE + side / 2 - 0.5
        pen.polygon([(x, y) for x, y in hole.tolist()], fill=0)
    covered: _Floats = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32) / np.float32(255)
    covered[covered < _FAINTEST] = 0
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    return covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _outline(shape: str) -> npt.NDArray[np.float64]:
    """[K, 2] corners (x, y) of a shape, y down, in any unit."""
    corners = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1.1, 0.9), (-1.1, 0.9)],
        "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
        "cross": [
            *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
            *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
        ],
    }
    if shape in corners:
        return np.array(corners[shape], dtype=np.float64)
    points = 10 if shape == "star" else 64
    t = np.arange(points) * 2 * np.pi / points
    if shape == "heart":
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y], axis=1)
    radius = np.where(np.arange(points) % 2, 0.42, 1.0) if shape == "star" else np.ones(points)
    return np.stack([radius * np.sin(t), -radius * np.cos(t)], axis=1)


_Stamps = dict[tuple[int, int], _Floats]
"""[h, w] coverage of every shape in every size, by (shape, size), each index counted from 0."""


@lru_cache(maxsize=4)
def _draw_stamps(image_size: int) -> _Stamps:
    sizes = [round(size * image_size / _REFERENCE_SIZE) for size in SHAPE_SIZES]
    return {(i, j): draw_shape(shape, size) for i, shape in enumerate(SHAPES) for j, size in enumerate(sizes)}


@dataclass(frozen=True)
class _Scenes:
    """The content of n images. Objects 0 and 1 are the named ones.

    Attributes:
        colors: [n, 3] index into `COLORS`.
        stamps: [n, 3, 2] key into `_Stamps`; the first entry is the shape.
        corners: [n, 3, 2] y and x of the upper left pixel.
        present: [n, 3] whether the object is drawn.
        captions: [n, 2] template and order of each caption: `2 * template + swapped`.
    """

    colors: _Ints
    stamps: _Ints
    corners: _Ints
    present: _Bools
    captions: _Ints


def _read_chunks(split: str, count: int, seed: int, image_size: int) -> Iterator[Sample]:
    pairs = np.array(split_pairs(split, seed), dtype=np.int64)
    stamps = _draw_stamps(image_size)
    for begin in range(0, count, _CHUNK):
        rng = np.random.default_rng(np.random.SeedSequence((seed, list(SPLITS).index(split), begin // _CHUNK)))
        scenes = _plan(rng, pairs, stamps, image_size)
        images = _paint(rng, scenes, stamps, image_size)
        for row in range(min(_CHUNK, count - begin)):
            yield _describe(f"{split}_{begin + row:06d}", images[row], scenes, stamps, row)


def _plan(rng: np.random.Generator, pairs: _Ints, stamps: _Stamps, image_size: int) -> _Scenes:
    n = _CHUNK
    named = pairs[rng.integers(len(pairs), size=n)]  # [n, 2, (color, shape)]
    colors = np.concatenate([named[:, :, 0], _others(rng, named[:, :, 0], len(COLORS))], axis=1)
    shapes = np.concatenate([named[:, :, 1], _others(rng, named[:, :, 1], len(SHAPES))], axis=1)
    repeats = rng.random(n) < _SAME_SHAPE_RATE
    shapes[repeats, _NAMED] = shapes[repeats, rng.integers(_NAMED, size=n)[repeats]]
    extents = np.array([mask.shape for mask in stamps.values()]).reshape(len(SHAPES), -1, 2)
    sizes = rng.integers(extents.shape[1], size=(n, _OBJECTS))
    wanted = np.arange(_OBJECTS) < rng.integers(_NAMED, _OBJECTS, endpoint=True, size=n)[:, None]
    corners, present = _place(rng, extents[shapes, sizes], wanted, image_size)
    variants = rng.permuted(np.tile(np.arange(2 * len(TEMPLATES)), (n, 1)), axis=1)
    return _Scenes(colors, np.stack([shapes, sizes], axis=2), corners, present, variants[:, :2])


def _others(rng: np.random.Generator, taken: _Ints, choices: int) -> _Ints:
    """For each row of `taken` [n, t], a random number below `choices` that is not among them, for each distractor."""
    keys = rng.random((len(taken), choices))
    np.put_along_axis(keys, taken, 2.0, axis=1)  # after all others
    return np.argsort(keys, axis=1)[:, : _OBJECTS - _NAMED]


def _place(rng: np.random.Generator, extents: _Ints, wanted: _Bools, image_size: int) -> tuple[_Ints, _Bools]:
    """Find places with little overlap: corners [n, 3, 2] and which objects found one [n, 3].

    Each object in turn takes the place, of some random ones and the four corners of the image, all on the grid, where
    it covers least of those before it. Thanks to the corners the second named object always fits; a distractor that
    does not is dropped.
    """
    n = len(extents)
    corners = np.zeros((n, _OBJECTS, 2), dtype=np.int64)
    present = wanted.copy()
    rows = np.arange(n)
    step = round(GRID * image_size / _REFERENCE_SIZE)
    for k in range(_OBJECTS):
        free = image_size - extents[:, None, k]  # [n, 1, 2]
        ends = np.broadcast_to([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], (n, 4, 2))
        places = np.rint(np.concatenate([rng.random((n, _PLACES, 2)), ends], axis=1) * free).astype(np.int64)
        places -= places % step
        covered = np.zeros(places.shape[:2], dtype=np.int64)
        for j in range(k):
            low = np.maximum(places, corners[:, None, j])
            high = np.minimum(places + extents[:, None, k], corners[:, None, j] + extents[:, None, j])
            covered += np.maximum(high - low, 0).prod(axis=2) * present[:, None, j]
        best = covered.argmin(axis=1)
        corners[:, k] = places[rows, best]
        if k >= _NAMED:
            present[:, k] &= covered[rows, best] <= _MOST_OVERLAP * extents[:, k].prod(axis=1)
    return corners, present


def _paint(rng: np.random.Generator, scenes: _Scenes, stamps: _Stamps, image_size: int) -> npt.NDArray[np.uint8]:
    """[n, h, w, 3] images: the named objects over the distractors over a textured background, and noise over all."""
    n = len(scenes.colors)
    images = _backgrounds(rng, n, image_size)
    jitter = rng.integers(-_COLOR_JITTER, _COLOR_JITTER, endpoint=True, size=(n, _OBJECTS, 3))
    paints = (np.array(list(COLORS.values()))[scenes.colors] + jitter).astype(np.float32)
    corners, keys = scenes.corners.tolist(), scenes.stamps.tolist()
    for row, column in np.argwhere(scenes.present)[::-1].tolist():  # the named ones last
        mask = stamps[tuple(keys[row][column])]
        y, x = corners[row][column]
        patch = images[row, y : y + mask.shape[0], x : x + mask.shape[1]]
        patch += mask[:, :, None] * (paints[row, column] - patch)
    images += 5 * rng.standard_normal((n, image_size, image_size, 1), dtype=np.float32)
    np.clip(images, 0, 255, out=images)
    return images.astype(np.uint8)


def _backgrounds(rng: np.random.Generator, n: int, image_size: int) -> _Floats:
    """[n, h, w, 3] muted colors with a smooth random texture, between about 60 and 170."""
    base = rng.uniform(90, 140, size=(n, 1, 1, 1)) + rng.uniform(-12, 12, size=(n, 1, 1, 3))
    tint = _upsample(rng.uniform(-12, 12, size=(n, 4, 4, 3)).astype(np.float32), image_size)
    light = _upsample(rng.uniform(-26, 26, size=(n, 9, 9, 1)).astype(np.float32), image_size)
    tint += base.astype(np.float32)
    tint += light
    return tint


def _upsample(grids: _Floats, image_size: int) -> _Floats:
    """Bilinear interpolation of [n, g, g, c] to [n, h, w, c], the grid's outer points on the image's borders."""
    position = np.linspace(0, grids.shape[1] - 1, image_size)[:, None]
    weights = np.maximum(0, 1 - np.abs(position - np.arange(grids.shape[1]))).astype(np.float32)  # [h, g]
    # Plain einsum, not matmul: on matrices this small BLAS threads cost more than they bring, most on a busy machine.
    images: _Floats = np.einsum("yi,nixc->nyxc", weights, np.einsum("xj,nijc->nixc", weights, grids))
    return images


def _describe(name: str, image: npt.NDArray[np.uint8], scenes: _Scenes, stamps: _Stamps, row: int) -> Sample:
    keys = scenes.stamps[row].tolist()
    things = [(int(color), int(key[0])) for color, key in zip(scenes.colors[row], keys, strict=True)]
    captions: list[str] = []
    spans: list[dict[int, tuple[Span, ...]]] = [{} for _ in things]
    for index, variant in enumerate(scenes.captions[row].tolist()):
        template, swapped = divmod(variant, 2)
        first, second = (1, 0) if swapped else (0, 1)
        caption, spans_first, spans_second = render_caption(TEMPLATES[template], things[first], things[second])
        captions.append(caption)
        spans[first][index], spans[second][index] = (spans_first,), (spans_second,)
    height, width = image.shape[:2]
    masks = _masks(scenes, stamps, row, (height, width))
    regions = tuple(
        Region(SHAPES[things[k][1]], _box(scenes, stamps, row, k), spans[k], mask=mask) for k, mask in masks.items()
    )
    return Sample(f"shapes_{name}", _encode_jpeg(image), (width, height), tuple(captions), regions, f"shapes/{name}")


def _box(scenes: _Scenes, stamps: _Stamps, row: int, k: int) -> Box:
    y, x = scenes.corners[row, k].tolist()
    height, width = stamps[tuple(scenes.stamps[row, k].tolist())].shape
    return (float(x), float(y), float(width), float(height))


def _masks(scenes: _Scenes, stamps: _Stamps, row: int, size: tuple[int, int]) -> dict[int, Mask]:
    """What shows of each object of an image: those before it lie over it."""
    free = np.ones(size, dtype=bool)
    masks = {}
    for k in np.flatnonzero(scenes.present[row]).tolist():
        y, x = scenes.corners[row, k].tolist()
        stamp = stamps[tuple(scenes.stamps[row, k].tolist())] >= _HALF
        place = (slice(y, y + stamp.shape[0]), slice(x, x + stamp.shape[1]))
        shown = np.zeros(size, dtype=bool)
        shown[place] = stamp & free[place]
        free &= ~shown
        masks[k] = encode_mask(shown)
    return masks


def _encode_jpeg(image: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    # Without chroma subsampling: it would smear the colors of shapes this small.
    Image.fromarray(image).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _write_split(out: Path, split: str, count: int, seed: int, progress: bool) -> None:
    samples = read_shapes(split, count, seed)
    try:
        write_shards(samples, out / split, name=_settings(split, count, seed), progress=progress, total=count)
    except ShardsExistError:
        # Another process that starts with the same settings may have been faster: its shards are as good.
        if not _is_prepared(out, split, count, seed):
            raise


def _settings(split: str, count: int, seed: int) -> str:
    """The name of a prepared split, which holds all that its content depends on."""
    return f"shapes-{split} (version {_VERSION}, {count} samples, seed {seed})"


def _is_prepared(out: Path, split: str, count: int, seed: int) -> bool:
    folder = out / split
    if not (folder / MANIFEST_NAME).exists():
        return False
    found = Manifest.load(folder).name
    if found != _settings(split, count, seed):
        raise ShardError(
            f"{folder}: holds {found!r}, asked for is {_settings(split, count, seed)!r}; choose another folder, or "
            "delete this one to have it made again"
        )
    return True
