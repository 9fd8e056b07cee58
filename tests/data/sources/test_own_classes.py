from __future__ import annotations

import pytest

from lightning_xai.data.phrase_finder import phrase_words
from lightning_xai.data.sources.coco_classes import read_classes
from lightning_xai.data.sources.own_classes import class_finder, number_forms


def named(caption: str, *categories: str, **added: list[str]) -> dict[str, list[str]]:
    found = class_finder({name: [] for name in categories}, added).finder.find(caption)
    return {label: [caption[slice(*span)] for span in spans] for label, spans in found.items()}


@pytest.mark.parametrize(
    ("caption", "categories", "expected"),
    [
        # The dictionary blocks these for COCO's classes; what they end in names an own class, and blocks those still.
        ("a train station", ("train", "station"), {"station": ["train station"]}),
        ("a dog house", ("dog",), {}),
        # An own name goes before the dictionary's word for another class.
        ("a boy and a man", ("person", "boy"), {"boy": ["boy"], "person": ["man"]}),
        ("a baseball player", ("player",), {"player": ["baseball player"]}),
        # COCO's classes keep their dictionary, however the names are joined.
        ("a stop light", ("traffic_light",), {"traffic_light": ["stop light"]}),
        ("a hot dog", ("dog",), {}),
        ("firewomen and a fireman", ("fireman", "firewoman"), {"firewoman": ["firewomen"], "fireman": ["fireman"]}),
        ("two boxes of cherries", ("box", "cherries"), {"box": ["boxes"], "cherries": ["cherries"]}),
        ("a cherry in a glass", ("cherries", "glasses"), {"cherries": ["cherry"]}),
    ],
)
def test_classes_are_named_as_a_reader_would(
    caption: str, categories: tuple[str, ...], expected: dict[str, list[str]]
) -> None:
    known = {label: words for label, words in named(caption, *categories).items() if label in categories}
    assert known == expected


def test_a_synonym_goes_before_names_and_adds_to_cocos_dictionary() -> None:
    assert named("a buggy and a car", "car", "buggy", car=["buggy"]) == {"car": ["buggy", "car"]}


def test_a_word_for_two_classes_names_neither() -> None:
    found = class_finder({"bow_(weapon)": [], "bow_(ribbon)": [], "tie": []})
    assert found.finder.find("a bow") == {}
    assert found.ambiguous["bow"] == ["bow_(weapon)", "bow_(ribbon)"]


def test_cocos_own_classes_are_found_with_their_dictionary_alone() -> None:
    classes, blocked = read_classes()
    finder = class_finder({name: [] for name in classes}).finder
    for label, phrases in classes.items():
        for phrase in phrases:
            if "(" not in phrase:
                assert finder.find(phrase) == {label: ((0, len(phrase)),)}, phrase
    assert not any(finder.find(phrase) for phrase in blocked if "(" not in phrase)


@pytest.mark.parametrize(
    ("one", "many"),
    [("bus", "buses"), ("glass", "glasses"), ("church", "churches"), ("lady", "ladies"), ("toy", "toys"),
     ("policeman", "policemen"), ("human", "humans"), ("goldfish", "goldfish"), ("lens", "lenses"), ("knife", "knives"),
     ("bow tie", "bow ties"), ("cup of tea", "cups of tea")],
)  # fmt: skip
def test_plurals(one: str, many: str) -> None:
    assert many in number_forms(one)
    assert phrase_words(one) in map(phrase_words, number_forms(many)) or many == "glasses"


def test_two_categories_that_read_alike_own_no_words() -> None:
    found = class_finder({"hot dog": [], "hot_dog": [], "dog": []})
    assert found.finder.find("a hot dog and a dog") == {"dog": ((16, 19),)}
    assert next(iter(found.ambiguous.values())) == ["hot dog", "hot_dog"]
