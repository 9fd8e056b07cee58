from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from captioned_shards import grey_sample

from lightning_xai.data.batch import Batch, EvaluationCollate, Record, TrainingCollate
from lightning_xai.data.excluded import BROKEN_RECORD, CORRUPT_IMAGE, UNPAIRED_MEMBER, Fault
from lightning_xai.data.sample import RecordError, Region, Sample, Span, WrongCaption
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.exclusion import Exclusion
from lightning_xai.models.image_transform import ImageTransform

LABELS = ("cat", "dog", "kite", "person")
TRANSFORM = ImageTransform(size=(32, 32))


@pytest.fixture(scope="module")
def evaluation(tokenizer: CaptionTokenizer) -> EvaluationCollate:
    return EvaluationCollate(TRANSFORM, tokenizer, LABELS)


def spans_of(text: str, *captions: str) -> dict[int, tuple[Span, ...]]:
    """Every place where `text` stands in the captions."""
    found = {}
    for index, caption in enumerate(captions):
        starts = [i for i in range(len(caption)) if caption.startswith(text, i)]
        if starts:
            found[index] = tuple((start, start + len(text)) for start in starts)
    return found


def rows(batch: Batch) -> list[tuple[int, str, Exclusion, str]]:
    phrases = batch.phrases
    return [
        (caption, LABELS[label], Exclusion(reason), text)
        for caption, label, reason, text in zip(
            phrases.caption_row.tolist(), phrases.label.tolist(), phrases.reason.tolist(), phrases.text, strict=True
        )
    ]


def test_every_caption_and_class_becomes_a_phrase(evaluation: EvaluationCollate) -> None:
    captions = ("a dog and a cat", "the cat sleeps", "nothing here")
    regions = (
        Region("dog", (20, 10, 20, 16), spans_of("a dog", *captions)),
        Region("cat", (30, 20, 10, 10), spans_of("cat", *captions)),
        Region("kite", (30, 20, 10, 10)),
    )
    plain, named = grey_sample("plain"), grey_sample("named", captions, regions=regions)
    batch = evaluation([(7, plain), (8, named)])

    assert rows(batch) == [
        (1, "cat", Exclusion.MEASURED, "cat"),
        (2, "cat", Exclusion.MEASURED, "cat"),
        (1, "dog", Exclusion.MEASURED, "a dog"),
        (-1, "kite", Exclusion.NOT_MENTIONED, ""),
    ]
    assert batch.captions == ["a photo", *captions]
    assert batch.caption_image.tolist() == [0, 1, 1, 1]
    assert batch.caption_index.tolist() == [0, 0, 1, 2]
    assert batch.phrases.image_row.tolist() == [1, 1, 1, 1]
    assert batch.label_names == LABELS
    assert batch.index.tolist() == [7, 8]
    assert len(batch.phrases) == 4


def test_several_instances_and_crowds_are_excluded(evaluation: EvaluationCollate) -> None:
    captions = ("a dog and people",)
    regions = (
        Region("dog", (10, 0, 20, 16), {0: ((2, 5),)}),
        Region("dog", (20, 10, 20, 16)),
        Region("person", (20, 10, 20, 16), {0: ((10, 16),)}, crowd=True),
    )
    assert rows(evaluation([(0, grey_sample("a", captions, regions=regions))])) == [
        (0, "dog", Exclusion.SEVERAL_INSTANCES, "dog"),
        (0, "person", Exclusion.SEVERAL_INSTANCES, "people"),
    ]


def test_entities_are_distinguished_within_their_class(evaluation: EvaluationCollate) -> None:
    captions = ("a dog bites a puppy near dogs", "the dog")
    regions = (
        Region("dog", (10, 0, 20, 16), {0: ((0, 5),), 1: ((0, 7),)}, entity="1"),
        Region("dog", (20, 10, 20, 16), {0: ((12, 19),)}, entity="2"),
        Region("dog", (10, 0, 20, 16), {0: ((25, 29),)}, entity="3"),
        Region("dog", (20, 10, 20, 16), {0: ((25, 29),)}, entity="3"),
    )
    batch = evaluation([(0, grey_sample("a", captions, regions=regions))])
    assert rows(batch) == [
        (0, "dog", Exclusion.MEASURED, "a dog"),
        (1, "dog", Exclusion.MEASURED, "the dog"),
        (0, "dog", Exclusion.MEASURED, "a puppy"),
        (0, "dog", Exclusion.SEVERAL_INSTANCES, "dogs"),
    ]
    boxes = batch.phrases.boxes
    assert torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[0], boxes[2])


def test_a_cropped_box_is_excluded_and_a_touched_one_is_not(evaluation: EvaluationCollate) -> None:
    regions = (
        Region("dog", (0, 0, 7, 48), {0: ((0, 3),)}),  # 64 x 48 becomes 42 x 32 and loses 5 pixels on each side
        Region("cat", (0, 0, 12, 48), {0: ((4, 7),)}),
    )
    batch = evaluation([(0, grey_sample("a", ("dog cat",), regions=regions))])
    assert rows(batch) == [(0, "cat", Exclusion.MEASURED, "cat"), (0, "dog", Exclusion.OUTSIDE_CROP, "dog")]
    x0, y0, x1, y1 = batch.phrases.boxes[0].tolist()
    assert (x0, y0, y1) == (0, 0, 32)
    assert x1 == pytest.approx(12 * 42 / 64 - 5, abs=1e-4)


def test_spans_after_the_context_are_excluded(evaluation: EvaluationCollate) -> None:
    caption = "the dog " + "very " * 80 + "big cat and dog"
    regions = (
        Region("dog", (20, 10, 20, 16), spans_of("dog", caption)),
        Region("cat", (20, 10, 20, 16), spans_of("cat", caption)),
    )
    batch = evaluation([(0, grey_sample("a", (caption,), regions=regions))])
    assert rows(batch) == [
        (0, "cat", Exclusion.SPAN_CUT_OFF, "cat"),
        (0, "dog", Exclusion.MEASURED, "dog, dog"),  # the first of the two is whole
    ]
    assert batch.phrases.span_mask.sum(1).tolist() == [0, 1]
    assert batch.phrases.span_mask[1, 2]  # BOS, the, dog


def test_a_span_inside_a_token_is_excluded(evaluation: EvaluationCollate) -> None:
    region = Region("dog", (20, 10, 20, 16), {0: ((2, 4),)})
    assert rows(evaluation([(0, grey_sample("a", ("a dog",), regions=(region,)))])) == [
        (0, "dog", Exclusion.SPAN_NOT_ALIGNED, "do")
    ]


def test_the_first_reason_is_the_one_that_counts(evaluation: EvaluationCollate) -> None:
    regions = (
        Region("dog", (0, 0, 4, 48), {0: ((0, 2),)}),  # cropped and not aligned
        Region("cat", (0, 0, 4, 48), {0: ((4, 6),)}),  # several, cropped and not aligned
        Region("cat", (0, 0, 4, 48), {0: ((4, 6),)}),
    )
    reasons = [reason for _, _, reason, _ in rows(evaluation([(0, grey_sample("a", ("dog cat",), regions=regions))]))]
    assert reasons == [Exclusion.SEVERAL_INSTANCES, Exclusion.OUTSIDE_CROP]


def test_broken_images_and_padding_are_invalid_rows_in_evaluation(evaluation: EvaluationCollate) -> None:
    region = Region("dog", (20, 10, 20, 16), {0: ((2, 5),)})
    good = grey_sample("good", ("a dog",), regions=(region,))
    image = good.image[: len(good.image) // 2]
    broken = Sample("broken", image, (64, 48), ("a dog",), (region,), source="test/broken.png")
    no_json = RecordError("shard-7.tar, record x: no json", kind=UNPAIRED_MEMBER)
    records: list[Record] = [(0, broken), (1, no_json), (2, good), (-1, None)]
    batch = evaluation(records)
    assert batch.valid.tolist() == [False, False, True, False]
    assert batch.index.tolist() == [-1, -1, 2, -1]
    assert batch.keys == ["broken", "", "good", ""]
    assert batch.captions == ["a dog"]
    assert batch.caption_image.tolist() == [2]
    assert batch.phrases.caption_row.tolist() == [0]
    assert batch.phrases.image_row.tolist() == [2]
    assert batch.images[[0, 1, 3]].abs().sum() == 0
    image_fault, record_fault = batch.faults
    assert (image_fault.index, image_fault.kind) == (0, CORRUPT_IMAGE)
    assert "record 'broken' (test/broken.png): the image does not decode" in image_fault.message
    assert record_fault == Fault(1, UNPAIRED_MEMBER, "shard-7.tar, record x: no json")


def test_an_annotation_of_another_size_is_a_fault(evaluation: EvaluationCollate) -> None:
    sample = replace(grey_sample("a", ("a dog",)), size=(48, 64))
    batch = evaluation([(3, sample)])
    assert not batch.valid.any()
    (fault,) = batch.faults
    assert (fault.index, fault.kind) == (3, BROKEN_RECORD)
    assert "(64, 48)" in fault.message
    assert "(48, 64)" in fault.message


def test_a_record_with_a_label_that_the_manifest_lacks_is_a_fault(evaluation: EvaluationCollate) -> None:
    sample = grey_sample("a", ("a zebra",), regions=(Region("zebra", (1, 1, 30, 30)),))
    batch = evaluation([(0, sample), (1, grey_sample("b"))])
    (fault,) = batch.faults
    assert (batch.valid.tolist(), fault.kind) == ([False, True], BROKEN_RECORD)
    assert "'a' (test/a.png) has labels ['zebra'] that its manifest lacks; prepare" in fault.message


def test_training_has_one_caption_per_image(tokenizer: CaptionTokenizer) -> None:
    collate = TrainingCollate(TRANSFORM, tokenizer, seed=1)
    samples = [grey_sample(f"k{i}", tuple(f"caption {j} of {i}" for j in range(5))) for i in range(6)]
    batch = collate(list(enumerate(samples)), epoch=3)
    assert batch.tokens.shape == (6, 77)
    assert batch.caption_image.tolist() == list(range(6))
    assert torch.equal(batch.tokens, tokenizer.encode(batch.captions))
    assert batch.captions == [f"caption {j} of {i}" for i, j in enumerate(batch.caption_index.tolist())]
    assert len(batch.phrases) == 0
    assert batch.phrases.span_mask.shape == (0, 77)


def test_the_caption_depends_on_seed_epoch_and_key_alone(tokenizer: CaptionTokenizer) -> None:
    samples = [grey_sample(f"k{i}", tuple(f"caption {j}" for j in range(5))) for i in range(8)]

    def choose(seed: int, epoch: int, order: list[int]) -> dict[str, int]:
        collate = TrainingCollate(TRANSFORM, tokenizer, seed=seed)
        batch = collate([(i, samples[i]) for i in order], epoch=epoch)
        return dict(zip(batch.keys, batch.caption_index.tolist(), strict=True))

    forward = list(range(8))
    assert choose(0, 0, forward) == choose(0, 0, forward[::-1])
    assert choose(0, 0, forward) != choose(0, 1, forward)
    assert choose(0, 0, forward) != choose(1, 0, forward)


def test_all_captions_get_their_turn_equally(tokenizer: CaptionTokenizer) -> None:
    collate = TrainingCollate(ImageTransform(size=(1, 1)), tokenizer, captions_per_image=3)
    samples = [grey_sample(f"k{i}", tuple("abcde")) for i in range(10)]
    counts = Counter(
        row for epoch in range(30) for row in collate(list(enumerate(samples)), epoch=epoch).caption_index.tolist()
    )
    assert sorted(counts) == [0, 1, 2]
    assert min(counts.values()) > 70  # of 300, expected 100, standard deviation 8


def test_only_the_first_captions_take_part_where_that_is_asked(tokenizer: CaptionTokenizer) -> None:
    collate = EvaluationCollate(TRANSFORM, tokenizer, LABELS, captions_per_image=2)
    captions = ("one", "two", "a dog")
    sample = grey_sample("a", captions, regions=(Region("dog", (20, 10, 20, 16), spans_of("dog", *captions)),))
    batch = collate([(0, sample)])
    assert batch.captions == ["one", "two"]
    assert rows(batch) == [(-1, "dog", Exclusion.NOT_MENTIONED, "")]


def test_an_invalid_training_row_keeps_its_place_with_an_empty_caption(tokenizer: CaptionTokenizer) -> None:
    batch = TrainingCollate(TRANSFORM, tokenizer)(
        [(4, grey_sample("a")), (5, RecordError("gone")), (6, grey_sample("b"))]
    )
    assert batch.valid.tolist() == [True, False, True]
    assert batch.tokens.shape == (3, 77)
    start, end = batch.tokens[0, 0].item(), batch.tokens[0].max().item()
    assert batch.tokens[1].tolist() == [start, end, *[0] * 75]
    assert torch.equal(batch.tokens[[0, 2]], tokenizer.encode(["a photo", "a photo"]))
    assert batch.caption_index.tolist() == [0, -1, 0]
    assert batch.caption_image.tolist() == [0, 1, 2]
    assert batch.faults == [Fault(5, BROKEN_RECORD, "gone")]


def test_collates_pickle_for_spawned_workers(evaluation: EvaluationCollate) -> None:
    copy = pickle.loads(pickle.dumps(evaluation))
    region = Region("dog", (20, 10, 20, 16), {0: ((2, 5),)})
    records: list[Record] = [(0, grey_sample("a", ("a dog",), regions=(region,)))]
    assert torch.equal(copy(records).phrases.span_mask, evaluation(records).phrases.span_mask)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_batches_pin(evaluation: EvaluationCollate) -> None:
    region = Region("dog", (20, 10, 20, 16), {0: ((2, 5),)})
    batch = evaluation([(0, grey_sample("a", ("a dog",), regions=(region,)))]).pin_memory()
    assert batch.images.is_pinned()
    assert batch.phrases.boxes.is_pinned()
    assert batch.to("cuda").phrases.boxes.device.type == "cuda"


# --- tokens that a sample blanks ---

Collate = Callable[[list[Record]], Batch]
CAPTIONS = ("a red ring and a star", "one blue heart")


@pytest.fixture(scope="module", params=[TrainingCollate, EvaluationCollate])
def collate(request: pytest.FixtureRequest, tokenizer: CaptionTokenizer) -> Collate:
    labels = {"label_names": ()} if request.param is EvaluationCollate else {}
    made: Collate = request.param(TRANSFORM, tokenizer, captions_per_image=1, **labels)
    return made


def blanked(key: str, blanks: Mapping[int, tuple[int, ...]]) -> Sample:
    return grey_sample(key, CAPTIONS, blanks=blanks)


def test_padding_takes_the_place_of_blanked_tokens_in_their_own_row(
    collate: Collate, tokenizer: CaptionTokenizer
) -> None:
    broken = RecordError("no image")
    batch = collate([(0, blanked("a", {})), (1, broken), (2, blanked("b", {0: (2, 3)}))])
    rows = batch.tokens[[0, 2]] if len(batch.tokens) == 3 else batch.tokens  # training keeps a row for broken records
    expected = tokenizer.encode([CAPTIONS[0], CAPTIONS[0]])
    assert tokenizer.token_strings(expected[1])[1:5] == ["a", "red", "ring", "and"]
    expected[1, 2] = expected[1, 3] = tokenizer.padding_id
    assert torch.equal(rows, expected)
    assert torch.equal(tokenizer.content_mask(rows)[0], tokenizer.content_mask(rows)[1])


def test_a_caption_without_blanks_stays_where_another_one_of_its_image_has_some(
    collate: Collate, tokenizer: CaptionTokenizer
) -> None:
    batch = collate([(0, blanked("a", {1: (1,), 0: ()}))])
    assert torch.equal(batch.tokens, tokenizer.encode([CAPTIONS[0]]))


def test_each_caption_of_an_image_has_its_own_blanks(tokenizer: CaptionTokenizer) -> None:
    collate = EvaluationCollate(TRANSFORM, tokenizer, ())
    batch = collate([(0, blanked("a", {})), (1, blanked("b", {0: (1,), 1: (3,)}))])
    expected = tokenizer.encode([*CAPTIONS, *CAPTIONS])
    expected[2, 1] = expected[3, 3] = tokenizer.padding_id
    assert torch.equal(batch.tokens, expected)


def test_training_blanks_the_caption_that_it_has_chosen(tokenizer: CaptionTokenizer) -> None:
    collate = TrainingCollate(TRANSFORM, tokenizer)
    records: list[Record] = [(i, blanked(f"key{i}", {1: (1,)})) for i in range(8)]
    batch = collate(records)
    chosen = batch.caption_index.tolist()
    assert set(chosen) == {0, 1}
    assert [row[1] == tokenizer.padding_id for row in batch.tokens.tolist()] == [index == 1 for index in chosen]


def test_blanks_that_this_tokenizer_has_no_place_for_break_their_record_alone(collate: Collate) -> None:
    batch = collate([(0, blanked("a", {})), (1, blanked("b", {0: (77,)}))])
    assert batch.valid.tolist() == [True, False]
    (fault,) = batch.faults
    assert "token 77 is to be blanked, the tokenizer gives 77" in fault.message
    assert "degraded for another model" in fault.message


def test_wrong_captions_of_the_captions_that_take_part_come_with_their_rows(
    evaluation: EvaluationCollate, tokenizer: CaptionTokenizer
) -> None:
    wrong = (WrongCaption("a photo of a cat", 1, "replace"), WrongCaption("a drawing", 0, "swap"))
    two = grey_sample("two", ("a photo", "a photo of a dog"), wrong_captions=wrong, group="7")
    records: list[Record] = [(0, grey_sample("one")), (1, RecordError("broken")), (2, two)]
    found = evaluation(records).wrong_captions
    assert found is not None
    assert (found.image_row.tolist(), found.caption_row.tolist()) == ([2, 2], [2, 1])
    assert (found.kinds, found.groups) == (["replace", "swap"], ["7", "7"])
    assert torch.equal(found.tokens, tokenizer.encode(["a photo of a cat", "a drawing"]))
    first = replace(evaluation, captions_per_image=1)(records).wrong_captions
    assert first is not None
    assert first.kinds == ["swap"]
    assert two.with_one_caption(1).wrong_captions == (WrongCaption("a photo of a cat", 0, "replace"),)
    assert TrainingCollate(TRANSFORM, tokenizer)(records).wrong_captions is None
