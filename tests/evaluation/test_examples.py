"""Heat maps to look at: the same ones in any order and on any number of processes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

import pytest

from lightning_xai.evaluation.examples import Place, choose_examples, example_of
from lightning_xai.results.examples import ExampleRecord

LABELS = ("cat", "dog", "kite")
Candidate = tuple[Place, ExampleRecord]


def candidate(index: int, caption: int = 0, label: str = "cat", gamma: float = 0.5, key: str = "k") -> Candidate:
    target = {"index": index, "caption_index": caption, "label": label, "key": key, "caption": "a dog", "phrase": "dog"}
    return example_of(target | {"x0": 0.0, "y0": 1.0, "x1": 2.0, "y1": 3.0}, gamma, True, [[0.5, -1.0], [0.0, 2.0]])


def random_candidates(seed: int, images: int = 25) -> list[Candidate]:
    """Some phrases of some captions of each image; few different gammas, so that there are ties, some without."""
    draw = random.Random(seed)
    return [
        candidate(index, caption, label, draw.choice([math.nan, 0.0, 0.2, 0.2, 0.7, 1.0]))
        for index in range(images)
        for caption in range(3)
        for label in LABELS
        if draw.random() < 0.4
    ]


def one_by_one(candidates: Iterable[Candidate], numbers: tuple[int, int, int]) -> dict[Place, ExampleRecord]:
    """The candidates of each image in one piece, in the order in which the images first appear."""
    by_image: dict[int, list[Candidate]] = {}
    for each in candidates:
        by_image.setdefault(each[0][0], []).append(each)
    kept: dict[Place, ExampleRecord] = {}
    for own in by_image.values():
        kept = choose_examples([*kept.items(), *own], *numbers)
    return kept


def expected(candidates: Sequence[Candidate], fixed: int, per_class: int, failures: int) -> dict[Place, set[str]]:
    """The rules in plain Python: walk through the data, take the first of each image until there are enough."""
    found: dict[Place, set[str]] = {}

    def walk(order: list[Candidate], most: int, why: str) -> None:
        seen: list[int] = []
        for place, _ in order:
            if len(seen) < most and place[0] not in seen:
                seen.append(place[0])
                found.setdefault(place, set()).add(why)

    by_place = sorted(candidates, key=lambda each: each[0])
    walk(by_place, fixed, "fixed")
    for label in LABELS:
        walk([each for each in by_place if each[0][2] == label], per_class, "class")
    without = [each for each in by_place if each[1].gamma is None]
    others = [each for each in by_place if each[1].gamma is not None]
    walk(without + sorted(others, key=lambda each: each[1].gamma or 0.0), failures, "failure")
    return found


@pytest.mark.parametrize("numbers", [(4, 2, 5), (0, 3, 0), (99, 99, 99), (0, 0, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_the_chosen_are_those_of_the_rules_in_any_order_and_on_any_number_of_processes(
    seed: int, numbers: tuple[int, int, int]
) -> None:
    draw, candidates = random.Random(seed), random_candidates(seed)
    shuffled = draw.sample(candidates, len(candidates))
    chosen = choose_examples(shuffled, *numbers)
    assert {place: set(record.why) for place, record in chosen.items()} == expected(candidates, *numbers)
    assert list(chosen) == sorted(chosen)
    assert all(len(record.why) == len(set(record.why)) for record in chosen.values())

    rank = {index: draw.randrange(3) for index in range(25)}
    shares = [[each for each in shuffled if rank[each[0][0]] == own] for own in range(3)]
    kept = [item for share in shares for item in one_by_one(share, numbers).items()]
    assert len(kept) < len(candidates) or min(numbers) == 99
    assert choose_examples(kept, *numbers) == chosen
    assert one_by_one(shuffled, numbers) == one_by_one(candidates[::-1], numbers) == chosen


def test_every_group_shows_distinct_images() -> None:
    candidates = [candidate(index, caption, gamma=0.1) for index in (5, 2) for caption in (0, 1)]
    candidates += [candidate(9, 0, gamma=0.0), candidate(9, 1, gamma=0.05)]
    chosen = choose_examples(candidates, 2, 3, 2)
    assert {place: record.why for place, record in chosen.items()} == {
        (2, 0, "cat"): ("fixed", "class", "failure"),
        (5, 0, "cat"): ("fixed", "class"),
        (9, 0, "cat"): ("class", "failure"),
    }


def test_a_map_without_anything_positive_is_the_worst() -> None:
    gammas = [0.5, 0.0, math.nan, 0.1]
    chosen = choose_examples((candidate(index, gamma=gamma) for index, gamma in enumerate(gammas)), 0, 0, 2)
    assert list(chosen) == [(1, 0, "cat"), (2, 0, "cat")]
    assert [record.gamma for record in chosen.values()] == [0.0, None]


@pytest.mark.parametrize("gammas", [(0.9, 0.1, 0.5), (0.5, 0.1, 0.9)])
def test_of_several_phrases_at_one_place_the_worst_stands_for_all(gammas: tuple[float, ...]) -> None:
    """Things of one class that one caption tells apart, as in Flickr30k Entities."""
    candidates = [candidate(0, gamma=gamma) for gamma in gammas]
    separate = choose_examples(candidates[:1], 1, 0, 1)
    for each in candidates[1:]:
        separate = choose_examples([*separate.items(), each], 1, 0, 1)
    for chosen in (choose_examples(candidates, 1, 0, 1), separate):
        (record,) = chosen.values()
        assert (record.gamma, record.why) == (0.1, ("fixed", "failure"))


def test_a_record_has_what_was_measured_and_its_picture_stays_in_its_folder_whatever_the_key() -> None:
    place, record = candidate(3, label="dog", key="../../x/é")
    assert place == (3, 0, "dog")
    assert (record.label, record.gamma, record.key, record.hit) == ("dog", 0.5, "../../x/é", True)
    assert record.heat == ((0.5, -1.0), (0.0, 2.0))
    assert (record.box, record.spans) == ((0.0, 1.0, 2.0, 3.0), ((2, 5),))
    assert record.image == "examples/______x__.jpg"
