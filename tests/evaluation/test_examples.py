"""Heat maps to look at: the same ones in any order and on any number of processes, and their files."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_xai.evaluation.examples import Candidate, ExampleGallery, Pixels, Shown, write_gallery
from lightning_xai.results.examples import read_examples

LABELS = ("cat", "dog", "kite")
Place = tuple[int, int, str]


def random_candidates(seed: int, images: int = 25) -> list[Candidate]:
    """Some phrases of some captions of each image; few different gammas, so that there are ties, some without."""
    draw = random.Random(seed)
    return [
        Candidate(index, caption, label, draw.choice([math.nan, 0.0, 0.2, 0.2, 0.7, 1.0]), {"phrase": label})
        for index in range(images)
        for caption in range(3)
        for label in LABELS
        if draw.random() < 0.4
    ]


def picture(index: int) -> Pixels:
    return np.full((1, 1, 3), index, dtype=np.uint8)


def one_by_one(gallery: ExampleGallery, candidates: Iterable[Candidate]) -> ExampleGallery:
    """The candidates of each image in one piece, in the order in which the images first appear."""
    by_image: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        by_image.setdefault(candidate.index, []).append(candidate)
    for own in by_image.values():
        gallery.add(own, picture)
    return gallery


def expected(candidates: Sequence[Candidate], fixed: int, per_class: int, failures: int) -> dict[Place, set[str]]:
    """The rules in plain Python: walk through the data, take the first of each image until there are enough."""
    found: dict[Place, set[str]] = {}

    def walk(order: list[Candidate], most: int, why: str) -> None:
        seen: list[int] = []
        for candidate in order:
            if len(seen) < most and candidate.index not in seen:
                seen.append(candidate.index)
                found.setdefault(candidate.place, set()).add(why)

    by_place = sorted(candidates, key=lambda candidate: (candidate.index, candidate.caption_index, candidate.label))
    walk(by_place, fixed, "fixed")
    for label in LABELS:
        walk([candidate for candidate in by_place if candidate.label == label], per_class, "class")
    without = [candidate for candidate in by_place if math.isnan(candidate.gamma)]
    others = [candidate for candidate in by_place if not math.isnan(candidate.gamma)]
    walk(without + sorted(others, key=lambda candidate: candidate.gamma), failures, "failure")
    return found


NUMBERS = pytest.mark.parametrize("numbers", [(4, 2, 5), (0, 3, 0), (99, 99, 99), (0, 0, 0)])


@NUMBERS
@pytest.mark.parametrize("seed", range(2))
def test_the_chosen_are_those_of_the_rules_in_the_order_of_the_data(seed: int, numbers: tuple[int, int, int]) -> None:
    candidates = random_candidates(seed)
    chosen = ExampleGallery(*numbers).choose(random.Random(seed).sample(candidates, len(candidates)))
    assert {place: set(why) for place, why in chosen.items()} == expected(candidates, *numbers)
    assert list(chosen) == sorted(chosen)
    assert all(len(why) == len(set(why)) for why in chosen.values())


@NUMBERS
@pytest.mark.parametrize("seed", range(3))
def test_what_is_chosen_of_all_is_among_what_each_process_keeps(seed: int, numbers: tuple[int, int, int]) -> None:
    draw, candidates = random.Random(seed), random_candidates(seed)
    shares: list[list[Candidate]] = [[], [], []]
    rank = {index: draw.randrange(3) for index in range(25)}
    for candidate in draw.sample(candidates, len(candidates)):
        shares[rank[candidate.index]].append(candidate)
    galleries = [one_by_one(ExampleGallery(*numbers), share) for share in shares]
    union = [candidate for gallery in galleries for candidate, _ in gallery.kept]
    assert len(union) < len(candidates) or min(numbers) == 99
    chosen = ExampleGallery(*numbers).choose(candidates)
    assert ExampleGallery(*numbers).choose(union) == chosen
    shown = ExampleGallery(*numbers).shown(gallery.kept for gallery in galleries)
    assert {example.candidate.place: example.why for example in shown} == chosen
    assert all((example.pixels == example.candidate.index).all() for example in shown)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_images_changes_nothing(seed: int) -> None:
    candidates = random_candidates(seed)
    everything = ExampleGallery(3, 2, 4)
    everything.add(candidates, picture)
    for order in (candidates[::-1], random.Random(seed).sample(candidates, len(candidates))):
        gallery = one_by_one(ExampleGallery(3, 2, 4), order)
        kept, whole = ([candidate for candidate, _ in each.kept] for each in (gallery, everything))
        assert sorted(kept, key=repr) == sorted(whole, key=repr)
        assert gallery.choose(kept) == everything.choose(candidates)


def test_every_group_shows_distinct_images() -> None:
    candidates = [Candidate(index, caption, "cat", 0.1, {}) for index in (5, 2) for caption in (0, 1)]
    candidates += [Candidate(9, 0, "cat", 0.0, {}), Candidate(9, 1, "cat", 0.05, {})]
    chosen = ExampleGallery(2, 3, 2).choose(candidates)
    assert chosen == {
        (2, 0, "cat"): ("fixed", "class", "failure"),
        (5, 0, "cat"): ("fixed", "class"),
        (9, 0, "cat"): ("class", "failure"),
    }


def test_a_map_without_anything_positive_is_the_worst() -> None:
    gammas = [0.5, 0.0, math.nan, 0.1]
    chosen = ExampleGallery(0, 0, 2).choose(Candidate(index, 0, "cat", gamma, {}) for index, gamma in enumerate(gammas))
    assert chosen == {(1, 0, "cat"): ("failure",), (2, 0, "cat"): ("failure",)}


@pytest.mark.parametrize("reverse", [False, True])
def test_of_several_phrases_at_one_place_the_worst_stands_for_all(reverse: bool) -> None:
    """Things of one class that one caption tells apart, as in Flickr30k Entities."""
    candidates = [Candidate(0, 0, "people", gamma, {"phrase": str(gamma)}) for gamma in (0.9, 0.1, 0.5)]
    gallery, separate = ExampleGallery(1, 0, 1), ExampleGallery(1, 0, 1)
    gallery.add(candidates[::-1] if reverse else candidates, picture)
    for candidate in candidates[::-1] if reverse else candidates:
        separate.add([candidate], picture)
    for each in (gallery, separate):
        ((kept, _),) = each.kept
        assert kept.record["phrase"] == "0.1"
        assert each.choose([kept]) == {(0, 0, "people"): ("fixed", "failure")}


def test_pictures_are_asked_for_what_is_kept_only_once_each_and_dropped_with_it() -> None:
    gallery, asked = ExampleGallery(1, 0, 1), []

    def pixels(index: int) -> Pixels:
        asked.append(index)
        return picture(index)

    gallery.add([Candidate(4, 0, "cat", 0.5, {}), Candidate(4, 1, "cat", 0.4, {})], pixels)
    gallery.add([Candidate(5, 0, "cat", 0.9, {}), Candidate(6, 0, "cat", 0.95, {})], pixels)
    assert asked == [4]
    gallery.add([Candidate(7, 0, "cat", 0.1, {})], pixels)
    assert asked == [4, 7]
    gallery.add([Candidate(8, 0, "cat", 0.05, {})], pixels)
    gallery.add([], pixels)
    assert asked == [4, 7, 8]
    assert sorted(candidate.index for candidate, _ in gallery.kept) == [4, 8]


def shown(key: str = "k1", value: int = 90, gamma: float = 0.5, size: tuple[int, int] = (6, 8)) -> Shown:
    target = {"index": 3, "caption_index": 0, "label": "dog", "key": key, "caption": "a dog", "phrase": "dog"}
    target |= {"x0": 0.0, "y0": 1.0, "x1": 2.0, "y1": 3.0}
    candidate = Candidate.of(target, gamma, True, [[0.5, -1.0], [0.0, 2.0]])
    return Shown(("fixed", "class"), candidate, np.full((*size, 3), value, dtype=np.uint8))


def test_examples_are_what_was_shown_and_share_their_pictures(tmp_path: Path) -> None:
    write_gallery(tmp_path, {"m2ib": [shown(size=(4, 4))]})  # an earlier run, of another size
    write_gallery(tmp_path, {"m2ib": [shown(), shown("k2", 200, math.nan)], "other": [shown()], "none": []})
    first, second = read_examples(tmp_path / "m2ib")
    (shared,) = read_examples(tmp_path / "other")
    assert (first.why, first.label, first.gamma, first.key) == (("fixed", "class"), "dog", 0.5, "k1")
    assert first.heat == ((0.5, -1.0), (0.0, 2.0))
    assert (first.box, first.spans, first.hit) == ((0.0, 1.0, 2.0, 3.0), ((2, 5),), True)
    assert second.gamma is None
    assert shared == first
    assert read_examples(tmp_path / "none") == []
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == ["k1.jpg", "k2.jpg"]
    for record, value in ((first, 90), (second, 200)):
        with Image.open(tmp_path / record.image) as picture:
            assert picture.size == (8, 6)
            assert np.abs(np.asarray(picture).astype(int) - value).max() <= 2


def test_a_picture_stays_in_its_folder_whatever_the_key(tmp_path: Path) -> None:
    write_gallery(tmp_path / "out", {"m2ib": [shown("../../x/é")]})
    (record,) = read_examples(tmp_path / "out" / "m2ib")
    assert (tmp_path / "out" / record.image).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
