"""What can be measured of a batch: the boxes that captions name, and hard negatives with their tokens."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from captioned_shards import grey_sample
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_xai.data.batch import Batch, EvaluationCollate
from lightning_xai.data.masks import Mask
from lightning_xai.data.object_swaps import object_swaps
from lightning_xai.data.phrases import Negatives, TargetRows
from lightning_xai.data.sample import HardNegative, RecordError, Region, Sample, Span
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.exclusion import Exclusion
from lightning_xai.models.image_transform import ImageTransform

LABELS = ("cat", "dog", "horse")
TRANSFORM = ImageTransform(size=(32, 32))  # 64 x 48 becomes 42 x 32 and loses 5 pixels on each side
CAPTIONS = ("A dog, and two Cats!", "the cat sleeps")
DOG = Region("dog", (20, 10, 20, 16), {0: ((2, 5),)})
CAT = Region("cat", (30, 20, 10, 10), {0: ((11, 19),), 1: ((4, 7),)})
ELEPHANT = HardNegative("A dog, and an Indian elephant!", (11, 29), 0, (11, 19), 1)


def make_sample(key: str = "a", captions: tuple[str, ...] = CAPTIONS, **changes: Any) -> Sample:
    return grey_sample(key, captions, **({"regions": (DOG, CAT)} | changes))


def collated(
    tokenizer: CaptionTokenizer, *samples: Sample, captions: int | None = None, swap: bool = False
) -> tuple[Batch, Negatives]:
    """The evaluation batch of some samples, an invalid row in front of them."""
    collate = EvaluationCollate(TRANSFORM, tokenizer, LABELS, captions, swap_objects=swap)
    batch = collate([(0, RecordError("gone")), *enumerate(samples, start=1)])
    assert batch.negatives is not None
    return batch, batch.negatives


def words(tokenizer: CaptionTokenizer, tokens: Tensor, mask: Tensor) -> str:
    return tokenizer.decode(tokens[mask])


def test_masks_spell_the_true_words_and_what_stands_in_their_place(tokenizer: CaptionTokenizer) -> None:
    plain, negative = make_sample("plain", ("nothing",), regions=()), make_sample("b", negatives=(ELEPHANT,))
    batch, negatives = collated(tokenizer, plain, negative)
    assert len(negatives) == 1
    assert words(tokenizer, negatives.tokens[0], negatives.mask[0]) == "an indian elephant"
    assert words(tokenizer, batch.tokens[negatives.caption_row[0]], negatives.true_mask[0]) == "two cats"
    assert (negatives.text, negatives.replacement) == (["two Cats"], ["an Indian elephant"])
    assert negatives.captions == [ELEPHANT.text]
    assert torch.equal(negatives.tokens, tokenizer.encode([ELEPHANT.text]))
    assert negatives.caption_row.tolist() == [1]  # after the caption of the plain image
    assert negatives.image_row.tolist() == [2]
    assert [LABELS[label] for label in negatives.label.tolist()] == ["cat"]
    assert negatives.reason.tolist() == [Exclusion.MEASURED]


def test_boxes_are_those_of_the_true_objects_after_the_crop(tokenizer: CaptionTokenizer) -> None:
    wide = Region("dog", (0, 12, 32, 24), {0: ((2, 5),)})
    swap = HardNegative("A cow, and two Cats!", (2, 5), 0, (2, 5), 0)
    _, negatives = collated(tokenizer, make_sample(regions=(wide, CAT), negatives=(swap, ELEPHANT)))
    assert negatives.boxes.dtype == torch.float32
    x0, y0, x1, y1 = negatives.boxes[0].tolist()
    assert (x0, y0, y1) == (0, 8, 24)
    assert x1 == pytest.approx(32 * 42 / 64 - 5, abs=1e-4)
    assert torch.equal(negatives.boxes[1], TRANSFORM.boxes(torch.tensor([CAT.box]), (64, 48))[0])


def test_stored_negatives_come_before_swaps_and_each_says_the_words_it_is_about(tokenizer: CaptionTokenizer) -> None:
    sample = make_sample("b", negatives=(ELEPHANT,))
    batch, negatives = collated(tokenizer, make_sample("a"), sample, swap=True)
    swaps = [object_swaps(make_sample("a"), CAPTIONS, LABELS), object_swaps(sample, CAPTIONS, LABELS)]
    assert [len(each) for each in swaps] == [3, 3]
    assert negatives.captions == [
        *(swap.text for swap in swaps[0]),
        ELEPHANT.text,
        *(swap.text for swap in swaps[1]),
    ]
    assert negatives.image_row.tolist() == [1] * 3 + [2] * 4
    assert negatives.caption_row.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert [LABELS[label] for label in negatives.label.tolist()] == ["dog", "cat", "cat", "cat", "dog", "cat", "cat"]
    for row, caption in enumerate(negatives.caption_row.tolist()):
        spelled = words(tokenizer, negatives.tokens[row], negatives.mask[row])
        true = words(tokenizer, batch.tokens[caption], negatives.true_mask[row])
        assert spelled == negatives.replacement[row].lower()
        assert true == negatives.text[row].lower()
        assert negatives.text[row] in batch.captions[caption]
        assert negatives.replacement[row] in negatives.captions[row]
        assert "horse" in spelled or spelled == "an indian elephant"
    assert negatives.reason.tolist() == [Exclusion.MEASURED] * 7


def test_negatives_of_captions_that_take_no_part_are_excluded(tokenizer: CaptionTokenizer) -> None:
    second = HardNegative("the cow sleeps", (4, 7), 1, (4, 7), 1)
    sample = make_sample(negatives=(second, ELEPHANT))
    _, everything = collated(tokenizer, sample, swap=True)
    batch, first = collated(tokenizer, sample, captions=1, swap=True)
    assert len(everything) == 5
    assert batch.captions == [CAPTIONS[0]]
    assert first.captions[0] == ELEPHANT.text
    assert first.captions[1:] == [swap.text for swap in object_swaps(sample, CAPTIONS[:1], LABELS)]
    assert first.caption_row.tolist() == [0, 0, 0]


UNMEASURED: list[tuple[HardNegative, tuple[float, float, float, float], Exclusion]] = [
    (HardNegative("a cow", (2, 5), 0, (2, 5), 0), (20, 10, 20, 16), Exclusion.MEASURED),
    (HardNegative("a cow", (2, 4), 0, (2, 5), 0), (20, 10, 20, 16), Exclusion.SPAN_NOT_ALIGNED),
    (HardNegative("a cow", (2, 5), 0, (2, 4), 0), (20, 10, 20, 16), Exclusion.SPAN_NOT_ALIGNED),
    (HardNegative("a " + "very " * 80 + "cow", (402, 405), 0, (2, 5), 0), (20, 10, 20, 16), Exclusion.SPAN_CUT_OFF),
    (HardNegative("a cow", (2, 5), 1, (402, 405), 0), (20, 10, 20, 16), Exclusion.SPAN_CUT_OFF),
    # The first reason that applies is the one that counts, and the wrong caption is looked at first.
    (HardNegative("a " + "very " * 80 + "cow", (402, 405), 0, (2, 4), 0), (20, 10, 20, 16), Exclusion.SPAN_CUT_OFF),
    (HardNegative("a cow", (2, 5), 0, (2, 5), 0), (0, 0, 7, 48), Exclusion.OUTSIDE_CROP),
    (HardNegative("a cow", (2, 4), 0, (2, 4), 0), (0, 0, 7, 48), Exclusion.OUTSIDE_CROP),
]


def test_what_cannot_be_measured_has_a_reason(tokenizer: CaptionTokenizer) -> None:
    for negative, box, reason in UNMEASURED:
        captions = ("a dog", "a " + "very " * 80 + "dog")
        x, y, width, height = box
        sample = make_sample(captions=captions, regions=(Region("dog", (x, y, width, height)),), negatives=(negative,))
        _, negatives = collated(tokenizer, sample)
        assert [Exclusion(value) for value in negatives.reason.tolist()] == [reason]
        assert len(negatives) == len(negatives.text) == len(negatives.mask) == 1
        if reason is Exclusion.MEASURED:
            assert negatives.mask.any()
            assert negatives.true_mask.any()


def test_a_batch_without_targets_has_the_usual_shapes(tokenizer: CaptionTokenizer) -> None:
    for batch in (
        EvaluationCollate(TRANSFORM, tokenizer, LABELS, swap_objects=True)([(-1, None)]),
        collated(tokenizer, make_sample(captions=(CAPTIONS[0],), regions=()), swap=True)[0],
    ):
        negatives, phrases = batch.negatives, batch.phrases
        assert negatives is not None
        assert (len(negatives), len(phrases)) == (0, 0)
        assert batch.images.shape[1:] == (3, 32, 32)
        assert batch.tokens.shape == (len(batch.captions), 77)
        assert negatives.tokens.shape == (0, 77)
        for mask in (negatives.mask, negatives.true_mask, phrases.span_mask):
            assert (mask.shape, mask.dtype) == ((0, 77), torch.bool)
        assert negatives.boxes.shape == phrases.boxes.shape == (0, 4)
        numbers = [getattr(part, name) for part in (negatives, phrases) for name in ("caption_row", "label", "reason")]
        assert {tuple(column.shape) for column in (*numbers, negatives.image_row, phrases.image_row)} == {(0,)}
        assert {column.dtype for column in (*numbers, batch.tokens, negatives.tokens)} == {torch.int64}


def test_columns_do_not_share_memory(tokenizer: CaptionTokenizer) -> None:
    rows = TargetRows(TRANSFORM, tokenizer, LABELS)
    rows.add(make_sample(), CAPTIONS, [ELEPHANT], 3, 7)
    negatives = rows.negatives()
    negatives.caption_row[0] = 99
    negatives.mask[:] = False
    assert (negatives.image_row.item(), negatives.reason.item()) == (3, Exclusion.MEASURED)
    assert negatives.true_mask.any()


def test_batches_move_and_pickle_with_their_negatives_and_named_boxes(tokenizer: CaptionTokenizer) -> None:
    batch, negatives = collated(tokenizer, make_sample("a"), swap=True)
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved.images.device.type == moved.phrases.boxes.device.type == "meta"
    assert moved.negatives is not None
    assert moved.named is not None
    parts = (moved.negatives, moved.named)
    tensors = [value for part in parts for value in vars(part).values() if isinstance(value, Tensor)]
    assert len(tensors) == 8 + 2
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.negatives.captions == negatives.captions
    assert negatives.boxes.device.type == "cpu"
    copy = pickle.loads(pickle.dumps(batch))
    assert torch.equal(copy.negatives.true_mask, negatives.true_mask)
    assert copy.negatives.replacement == negatives.replacement


def test_some_images_of_a_batch_keep_their_own_phrases_and_masks(tokenizer: CaptionTokenizer) -> None:
    batch, _ = collated(tokenizer, make_sample("a"), make_sample("b"), swap=True)
    of_each = [int(row) for row in batch.phrases.image_row]
    batch.phrases.masks = [Mask((1, row + 1), "1") for row in range(len(of_each))]
    second = batch.only(torch.tensor([2]))
    kept = [row for row, image in enumerate(of_each) if image == 2]
    assert 0 < len(kept) < len(of_each)
    assert second.phrases.masks == [batch.phrases.masks[row] for row in kept]
    assert second.phrases.text == [batch.phrases.text[row] for row in kept]
    assert second.phrases.image_row.tolist() == [0] * len(kept)
    assert second.keys == ["b"]
    batch.phrases.masks = []  # as where no metric reads them
    assert batch.only(torch.tensor([2])).phrases.masks == []


def test_batches_with_masks_are_cast_as_lightnings_true_precisions_do_it(tokenizer: CaptionTokenizer) -> None:
    batch, _ = collated(tokenizer, make_sample("a", regions=(DOG, replace(CAT, mask=Mask((48, 64), "0")))), swap=True)
    assert any(isinstance(mask, Mask) for mask in batch.phrases.masks)
    double = apply_to_collection(batch, Tensor, lambda part: part.double() if part.is_floating_point() else part)
    assert double.phrases.boxes.dtype == torch.float64
    assert double.phrases.masks == batch.phrases.masks


# --- boxes that captions name ---

HERE, THERE = (20.0, 10.0, 20.0, 16.0), (30.0, 20.0, 10.0, 10.0)
GONE, TOUCHED = (0.0, 0.0, 7.0, 48.0), (0.0, 0.0, 12.0, 48.0)
SPAN: tuple[Span, ...] = ((0, 3),)


def sample_of(*regions: Region, captions: int = 3) -> Sample:
    return Sample("a", b"", (64, 48), tuple(f"dog {number}" for number in range(captions)), regions)


def row_boxes(
    tokenizer: CaptionTokenizer, sample: Sample, first_row: int = 0, captions: int = 3
) -> list[tuple[int, tuple[float, ...]]]:
    rows = TargetRows(TRANSFORM, tokenizer, (*LABELS, "kite"))
    rows.add(sample, sample.captions[:captions], [], 0, first_row)
    named = rows.named()
    return [(row, tuple(box)) for row, box in zip(named.caption_row.tolist(), named.boxes.tolist(), strict=True)]


def after(box: tuple[float, float, float, float]) -> tuple[float, ...]:
    return tuple(TRANSFORM.boxes(torch.tensor([box]), (64, 48))[0].tolist())


def test_every_caption_gets_every_box_that_it_names_several_instances_included(tokenizer: CaptionTokenizer) -> None:
    sample = sample_of(
        Region("dog", HERE, {0: SPAN, 2: SPAN}),
        Region("dog", THERE, {0: SPAN, 2: SPAN}),
        Region("cat", TOUCHED, {1: ((0, 3), (4, 5))}),
        Region("kite", HERE),
    )
    found = row_boxes(tokenizer, sample, 10)
    expected = [(10, after(HERE)), (10, after(THERE)), (11, after(TOUCHED)), (12, after(HERE)), (12, after(THERE))]
    assert sorted(found) == sorted(expected)


def test_boxes_of_which_the_crop_leaves_nothing_are_not_among_them(tokenizer: CaptionTokenizer) -> None:
    sample = sample_of(Region("dog", GONE, {0: SPAN}), Region("dog", TOUCHED, {0: SPAN}))
    found = row_boxes(tokenizer, sample)
    assert found == [(0, after(TOUCHED))]
    x0, _, x1, _ = found[0][1]
    assert 0 == x0 < x1 < 12 * 42 / 64


def test_an_instance_without_a_box_counts_and_is_not_measured(tokenizer: CaptionTokenizer) -> None:
    lost = Region("dog", None, {0: SPAN})
    for regions, reason in (
        ((Region("dog", HERE, {0: SPAN}), lost), Exclusion.SEVERAL_INSTANCES),
        ((lost, Region("dog", HERE, {0: SPAN})), Exclusion.SEVERAL_INSTANCES),
        ((lost,), Exclusion.NO_BOX),
    ):
        sample = sample_of(*regions, Region("cat", THERE, {1: SPAN}))
        rows = TargetRows(TRANSFORM, tokenizer, (*LABELS, "kite"))
        rows.add(sample, sample.captions, [], 0, 0)
        assert rows.phrases().reason.tolist() == [Exclusion.MEASURED, reason]
        assert row_boxes(tokenizer, sample) == [(1, after(THERE))]  # what caption 0 names is not known as a whole


def test_captions_that_take_no_part_name_nothing(tokenizer: CaptionTokenizer) -> None:
    sample = sample_of(Region("dog", HERE, {0: SPAN, 1: SPAN, 2: SPAN}), Region("cat", THERE, {2: SPAN}))
    assert row_boxes(tokenizer, sample, 5, captions=2) == [(5, after(HERE)), (6, after(HERE))]
    assert len(row_boxes(tokenizer, sample, 5)) == 4


def test_a_caption_without_a_place_that_names_the_region_does_not_name_it(tokenizer: CaptionTokenizer) -> None:
    sample = sample_of(Region("dog", HERE, {0: (), 1: SPAN}))
    assert row_boxes(tokenizer, sample) == [(1, after(HERE))]


def test_page_locked_memory_reaches_all_depths(tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    pinned = collated(tokenizer, make_sample(), swap=True)[0].pin_memory()
    assert pinned.negatives is not None
    for part in (pinned, pinned.phrases, pinned.negatives):
        assert {value.device.type for value in vars(part).values() if isinstance(value, Tensor)} == {"meta"}
