from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor
from torch.nn.functional import normalize

from lightning_xai.loss import contrastive_loss
from lightning_xai.metrics.retrieval import RetrievalMetric, recall_at_k

SCALE = torch.tensor(20.0)


def split(images: int = 23, captions: int = 5, width: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """A whole split in order: the image's own captions are near it, but not nearest always."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, width, generator=generator)
    text = image.repeat_interleave(captions, dim=0) + 1.2 * torch.randn(images * captions, width, generator=generator)
    return {
        "image_features": normalize(image, dim=1),
        "text_features": normalize(text, dim=1),
        "index": torch.arange(images),
        "caption_image": torch.arange(images).repeat_interleave(captions),
        "caption_index": torch.arange(captions).repeat(images),
    }


def batch_of(data: dict[str, Tensor], rows: list[int], junk: float = math.nan) -> dict[str, Tensor]:
    """The batch that holds these images with all their captions, in this order; -1 is a row of padding."""
    images, texts, caption_image, caption_index = [], [], [], []
    for position, row in enumerate(rows):
        images.append(data["image_features"][row] if row >= 0 else torch.full_like(data["image_features"][0], junk))
        for caption in (data["caption_image"] == row).nonzero()[:, 0].flip(0).tolist() if row >= 0 else [0]:
            texts.append(
                data["text_features"][caption] if row >= 0 else torch.full_like(data["text_features"][0], junk)
            )
            caption_image.append(position)
            caption_index.append(int(data["caption_index"][caption]))
    width = data["image_features"].shape[1]
    return {
        "image_features": torch.stack(images) if images else torch.zeros(0, width),
        "text_features": torch.stack(texts) if texts else torch.zeros(0, width),
        "index": torch.tensor(rows, dtype=torch.int64),
        "caption_image": torch.tensor(caption_image, dtype=torch.int64),
        "caption_index": torch.tensor(caption_index, dtype=torch.int64),
    }


def naive_recall(images: Tensor, texts: Tensor, caption_image: list[int], k: int) -> tuple[float, float]:
    """Sort every row of the full matrix; equal similarities stand before the own one."""
    similarity = (images.double() @ texts.double().T).tolist()
    image_hits = text_hits = 0
    for image, row in enumerate(similarity):
        order = sorted(range(len(row)), key=lambda c: (-row[c], caption_image[c] == image))
        image_hits += any(caption_image[c] == image for c in order[:k])
    for caption, own in enumerate(caption_image):
        column = [row[caption] for row in similarity]
        order = sorted(range(len(column)), key=lambda i: (-column[i], i == own))
        text_hits += own in order[:k]
    return image_hits / len(images), text_hits / len(texts)


def result_of(batches: list[dict[str, Tensor]], **settings: Any) -> dict[str, float]:
    metric = RetrievalMetric(group_size=8, **settings)
    for batch in batches:
        metric.update(**batch, logit_scale=SCALE)
    return metric.compute()


def results_of_own_share(shares: list[list[list[dict[str, Tensor]]]]) -> list[dict[str, float]]:
    """For each scenario, the batches of each rank -> what this rank computes."""
    return [result_of(scenario[dist.get_rank()]) for scenario in shares]


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("captions", [1, 5])
def test_recall_agrees_with_sorting_the_full_matrix(chunk: int, captions: int) -> None:
    data = split(captions=captions)
    features = (data["image_features"], data["text_features"])
    ks = (1, 2, 5, 10, 200)
    recall = recall_at_k(*features, data["caption_image"], ks, chunk)
    for k in ks:
        expected = naive_recall(*features, data["caption_image"].tolist(), k)
        assert (recall[f"image_to_text_recall_at_{k}"], recall[f"text_to_image_recall_at_{k}"]) == expected
    assert 0 < recall["text_to_image_recall_at_1"] < recall["text_to_image_recall_at_5"] < 1
    assert recall["image_to_text_recall_at_200"] == recall["text_to_image_recall_at_200"] == 1


def test_recall_agrees_with_the_full_matrix_for_shuffled_and_uneven_captions() -> None:
    data = split()
    # At least the first caption of every image, some more of some images, in no order.
    order = torch.cat([torch.arange(0, 115, 5), torch.tensor([3, 1, 2, 58, 57]), torch.tensor([112, 111])])
    order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(1))]
    texts, own = data["text_features"][order], data["caption_image"][order]
    recall = recall_at_k(data["image_features"], texts, own, (1, 3))
    for k in (1, 3):
        expected = naive_recall(data["image_features"], texts, own.tolist(), k)
        assert (recall[f"image_to_text_recall_at_{k}"], recall[f"text_to_image_recall_at_{k}"]) == expected


def test_captions_of_one_image_do_not_push_each_other_out() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Five captions of the first image: four are as near to it as can be, one is nearer to the other image.
    texts = torch.tensor([[1.0, 0.0]] * 4 + [[0.28, 0.96]] + [[0.6, 0.8]])
    recall = recall_at_k(images, texts, torch.tensor([0, 0, 0, 0, 0, 1]), (1, 2))
    # Second image: the most similar caption (0.96) is a foreign one, its own (0.8) comes second.
    assert recall["image_to_text_recall_at_1"] == 0.5
    assert recall["image_to_text_recall_at_2"] == 1
    assert recall["text_to_image_recall_at_1"] == 5 / 6
    assert recall["text_to_image_recall_at_2"] == 1


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_collapsed_or_diverged_model_finds_nothing(value: float) -> None:
    features = torch.full((12, 1), value)
    recall = recall_at_k(features, features, torch.arange(12), (1, 10))
    assert set(recall.values()) == {0.0}


def test_images_without_a_caption_are_candidates_but_no_queries() -> None:
    images = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    texts = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    recall = recall_at_k(images, texts, torch.tensor([0, 2]), (1, 2))
    assert recall["text_to_image_recall_at_1"] == 0.5
    assert recall["image_to_text_recall_at_1"] == 1


@pytest.mark.parametrize("images", [0, 2])
def test_no_caption_gives_nan_under_the_same_keys(images: int) -> None:
    recall = recall_at_k(torch.zeros(images, 3), torch.zeros(0, 3), torch.zeros(0).long(), (1,))
    assert set(recall) == {"image_to_text_recall_at_1", "text_to_image_recall_at_1"}
    assert all(math.isnan(value) for value in recall.values())


@pytest.mark.parametrize(
    ("texts", "own", "ks", "chunk", "message"),
    [
        (torch.ones(2, 4), torch.tensor([0, 1]), (1,), 8, r"\(2, 4\)"),
        (torch.ones(2, 3), torch.tensor([0]), (1,), 8, r"caption_image \[2\]"),
        (torch.ones(2, 3), torch.tensor([0, 2]), (1,), 8, "2 images.*0 to 2"),
        (torch.ones(2, 3), torch.tensor([0, -1]), (1,), 8, "-1 to 0"),
        (torch.ones(2, 3), torch.tensor([0, 1]), (0,), 8, "1 or more"),
        (torch.ones(2, 3), torch.tensor([0, 1]), (), 8, "at least one"),
        (torch.ones(2, 3), torch.tensor([0, 1]), (1,), 0, "chunk=0"),
    ],
)
def test_input_that_does_not_fit_is_refused(texts: Tensor, own: Tensor, ks: Any, chunk: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recall_at_k(torch.ones(2, 3), texts, own, ks, chunk)


def test_the_metric_groups_consecutive_images_with_their_first_caption() -> None:
    data = split()
    result = result_of([batch_of(data, list(range(23)))])
    first = data["text_features"][::5]
    total = right = 0.0
    for start, stop in ((0, 8), (8, 16), (16, 23)):
        loss, accuracy = contrastive_loss(data["image_features"][start:stop], first[start:stop], SCALE)
        total += loss.item() * (stop - start)
        right += accuracy.item() * (stop - start)
    assert result["contrastive_loss"] == pytest.approx(total / 23, abs=1e-7)
    assert result["accuracy"] == pytest.approx(right / 23, abs=1e-7)
    assert 0 < result["accuracy"] < 1
    recall = recall_at_k(data["image_features"], data["text_features"], data["caption_image"])
    assert {name: result[name] for name in recall} == recall
    assert set(result) == {*recall, "contrastive_loss", "accuracy"}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_order_batches_padding_and_duplicates_do_not_matter(mode: Any) -> None:
    data = split()
    expected = result_of([batch_of(data, list(range(23)))])
    with mode():
        batches = [[7, -1, 3, 22], [-1], [0, 1, 2, -1, *range(8, 22)], [], [6, 5, 4, 3, 22]]
        assert result_of([batch_of(data, rows) for rows in batches]) == expected
        assert result_of([batch_of(data, rows, junk=1.0) for rows in batches]) == expected


def test_padding_captions_may_point_to_no_image() -> None:
    data = split(images=4)
    padded = batch_of(data, [0, 1, 2, 3])
    padded["text_features"] = torch.cat([torch.ones(3, 6), padded["text_features"]])
    padded["caption_image"] = torch.cat([torch.tensor([-1, -1, -1]), padded["caption_image"]])
    padded["caption_index"] = torch.cat([torch.tensor([0, 0, 0]), padded["caption_index"]])
    assert result_of([padded]) == result_of([batch_of(data, [0, 1, 2, 3])])


def test_two_processes_give_the_result_of_one() -> None:
    data = split()
    even = [[batch_of(data, list(range(0, 23, 2)))], [batch_of(data, [*range(1, 23, 2), -1])]]
    uneven = [[batch_of(data, list(range(20))), batch_of(data, [22])], [batch_of(data, [21, 20, 19])]]
    no_valid_row = [[batch_of(data, list(range(23)))], [batch_of(data, [-1, -1])]]
    no_row = [[batch_of(data, [])], [batch_of(data, list(range(23)))]]
    nothing = [[batch_of(data, [-1])], [batch_of(data, [])]]
    ranks = run_distributed(results_of_own_share, [even, uneven, no_valid_row, no_row, nothing])
    expected = result_of([batch_of(data, list(range(23)))])
    for results in ranks:
        assert results[:4] == [expected] * 4
        assert all(math.isnan(value) for value in results[4].values())
        assert set(results[4]) == set(expected)


def test_a_metric_without_a_row_gives_nan() -> None:
    for result in (result_of([batch_of(split(), [-1])]), result_of([batch_of(split(), [])])):
        assert all(math.isnan(value) for value in result.values())
    with pytest.warns(UserWarning, match="before the ``update``"):
        result = result_of([])
    assert all(math.isnan(value) for value in result.values())
    assert set(result) == set(result_of([batch_of(split(), [0])]))


def test_a_reset_forgets_everything_and_a_pickle_nothing() -> None:
    data = split()
    metric = RetrievalMetric(group_size=8)
    metric.update(**batch_of(data, [0, 1, 2]), logit_scale=SCALE)
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute() == metric.compute()
    metric.reset()
    metric.update(**batch_of(data, list(range(23))), logit_scale=SCALE)
    assert metric.compute() == result_of([batch_of(data, list(range(23)))])


def test_features_in_half_precision_are_kept_in_single() -> None:
    data = split()
    batch = batch_of(data, list(range(23)))
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    single = {name: value.float() if value.is_floating_point() else value for name, value in half.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert result_of([half]) == result_of([single])
    metric = RetrievalMetric(group_size=8)
    torch.nn.ModuleList([metric]).to(torch.bfloat16)
    metric.set_dtype(torch.bfloat16)
    metric.update(**batch, logit_scale=SCALE + 0.07)
    exact = RetrievalMetric(group_size=8)
    exact.update(**batch, logit_scale=SCALE + 0.07)
    assert metric.compute() == exact.compute()
    metric.update(**half, logit_scale=SCALE)
    assert metric.image_features[1].dtype == metric.text_features[1].dtype == torch.float32


def test_batches_and_settings_that_do_not_fit_are_refused() -> None:
    batch = batch_of(split(), [0, 1])
    with pytest.raises(ValueError, match=r"\[B, K\], \[C, K\], \[B\], \[C\], \[C\]"):
        RetrievalMetric().update(**{**batch, "index": torch.tensor([0])}, logit_scale=SCALE)
    for settings in ({"group_size": 0}, {"chunk": 0}, {"ks": (0,)}, {"ks": ()}):
        with pytest.raises(ValueError, match="1 or more"):
            RetrievalMetric(**settings)
