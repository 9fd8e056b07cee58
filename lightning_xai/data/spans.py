"""From a phrase to its characters in a caption, and from characters to the tokens a text encoder sees.

`find_mentions` says where a caption names a class; `CaptionTokenizer` turns such a place into token positions exactly,
or says why it cannot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_xai.data.sample import Span

# An apostrophe belongs to what follows it only inside a word: "dog's" is "dog" + "'s", "'dog'" is "dog". So "dog's"
# names a dog, while "o'clock" ("o" + "'clock") names no clock.
_WORD = re.compile(r"(?:(?<=\w)['\u2019])?\w+")
_HYPHENS = frozenset("-\u2010\u2011")
_PHRASE_PART = re.compile(r"\(([^()]*)\)|([^()]+)")
_MEMO_SIZE = 4096


class SpanError(ValueError):
    """A span of characters has no tokens of its own."""


class SpanCutOffError(SpanError):
    """The span lies, in whole or in part, behind the tokenizer's context length."""


class SpanAlignmentError(SpanError):
    """The span starts or ends inside a token, or the tokenizer's cleaning changed it beyond recognition."""


@dataclass(frozen=True)
class _Phrase:
    """A dictionary entry: the words of the mention and the words that have to stand before and behind it."""

    label: str | None
    before: tuple[str, ...]
    core: tuple[str, ...]
    behind: tuple[str, ...]

    @property
    def rank(self) -> tuple[int, int, bool]:
        """Which of two entries wins where both fit: longer mention, then more context, then the one that blocks."""
        context = len(self.before) + len(self.behind)
        return len(self.core), context, self.label is None


@dataclass(frozen=True)
class _Words:
    """A caption split into words. `gaps[i]` stands before word i: "" within a word, " ", "-", or "." for the rest."""

    texts: tuple[str, ...]
    spans: tuple[Span, ...]
    gaps: tuple[str, ...]


class MentionFinder:
    """Finds where a caption names one of the classes of a dictionary.

    A phrase of the dictionary is a sequence of whole words, compared without case. Words in parentheses have to be
    there but are not part of the mention: `"glass (of wine)"` finds `glass` in "a glass of wine" only. Where several
    phrases fit the same words, the one with the longest mention wins, then the one with more words in parentheses,
    whatever their classes; phrases in `blocked` compete like all others and then name nothing.

    Hyphens count as spaces inside a phrase ("hot-dog" is "hot dog"), but a hyphenated compound that is longer than the
    phrase is another word: "man-made" names no man. A possessive names its owner, without the "'s".

    Args:
        synonyms: class -> phrases, in singular and plural as wanted.
        blocked: phrases that name no class but contain words that would ("bus stop").

    Raises:
        ValueError: a phrase has no word outside its parentheses, or belongs to two classes.
    """

    def __init__(self, synonyms: Mapping[str, Sequence[str]], blocked: Iterable[str] = ()) -> None:
        owners: dict[tuple[tuple[str, ...], ...], str | None] = {}
        self._by_first_word: dict[str, list[_Phrase]] = {}
        entries = [(label, text) for label, texts in synonyms.items() for text in texts]
        for label, text in [*entries, *((None, text) for text in blocked)]:
            phrase = _parse_phrase(text, label)
            parts = (phrase.before, phrase.core, phrase.behind)
            if parts in owners:
                if owners[parts] != label:
                    raise ValueError(f"{text!r} stands for both {owners[parts]!r} and {label!r}; keep one of them")
                continue
            owners[parts] = label
            self._by_first_word.setdefault(phrase.core[0], []).append(phrase)

    def find(self, caption: str) -> dict[str, tuple[Span, ...]]:
        """The character spans `(start, end)` (end exclusive) of every mention, by class, from left to right."""
        words = _split(caption)
        fits = [
            (phrase, index)
            for index, text in enumerate(words.texts)
            for phrase in self._by_first_word.get(text, ())
            if _fits(phrase, words, index)
        ]
        fits.sort(key=lambda fit: fit[0].rank, reverse=True)  # stable: of equals the leftmost stays first
        taken: set[int] = set()
        found: list[tuple[str, Span]] = []
        for phrase, index in fits:
            covered = range(index, index + len(phrase.core))
            if taken.isdisjoint(covered):
                taken.update(covered)
                if phrase.label is not None:
                    found.append((phrase.label, (words.spans[index][0], words.spans[covered[-1]][1])))
        mentions: dict[str, tuple[Span, ...]] = {}
        for label, span in sorted(found, key=lambda item: item[1]):
            mentions[label] = (*mentions.get(label, ()), span)
        return mentions


def find_mentions(
    caption: str, synonyms: Mapping[str, Sequence[str]], blocked: Sequence[str] = ()
) -> dict[str, tuple[Span, ...]]:
    """Where a caption names the classes of a dictionary; `MentionFinder` has the rules.

    Args:
        caption: any text.
        synonyms: class -> phrases.
        blocked: phrases that name no class.

    Returns:
        class -> character spans `(start, end)` (end exclusive) from left to right; classes without mention are absent.

    Raises:
        ValueError: a phrase has no word outside its parentheses, or belongs to two classes.

    Example:
        >>> synonyms = {"dog": ["dog", "dogs"], "hot dog": ["hot dog", "hot dogs"]}
        >>> find_mentions("A dog's hot-dog.", synonyms)
        {'dog': ((2, 5),), 'hot dog': ((8, 15),)}
        >>> find_mentions("a dog park", synonyms, blocked=["dog park"])
        {}
    """
    return _finder(tuple((label, tuple(phrases)) for label, phrases in synonyms.items()), tuple(blocked)).find(caption)


@lru_cache(maxsize=8)
def _finder(synonyms: tuple[tuple[str, tuple[str, ...]], ...], blocked: tuple[str, ...]) -> MentionFinder:
    return MentionFinder(dict(synonyms), blocked)


def _split(text: str) -> _Words:
    texts, spans, gaps, end = [], [], [], 0
    for match in _WORD.finditer(text):
        between = text[end : match.start()]
        gaps.append("-" if between in _HYPHENS else " " if between.isspace() else "." if between else "")
        # Word by word, because lowering may change the number of characters.
        texts.append(match.group().lower().replace("\u2019", "'"))
        spans.append(match.span())
        end = match.end()
    return _Words(tuple(texts), tuple(spans), tuple(gaps))


def _parse_phrase(text: str, label: str | None) -> _Phrase:
    before: tuple[str, ...] = ()
    core: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    for context, mention in _PHRASE_PART.findall(text):
        words = _split(context or mention).texts
        if mention and words:
            if core:
                raise ValueError(f"{text!r}: the words outside parentheses have to stand together")
            core = words
        elif core:
            behind += words
        else:
            before += words
    if not core:
        raise ValueError(f"{text!r}: a phrase needs a word outside parentheses")
    return _Phrase(label, before, core, behind)


def _fits(phrase: _Phrase, words: _Words, index: int) -> bool:
    first, last = index - len(phrase.before), index + len(phrase.core) + len(phrase.behind)
    if first < 0 or words.texts[first:last] != phrase.before + phrase.core + phrase.behind:
        return False
    if any(gap == "." for gap in words.gaps[first + 1 : last]):
        return False
    return words.gaps[first] != "-" and (last == len(words.gaps) or words.gaps[last] != "-")


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
        self._memo: dict[str, list[int]] = {}
        self._encode_text, self._decode_ids = _find_codec(tokenizer)
        self.context_length = int(tokenizer(["a"]).shape[1])
        self._first, self._capacity, self._end_id = self._probe()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """The same as `encode`."""
        return self.encode(captions)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Token ids [C, L] (int64) of C captions, exactly as the wrapped tokenizer makes them.

        Raises:
            ValueError: a caption is empty, or `captions` is one string instead of a sequence.
        """
        if isinstance(captions, str):
            raise ValueError(f"expected a sequence of captions, got the string {captions!r}; put it into a list")
        for index, caption in enumerate(captions):
            _check_not_empty(caption, f"caption {index} of {len(captions)}")
        if not captions:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        tokens: Tensor = self.tokenizer(list(captions))
        return tokens.to(torch.int64)

    def token_span(self, caption: str, span: Span) -> slice:
        """The token positions that the characters `span` of `caption` became.

        The tokens of the text before the span and of the text up to its end have to be the first tokens of the whole
        caption; what lies between them is the span, and has to decode to its characters again.

        Args:
            caption: the text as it is given to `encode`.
            span: characters `(start, end)`, end exclusive.

        Returns:
            A slice of the caption's row of `encode`; tokens that the tokenizer adds in front are counted.

        Raises:
            SpanCutOffError: a token of the span lies behind the context length.
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
        if tokens[:first] != before or tokens[:last] != upto or first >= last:
            raise SpanAlignmentError(f"{phrase!r} at {span} does not start and end with a token of {caption!r}")
        decoded = self._decode(tokens[first:last])
        if _squeeze(decoded) != _squeeze(self._clean(phrase)):
            raise SpanAlignmentError(f"{phrase!r} at {span} of {caption!r} decodes to {decoded!r}")
        if last > self._capacity:
            raise SpanCutOffError(
                f"{phrase!r} at {span} ends with token {last} of {caption!r}; only {self._capacity} fit "
                f"the context length of {self.context_length}"
            )
        return slice(self._first + first, self._first + last)

    @property
    def padding_id(self) -> int:
        """The token that fills up short captions."""
        return int(self.encode(["a"])[0, -1])

    def padding_caption(self) -> Tensor:
        """A caption that says nothing: start, one padding token, end, padding; token ids [L]."""
        # A caption of one token gives the tokenizer's own start, end and padding, around the place for the token.
        tokens = self.encode(["a"])[0].clone()
        tokens[self._first] = self.padding_id
        return tokens

    def content_mask(self, tokens: Tensor) -> Tensor:
        """Which of the token ids [B, L] are a caption's own, not marks of start and end or padding: bool [B, L].

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

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of token ids [T]; tokens that mark start and end, and padding behind the end, are left out.

        Raises:
            ValueError: the tokenizer cannot decode.
        """
        return " ".join("".join(self._piece(token) for token in self._content(_to_list(tokens))).split())

    def token_strings(self, tokens: Tensor | Sequence[int]) -> list[str]:
        """One string for each of the token ids [L], without spaces: "" for padding behind the end token.

        Raises:
            ValueError: the tokenizer cannot decode.
        """
        ids = _to_list(tokens)
        length = ids.index(self._end_id) + 1 if self._end_id in ids else len(ids)
        return [self._piece(token).strip() for token in ids[:length]] + [""] * (len(ids) - length)

    def _content(self, ids: list[int]) -> list[int]:
        if self._end_id in ids:
            ids = ids[: ids.index(self._end_id)]
        special = set(getattr(getattr(self.tokenizer, "tokenizer", self.tokenizer), "all_special_ids", ()))
        return [token for token in ids if token not in special]

    def _piece(self, token: int) -> str:
        return self._decode([token])

    def _decode(self, ids: list[int]) -> str:
        if self._decode_ids is None:
            raise ValueError(_no_codec(self.tokenizer))
        return self._decode_ids(ids)

    def _ids(self, text: str) -> list[int]:
        if self._encode_text is None:
            raise ValueError(_no_codec(self.tokenizer))
        if text not in self._memo:
            if len(self._memo) >= _MEMO_SIZE:
                self._memo.clear()
            self._memo[text] = self._encode_text(text)
        return self._memo[text]

    def _clean(self, text: str) -> str:
        clean = getattr(self.tokenizer, "clean_fn", None)
        return str(clean(text)) if clean is not None else text

    def _probe(self) -> tuple[int, int, int | None]:
        """How many tokens stand before a caption's own, how many of its own fit, and which token ends it."""
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


_Encode = Callable[[str], list[int]]
_Decode = Callable[[list[int]], str]


def _find_codec(tokenizer: Any) -> tuple[_Encode | None, _Decode | None]:
    """Text -> its own token ids, and back; None where the tokenizer has no such thing."""
    if hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode"):
        return tokenizer.encode, tokenizer.decode
    inner = getattr(tokenizer, "tokenizer", None)  # open_clip's HFTokenizer
    if hasattr(inner, "decode") and callable(inner):
        return _HuggingFaceEncode(tokenizer), inner.decode
    return None, None


@dataclass(frozen=True)
class _HuggingFaceEncode:
    """`encode` for open_clip's `HFTokenizer`, which has none (a class, so that it can be sent to worker processes)."""

    wrapper: Any

    def __call__(self, text: str) -> list[int]:
        ids = self.wrapper.tokenizer(self.wrapper.clean_fn(text), add_special_tokens=False)["input_ids"]
        return [int(token) for token in ids]


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
