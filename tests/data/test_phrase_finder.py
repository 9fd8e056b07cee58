from __future__ import annotations

import unicodedata
from typing import Any

import pytest

from lightning_xai.data.phrase_finder import MentionFinder, find_phrases

ANIMALS = {"dog": ["dog", "dogs"], "hot dog": ["hot dog", "hot dogs"], "bear": ["bear"], "teddy bear": ["teddy bear"]}


def phrases(caption: str, synonyms: Any = ANIMALS, blocked: Any = ()) -> dict[str, list[str]]:
    found = MentionFinder(synonyms, blocked).find(caption)
    return {label: [caption[start:end] for start, end in spans] for label, spans in found.items()}


CAPTIONS: list[tuple[str, dict[str, list[str]]]] = [
    ("A dog eats a hot dog.", {"dog": ["dog"], "hot dog": ["hot dog"]}),
    ("HOT  DOGS and Dogs", {"hot dog": ["HOT  DOGS"], "dog": ["Dogs"]}),
    ("a hot-dog, a hot\ndog", {"hot dog": ["hot-dog", "hot\ndog"]}),
    ("it is hot. dog sleeps", {"dog": ["dog"]}),
    ("it is hot, dog sleeps", {"dog": ["dog"]}),
    ("the teddy bear's ear and the bear\u2019s ear", {"teddy bear": ["teddy bear"], "bear": ["bear"]}),
    ("the dogs' bowls, a 'dog', (dog)", {"dog": ["dogs", "dog", "dog"]}),
    ("a dogma, a hotdog, underdogs, dog_1, 2dogs", {}),
    ("a dog-friendly cafe and a guard-dog", {}),
    ("a dog - a bear -- dog", {"dog": ["dog", "dog"], "bear": ["bear"]}),
    ("", {}),
    ("...", {}),
]


def test_whole_words_are_found_and_the_longest_phrase_wins() -> None:
    for caption, expected in CAPTIONS:
        assert phrases(caption) == expected, caption


def test_spans_are_character_positions_from_left_to_right() -> None:
    assert MentionFinder(ANIMALS).find("dogs, a hot dog, dog") == {"dog": ((0, 4), (17, 20)), "hot dog": ((8, 15),)}


def test_spans_stay_right_where_lower_case_has_more_characters() -> None:
    caption = "\u0130\u0130\u0130 Dog"
    assert MentionFinder(ANIMALS).find(caption) == {"dog": ((4, 7),)}


def test_a_longer_phrase_wins_also_over_one_that_starts_before_it() -> None:
    synonyms = {"a": ["big red"], "b": ["red fire truck"]}
    assert phrases("a big red fire truck", synonyms) == {"b": ["red fire truck"]}


def test_words_in_parentheses_have_to_be_there_but_do_not_belong_to_the_mention() -> None:
    synonyms = {"wine glass": ["glass (of wine)", "(wine) goblet"], "ski": ["skis"]}
    assert phrases("a glass of water, a glass of wine", synonyms) == {"wine glass": ["glass"]}
    assert phrases("a goblet, a wine goblet; glass. of wine", synonyms) == {"wine glass": ["goblet"]}
    assert phrases("a man skis on skis", synonyms, ["(man) skis"]) == {"ski": ["skis"]}


def test_a_blocked_phrase_names_nothing_and_leaves_the_rest() -> None:
    assert phrases("a dog in a dog park", blocked=["dog park"]) == {"dog": ["dog"]}


WITHOUT_MENTION = ["", "  ", "(of wine)", "glass (of) wine", "!"]


def test_a_phrase_without_a_mention_is_an_error() -> None:
    for text in WITHOUT_MENTION:
        with pytest.raises(ValueError, match="parenthes"):
            MentionFinder({"x": [text]})


def test_a_phrase_for_two_classes_is_an_error_that_names_both() -> None:
    with pytest.raises(ValueError, match="'Jet' stands for both 'plane' and 'boat'"):
        MentionFinder({"plane": ["jet"], "boat": ["Jet"]})
    with pytest.raises(ValueError, match="stands for both 'plane' and None"):
        MentionFinder({"plane": ["jet"]}, blocked=["jet"])


def test_given_words_are_found_as_whole_words_and_the_first_listed_counts() -> None:
    caption = "A car door, a Car  door, carpets, the t-shirt (red) and a car"
    assert find_phrases(caption, ["car door", "car"]) == [(2, 10), (58, 61)]
    assert find_phrases(caption, ["car", "car door"]) == [(2, 5), (58, 61)]
    assert find_phrases(caption, [" CAR door "], exact=False) == [(2, 10), (14, 23)]
    assert find_phrases(caption, ["t-shirt (red)"]) == [(38, 51)]
    for nothing in ([], [""], ["", "carp"]):
        assert find_phrases(caption, nothing) == []
    assert find_phrases(caption, [" "], exact=False) == []


@pytest.mark.parametrize(
    ("caption", "phrase", "found"),
    [
        ("一只狗在红色的垫子上", "红色的", "红色的"),
        ("犬が赤いマットの上にいる", "犬", "犬"),
        ("แมวบนเสื่อ", "แมว", "แมว"),
        ("강아지가 매트 위에 있다", "강아지", "강아지"),
        ("큰강아지", "강아지", None),
        ("किताब", "क", None),
        ("a狗 and a cat", "狗", "狗"),
        ("un CAFE\u0301 noir", "café", "CAFE\u0301"),
        ("un café noir", "cafe\u0301", "café"),
        ("un cafe\u0301 noir", "cafe", None),
        ("the dog\u2019s bowl", "dog's bowl", "dog\u2019s bowl"),
        (unicodedata.normalize("NFD", "강아지가"), "강아지", unicodedata.normalize("NFD", "강아지")),
    ],
)
def test_phrases_are_found_in_every_script_and_form_of_unicode(caption: str, phrase: str, found: str | None) -> None:
    places = [caption[start:end] for start, end in find_phrases(caption, [phrase], exact=False)]
    assert places == ([] if found is None else [found])
