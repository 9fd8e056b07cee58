from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lightning_xai.data.masks import decode_mask
from lightning_xai.data.sample import Region, Sample, encode_sample, read_image
from lightning_xai.data.shapes import (
    COLORS,
    SHAPES,
    SPLITS,
    TEMPLATES,
    draw_shape,
    phrase,
    prepare_shapes,
    read_shapes,
    split_pairs,
)
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shard_store import LocalStore
from lightning_xai.data.shards import MANIFEST_NAME, Manifest, ShardError
from lightning_xai.data.verification import find_wrong_checksums

COUNT = 600


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(read_shapes("train", COUNT))


def named(sample: Sample) -> list[Region]:
    return [region for region in sample.regions if region.spans]


def phrase_of(sample: Sample, region: Region) -> str:
    (phrase_text,) = {
        sample.captions[caption][start:end] for caption, spans in region.spans.items() for start, end in spans
    }
    return phrase_text


def pixels_of(sample: Sample) -> npt.NDArray[np.int64]:
    return np.asarray(read_image(sample.image, sample.key), dtype=np.int64)


def test_every_sample_keeps_the_contract(samples: list[Sample]) -> None:
    assert len(samples) == len({sample.key for sample in samples}) == COUNT
    for sample in samples:
        encode_sample(sample)
        assert read_image(sample.image, sample.key).size == sample.size == (64, 64)
        for region in sample.regions:
            assert region.box is not None
            x, y, width, height = region.box
            assert x >= 0
            assert y >= 0
            assert x + width <= 64
            assert y + height <= 64
            assert 14 <= min(width, height) <= max(width, height) <= 25
            assert x % 8 == y % 8 == 0


def test_two_captions_name_the_same_two_objects_and_no_other(samples: list[Sample]) -> None:
    phrases = {phrase((color, shape)) for color in range(4) for shape in range(8)}
    for sample in samples:
        first, second = named(sample)
        assert set(first.spans) == set(second.spans) == {0, 1}
        assert sample.captions[0] != sample.captions[1]
        words = [phrase_of(sample, region).split() for region in (first, second)]
        assert [shape for _, shape in words] == [first.label, second.label]
        assert words[0][0] != words[1][0]
        assert first.label != second.label
        for caption in sample.captions:
            assert {text for text in phrases if text in caption} == {" ".join(word) for word in words}


def test_all_orders_and_templates_occur(samples: list[Sample]) -> None:
    skeletons = Counter[str]()
    for sample in samples:
        texts = [phrase_of(sample, region) for region in named(sample)]
        for caption in sample.captions:
            order = sorted(texts, key=caption.index) == texts
            skeleton = caption
            for text in texts:
                skeleton = skeleton.replace(f"a {text}", "{}")
            skeletons[f"{skeleton} {order}"] += 1
    assert len(skeletons) == 2 * len(TEMPLATES)
    assert {skeleton.rsplit(" ", 1)[0] for skeleton in skeletons} == set(TEMPLATES)
    assert min(skeletons.values()) > 0.5 * 2 * COUNT / len(skeletons)


def test_the_named_color_fills_the_box_and_the_shape_the_caption_says(samples: list[Sample]) -> None:
    for sample in samples[:200]:
        image = pixels_of(sample)
        for region in named(sample):
            color, shape = phrase_of(sample, region).split()
            assert region.box is not None
            x, y, width, height = (int(value) for value in region.box)
            inside = image[y : y + height, x : x + width]
            nearest = np.abs(inside[:, :, None] - np.array(list(COLORS.values()))).sum(axis=3)
            close = nearest.min(axis=2) < 90
            share = (close & (nearest.argmin(axis=2) == list(COLORS).index(color))).mean()
            assert share > 0.25, (sample.key, region, share)
            if shape == "ring":
                centre = inside[height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1]
                assert np.abs(centre - COLORS[color]).sum(axis=2).min() > 90


def test_boxes_are_tight_around_the_pixels(samples: list[Sample]) -> None:
    """Where a shape's color is far from the background, its pixels span the box to one pixel (the softened edge)."""
    checked = 0
    for sample in samples[:200]:
        image = pixels_of(sample)
        for region in named(sample):
            color = phrase_of(sample, region).split()[0]
            assert region.box is not None
            if color == "green":
                continue
            x, y, width, height = (int(value) for value in region.box)
            others = [other.box for other in sample.regions if other is not region and other.box is not None]
            if any(_gap(region.box, box) < 4 for box in others):
                continue
            area = (slice(max(y - 3, 0), y + height + 3), slice(max(x - 3, 0), x + width + 3))
            base = np.median(np.concatenate([image[area][0], image[area][-1]]), axis=0)
            along = np.array(COLORS[color]) - base
            amount = ((image[area] - base) @ along) / (along @ along)
            rows, columns = np.nonzero(amount > 0.35)
            assert abs(rows.min() + area[0].start - y) <= 1
            assert abs(rows.max() + 1 + area[0].start - y - height) <= 1
            assert abs(columns.min() + area[1].start - x) <= 1
            assert abs(columns.max() + 1 + area[1].start - x - width) <= 1
            checked += 1
    assert checked > 50


def _gap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    across = max(b[0] - a[0] - a[2], a[0] - b[0] - b[2])
    down = max(b[1] - a[1] - a[3], a[1] - b[1] - b[3])
    return max(across, down)


def test_a_drawn_shape_is_tight_soft_and_of_the_asked_size() -> None:
    for shape, size in product(SHAPES, range(10, 49)):
        mask = draw_shape(shape, size)
        assert size - 1 <= max(mask.shape) <= size + 1
        for border in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
            assert border.max() >= 1 / 8
        assert mask.max() == 1
        assert not ((mask > 0) & (mask < 1 / 8)).any()
        if shape != "square":
            assert ((mask > 0) & (mask < 1)).any()  # anti-aliased


def test_the_eight_shapes_differ_at_the_smallest_size() -> None:
    masks = []
    for shape in SHAPES:
        padded = np.zeros((12, 12), dtype=np.float32)
        mask = draw_shape(shape, 10)  # in an image of 32 pixels
        top, left = (12 - mask.shape[0]) // 2, (12 - mask.shape[1]) // 2
        padded[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        masks.append(padded)
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert np.minimum(first, second).sum() / np.maximum(first, second).sum() < 0.85


def test_masks_hold_what_shows_of_each_shape(samples: list[Sample]) -> None:
    for sample in samples[:60]:
        pixels = pixels_of(sample)
        masks = [decode_mask(region.mask) for region in sample.regions if region.mask]
        assert len(masks) == len(sample.regions)
        assert np.sum(masks, axis=0).max() == 1
        for region, mask in zip(sample.regions, masks, strict=True):
            assert region.box is not None
            x, y, width, height = map(int, region.box)
            assert mask.sum() == mask[y : y + height, x : x + width].sum() > 0.15 * width * height
            if region.spans:
                color = np.array(COLORS[phrase_of(sample, region).split()[0]])
                distance = np.abs(pixels - color).mean(axis=2)
                assert distance[mask].mean() < 20
                rest = distance[y : y + height, x : x + width][~mask[y : y + height, x : x + width]]
                assert not len(rest) or rest.mean() > 30


def test_distractors_are_named_nowhere_and_repeat_a_named_shape_in_a_tenth(samples: list[Sample]) -> None:
    repeats = 0
    numbers = Counter(len(sample.regions) for sample in samples)
    for sample in samples:
        shapes = {region.label for region in named(sample)}
        repeats += any(region.label in shapes for region in sample.regions if not region.spans)
    assert set(numbers) == {2, 3}
    assert min(numbers.values()) > COUNT / 3
    assert 0.05 < repeats / COUNT < 0.15


def test_no_caption_and_no_image_is_shared_between_splits() -> None:
    splits = {split: list(read_shapes(split, COUNT)) for split in SPLITS}
    for position, first in enumerate(splits):
        for second in list(splits)[:position]:
            captions = [{text for sample in splits[split] for text in sample.captions} for split in (first, second)]
            images = [{hashlib.sha256(sample.image).digest() for sample in splits[split]} for split in (first, second)]
            assert not captions[0] & captions[1]
            assert not images[0] & images[1]
            assert len(images[0]) == COUNT


@pytest.mark.parametrize("seed", [0, 1])
def test_the_nameable_pairs_are_dealt_out_completely_and_only_once(seed: int) -> None:
    dealt = [frozenset(pair) for split in SPLITS for pair in split_pairs(split, seed)]
    assert len(dealt) == len(set(dealt)) == 336
    assert len({thing for pair in split_pairs("train", seed) for thing in pair}) == 32  # every object is learned


def test_another_seed_deals_and_draws_otherwise() -> None:
    assert set(split_pairs("val", 0)) != set(split_pairs("val", 1))
    assert next(iter(read_shapes("val", 1, seed=0))).image != next(iter(read_shapes("val", 1, seed=1))).image


def test_two_runs_give_the_same_bytes() -> None:
    program = """
import hashlib
from lightning_xai.data.shapes import read_shapes
print(hashlib.sha256(repr(list(read_shapes("train", 200, seed=5))).encode()).hexdigest())
"""
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "1"},
    ).stdout
    assert elsewhere.strip() == hashlib.sha256(repr(list(read_shapes("train", 200, seed=5))).encode()).hexdigest()


def test_a_sample_does_not_depend_on_how_many_are_read(samples: list[Sample]) -> None:
    for count in (0, 1, 63, 64, 65, 129):
        assert list(read_shapes("train", count)) == samples[:count]


WRONG_ARGUMENTS = [
    (("training", 1, 0, 64), "expected a split of train, val, test; got 'training'"),
    (("train", -1, 0, 64), "expected count >= 0"),
    (("train", 1, -1, 64), "seed >= 0"),
    (("train", 1, 0, 16), "image_size >= 32"),
]


def test_wrong_arguments_are_refused_at_once() -> None:
    for arguments, message in WRONG_ARGUMENTS:
        with pytest.raises(ValueError, match=message):
            read_shapes(*arguments)


def test_prepared_shards_hold_the_world_and_are_made_once(tmp_path: Path) -> None:
    prepare_shapes(tmp_path, train=150, val=30, seed=2, progress=False)
    for split, count in (("train", 150), ("val", 30)):
        manifest = Manifest.load(tmp_path / split)
        assert find_wrong_checksums(LocalStore(tmp_path / split), manifest.shards) == []
        assert manifest.labels == tuple(sorted(SHAPES))
        items = [item for _, item in read_samples(tmp_path / split, manifest, range(len(manifest.shards)), 0, count)]
        assert items == list(read_shapes(split, count, seed=2))
    before = _times(tmp_path)
    prepare_shapes(tmp_path, train=150, val=30, seed=2, progress=False)
    assert _times(tmp_path) == before


def _times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_other_settings_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    usual = {"train": 40, "val": 10, "seed": 0}
    prepare_shapes(tmp_path, **usual, progress=False)
    before = _times(tmp_path)
    told = r"holds 'shapes-.*, asked for is 'shapes-.*choose another folder, or delete"
    for settings in ({"seed": 1}, {"train": 50}, {"val": 20}):
        with pytest.raises(ShardError, match=told):
            prepare_shapes(tmp_path, **(usual | settings), progress=False)
        assert _times(tmp_path) == before


def test_only_the_missing_split_is_made_and_a_corrupt_one_is_an_error(tmp_path: Path) -> None:
    prepare_shapes(tmp_path, train=40, val=10, progress=False)
    for path in (tmp_path / "val").iterdir():
        path.unlink()
    before = _times(tmp_path / "train")
    prepare_shapes(tmp_path, train=40, val=10, progress=False)
    assert _times(tmp_path / "train") == before
    assert Manifest.load(tmp_path / "val").samples == 10
    (tmp_path / "train" / MANIFEST_NAME).write_text("{")
    with pytest.raises(ShardError, match=r"train.manifest\.json: broken JSON"):
        prepare_shapes(tmp_path, train=40, val=10, progress=False)


def test_several_that_prepare_at_once_all_succeed(tmp_path: Path) -> None:
    start = threading.Barrier(3)

    def prepare() -> None:
        start.wait(timeout=60)
        prepare_shapes(tmp_path / "out", train=700, val=100, progress=False)

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(prepare) for _ in range(3)]:
            done.result(timeout=60)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    folder = tmp_path / "out" / "train"
    assert find_wrong_checksums(LocalStore(folder), Manifest.load(folder).shards) == []
