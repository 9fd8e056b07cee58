"""Tokens that a sample blanks reach the model as padding, and nothing else changes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_xai.data.batch import Batch, EvaluationCollate, Record, TrainingCollate
from lightning_xai.data.sample import RecordError, Sample
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.image_transform import ImageTransform

Collate = Callable[[list[Record]], Batch]
CAPTIONS = ("a red ring and a star", "one blue heart")


@pytest.fixture(scope="module", params=["training", "evaluation"])
def collate(request: pytest.FixtureRequest, tokenizer: CaptionTokenizer) -> Collate:
    transform = ImageTransform(size=(32, 32))
    if request.param == "training":
        return TrainingCollate(transform, tokenizer, captions_per_image=1)
    return EvaluationCollate(transform, tokenizer, (), captions_per_image=1)


def make_sample(key: str, blanks: Mapping[int, tuple[int, ...]], captions: tuple[str, ...] = CAPTIONS) -> Sample:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return Sample(key, stream.getvalue(), (8, 8), captions, source=f"test/{key}.png", blanks=blanks)


def plain(tokenizer: CaptionTokenizer, *captions: str) -> Tensor:
    return tokenizer.encode(list(captions))


def test_padding_takes_the_place_of_blanked_tokens_in_their_own_row(
    collate: Collate, tokenizer: CaptionTokenizer
) -> None:
    broken = RecordError("no image")
    batch = collate([(0, make_sample("a", {})), (1, broken), (2, make_sample("b", {0: (2, 3)}))])
    rows = batch.tokens[[0, 2]] if len(batch.tokens) == 3 else batch.tokens  # training keeps a row for broken records
    expected = plain(tokenizer, CAPTIONS[0], CAPTIONS[0])
    assert tokenizer.token_strings(expected[1])[1:5] == ["a", "red", "ring", "and"]
    expected[1, 2] = expected[1, 3] = tokenizer.padding_id
    assert torch.equal(rows, expected)
    assert torch.equal(tokenizer.content_mask(rows)[0], tokenizer.content_mask(rows)[1])


def test_a_caption_without_blanks_stays_where_another_one_of_its_image_has_some(
    collate: Collate, tokenizer: CaptionTokenizer
) -> None:
    batch = collate([(0, make_sample("a", {1: (1,), 0: ()}))])
    assert torch.equal(batch.tokens, plain(tokenizer, CAPTIONS[0]))


def test_each_caption_of_an_image_has_its_own_blanks(tokenizer: CaptionTokenizer) -> None:
    collate = EvaluationCollate(ImageTransform(size=(32, 32)), tokenizer, ())
    batch = collate([(0, make_sample("a", {})), (1, make_sample("b", {0: (1,), 1: (3,)}))])
    expected = plain(tokenizer, *CAPTIONS, *CAPTIONS)
    expected[2, 1] = expected[3, 3] = tokenizer.padding_id
    assert torch.equal(batch.tokens, expected)


def test_training_blanks_the_caption_that_it_has_chosen(tokenizer: CaptionTokenizer) -> None:
    collate = TrainingCollate(ImageTransform(size=(32, 32)), tokenizer)
    records: list[Record] = [(i, make_sample(f"key{i}", {1: (1,)})) for i in range(8)]
    batch = collate(records)
    chosen = batch.caption_index.tolist()
    assert set(chosen) == {0, 1}
    assert [row[1] == tokenizer.padding_id for row in batch.tokens.tolist()] == [index == 1 for index in chosen]


def test_blanks_that_this_tokenizer_has_no_place_for_break_their_record_alone(collate: Collate) -> None:
    batch = collate([(0, make_sample("a", {})), (1, make_sample("b", {0: (77,)}))])
    assert batch.valid.tolist() == [True, False]
    (fault,) = batch.faults
    assert "token 77 is to be blanked, the tokenizer gives 77" in fault.message
    assert "degraded for another model" in fault.message
