"""Find phrases in captions: `find_phrases` looks for given words, `MentionFinder` for the classes of a dictionary.

Both find whole words only. `spans.CaptionTokenizer` turns a place that they found into tokens. No torch is needed here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["MentionFinder", "find_phrases", "phrase_words"]

Span = tuple[int, int]

# An apostrophe belongs to what follows it only inside a word: "dog's" is "dog" + "'s", "'dog'" is "dog". So "dog's"
# names a dog, while "o'clock" ("o" + "'clock") names no clock.
_WORD = re.compile(r"(?:(?<=\w)['\u2019])?\w+")
_HYPHENS = frozenset("-\u2010\u2011")
# Scripts written without spaces: Tibetan, Thai, Lao, Myanmar, Khmer, Japanese kana, Chinese characters. And Hangul,
# whose particles follow their noun without one.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003134f"
)
_HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"
_APOSTROPHES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'"})
_PHRASE_PART = re.compile(r"\(([^()]*)\)|([^()]+)")


def find_phrases(caption: str, phrases: Sequence[str], *, exact: bool = True) -> list[Span]:
    """Find the places of several phrases in a caption, as whole words: character spans, end exclusive.

    In scripts written without spaces, a phrase may stand anywhere.

    Args:
        caption: any text.
        phrases: of those that begin at the same place, the one listed first counts.
        exact: whether case, white space between words, the form of apostrophes and the way in which Unicode composes
            accents have to be the same.

    >>> find_phrases("A car door, carpets and a car.", ["car door", "car"])
    [(2, 10), (26, 29)]
    >>> find_phrases("A dog, another dog and two dogs", ["DOG"], exact=False)
    [(2, 5), (15, 18)]
    """
    if exact:
        patterns = [_whole(re.escape(phrase), phrase) for phrase in phrases if phrase]
        found = [match.span() for match in re.finditer("|".join(patterns), caption)] if patterns else []
        return [span for span in found if not _is_mark(caption[span[1] : span[1] + 1])]
    text, places = _folded(caption)
    folded = [_folded(phrase)[0] for phrase in phrases if phrase.strip()]
    patterns = [_whole(r"\s+".join(map(re.escape, phrase.split())), phrase.strip()) for phrase in folded]
    found = [match.span() for match in re.finditer("|".join(patterns), text, re.IGNORECASE)] if patterns else []
    # A match may not end within what Unicode writes as several characters but readers see as one.
    return [
        (places[start][0], places[end - 1][1])
        for start, end in found
        if (start == 0 or places[start - 1] != places[start])
        and (end == len(text) or (places[end - 1] != places[end] and not _is_mark(text[end])))
    ]


def _is_mark(char: str) -> bool:
    """Whether a character belongs to the one before it, such as a vowel sign of an Indic script."""
    return bool(char) and unicodedata.category(char).startswith("M")


def _whole(pattern: str, phrase: str) -> str:
    """A pattern that matches no part of a longer word."""
    before = "" if re.match(f"[{_UNSPACED}]", phrase) else rf"(?<![^\W{_UNSPACED}])"
    after = "" if re.match(f"[{_UNSPACED}{_HANGUL}]", phrase[-1]) else rf"(?![^\W{_UNSPACED}])"
    return f"{before}(?:{pattern}){after}"


def _folded(text: str) -> tuple[str, list[Span]]:
    r"""A text with composed accents and plain apostrophes, and the span of `text` that each character stands for.

    >>> _folded("cafe\u0301")
    ('caf\xe9', [(0, 1), (1, 2), (2, 3), (3, 5)])
    """
    folded, places, start = "", [], 0
    while start < len(text):
        end = start + 1
        # What follows is part of the character if it is an accent, or composes with it as the letters of Hangul do.
        while end < len(text) and (
            unicodedata.combining(text[end]) or len(unicodedata.normalize("NFC", text[start : end + 1])) == 1
        ):
            end += 1
        part = unicodedata.normalize("NFC", text[start:end]).translate(_APOSTROPHES)
        folded += part
        places += [(start, end)] * len(part)
        start = end
    return folded, places


@dataclass(frozen=True)
class _Phrase:
    """A dictionary entry: the words of the mention and the words that have to stand before and after it."""

    label: str | None
    before: tuple[str, ...]
    core: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def rank(self) -> tuple[int, int, bool]:
        """The order in which entries that fit win: longer mention, then more context, then the one that blocks."""
        context = len(self.before) + len(self.after)
        return len(self.core), context, self.label is None


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
            parts = (phrase.before, phrase.core, phrase.after)
            if parts in owners:
                if owners[parts] != label:
                    raise ValueError(f"{text!r} stands for both {owners[parts]!r} and {label!r}; keep one of them")
                continue
            owners[parts] = label
            self._by_first_word.setdefault(phrase.core[0], []).append(phrase)

    def find(self, caption: str) -> dict[str, tuple[Span, ...]]:
        """The character spans `(start, end)` (end exclusive) of every mention, by class, from left to right."""
        words, spans, gaps = _split(caption)
        fits = [
            (phrase, index)
            for index, text in enumerate(words)
            for phrase in self._by_first_word.get(text, ())
            if _fits(phrase, words, gaps, index)
        ]
        fits.sort(key=lambda fit: fit[0].rank, reverse=True)  # stable: of equals the leftmost stays first
        taken: set[int] = set()
        found: list[tuple[str, Span]] = []
        for phrase, index in fits:
            covered = range(index, index + len(phrase.core))
            if taken.isdisjoint(covered):
                taken.update(covered)
                if phrase.label is not None:
                    found.append((phrase.label, (spans[index][0], spans[covered[-1]][1])))
        mentions: dict[str, tuple[Span, ...]] = {}
        for label, span in sorted(found, key=lambda item: item[1]):
            mentions[label] = (*mentions.get(label, ()), span)
        return mentions


def phrase_words(text: str) -> tuple[str, ...]:
    """The words of a phrase as `MentionFinder` compares them: two phrases with the same ones are the same.

    >>> phrase_words("Hot-dog"), phrase_words("...")
    (('hot', 'dog'), ())
    """
    return _split(text)[0]


def _split(text: str) -> tuple[tuple[str, ...], list[Span], list[str]]:
    """A text's words, their places, and what stands before each: "" inside a word, " ", "-", or "." for the rest."""
    texts, spans, gaps, end = [], [], [], 0
    for match in _WORD.finditer(text):
        between = text[end : match.start()]
        gaps.append("-" if between in _HYPHENS else " " if between.isspace() else "." if between else "")
        # Word by word, because lowering may change the number of characters.
        texts.append(match.group().lower().replace("\u2019", "'"))
        spans.append(match.span())
        end = match.end()
    return tuple(texts), spans, gaps


def _parse_phrase(text: str, label: str | None) -> _Phrase:
    before: tuple[str, ...] = ()
    core: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    for context, mention in _PHRASE_PART.findall(text):
        words, _, _ = _split(context or mention)
        if mention and words:
            if core:
                raise ValueError(f"{text!r}: the words outside parentheses have to stand together")
            core = words
        elif core:
            after += words
        else:
            before += words
    if not core:
        raise ValueError(f"{text!r}: a phrase needs a word outside parentheses")
    return _Phrase(label, before, core, after)


def _fits(phrase: _Phrase, words: tuple[str, ...], gaps: list[str], index: int) -> bool:
    first, last = index - len(phrase.before), index + len(phrase.core) + len(phrase.after)
    if first < 0 or words[first:last] != phrase.before + phrase.core + phrase.after:
        return False
    if any(gap == "." for gap in gaps[first + 1 : last]):
        return False
    return gaps[first] != "-" and (last == len(gaps) or gaps[last] != "-")
