"""The boxes that captions name: all instances, where the crop leaves something of them."""

from __future__ import annotations

import torch

from lightning_xai.data.image_transform import ImageTransform
from lightning_xai.data.phrases import NamedBoxes, named_boxes
from lightning_xai.data.sample import Region, Sample, Span

TRANSFORM = ImageTransform(size=(32, 32))  # 64 x 48 becomes 42 x 32 and loses 5 pixels on each side
HERE, THERE = (20.0, 10.0, 20.0, 16.0), (30.0, 20.0, 10.0, 10.0)
GONE, TOUCHED = (0.0, 0.0, 7.0, 48.0), (0.0, 0.0, 12.0, 48.0)
SPAN: tuple[Span, ...] = ((0, 3),)


def sample_of(*regions: Region, captions: int = 3) -> Sample:
    return Sample("a", b"", (64, 48), tuple(f"dog {number}" for number in range(captions)), regions)


def pairs(named: NamedBoxes) -> list[tuple[int, tuple[float, ...]]]:
    return [(row, tuple(box)) for row, box in zip(named.caption_row.tolist(), named.boxes.tolist(), strict=True)]


def after(box: tuple[float, float, float, float]) -> tuple[float, ...]:
    return tuple(TRANSFORM.boxes(torch.tensor([box]), (64, 48))[0].tolist())


def test_every_caption_gets_every_box_that_it_names_several_instances_included() -> None:
    sample = sample_of(
        Region("dog", HERE, {0: SPAN, 2: SPAN}),
        Region("dog", THERE, {0: SPAN, 2: SPAN}),
        Region("cat", TOUCHED, {1: ((0, 3), (4, 5))}),
        Region("kite", HERE),
    )
    found = pairs(named_boxes([(sample, 10)], None, TRANSFORM))
    expected = [(10, after(HERE)), (10, after(THERE)), (11, after(TOUCHED)), (12, after(HERE)), (12, after(THERE))]
    assert sorted(found) == sorted(expected)


def test_rows_count_from_each_samples_first_caption() -> None:
    samples = [(sample_of(Region("dog", HERE, {1: SPAN})), 0), (sample_of(Region("dog", THERE, {0: SPAN})), 3)]
    assert pairs(named_boxes(samples, None, TRANSFORM)) == [(1, after(HERE)), (3, after(THERE))]


def test_boxes_of_which_the_crop_leaves_nothing_are_not_among_them() -> None:
    sample = sample_of(Region("dog", GONE, {0: SPAN}), Region("dog", TOUCHED, {0: SPAN}))
    found = pairs(named_boxes([(sample, 0)], None, TRANSFORM))
    assert found == [(0, after(TOUCHED))]
    x0, _, x1, _ = found[0][1]
    assert 0 == x0 < x1 < 12 * 42 / 64


def test_captions_that_take_no_part_name_nothing() -> None:
    sample = sample_of(Region("dog", HERE, {0: SPAN, 1: SPAN, 2: SPAN}), Region("cat", THERE, {2: SPAN}))
    assert pairs(named_boxes([(sample, 5)], 2, TRANSFORM)) == [(5, after(HERE)), (6, after(HERE))]
    assert len(pairs(named_boxes([(sample, 5)], None, TRANSFORM))) == 4


def test_a_caption_without_a_place_that_names_the_region_does_not_name_it() -> None:
    sample = sample_of(Region("dog", HERE, {0: (), 1: SPAN}))
    assert pairs(named_boxes([(sample, 0)], None, TRANSFORM)) == [(1, after(HERE))]


def test_no_boxes_have_the_usual_shapes() -> None:
    for samples in ([], [(sample_of(Region("dog", HERE)), 0)]):
        named = named_boxes(samples, None, TRANSFORM)
        assert named.caption_row.shape == (0,)
        assert named.caption_row.dtype == torch.int64
        assert named.boxes.shape == (0, 4)
        assert named.boxes.dtype == torch.float32
