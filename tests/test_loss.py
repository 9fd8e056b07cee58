from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from linear_towers import LinearTowers, eight_pairs
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from lightning_xai.loss import contrastive_loss, gather_features, global_contrastive_loss


def unit_features(rows: int, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    text = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return normalize(image, dim=1), normalize(text, dim=1)


def steps_on_own_share(masks: list[Tensor]) -> list[dict[str, Tensor]]:
    """One forward and backward pass under DDP for each mask; each rank sees its share of the batch only."""
    return [step_on_own_share(valid) for valid in masks]


def step_on_own_share(valid: Tensor) -> dict[str, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    images, texts = (tensor.chunk(world)[rank] for tensor in eight_pairs())
    model = DistributedDataParallel(LinearTowers())
    image, text, scale, _ = model(images, texts)
    loss, accuracy = global_contrastive_loss(image, text, scale, valid.chunk(world)[rank])
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "accuracy": accuracy, **gradients}


def gathered_with_own_gradients() -> dict[str, Tensor]:
    """Gather rows that tell the rank; each rank weights what it got differently, so the sum over ranks shows."""
    rank = dist.get_rank()
    image = torch.full((2, 3), float(rank), requires_grad=True)
    text = torch.full((2, 3), 10.0 + rank, requires_grad=True)
    images, texts, valid = gather_features(image, text, torch.tensor([True, rank == 0]))
    weights = torch.arange(len(images), dtype=torch.float32)[:, None] + 100 * rank
    torch.autograd.backward((weights * images - 2 * weights * texts).sum())
    assert image.grad is not None
    assert text.grad is not None
    return {
        "images": images.detach(),
        "texts": texts.detach(),
        "valid": valid,
        "image": image.grad,
        "text": text.grad,
    }


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_the_loss_and_its_gradient_are_those_of_open_clip(rows: int) -> None:
    from open_clip.loss import ClipLoss  # here, so that the processes started below do not import it

    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    features = [tensor.requires_grad_() for tensor in unit_features(rows)]
    loss, _ = contrastive_loss(features[0], features[1], scale)
    expected = ClipLoss()(features[0], features[1], scale)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, [*features, scale]), torch.autograd.grad(expected, [*features, scale])
    )


def test_the_loss_of_two_pairs_is_the_one_computed_by_hand() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # Logits at scale 5: [[5, 3], [0, 4]].
    rows = math.log1p(math.exp(-2)) + math.log1p(math.exp(-4))
    columns = math.log1p(math.exp(-5)) + math.log1p(math.exp(-1))
    loss, accuracy = contrastive_loss(image, text, torch.tensor(5.0))
    assert loss.item() == pytest.approx((rows + columns) / 4, abs=1e-6)
    assert accuracy.item() == 1


def test_accuracy_averages_both_directions() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    # Similarities [[1, .8], [0, .6]]: both images find their caption, the second caption prefers the first image.
    _, accuracy = contrastive_loss(image, text, torch.tensor(5.0))
    assert accuracy.item() == 0.75


def test_a_collapsed_model_has_no_accuracy_by_luck() -> None:
    same = torch.ones(4, 2) / math.sqrt(2)
    loss, accuracy = contrastive_loss(same, same, torch.tensor(3.0))
    assert accuracy.item() == 0
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)


@pytest.mark.parametrize("junk", [0.0, 1e3, math.nan, math.inf])
def test_invalid_rows_count_neither_as_examples_nor_as_negatives(junk: float) -> None:
    image, text = unit_features(6)
    valid = torch.tensor([True, False, True, True, False, True])
    kept = [image[valid].clone().requires_grad_(), text[valid].clone().requires_grad_()]
    full = [t.masked_fill(~valid[:, None], junk).requires_grad_() for t in (image, text)]
    scale = torch.tensor(7.0, dtype=torch.float64)
    expected, expected_accuracy = contrastive_loss(kept[0], kept[1], scale)
    loss, accuracy = contrastive_loss(full[0], full[1], scale, valid)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(accuracy, expected_accuracy)
    torch.autograd.backward(loss)
    torch.autograd.backward(expected)
    for all_rows, valid_rows in zip(full, kept, strict=True):
        assert all_rows.grad is not None
        torch.testing.assert_close(all_rows.grad[valid], valid_rows.grad)
        assert not all_rows.grad[~valid].any()


def test_a_batch_without_a_valid_row_has_zero_loss_and_zero_gradients() -> None:
    image, text = (tensor.requires_grad_() for tensor in unit_features(3))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss, accuracy = contrastive_loss(image, text, scale, torch.zeros(3, dtype=torch.bool))
    assert loss.item() == 0
    assert accuracy.isnan()
    torch.autograd.backward(loss)
    for tensor in (image, text, scale):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_a_diverged_model_shows_in_loss_and_accuracy() -> None:
    image, text = unit_features(3)
    loss, accuracy = contrastive_loss(image * math.nan, text, torch.tensor(7.0))
    assert loss.isnan()
    assert accuracy.item() == 0


def test_the_loss_keeps_float32_inside_autocast() -> None:
    image, text = (tensor.float() for tensor in unit_features(5))
    expected, _ = contrastive_loss(image, text, torch.tensor(100.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = contrastive_loss(image, text, torch.tensor(100.0))
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()


def test_half_precision_features_give_a_float32_loss() -> None:
    image, text = (tensor.bfloat16() for tensor in unit_features(5))
    expected, _ = contrastive_loss(image.double(), text.double(), torch.tensor(100.0))
    loss, _ = contrastive_loss(image, text, torch.tensor(100.0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    cases: list[tuple[Tensor, Tensor, Any, str]] = [
        (torch.ones(2, 3), torch.ones(3, 3), None, r"\(2, 3\) and \(3, 3\)"),
        (torch.ones(3), torch.ones(3), None, r"one shape \[B, K\]"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, dtype=torch.bool), r"valid has to be \[2\] bool"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), "float32"),
    ]
    for image, text, valid, message in cases:
        with pytest.raises(ValueError, match=message):
            contrastive_loss(image, text, torch.tensor(1.0), valid)


def test_gathering_on_one_process_hands_the_features_through() -> None:
    image, text = unit_features(3)
    valid = torch.ones(3, dtype=torch.bool)
    assert all(a is b for a, b in zip(gather_features(image, text, valid), (image, text, valid), strict=True))
    with pytest.raises(ValueError, match="one shape and dtype"):
        gather_features(image, text.float(), valid)


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_have_the_loss_and_the_gradients_of_one(world: int) -> None:
    some_invalid = [True, False, True, True, False, True, True, True]
    masks = [torch.tensor(valid) for valid in ([True] * 8, some_invalid, [True] * 4 + [False] * 4)]
    results = run_distributed(steps_on_own_share, masks, world_size=world)
    for ranks, mask in zip(zip(*results, strict=True), masks, strict=True):
        model = LinearTowers()
        image, text, scale, _ = model(*eight_pairs())
        loss, accuracy = contrastive_loss(image, text, scale, mask)
        torch.autograd.backward(loss)
        expected = {name: p.grad for name, p in model.named_parameters()}
        assert set(expected) == {"image", "text", "log_scale", "bias"}
        for rank in ranks:
            assert torch.equal(rank["loss"], ranks[0]["loss"])
            torch.testing.assert_close(rank["loss"], loss.detach(), rtol=0, atol=1e-12)
            torch.testing.assert_close(rank["accuracy"], accuracy, rtol=0, atol=1e-12)
            for name, gradient in expected.items():
                torch.testing.assert_close(rank[name], gradient, rtol=0, atol=1e-12)


def test_gathered_rows_stand_in_rank_order_and_gradients_are_summed_over_ranks() -> None:
    first, second = run_distributed(gathered_with_own_gradients)
    for rank in (first, second):
        assert rank["images"][:, 0].tolist() == [0, 0, 1, 1]
        assert rank["texts"][:, 0].tolist() == [10, 10, 11, 11]
        assert rank["valid"].tolist() == [True, True, True, False]
    # Row i weighs i on rank 0 and i + 100 on rank 1; rank 0 owns rows 0 and 1, rank 1 rows 2 and 3.
    assert first["image"][:, 0].tolist() == [100, 102]
    assert second["image"][:, 0].tolist() == [104, 106]
    assert first["text"][:, 0].tolist() == [-200, -204]
    assert second["text"][:, 0].tolist() == [-208, -212]
