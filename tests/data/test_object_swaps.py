"""Hard negatives made from boxes: wrong about one object, and about nothing else."""

from __future__ import annotations

import dataclasses

from lightning_xai.data.object_swaps import object_swaps, swapped
from lightning_xai.data.sample import Region, Sample
from lightning_xai.data.shapes import SHAPES, read_shapes

LABELS = ("cat", "dog", "elephant", "horse")
SAMPLE = Sample(
    key="1",
    image=b"",
    size=(100, 100),
    captions=("a dog and a cat", "a dog barks at a dog", "the puppy"),
    regions=(
        Region("dog", (0.0, 0.0, 50.0, 50.0), {0: ((2, 5),), 1: ((2, 5), (17, 20)), 2: ((4, 9),)}),
        Region("cat", (50.0, 50.0, 50.0, 50.0), {0: ((12, 15),)}),
    ),
)


SWAPS = [
    ("a dog on a mat", (2, 5), "dog", "apple", "an apple on a mat", "apple"),
    ("An apple on a mat", (3, 8), "apple", "dog", "A dog on a mat", "dog"),
    ("a puppy sleeps", (2, 7), "dog", "cat", "a cat sleeps", "cat"),
    ("we see a red ring.", (9, 17), "ring", "arrow", "we see a red arrow.", "red arrow"),
    ("the dog", (4, 7), "dog", "elephant", "the elephant", "elephant"),
    ("banana dog", (7, 10), "dog", "elephant", "banana elephant", "elephant"),
    ("a hotdog", (2, 8), "dog", "cat", "a cat", "cat"),
]


def test_one_object_is_swapped_and_its_article_fits() -> None:
    for caption, span, label, other, text, words in SWAPS:
        made, (start, end) = swapped(caption, span, label, other)
        assert made == text
        assert made[start:end] == words


def test_only_single_mentions_of_single_objects_are_swapped_for_absent_classes() -> None:
    swaps = object_swaps(SAMPLE, SAMPLE.captions, LABELS)
    assert [(swap.caption, swap.region) for swap in swaps] == [(0, 0), (2, 0), (0, 1)]
    for swap in swaps:
        true = SAMPLE.captions[swap.caption]
        assert swap.text[slice(*swap.span)] in ("elephant", "horse")
        assert true[slice(*swap.true_span)] in ("dog", "puppy", "cat")
    assert len(object_swaps(SAMPLE, SAMPLE.captions[:1], LABELS)) == 2


def test_nothing_is_swapped_where_it_could_be_true_or_where_classes_are_coarse() -> None:
    dog, cat = SAMPLE.regions
    for regions in (
        (dog, dog, cat),
        (dataclasses.replace(dog, crowd=True), cat),
        (dataclasses.replace(dog, entity="7"),),
        (dataclasses.replace(dog, box=None), cat),
        (dog, dataclasses.replace(dog, box=None), cat),
    ):
        swaps = object_swaps(dataclasses.replace(SAMPLE, regions=regions), SAMPLE.captions, LABELS)
        assert all(regions[swap.region].label == "cat" for swap in swaps)
    assert object_swaps(SAMPLE, SAMPLE.captions, ("dog", "cat")) == []


def test_a_swap_depends_on_nothing_but_key_caption_and_class() -> None:
    first = object_swaps(SAMPLE, SAMPLE.captions, LABELS)
    assert object_swaps(SAMPLE, SAMPLE.captions, LABELS[::-1]) == first
    others = {
        swap.text
        for key in range(20)
        for swap in object_swaps(dataclasses.replace(SAMPLE, key=str(key)), SAMPLE.captions[:1], LABELS)
    }
    assert len(others) == 4  # two objects, two absent classes


def test_swaps_of_the_world_of_shapes_name_a_shape_that_is_not_there() -> None:
    count = 0
    for sample in read_shapes("val", 20):
        for swap in object_swaps(sample, sample.captions, SHAPES):
            color, shape = swap.text[slice(*swap.span)].split()
            true_color, true_shape = sample.captions[swap.caption][slice(*swap.true_span)].split()
            assert color == true_color
            assert shape not in {region.label for region in sample.regions}
            assert true_shape == sample.regions[swap.region].label
            count += 1
    assert count > 40
