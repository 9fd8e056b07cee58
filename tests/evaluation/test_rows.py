"""Rows of a batch against plain loops: maps are given, and the model's similarity is known in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_batches import BOXES, evaluation_batch
from inputs import batch_sizes
from linear_encoder import LinearEncoder
from numpy.typing import NDArray
from torch import Tensor

from lightning_xai.attribution import Attribution, AttributionMethod, BanzhafInteractions
from lightning_xai.attribution.base import InteractionAttribution
from lightning_xai.attribution.patch_grid import PatchGrid
from lightning_xai.data.batch import Batch
from lightning_xai.data.phrases import NamedBoxes
from lightning_xai.evaluation.embeddings import Embeddings
from lightning_xai.evaluation.rows import (
    BatchMaps,
    BatchRows,
    MethodMaps,
    Wanted,
    _Measuring,
    maps_of,
    measure_batch,
)
from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics import METRICS
from lightning_xai.metrics.grounding import patch_mask
from lightning_xai.metrics.pair_insertion_deletion import greedy_order
from lightning_xai.metrics.registry import choose_metrics
from lightning_xai.results.table import TARGET_COLUMNS

SIZE, GRID = (8, 12), (2, 3)
OF_GIVEN_MAPS = tuple(name for name in METRICS if name not in ("pointing_game", "max_sensitivity", "agreement"))
Row = dict[str, Any]


class Silent(AttributionMethod):
    """A method that is never asked."""

    def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        raise AssertionError("maps are given")


class SilentSigned(Silent):
    signed = True


class Given(MethodMaps):
    """Gives maps that were drawn before: one for each phrase, true words, replacement and caption of a batch."""

    def __init__(self, batch: Batch, *, signed: bool = True, batch_size: int = 64) -> None:
        encoder = LinearEncoder(SIZE, GRID)
        super().__init__((SilentSigned if signed else Silent)(encoder), batch_size)
        generator = torch.Generator().manual_seed(5)
        assert batch.negatives is not None
        rows = {"phrases": len(batch.phrases), "true": len(batch.negatives), "replacements": len(batch.negatives)}
        self.given = {
            name: torch.randn(count, *GRID, generator=generator, dtype=torch.float64)
            for name, count in (rows | {"image": len(batch.tokens)}).items()
        }
        self.text = torch.randn(batch.tokens.shape, generator=generator, dtype=torch.float64)
        self.prefix: Tensor | None = None
        self.asked: list[Wanted] = []

    def maps(self, batch: Batch, wanted: Wanted) -> BatchMaps:
        self.asked.append(wanted)
        return BatchMaps(
            self.given["phrases"][wanted.phrases],
            self.given["true"][wanted.negatives],
            self.given["replacements"][wanted.negatives],
            self.given["image"] if wanted.captions else self.given["image"][:0],
            self.text if wanted.captions else self.text[:0],
            Attribution(self.given["image"], self.text, self.text[:, 0], prefix=self.prefix)
            if wanted.captions
            else None,
        )


@pytest.fixture(scope="module")
def batch() -> Batch:
    return evaluation_batch(SIZE, LinearEncoder(SIZE, GRID).tokenizer)


def measured(
    batch: Batch,
    maps: Given,
    metrics: Sequence[str] = OF_GIVEN_MAPS,
    options: dict[str, dict[str, Any]] | None = None,
) -> BatchRows:
    chosen = choose_metrics(metrics, options or {})
    embeddings = Embeddings.of(maps.method.encoder, batch)
    return measure_batch(batch, maps, list(chosen.values()), embeddings)


def table(batch: Batch, maps: Given, name: str, **options: Any) -> list[Row]:
    """The targets of one metric with its values in columns, and the reason where one is missing."""
    rows = measured(batch, maps, [name], {name: options} if options else {})
    targets = {target["target"]: dict(target) for target in rows.targets}
    assert len(targets) == len(rows.targets)
    for target, metric, value, excluded in rows.values:
        assert math.isnan(value) == bool(excluded)
        targets[target] |= {metric: value, "excluded": excluded}
    return list(targets.values())


def bilinear(heat: Tensor) -> NDArray[np.float64]:
    """A map [H, W] between its patches' centres, and constant beyond them, pixel by pixel."""
    pixels = np.zeros(SIZE)
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            y, x = ((at + 0.5) * few / many - 0.5 for at, few, many in zip((row, column), GRID, SIZE, strict=True))
            y, x = min(max(y, 0.0), GRID[0] - 1), min(max(x, 0.0), GRID[1] - 1)
            top, left = int(y), int(x)
            for i, share_y in ((top, 1 - (y - top)), (min(top + 1, GRID[0] - 1), y - top)):
                for j, share_x in ((left, 1 - (x - left)), (min(left + 1, GRID[1] - 1), x - left)):
                    pixels[row, column] += share_y * share_x * float(heat[i, j])
    return pixels


def in_box(heat: Tensor, box: Sequence[float]) -> float:
    """The sum of a map over the patches of a box."""
    mask = patch_mask(torch.tensor([box]), GRID, SIZE)[0]
    return math.fsum(float(heat[y, x]) for y in range(GRID[0]) for x in range(GRID[1]) if mask[y, x])


def test_every_target_is_described_once_and_numbered_within_its_sample_and_kind(batch: Batch) -> None:
    rows = measured(batch, Given(batch))
    described = {target["target"]: target for target in rows.targets}
    assert len(described) == len(rows.targets)
    assert {name for name, *_ in rows.values} == described.keys()
    for name, target in described.items():
        assert target.keys() >= set(TARGET_COLUMNS)
        assert name == f"{target['kind']}-{target['index']}-{target['ordinal']}"
        assert target["key"] == f"k{target['index'] - 10}"
        place = batch.captions.index(target["caption"])
        assert int(batch.caption_index[place]) == target["caption_index"]
        assert batch.keys[int(batch.caption_image[place])] == target["key"]
    for kind in ("phrase", "phrase_pair", "negative", "caption"):
        for index in (10, 12):
            ordinals = [t["ordinal"] for t in rows.targets if (t["kind"], t["index"]) == (kind, index)]
            assert ordinals == list(range(len(ordinals)))
            assert ordinals
    assert [target["kind"] for target in rows.targets if target["index"] == 11] == ["caption"]


@pytest.mark.parametrize("name", OF_GIVEN_MAPS)
def test_targets_have_the_same_names_whatever_else_is_measured(batch: Batch, name: str) -> None:
    everything = {row[:2]: row for row in measured(batch, Given(batch)).values}
    alone = measured(batch, Given(batch), [name]).values
    assert alone
    assert [repr(everything[row[:2]]) for row in alone] == [repr(row) for row in alone]


@pytest.mark.parametrize(
    ("metrics", "phrases", "negatives", "captions"),
    [
        ({"grounding"}, True, False, False),
        ({"other_objects"}, True, False, False),
        ({"hard_negatives"}, False, True, False),
        ({"localization"}, False, False, True),
        ({"grounding", "localization"}, True, False, True),
        (set(OF_GIVEN_MAPS), True, True, True),
    ],
)
def test_a_method_is_asked_once_and_for_no_more_than_is_needed(
    batch: Batch, metrics: set[str], phrases: bool, negatives: bool, captions: bool
) -> None:
    maker = Given(batch)
    measured(batch, maker, sorted(metrics))
    (asked,) = maker.asked
    can = (batch.phrases.reason == Exclusion.MEASURED).nonzero()[:, 0].tolist()
    assert batch.negatives is not None
    assert asked.phrases.tolist() == (can if phrases else [])
    assert asked.negatives.tolist() == (list(range(len(batch.negatives))) if negatives else [])
    assert asked.captions is captions
    assert len(can) == 6


def test_boxes_of_a_patch_or_less_are_not_asked_for(batch: Batch) -> None:
    assert batch.negatives is not None
    small = torch.tensor([0.0, 0.0, 4.0, 4.0])
    phrases = replace(batch.phrases, boxes=batch.phrases.boxes.clone())
    negatives = replace(batch.negatives, boxes=batch.negatives.boxes.clone())
    phrases.boxes[0], negatives.boxes[1] = small, small
    maker, changed = Given(batch), replace(batch, phrases=phrases, negatives=negatives)
    for name, count in (("grounding", 1), ("other_objects", 2), ("hard_negatives", 1)):
        rows, before = table(changed, maker, name), table(batch, Given(batch), name)
        assert [row["target"] for row in rows] == [row["target"] for row in before]
        assert [row["excluded"] for row in rows].count("smaller_than_patch") == count
    assert 0 not in maker.asked[0].phrases.tolist()
    assert 1 not in maker.asked[2].negatives.tolist()
    # The others have the values that they had.
    whole, part = table(batch, Given(batch), "other_objects"), table(changed, Given(batch), "other_objects")
    assert [row for row in part if not row["excluded"]] == [
        full for full, row in zip(whole, part, strict=True) if not row["excluded"]
    ]


def test_grounding_has_the_share_inside_the_box_and_the_map(batch: Batch) -> None:
    maker = Given(batch)
    maker.given["phrases"][3] = -1.0  # nothing positive
    rows = table(batch, maker, "grounding")
    assert len(rows) == len(batch.phrases) == 6
    for number, row in enumerate(rows):
        heat = maker.given["phrases"][number]
        assert [row[side] for side in ("x0", "y0", "x1", "y1")] == batch.phrases.boxes[number].tolist()
        if number == 3:
            assert row["excluded"] == "no_positive"
            assert math.isnan(row["gamma"])
            assert math.isnan(row["rho"])
            continue
        share = in_box(heat.clamp(min=0), batch.phrases.boxes[number].tolist()) / float(heat.clamp(min=0).sum())
        assert row["gamma"] == pytest.approx(share, abs=1e-12)
        assert row["rho"] == (in_box((heat == heat.max()).double(), batch.phrases.boxes[number].tolist()) == 1)
        assert (row["phrase"], row["label"]) == (batch.phrases.text[number], row["phrase"].split(", ")[0])
    assert {row["rho"] for row in rows if not row["excluded"]} == {0.0, 1.0}


def test_other_objects_are_the_boxes_of_other_classes_in_the_same_caption(batch: Batch) -> None:
    maker = Given(batch)
    rows = table(batch, maker, "other_objects")
    found = {(row["caption"], row["label"], row["other_label"]): row for row in rows}
    expected = [("a dog bites a cat", "cat", "dog"), ("a dog bites a cat", "dog", "cat")]
    long = "one horse near a cat and the horse"
    expected += [(long, "cat", "horse"), (long, "horse", "cat")]
    assert sorted(found) == sorted(expected)
    phrases = batch.phrases
    for (caption, label, other), row in found.items():
        places = {
            batch.label_names[int(phrases.label[number])]: number
            for number in range(len(phrases))
            if batch.captions[int(phrases.caption_row[number])] == caption
        }
        heat = maker.given["phrases"][places[label]]
        assert row["own"] == pytest.approx(in_box(heat, phrases.boxes[places[label]].tolist()), abs=1e-12)
        assert row["other"] == pytest.approx(in_box(heat, phrases.boxes[places[other]].tolist()), abs=1e-12)
        assert row["phrase"] == phrases.text[places[label]]


def test_hard_negatives_are_measured_in_the_true_objects_box(batch: Batch) -> None:
    maker, negatives = Given(batch), batch.negatives
    assert negatives is not None
    rows = table(batch, maker, "hard_negatives")
    assert len(rows) == len(negatives) > 3
    for number, row in enumerate(rows):
        box = negatives.boxes[number].tolist()
        positive, negative = (in_box(maker.given[name][number], box) for name in ("true", "replacements"))
        assert row["positive"] == pytest.approx(positive, abs=1e-12)
        assert row["negative"] == pytest.approx(negative, abs=1e-12)
        assert row["delta"] == pytest.approx(negative - positive, abs=1e-12)
        assert row["negative_caption"] == negatives.captions[number]
        assert row["replacement"] in row["negative_caption"]
        assert row["phrase"] in row["caption"]
        assert row["label"] == row["phrase"]
    assert table(replace(batch, negatives=None), maker, "hard_negatives") == []


@pytest.mark.parametrize("quantile", [0.5, 0.75])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_localization_agrees_with_loops_over_pixels(batch: Batch, quantile: float, batch_size: int) -> None:
    maker = Given(batch, batch_size=batch_size)
    rows = table(batch, maker, "localization", quantile=quantile)
    height, width = SIZE
    for number, row in enumerate(rows):
        image, caption = int(batch.caption_image[number]) - 1, batch.captions[number]
        boxes = [box for label, box in BOXES[image].items() if label in caption]
        assert row["boxes"] == len(boxes)
        if not boxes:
            assert row["excluded"] == "no_box"
            continue
        heat = bilinear(maker.given["image"][number])
        ours = heat > np.quantile(heat, quantile, method="inverted_cdf")
        truth = np.zeros(SIZE, dtype=bool)
        for x, y, across, down in boxes:
            truth[y * height // 2 : (y + down) * height // 2, x * width // 4 : (x + across) * width // 4] = True
        assert row["iou"] == pytest.approx((ours & truth).sum() / (ours | truth).sum(), abs=1e-12)
    assert [row["boxes"] for row in rows] == [2, 1, 0, 1, 2]


def test_a_constant_map_and_a_box_that_holds_no_pixel_have_no_ratio(batch: Batch) -> None:
    named = NamedBoxes(torch.tensor([0, 1]), torch.tensor([[0.6, 0.6, 1.4, 1.4], [0.0, 0.0, 4.0, 4.0]]))
    maker, changed = Given(batch), replace(batch, named=named)
    maker.given["image"][:2] = 1.0
    rows = table(changed, maker, "localization")
    assert [(row["boxes"], row["excluded"]) for row in rows[:3]] == [(1, "no_box"), (1, ""), (0, "no_box")]
    assert rows[1]["iou"] == 0


def kept_image(image: Tensor, heat: NDArray[np.float64], hidden: float, signed: bool, share: float | None) -> Tensor:
    """An image of which only the important part is seen, pixel by pixel."""
    if share is not None:
        best = sorted(range(heat.size), key=lambda place: -heat.flat[place])[: int(share * heat.size)]
        shown = np.isin(np.arange(heat.size), best).reshape(SIZE).astype(float)
    else:
        positive = np.maximum(heat, 0) if signed else heat
        shown = (positive - positive.min()) / (positive.max() - positive.min())
    return hidden + torch.from_numpy(shown) * (image - hidden)


@pytest.mark.parametrize(
    ("batch_size", "hidden", "signed", "share"),
    [(2, "zeros", True, None), (64, "black", False, None), (2, "black", True, 0.25), (64, "zeros", False, 0.25)],
)
def test_confidence_is_the_similarity_of_what_is_kept(
    batch: Batch, batch_size: int, hidden: str, signed: bool, share: float | None
) -> None:
    maker = Given(batch, signed=signed, batch_size=batch_size)
    encoder = maker.method.encoder
    assert isinstance(encoder, LinearEncoder)
    rows = table(batch, maker, "confidence", hidden_image=hidden, keep_pixels=share)
    assert len(rows) == 5
    for number, row in enumerate(rows):
        image = batch.images[int(batch.caption_image[number])]
        heat = bilinear(maker.given["image"][number])
        seen = kept_image(image, heat, -1.0 if hidden == "black" else 0.0, signed, share)
        whole, part = (float(encoder.image_terms(pixels[None]).sum()) for pixels in (image, seen))
        terms, scores = encoder.text_terms(batch.tokens[[number]])[0], maker.text[number]
        own = encoder.tokenizer.content_mask(batch.tokens[[number]])[0].nonzero()[:, 0].tolist()
        best = sorted(own, key=lambda place: -float(scores[place]))[: math.ceil(len(own) / 2)]
        assert row["similarity"] == pytest.approx(whole * float(terms.sum()), abs=1e-12)
        assert row["image_kept"] == pytest.approx(part * float(terms.sum()), abs=1e-12)
        assert row["text_kept"] == pytest.approx(whole * float(terms[best].sum()), abs=1e-12)
        for modality in ("image", "text"):
            change = row[f"{modality}_kept"] - row["similarity"]
            assert row[f"{modality}_drop"] == max(0.0, -change)
            assert row[f"{modality}_increase"] == (change > 0)
        assert abs(row["image_kept"] - row["similarity"]) > 1e-9
        assert len(own) == 1 or abs(row["text_kept"] - row["similarity"]) > 1e-9


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_as_many_tokens_are_kept_as_asked_for_rounded_up(batch: Batch, share: float) -> None:
    maker = Given(batch)
    encoder = maker.method.encoder
    assert isinstance(encoder, LinearEncoder)
    for number, row in enumerate(table(batch, maker, "confidence", keep_tokens=share)):
        own = encoder.tokenizer.content_mask(batch.tokens[[number]])[0].nonzero()[:, 0].tolist()
        best = sorted(own, key=lambda place: -float(maker.text[number, place]))[: math.ceil(share * len(own))]
        whole = float(encoder.image_terms(batch.images[[int(batch.caption_image[number])]]).sum())
        terms = encoder.text_terms(batch.tokens[[number]])[0]
        assert row["text_kept"] == pytest.approx(whole * float(terms[best].sum()), abs=1e-12)


def test_marks_and_kept_tokens_stay_where_they_are_and_padding_takes_the_others_place(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker, given = Given(batch), []
    encoder = maker.method.encoder
    assert isinstance(encoder, LinearEncoder)
    plain = encoder.encode_text

    def recorded(tokens: Tensor) -> Tensor:
        given.append(tokens)
        return plain(tokens)

    monkeypatch.setattr(encoder, "encode_text", recorded)
    table(batch, maker, "confidence")
    whole, kept = given
    assert torch.equal(whole, batch.tokens)
    own = encoder.tokenizer.content_mask(whole)
    assert torch.equal(kept[~own], whole[~own])
    assert ((kept == whole) | (kept == encoder.tokenizer.padding_id)).all()
    assert (kept != whole).sum(dim=1).tolist() == [count // 2 for count in own.sum(dim=1).tolist()]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("grounding", "phrases"),
        ("other_objects", "phrases"),
        ("hard_negatives", "true"),
        ("hard_negatives", "replacements"),
        ("localization", "image"),
        ("confidence", "text"),
    ],
)
def test_maps_that_are_not_finite_are_refused(batch: Batch, name: str, part: str) -> None:
    maker = Given(batch)
    (maker.text if part == "text" else maker.given[part])[1] = math.nan
    with pytest.raises(ValueError, match="finite"):
        table(batch, maker, name)


def test_a_batch_of_broken_records_alone_has_no_records(batch: Batch) -> None:
    broken = replace(batch, index=torch.full_like(batch.index, -1), valid=torch.zeros_like(batch.valid))
    none = torch.zeros(0, dtype=torch.int64)
    assert batch.negatives is not None
    empty = replace(
        broken,
        tokens=batch.tokens[:0],
        caption_image=none,
        caption_index=none,
        captions=[],
        phrases=type(batch.phrases).empty(16),
        named=NamedBoxes(none, torch.zeros(0, 4)),
        negatives=None,
    )
    rows = measured(empty, Given(replace(empty, negatives=batch.negatives)))
    assert (rows.targets, rows.values, rows.phrases) == ([], [], [])


# --- coalitions ---


def test_coalitions_are_embedded_once_for_all_methods_and_compared_with_sums_of_present_terms(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = LinearEncoder(SIZE, GRID)
    images, texts = batch_sizes(encoder, "encode_image", monkeypatch), batch_sizes(encoder, "encode_text", monkeypatch)
    embeddings = Embeddings.of(encoder, batch)
    few = {"image_coalitions": 12, "text_coalitions": 8}
    chosen = list(choose_metrics(["faithfulness", "infidelity"], {"faithfulness": few, "infidelity": few}).values())
    exact = maps_of(BanzhafInteractions(encoder, image_samples=20, text_samples=40), 4)
    exact.maps(batch, Wanted(torch.tensor([0]), torch.tensor([], dtype=torch.int64), captions=True))
    images.clear()
    texts.clear()
    rows = [measure_batch(batch, maps, chosen, embeddings) for maps in (Given(batch), Given(batch))]
    assert (sum(images), max(images)) == (len(batch.images) * 13, 13)
    assert (sum(texts), max(texts)) == (len(batch.tokens) * 9, 9)
    assert rows[0].values == rows[1].values

    # The similarity is bilinear here, so that exact interactions say all of it, and maps of either side cannot.
    found = {(name, metric): value for name, metric, value, _ in measure_batch(batch, exact, chosen, embeddings).values}
    for (name, metric), value in found.items():
        if "infidelity" in metric:
            assert value == pytest.approx(0, abs=1e-9) or (metric == "text_infidelity_scaled" and math.isnan(value))
            continue
        # Coalitions of equal worth are ranked by their rounding.
        assert value == pytest.approx(1, abs=1e-9 if metric == "r2" else 0.5), (name, metric)
    assert all(value < 0.99 for _, metric, value, _ in rows[0].values if metric == "r2")


def test_first_order_maps_say_of_a_coalition_the_sum_over_its_patches_and_words(batch: Batch) -> None:
    maps = Given(batch)
    embeddings = Embeddings.of(maps.method.encoder, batch)
    measuring = _Measuring(batch, maps, {"caption"}, embeddings)
    found = measuring._coalitions(embeddings, 12, 8, 0.5, 0)
    of_images, of_texts = embeddings._coalitions.values()
    for caption in range(len(batch.tokens)):
        for pair in range(48):
            image, text = pair // 4, pair % 8
            shown, said = of_images.present[0, 1 + image], of_texts.present[caption, 1 + text]
            expected = maps.given["image"][caption][shown].sum() + maps.text[caption][said].sum()
            assert float(found.explained[caption, pair]) == pytest.approx(float(expected))
            one = of_images.embeddings[batch.caption_image[caption], 1 + image]
            value = one @ of_texts.embeddings[caption, 1 + text]
            assert float(found.similarity[caption, pair]) == pytest.approx(float(value))
    content = maps.method.encoder.tokenizer.content_mask(batch.tokens)
    assert not (of_texts.present[:, 0] & content).any()
    assert (of_texts.present | content[:, None]).all(), "marks of start and end always stay"


def test_parts_come_and_go_in_the_order_of_the_maps(batch: Batch) -> None:
    maps = Given(batch)
    encoder = maps.method.encoder
    content = encoder.tokenizer.content_mask(batch.tokens)
    rows = table(batch, maps, "insertion_deletion", steps=3)
    for caption, row in enumerate(rows):
        image, tokens = batch.images[batch.caption_image[caption]], batch.tokens[caption]
        patches = sorted(range(6), key=lambda patch: -float(maps.given["image"][caption].flatten()[patch]))
        words = sorted(content[caption].nonzero()[:, 0].tolist(), key=lambda word: -float(maps.text[caption, word]))
        curves: dict[str, list[float]] = {}
        for step in range(4):
            first, then = patches[: step * 2], patches[step * 2 :]
            count = round(step * len(words) / 3)
            for name, shown, said in (
                ("insertion", first, words[:count]),
                ("deletion", then, words[count:]),
                ("image_insertion", first, words),
                ("image_deletion", then, words),
                ("text_insertion", patches, words[:count]),
                ("text_deletion", patches, words[count:]),
            ):
                part, text = torch.zeros_like(image), torch.where(content[caption], 0, tokens)
                for patch in shown:
                    across, down = slice(patch % 3 * 4, patch % 3 * 4 + 4), slice(patch // 3 * 4, patch // 3 * 4 + 4)
                    part[:, down, across] = image[:, down, across]
                text[said] = tokens[said]
                pair = encoder.encode_image(part[None]), encoder.encode_text(text[None])
                curves.setdefault(name, []).append(float(torch.cosine_similarity(*pair)))
        for name, curve in curves.items():
            expected = sum((one + other) / 2 for one, other in itertools.pairwise(curve)) / 3
            assert row[name] == pytest.approx(expected, rel=1e-6, abs=1e-12), (caption, name)


def test_pairs_come_and_go_in_their_greedy_order(batch: Batch) -> None:
    encoder = LinearEncoder(SIZE, GRID)
    exact = maps_of(BanzhafInteractions(encoder, image_samples=64, text_samples=128), 64)
    embeddings = Embeddings.of(encoder, batch)
    chosen = choose_metrics(["pair_insertion_deletion"], {"pair_insertion_deletion": {"steps": 2}})
    rows = measure_batch(batch, exact, list(chosen.values()), embeddings)
    found = {(name, metric): value for name, metric, value, _ in rows.values}
    interactions = exact.method.attribute(batch.images[batch.caption_image], batch.tokens)
    assert isinstance(interactions, InteractionAttribution)
    content = encoder.tokenizer.content_mask(batch.tokens)
    for target, caption in ((row["target"], number) for number, row in enumerate(rows.targets)):
        own, image = content[[caption]], batch.images[batch.caption_image[caption]]
        pairs = interactions.interactions[[caption]].flatten(2), interactions.prefix[[caption]]
        for metric in chosen["pair_insertion_deletion"].spec.values:
            insertion, most = "insertion" in metric, "least" not in metric
            place = greedy_order(*pairs, own, insertion=insertion, most=most)[0]
            first = place < round((6 + int(own.sum())) / 2)
            half = first if insertion else ~first
            curve = []
            for shown, said in (
                (half[:6] & False, ~own[0]),
                (half[:6], half[6:] | ~own[0]),
                (half[:6] | True, own[0] | True),
            ):
                part = PatchGrid(GRID).spread(shown.reshape(GRID), SIZE) * image
                text = torch.where(said, batch.tokens[caption], encoder.tokenizer.padding_id)
                pair = encoder.encode_image(part[None]), encoder.encode_text(text[None])
                curve.append(float(torch.cosine_similarity(*pair).detach()))
            expected = (curve[0] + 2 * curve[1] + curve[2]) / 4
            assert found[target, metric] == pytest.approx(expected, rel=1e-6, abs=1e-12), (caption, metric)
    assert all(row["excluded"] for row in table(batch, Given(batch), "pair_insertion_deletion"))


def test_what_sits_on_cls_is_compared_with_all_that_is_attributed(batch: Batch) -> None:
    maps = Given(batch)
    assert all(row["excluded"] for row in table(batch, maps, "prefix_share")), "a method without interactions"
    prefix = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps.prefix = prefix
    for caption, row in enumerate(table(batch, maps, "prefix_share")):
        expected = float(prefix[caption].sum())
        assert row["prefix"] == pytest.approx(expected)
        assert row["prefix_share"] == pytest.approx(expected / (expected + float(maps.given["image"][caption].sum())))
