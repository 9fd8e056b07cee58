from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from lightning_xai.data.phrase_finder import MentionFinder
from lightning_xai.data.sources.coco_classes import read_classes
from lightning_xai.data.spans import (
    CaptionTokenizer,
    SpanAlignmentError,
    SpanCutOffError,
)


def test_tokens_of_every_span_of_coco_mini_decode_to_the_phrase(tokenizer: CaptionTokenizer, coco_mini: Path) -> None:
    count = 0
    for path in sorted(coco_mini.glob("annotations/captions_*.json")):
        captions = [annotation["caption"] for annotation in json.loads(path.read_bytes())["annotations"]]
        finder = MentionFinder(*read_classes())
        for caption, row in zip(captions, tokenizer.encode(captions), strict=True):
            for spans in finder.find(caption).values():
                for start, end in spans:
                    expected = " ".join(caption[start:end].lower().split())
                    assert tokenizer.decode(row[tokenizer.token_span(caption, (start, end))]) == expected
                    count += 1
    assert count > 1000


PLACES: list[tuple[str, str, list[str]]] = [
    ("dog", "dog", ["dog"]),
    ("  Two  DOGS,\nplaying. ", "DOGS", ["dogs"]),
    ("the dog's bowl", "dog", ["dog"]),
    ("the dog's bowl", "dog's", ["dog", "'s"]),
    ("a (hot-dog)!", "hot-dog", ["hot", "-", "dog"]),
    ("cats &amp; dogs &lt;3", "dogs", ["dogs"]),
    ("cats &amp; dogs &lt;3", "&amp; dogs", ["&", "dogs"]),
    ("a \u201cdog\u201d", "dog", ["dog"]),
    ("a caf\u00e9 \U0001f436 dog", "dog", ["dog"]),
    ("a schnauzerdoodle sits", "schnauzerdoodle", ["schnau", "zer", "doodle"]),
    ("a dog ", "dog ", ["dog"]),
]


def test_tokens_are_those_of_the_phrase_in_its_place(tokenizer: CaptionTokenizer) -> None:
    for caption, phrase, tokens in PLACES:
        start = caption.index(phrase)
        row = tokenizer.encode([caption])[0]
        assert tokenizer.token_strings(row[tokenizer.token_span(caption, (start, start + len(phrase)))]) == tokens


def test_the_second_of_two_equal_words_has_its_own_tokens(tokenizer: CaptionTokenizer) -> None:
    caption = "a dog and a dog"
    assert tokenizer.token_span(caption, (2, 5)) == slice(2, 3)
    assert tokenizer.token_span(caption, (12, 15)) == slice(5, 6)


NOT_ALIGNED = [
    ("two hotdogs", (4, 7)),  # ends inside a word
    ("two hotdogs", (7, 11)),  # starts inside a word
    ("a dog", (1, 2)),  # only a space
    ("cats &amp; dogs", (6, 9)),  # inside an HTML entity
    ("a Ã©clair", (2, 3)),  # broken encoding that the tokenizer's cleaning repairs
]


def test_a_span_that_is_not_made_of_tokens_is_an_alignment_error(tokenizer: CaptionTokenizer) -> None:
    for caption, span in NOT_ALIGNED:
        with pytest.raises(SpanAlignmentError):
            tokenizer.token_span(caption, span)


def test_a_span_after_the_context_length_is_cut_off(tokenizer: CaptionTokenizer) -> None:
    inside = "a " * 74 + "dog dog"
    row = tokenizer.encode([inside])[0]
    position = tokenizer.token_span(inside, (148, 151))
    assert tokenizer.token_strings(row[position]) == ["dog"]
    assert position == slice(75, 76)
    with pytest.raises(SpanCutOffError, match="77"):
        tokenizer.token_span(inside, (152, 155))
    with pytest.raises(SpanCutOffError):  # begins before the cut, ends after it
        tokenizer.token_span(inside, (148, 155))


OUTSIDE = [(-1, 2), (0, 0), (3, 2), (0, 6)]


def test_a_span_that_leaves_the_caption_is_an_error(tokenizer: CaptionTokenizer) -> None:
    for span in OUTSIDE:
        with pytest.raises(ValueError, match="leaves the caption"):
            tokenizer.token_span("a dog", span)


def test_an_empty_caption_is_an_error_that_names_it(tokenizer: CaptionTokenizer) -> None:
    with pytest.raises(ValueError, match="caption 1 of 2 is empty"):
        tokenizer.encode(["a dog", " \n"])
    with pytest.raises(ValueError, match="empty"):
        tokenizer.token_span(" ", (0, 1))


def test_encode_gives_what_the_wrapped_tokenizer_gives(tokenizer: CaptionTokenizer) -> None:
    captions = ["a dog", "two dogs " * 60]
    tokens = tokenizer.encode(captions)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == open_clip.get_tokenizer("ViT-B-32")(captions).tolist()
    assert tokenizer.context_length == tokens.shape[1] == 77
    assert tokenizer.encode([]).shape == (0, 77)
    with pytest.raises(ValueError, match="list"):
        tokenizer.encode("a dog")


def test_padding_and_marks_are_not_decoded(tokenizer: CaptionTokenizer) -> None:
    row = tokenizer.encode(["Oh! A dog's life"])[0]
    assert tokenizer.decode(row) == "oh ! a dog 's life"
    strings = tokenizer.token_strings(row)
    assert strings[:8] == ["<start_of_text>", "oh", "!", "a", "dog", "'s", "life", "<end_of_text>"]
    assert strings[8:] == [""] * 69


def test_other_context_lengths_and_cleanings_are_aligned_too() -> None:
    short = CaptionTokenizer(SimpleTokenizer(context_length=5, clean="canonicalize"))
    caption = "Well, a hot-dog (dog)"
    position = short.token_span(caption, (8, 15))
    assert short.decode(short.encode([caption])[0][position]) == "hotdog"
    with pytest.raises(SpanCutOffError):
        short.token_span(caption, (17, 20))


def test_a_reduction_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction"):
        CaptionTokenizer(SimpleTokenizer(reduction_mask="random"))


class _IdsOnly:
    """A tokenizer that gives ids and nothing else."""

    def __call__(self, captions: list[str]) -> Tensor:
        return torch.ones(len(captions), 8, dtype=torch.int32)


def test_a_tokenizer_without_encode_gives_ids_but_says_that_it_has_no_spans() -> None:
    tokenizer = CaptionTokenizer(_IdsOnly())
    assert tokenizer.encode(["a dog"]).dtype == torch.int64
    with pytest.raises(ValueError, match="_IdsOnly has neither encode and decode") as caught:
        tokenizer.token_span("a dog", (2, 5))
    assert not isinstance(caught.value, SpanAlignmentError)  # no record's fault: it must not be counted as one
    with pytest.raises(ValueError, match="_IdsOnly"):
        tokenizer.decode([1])


class _Contrary(SimpleTokenizer):  # type: ignore[misc]  # open_clip has no types
    """Its encode does not agree with what a call gives."""

    def encode(self, text: str) -> list[int]:
        return [7] * len(text)

    def __call__(self, captions: list[str], context_length: int | None = None) -> Tensor:
        return torch.zeros(len(captions), 8, dtype=torch.int64)


def test_an_encode_that_disagrees_with_the_call_is_refused() -> None:
    with pytest.raises(ValueError, match="agree"):
        CaptionTokenizer(_Contrary())


def test_the_tokens_of_a_hugging_face_tokenizer_are_aligned(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="open_clip needs transformers for its HFTokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "hot", "dog", "##s", "poo", "##dle", "##d", "and"]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    transformers.BertTokenizerFast(str(vocabulary)).save_pretrained(tmp_path)
    wrapped = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=9)
    tokenizer = CaptionTokenizer(wrapped)
    caption = "A  poodle and hot dogs"
    row = tokenizer.encode([caption])[0]
    assert row[tokenizer.token_span(caption, (3, 9))].tolist() == [words.index("poo"), words.index("##dle")]
    assert tokenizer.token_span(caption, (14, 22)) == slice(5, 8)
    with pytest.raises(SpanCutOffError):
        tokenizer.token_span(caption + " and dog", (27, 30))
    with pytest.raises(SpanAlignmentError):
        tokenizer.token_span(caption, (3, 7))


@pytest.mark.parametrize(
    ("caption", "phrase"),
    [
        ("一只狗在红色的垫子上", "红色的"),
        ("犬が赤いマットの上にいる", "犬"),
        ("ein größerer Hund", "größerer"),
        ("un café noir", "café"),
    ],
)
def test_spans_in_any_script_are_aligned_by_bytes(tokenizer: CaptionTokenizer, caption: str, phrase: str) -> None:
    start = caption.index(phrase)
    own = tokenizer.encode([caption])[0, tokenizer.token_span(caption, (start, start + len(phrase)))]
    decoder: dict[int, str] = tokenizer.tokenizer.decoder
    pieces = "".join(decoder[token].removesuffix("</w>") for token in own.tolist())
    assert bytes(tokenizer.tokenizer.byte_decoder[character] for character in pieces).decode() == phrase


def test_a_tokenizer_that_strips_accents_aligns_by_its_offsets(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="open_clip needs transformers for its HFTokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "un", "caf", "##e", "狗"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    tokenizer = CaptionTokenizer(open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=9))
    for caption in ("un café noir", "un cafe\u0301 noir"):
        assert tokenizer.token_span(caption, (3, len(caption) - 5)) == slice(2, 4)
    assert tokenizer.token_span("un狗", (2, 3)) == slice(2, 3)
    with pytest.raises(SpanAlignmentError, match="UNK"):
        tokenizer.token_span("un größer", (3, 9))  # a word that the model does not see


def test_a_span_behind_an_end_of_text_that_was_typed_is_cut_off(tokenizer: CaptionTokenizer) -> None:
    caption = "a dog <end_of_text> on a mat"
    assert tokenizer.token_span(caption, (2, 5)) == slice(2, 3)
    with pytest.raises(SpanCutOffError, match="behind an end-of-text token"):
        tokenizer.token_span(caption, (25, 28))


def test_the_first_caption_that_is_cut_off_is_warned_of_once(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = CaptionTokenizer(open_clip.get_tokenizer("ViT-B-32", context_length=6))
    tokenizer.encode(["a b c d", "a"])  # as many as there are places
    assert not recwarn.list
    tokenizer.encode(["a", "a b c d e"])
    tokenizer.encode(["a b c d e f"])
    (warning,) = recwarn.list
    assert "a caption of 5 tokens is cut off; the model reads 4: 'a b c d e'" in str(warning.message)
