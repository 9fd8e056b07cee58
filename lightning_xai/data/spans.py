"""From characters of a caption to the tokens that a text encoder sees: exactly, or with the reason why not."""

from __future__ import annotations

import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_xai.data.sample import Span

_T = TypeVar("_T")
_MEMO_SIZE = 4096


class SpanError(ValueError):
    """A span of characters is not made of whole tokens."""


class SpanCutOffError(SpanError):
    """The span lies, in whole or in part, beyond the context length or after an end of text."""


class SpanAlignmentError(SpanError):
    """The span starts or ends inside a token, or the tokenizer's cleaning changed it beyond recognition."""


class CaptionTokenizer:
    """A text encoder's tokenizer that also knows which tokens a piece of a caption became.

    Args:
        tokenizer: what `open_clip.get_tokenizer` returns: callable on a list of captions, giving token ids [C, L].
            Spans need its `encode` and `decode` as well (open_clip's `SimpleTokenizer`), or the Hugging Face tokenizer
            that open_clip's `HFTokenizer` wraps.

    Raises:
        ValueError: the tokenizer drops tokens at random (open_clip's reduction masks), so that no position is fixed.

    Attributes:
        context_length: L, the length of every token sequence.
    """

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "reduction_fn", None) is not None:
            raise ValueError(
                "a tokenizer with a reduction mask moves tokens at random; build it without reduction_mask"
            )
        self.tokenizer = tokenizer
        self._encode_text, self._decode_ids = _find_codec(tokenizer)
        self._ids_memo: dict[str, list[int]] = {}
        self._clean_memo: dict[str, str] = {}
        shortest = tokenizer(["a"])[0]
        self.context_length, self._padding = len(shortest), int(shortest[-1])
        self._told_of_cut = False
        self._first, self._capacity, self._end_id = self._probe()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """The same as `encode`."""
        return self.encode(captions)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Token ids [C, L] (int64) of C captions, exactly as the wrapped tokenizer makes them.

        The first caption that is longer than the model reads is warned of.

        Raises:
            ValueError: a caption is empty, or `captions` is one string instead of a sequence.
        """
        if isinstance(captions, str):
            raise ValueError(f"expected a sequence of captions, got the string {captions!r}; put it into a list")
        for index, caption in enumerate(captions):
            _check_not_empty(caption, f"caption {index} of {len(captions)}")
        if not captions:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        tokens: Tensor = self.tokenizer(list(captions)).to(torch.int64)
        self._tell_of_cut(captions, tokens)
        return tokens

    def _tell_of_cut(self, captions: Sequence[str], tokens: Tensor) -> None:
        """Warn of the first caption that is longer than the model reads, of all that pass through this tokenizer."""
        if self._told_of_cut or self._capacity == 0:
            return
        # Only a row without padding can be of one, so that others are not tokenised twice.
        last = tokens[:, self._first + self._capacity - 1]
        for row in ((last != self._padding) & (last != self._end_id)).nonzero()[:, 0].tolist():
            length = len(self._ids(captions[row]))
            if length > self._capacity:
                self._told_of_cut = True
                warnings.warn(
                    f"a caption of {length} tokens is cut off; the model reads {self._capacity}: {captions[row]!r} "
                    "(only the first such caption is named)",
                    stacklevel=3,
                )
                return

    def token_span(self, caption: str, span: Span) -> slice:
        """The token positions that the characters `span` of `caption` became.

        The tokens of the text before the span and of the text up to its end have to be the first tokens of the whole
        caption; what lies between them is the span, and has to decode to its characters again. Beyond ASCII, where
        words may have no end and tokenizers strip accents, the tokenizer's own offsets decide where that fails.

        Args:
            caption: the text as it is given to `encode`.
            span: characters `(start, end)`, end exclusive.

        Returns:
            A slice of the caption's row of `encode`; tokens that the tokenizer adds in front are counted.

        Raises:
            SpanCutOffError: a token of the span lies beyond the context length, or after an end-of-text token that the
                caption holds itself.
            SpanAlignmentError: the span starts or ends inside a token, or does not survive the tokenizer's cleaning.
            ValueError: the caption is empty, the span leaves it, or the tokenizer cannot align spans at all.
        """
        _check_not_empty(caption, "the caption")
        start, end = span
        if not 0 <= start < end <= len(caption):
            raise ValueError(f"span {span} leaves the caption {caption!r} of {len(caption)} characters")
        tokens, before, upto = self._ids(caption), self._ids(caption[:start]), self._ids(caption[:end])
        first, last = len(before), len(upto)
        phrase = caption[start:end]
        reason = ""
        if tokens[:first] != before or tokens[:last] != upto or first >= last:
            reason = f"{phrase!r} at {span} does not start and end with a token of {caption!r}"
        elif _squeeze(decoded := self._decode(tokens[first:last])) != _squeeze(self._clean(phrase)):
            reason = f"{phrase!r} at {span} of {caption!r} decodes to {decoded!r}"
        if reason:
            found = None if caption.isascii() else self._by_offsets(caption, span)
            if found is None:
                raise SpanAlignmentError(reason)
            first, last = found
        if self._end_id in tokens[:last]:
            raise SpanCutOffError(
                f"{phrase!r} at {span} stands after an end-of-text token of {caption!r}, where the model stops reading"
            )
        if last > self._capacity:
            raise SpanCutOffError(
                f"{phrase!r} at {span} ends with token {last} of {caption!r}; only {self._capacity} fit "
                f"the context length of {self.context_length}"
            )
        return slice(self._first + first, self._first + last)

    def offsets(self, caption: str) -> list[Span] | None:
        """The characters of the cleaned caption that each of its own tokens stands for; None if that is not known.

        Tokens that are bytes of one character share it.
        """
        text, ids = self._clean(caption), self._ids(caption)
        inner: Any = getattr(self.tokenizer, "tokenizer", None)
        if getattr(inner, "is_fast", False):
            found = inner(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            # The pieces of some vocabularies begin with the blank before them.
            return [(start + _blanks(text[start:end]), end) for start, end in found]
        decoder = getattr(self.tokenizer, "decoder", None)
        return _byte_offsets(text, [decoder[token] for token in ids]) if isinstance(decoder, dict) else None

    def _by_offsets(self, caption: str, span: Span) -> tuple[int, int] | None:
        """The first token of a span and the one after its last; None where a token holds more than the span."""
        whole, before, upto = (self._clean(text) for text in (caption, caption[: span[0]], caption[: span[1]]))
        offsets = self.offsets(caption)
        if offsets is None or not whole.startswith(before) or not whole.startswith(upto):
            return None
        start, end = len(before) + _blanks(whole[len(before) :]), len(upto)
        inside = [i for i, (first, last) in enumerate(offsets) if last > start and first < end]
        if not inside or offsets[inside[0]][0] < start or offsets[inside[-1]][1] > end:
            return None
        unknown, ids = getattr(getattr(self.tokenizer, "tokenizer", None), "unk_token_id", None), self._ids(caption)
        if all(ids[position] == unknown for position in inside):
            return None  # the model does not see which words these are
        return inside[0], inside[-1] + 1

    @property
    def padding_id(self) -> int:
        """The token that fills up short captions."""
        return self._padding

    def padding_caption(self) -> Tensor:
        """A caption that says nothing: start, one padding token, end, padding; token ids [L]."""
        # A caption of one token gives the tokenizer's own start, end and padding, around the place for the token.
        tokens = self.encode(["a"])[0].clone()
        tokens[self._first] = self.padding_id
        return tokens

    def content_mask(self, tokens: Tensor) -> Tensor:
        """The mask of a caption's own tokens in ids [B, L], without marks of start and end or padding: bool [B, L].

        Example:
            >>> import open_clip
            >>> tokenizer = CaptionTokenizer(open_clip.get_tokenizer("ViT-B-32"))
            >>> tokenizer.content_mask(tokenizer.encode(["a cat"]))[0, :5].tolist()
            [False, True, True, False, False]
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        # A tokenizer without a mark of the end fills up with padding instead.
        end_id = self.padding_id if self._end_id is None else self._end_id
        own = (positions >= self._first).expand_as(tokens)
        return own & ((tokens == end_id) & own).cumsum(dim=1).eq(0)

    def padding_mask(self, tokens: Tensor) -> Tensor:
        """The mask of what fills up captions after their end in ids [B, L]: bool [B, L].

        Example:
            >>> import open_clip
            >>> tokenizer = CaptionTokenizer(open_clip.get_tokenizer("ViT-B-32"))
            >>> tokenizer.padding_mask(tokenizer.encode(["a cat"]))[0, :6].tolist()  # start, a, cat, end
            [False, False, False, False, True, True]
        """
        over = ~self.content_mask(tokens)
        over[:, : self._first] = False
        if self._end_id is not None:  # the first mark of the end is the caption's own
            over[:, 1:] &= over[:, :-1].clone()
            over[:, : self._first + 1] = False
        return over & (tokens == self.padding_id)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of token ids [T], without tokens that mark start and end, and without padding after the end.

        Raises:
            ValueError: the tokenizer cannot decode.
        """
        ids = _to_list(tokens)
        if self._end_id in ids:
            ids = ids[: ids.index(self._end_id)]
        special = set(getattr(getattr(self.tokenizer, "tokenizer", self.tokenizer), "all_special_ids", ()))
        return " ".join("".join(self._decode([token]) for token in ids if token not in special).split())

    def joint_string(self, tokens: Sequence[int]) -> str:
        """The text of token ids that belong together, such as the bytes of one character, without spaces around it.

        Raises:
            ValueError: the tokenizer cannot decode.
        """
        return self._decode(list(tokens)).strip()

    def token_strings(self, tokens: Tensor | Sequence[int]) -> list[str]:
        """One string for each of the token ids [L], without spaces: "" for padding after the end token.

        Raises:
            ValueError: the tokenizer cannot decode.
        """
        ids = _to_list(tokens)
        length = ids.index(self._end_id) + 1 if self._end_id in ids else len(ids)
        return [self._decode([token]).strip() for token in ids[:length]] + [""] * (len(ids) - length)

    def _decode(self, ids: list[int]) -> str:
        if self._decode_ids is None:
            raise ValueError(_no_codec(self.tokenizer))
        return self._decode_ids(ids)

    def _ids(self, text: str) -> list[int]:
        if self._encode_text is None:
            raise ValueError(_no_codec(self.tokenizer))
        return _remembered(self._ids_memo, text, self._encode_text)

    def _clean(self, text: str) -> str:
        clean = getattr(self.tokenizer, "clean_fn", None)
        return text if clean is None else _remembered(self._clean_memo, text, clean)

    def _probe(self) -> tuple[int, int, int | None]:
        """The number of tokens before a caption's own, how many tokens fit after them, and the token that ends it."""
        if self._encode_text is None:
            return 0, 0, None
        short = self._encode_text("a b")
        row = self.tokenizer(["a b"])[0].tolist()
        first = next((i for i in range(len(row)) if row[i : i + len(short)] == short), None)
        if first is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} gives {row[:8]}... for 'a b', but its encode gives {short}; the two "
                "have to agree for spans to be aligned"
            )
        text = "a b " * self.context_length
        own, row = self._encode_text(text), self.tokenizer([text])[0].tolist()[first:]
        capacity = next((i for i, (a, b) in enumerate(zip(own, row, strict=False)) if a != b), len(row))
        return first, capacity, row[capacity] if capacity < len(row) else None


def _remembered(memo: dict[str, _T], text: str, function: Callable[[str], _T]) -> _T:
    """`function(text)`, kept for up to `_MEMO_SIZE` texts."""
    if text not in memo:
        if len(memo) >= _MEMO_SIZE:
            memo.clear()
        memo[text] = function(text)
    return memo[text]


_Encode = Callable[[str], list[int]]
_Decode = Callable[[list[int]], str]


def _find_codec(tokenizer: Any) -> tuple[_Encode | None, _Decode | None]:
    """Text -> its own token ids, and back; None where the tokenizer has no such thing."""
    if hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode"):
        return tokenizer.encode, tokenizer.decode
    inner = getattr(tokenizer, "tokenizer", None)  # open_clip's HFTokenizer
    if hasattr(inner, "decode") and callable(inner):
        return partial(_encode_hugging_face, tokenizer), inner.decode
    return None, None


def _encode_hugging_face(wrapper: Any, text: str) -> list[int]:
    """`encode` for open_clip's `HFTokenizer`, which has none."""
    # Not verbose: it would warn of texts that are longer than the model takes, which are cut elsewhere.
    ids = wrapper.tokenizer(wrapper.clean_fn(text), add_special_tokens=False, verbose=False)["input_ids"]
    return [int(token) for token in ids]


def _blanks(text: str) -> int:
    """Number of blanks that a text begins with."""
    return len(text) - len(text.lstrip())


def _byte_offsets(text: str, pieces: Sequence[str]) -> list[Span]:
    """Characters of the text for each piece of a byte-level vocabulary (one character a byte, `</w>` at word ends)."""
    starts = [0]  # of each character, in bytes
    for character in text:
        starts.append(starts[-1] + len(character.encode("utf-8", "surrogatepass")))
    place, found = 0, []
    for piece in pieces:
        at = bisect_right(starts, place) - 1
        if place == starts[at]:
            at += _blanks(text[at:])
            place = starts[at]
        end = place + len(piece.removesuffix("</w>"))
        found.append((at, bisect_left(starts, end)))
        place = end
    return found


def _no_codec(tokenizer: Any) -> str:
    return (
        f"{type(tokenizer).__name__} has neither encode and decode nor a Hugging Face tokenizer inside, so spans "
        "cannot be mapped to its tokens; use a model with open_clip's SimpleTokenizer or HFTokenizer"
    )


def _check_not_empty(caption: str, name: str) -> None:
    if not caption.strip():
        raise ValueError(f"{name} is empty; leave it out")


def _squeeze(text: str) -> str:
    return "".join(text.split()).lower()


def _to_list(tokens: Tensor | Sequence[int]) -> list[int]:
    return [int(token) for token in (tokens.tolist() if isinstance(tokens, Tensor) else tokens)]
