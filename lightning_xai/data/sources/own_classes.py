"""The words that captions may use for the classes of any file of COCO's form.

- COCO's own 80 classes keep their dictionary (`coco_classes`), also where underscores join the words of their names.
- Any other class is found by its name, in singular and plural ("hard_hat": hard hat, hard hats), and by the `synonyms`
  that LVIS lists. What stands in parentheses tells classes apart for people and is not looked for: "bow_(weapon)" is
  "bow".
- A file of synonyms adds words to any class.

What the file of synonyms says goes before names, names before LVIS's synonyms, and these before COCO's dictionary. A
phrase that means two classes at the same level names neither. Compounds that the dictionary knows only to block them
("train station") name a class of your own that is called as they end ("station").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import yaml

from lightning_xai.data.phrase_finder import MentionFinder, phrase_words
from lightning_xai.data.sources.coco_classes import read_classes
from lightning_xai.data.sources.files import check_path

__all__ = ["ClassFinder", "class_finder", "number_forms", "read_synonyms"]

_SHOWN = 10
_IN_PARENTHESES = re.compile(r"\([^()]*\)")
_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])")
_IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "foot": "feet", "tooth": "teeth",
    "goose": "geese", "mouse": "mice", "ox": "oxen", "leaf": "leaves", "knife": "knives", "wolf": "wolves",
    "shelf": "shelves", "half": "halves", "loaf": "loaves", "calf": "calves", "scarf": "scarves", "wife": "wives",
    "sheep": "sheep", "deer": "deer", "fish": "fish", "aircraft": "aircraft", "bison": "bison", "potato": "potatoes",
    "tomato": "tomatoes", "hero": "heroes", "lens": "lenses",
}  # fmt: skip
_SINGULAR = {plural: singular for singular, plural in _IRREGULAR.items()}
_NO_PLURALS = {"glasses", "clothes", "series", "species"}  # a glass is another thing than glasses


@dataclass(frozen=True)
class ClassFinder:
    """Finds classes in captions.

    Attributes:
        finder: finds them.
        ambiguous: phrases that are not looked for, each with the classes that it could mean.
    """

    finder: MentionFinder
    ambiguous: Mapping[str, Sequence[str]]


def class_finder(
    categories: Mapping[str, Sequence[str]], added: Mapping[str, Sequence[str]] | None = None
) -> ClassFinder:
    """The finder of the classes of a file.

    Args:
        categories: name -> the synonyms that the file itself lists.
        added: name -> further phrases, as `MentionFinder` takes them.

    >>> found = class_finder({"hard_hat": [], "dog": []}, {"hard_hat": ["helmet"]})
    >>> found.finder.find("Two puppies beside helmets and a hard hat")
    {'dog': ((4, 11),), 'hard_hat': ((19, 26), (33, 41))}
    """
    classes, blocked = read_classes()
    written = Counter(_readable(name).lower() for name in categories)
    # Two that read alike ("hot dog", "hot_dog") are as unclear as two of any other name.
    named = {text: name for name in categories if (text := _readable(name).lower()) in classes and written[text] == 1}
    own = [name for name in categories if name not in named.values()]
    levels = (
        [(name, phrase) for name, phrases in (added or {}).items() for phrase in _forms(phrases)],
        [(name, phrase) for name in own for phrase in _forms([_readable(name)])],
        [(name, phrase) for name in own for phrase in _forms(map(_readable, categories[name]))],
    )
    phrases: dict[str, list[str]] = {name: [] for name in categories}
    owners: dict[tuple[str, ...], str | None] = {}
    ambiguous: dict[str, list[str]] = {}
    for claims in map(_claims, levels):
        for words, (phrase, names) in claims.items():
            if words not in owners:
                owners[words] = names[0] if len(names) == 1 else None
                if len(names) > 1:
                    ambiguous[phrase] = names
                else:
                    phrases[names[0]].append(phrase)
    others = [(named.get(label), phrase) for label, known in classes.items() for phrase in known]
    nothing = []
    for name, phrase in [*others, *((None, phrase) for phrase in blocked)]:
        if "(" not in phrase:
            words = phrase_words(phrase)
            if words in owners and owners[words] is not None:
                continue
            if name is None:
                ends = (owners.get(words[first:]) for first in range(1, len(words)))
                name = next((end for end in ends if end is not None), None)
        if name is None:
            nothing.append(phrase)
        else:
            phrases[name].append(phrase)
    return ClassFinder(MentionFinder(phrases, nothing), ambiguous)


def read_synonyms(path: Path, categories: Iterable[str]) -> dict[str, list[str]]:
    """The content of a file of synonyms, by the names of the categories.

    Args:
        path: YAML or JSON: each class with its phrases, as a list or joined by commas ("helmet: hard hat, headgear").
        categories: names of the classes that there are; case and underscores of the file's names do not matter.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another form, a class that there is none of, or a phrase for two classes.
    """
    form = "a YAML or JSON file with a line for each class (helmet: [hard hat, headgear])"
    check_path(path, "synonyms", "file", form)
    try:
        read = msgspec.convert(yaml.safe_load(path.read_bytes()), dict[str, list[str] | str])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"synonyms: {path}: {error}; give {form}") from error
    names = {_readable(name).lower(): name for name in categories} | {name: name for name in categories}
    found: dict[str, list[str]] = {}
    for given, phrases in read.items():
        name = names.get(given, names.get(_readable(given).lower()))
        if name is None:
            raise ValueError(
                f"synonyms: {path}: there is no class {given!r}; the instances have {shown(names.values())}"
            )
        listed = phrases.split(",") if isinstance(phrases, str) else phrases
        found.setdefault(name, []).extend(phrase for phrase in listed if phrase_words(phrase))
    claims = _claims([(name, phrase) for name, phrases in found.items() for phrase in phrases])
    for phrase, owners in claims.values():
        if len(owners) > 1:
            raise ValueError(f"synonyms: {path}: {phrase!r} stands for {shown(owners)}; keep one of them")
    return found


def number_forms(phrase: str) -> list[str]:
    """A phrase with its singular or plural, as far as spelling shows.

    >>> number_forms("hard hat"), number_forms("boxes"), number_forms("glass of wine"), number_forms("glasses")
    (['hard hat', 'hard hats'], ['boxes', 'boxe', 'box'], ['glass of wine', 'glasses of wine'], ['glasses'])
    """
    head, of, rest = phrase.partition(" of ")
    before, _, word = head.rpartition(" ")
    return [" ".join(filter(None, (before, form))) + of + rest for form in _word_forms(word)]


def shown(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - _SHOWN:,} more" if len(distinct) > _SHOWN else ""
    return ", ".join(map(repr, distinct[:_SHOWN])) + more


def _word_forms(word: str) -> list[str]:
    lower = word.lower()
    if lower in _NO_PLURALS or not lower:
        return [word]
    if lower in _IRREGULAR:
        return [word, _IRREGULAR[lower]]
    if lower in _SINGULAR:
        return [word, _SINGULAR[lower]]
    if lower.endswith("men"):
        return [word, f"{lower.removesuffix('men')}man"]
    is_plural = lower.endswith("s") and not lower.endswith(("ss", "us", "is")) and len(lower) > 3
    guesses = (lower[:-1], lower[:-2], f"{lower[:-3]}y") if is_plural else ()
    singular = [guess for guess in guesses if _plural(guess) == lower]
    return [word, *singular] if singular else [word, _plural(lower)]


def _plural(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("man", "child", "fish", "craft")) and not word.endswith("human"):
        end = next(end for end in ("woman", "man", "child", "fish", "craft") if word.endswith(end))
        return word.removesuffix(end) + {"woman": "women", "man": "men", "child": "children"}.get(end, end)
    if re.search(r"(?:s|x|z|ch|sh)$", word):
        return f"{word}es"
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}s"


def _forms(phrases: Iterable[str]) -> Iterator[str]:
    for phrase in phrases:
        if phrase_words(phrase):
            yield from [phrase] if "(" in phrase else number_forms(phrase.strip())


def _claims(phrases: Iterable[tuple[str, str]]) -> dict[tuple[str, ...], tuple[str, list[str]]]:
    """Words -> the phrase, and the names of the classes that claim it."""
    claims: dict[tuple[str, ...], tuple[str, list[str]]] = {}
    for name, phrase in phrases:
        # A phrase with a context in parentheses is another one than its words alone.
        key = (*phrase_words(phrase), phrase) if "(" in phrase else phrase_words(phrase)
        _, names = claims.setdefault(key, (phrase, []))
        if name not in names:
            names.append(name)
    return claims


def _readable(name: str) -> str:
    return " ".join(_CAMEL_CASE.sub(" ", _IN_PARENTHESES.sub(" ", name.replace("_", " "))).split())
