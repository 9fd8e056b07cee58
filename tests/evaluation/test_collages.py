from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from evaluation_batches import evaluation_batch
from linear_encoder import LinearEncoder
from torch import Tensor

from lightning_xai.data.batch import Batch
from lightning_xai.data.phrases import Phrases
from lightning_xai.evaluation.collages import Collage, Collages

SIZE = (8, 12)
OTHERS = 9


@pytest.fixture(scope="module")
def batch() -> Batch:
    """A broken record and three images with the labels dog and cat, none, cat and horse."""
    return evaluation_batch(SIZE, LinearEncoder(SIZE).tokenizer, torch.float32)


def others_of(batch: Batch, labels: list[int]) -> Batch:
    """Images in one color each, their number; the first is a sample of the batch, the second broken; a label each."""
    numbers = torch.arange(OTHERS)
    phrases = replace(
        Phrases.empty(16), image_row=numbers[: len(labels)], label=torch.tensor(labels, dtype=torch.int64)
    )
    return replace(
        batch,
        images=numbers.reshape(-1, 1, 1, 1).expand(-1, 3, *SIZE).float(),
        index=torch.tensor([10, -1, *range(50, 50 + OTHERS - 2)]),
        keys=[f"o{number}" for number in range(OTHERS)],
        phrases=phrases,
    )


def quarters(image: Tensor) -> list[Tensor]:
    return [part for half in torch.split(image, 4, dim=1) for part in torch.split(half, 6, dim=2)]


def test_each_collage_has_the_captions_image_and_three_that_show_nothing_that_it_names(batch: Batch) -> None:
    # All but the last three show a cat (0), which the first and the fourth caption name.
    collages = Collages(others_of(batch, [0] * (OTHERS - 3) + [1, 2, 2])).of(batch)
    assert len(collages) == len(batch.tokens) == 5
    assert [collage is None for collage in collages] == [True, False, False, False, True]
    for caption, collage in enumerate(collages):
        if collage is None:
            continue
        parts = quarters(collage.image)
        own = parts.pop(collage.quarter)
        image = batch.images[batch.caption_image[caption]]
        torch.testing.assert_close(own.mean(), image.mean(), atol=0.1, rtol=0)
        used = [round(float(part.mean())) for part in parts]
        assert [f"o{number}" for number in used] == collage.others.split()
        assert len(set(used)) == 3
        assert 1 not in used, "a broken record"
        assert (collage.passed_over > 0) == (batch.captions[caption] == "a cat")
        assert caption > 1 or 0 not in used, "the caption's own image"
        if batch.captions[caption] == "a cat":
            assert sorted(used) == [6, 7, 8]


def test_a_caption_has_its_collage_in_any_batch(batch: Batch) -> None:
    others = others_of(batch, [])
    whole = Collages(others).of(batch)
    last = replace(
        batch, tokens=batch.tokens[3:4], caption_image=batch.caption_image[3:4], caption_index=batch.caption_index[3:4],
        phrases=Phrases.empty(16),
    )  # fmt: skip
    (alone,) = Collages(others).of(last)
    assert alone is not None
    assert whole[3] is not None
    assert torch.equal(alone.image, whole[3].image)
    assert (alone.quarter, alone.others) == (whole[3].quarter, whole[3].others)


@pytest.mark.parametrize(("size", "grid"), [((8, 12), (2, 4)), ((9, 7), (7, 7)), ((7, 7), (1, 3))])
def test_the_quarters_share_every_patch_of_any_grid(size: tuple[int, int], grid: tuple[int, int]) -> None:
    insides = [Collage(torch.zeros(3, *size), quarter, "").inside(grid) for quarter in range(4)]
    torch.testing.assert_close(sum(insides), torch.ones(grid, dtype=torch.float64))
    areas = [a * b for a in (size[0] // 2, -(-size[0] // 2)) for b in (size[1] // 2, -(-size[1] // 2))]
    expected = [area / (size[0] * size[1]) for area in areas]
    assert [float(inside.mean()) for inside in insides] == pytest.approx(expected)
