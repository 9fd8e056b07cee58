from __future__ import annotations

import math
import pickle
import statistics
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.base import PhraseTargets
from lightning_xai.metrics.grounding import (
    SPEC,
    GroundingMetric,
    GroundingSummary,
    box_attribution,
    gamma,
    grounding,
    larger_than_patch,
    measurable,
    patch_mask,
    rho,
)

LABELS = ("dog", "cat", "ring", "unseen")
GRID, IMAGE = (3, 4), (48, 64)  # patches of 16 pixels


def random_maps(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Signed maps [rows, 5, 7] and masks of random boxes."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(rows, 5, 7, generator=generator)
    corners = torch.rand(rows, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([70.0, 50.0])
    return maps, patch_mask(corners.flatten(1), (5, 7), (50, 70))


def random_rows(rows: int) -> dict[str, Tensor]:
    """Rows as a validation pass makes them: some left out, some without a positive entry."""
    generator = torch.Generator().manual_seed(3)
    reason = torch.randint(len(Exclusion), (rows,), generator=generator)
    reason[torch.rand(rows, generator=generator) < 0.7] = Exclusion.MEASURED
    values = torch.rand(rows, generator=generator, dtype=torch.float64)
    values[torch.rand(rows, generator=generator) < 0.1] = math.nan
    label = torch.randint(3, (rows,), generator=generator)
    return {"gamma": values, "hit": torch.rand(rows, generator=generator) < 0.6, "label": label, "reason": reason}


def update(metric: GroundingMetric, rows: dict[str, Tensor], part: Any = slice(None)) -> None:
    metric.update(**{name: column[part] for name, column in rows.items()})


def add_nothing(metric: GroundingMetric) -> None:
    """A pass without a row; torchmetrics warns when there was no update at all."""
    update(metric, random_rows(1), slice(0))


def summaries_of_own_share(rows: dict[str, Tensor]) -> list[str]:
    """A third of the rows in one piece here, the others one by one there; all on the last rank; none at all."""
    rank, count = dist.get_rank(), len(rows["label"])
    uneven, one_sided, empty = (GroundingMetric(LABELS) for _ in range(3))
    if rank == 0:
        update(uneven, rows, slice(count // 3))
    elif rank == 1:
        for row in reversed(range(count // 3, count)):
            update(uneven, rows, [row])
    if rank == dist.get_world_size() - 1:
        update(one_sided, rows)
    # repr: floats in full, and NaN equals itself.
    return [repr(metric.compute()) for metric in (uneven, one_sided, empty)]


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((0, 0, 64, 48), [0, 1, 2], [0, 1, 2, 3]),
        ((16, 16, 48, 32), [1], [1, 2]),
        ((9, 0, 55, 16), [0], [1, 2]),  # touches four patches, its edges are nearest to 16 and 48
        ((7, 0, 57, 16), [0], [0, 1, 2, 3]),
        ((8, 0, 40, 16), [0], [1, 2]),  # halves move up, both of them: two patches wide stays two patches wide
        ((24, 0, 56, 16), [0], [2, 3]),
        ((17, 17, 21, 22), [1], [1]),  # smaller than a patch: the one under the centre
        ((26, 0, 38, 48), [0, 1, 2], [2]),  # narrow but tall; the centre x = 32 opens the third column
        ((-30, -30, 16, 16), [0], [0]),  # the outside is cut off
        ((48, 32, 90, 90), [2], [3]),
        ((64, 48, 64, 48), [2], [3]),  # no area at the far corner still gives a patch inside the grid
        ((100, 100, 120, 120), [2], [3]),
    ],
)
def test_box_edges_move_to_the_nearest_patch_edge(box: tuple[int, ...], rows: list[int], columns: list[int]) -> None:
    expected = torch.zeros(GRID, dtype=torch.bool)
    for row in rows:
        expected[row, columns] = True
    assert patch_mask(torch.tensor([box], dtype=torch.float32), GRID, IMAGE)[0].tolist() == expected.tolist()


def test_the_grid_is_rows_by_columns_and_the_image_height_by_width() -> None:
    mask = patch_mask(torch.tensor([[0.0, 0.0, 10.0, 40.0]]), (4, 2), (40, 20))
    assert mask.int().tolist() == [[[1, 0]] * 4]


def test_the_mask_keeps_the_area_of_a_box_on_average_over_its_positions() -> None:
    offsets = torch.arange(0, 32, 0.25)
    boxes = torch.stack([offsets, offsets, offsets + 25, offsets + 25], dim=1)
    covered = patch_mask(boxes, (6, 6), (96, 96)).any(dim=1).sum(dim=1).double()
    assert covered.mean().item() == pytest.approx(25 / 16, abs=1e-9)


def test_a_box_has_to_be_larger_than_one_patch_in_area_not_in_width() -> None:
    boxes = torch.tensor([[0, 0, 16, 16], [0, 0, 4, 64], [0, 0, 4, 65], [-16, 0, 15, 16], [9, 9, 2, 2]])
    larger = larger_than_patch(boxes.float(), (8, 4), (128, 64))
    assert larger.tolist() == [False, False, True, False, False]


def test_only_measured_rows_become_smaller_than_a_patch() -> None:
    reason = torch.tensor([Exclusion.MEASURED, Exclusion.MEASURED, Exclusion.OUTSIDE_CROP])
    boxes = torch.tensor([[0.0, 0, 16, 16], [0, 0, 17, 16], [0, 0, 0, 0]])
    result = measurable(reason, boxes, GRID, IMAGE)
    assert result.tolist() == [Exclusion.SMALLER_THAN_PATCH, Exclusion.MEASURED, Exclusion.OUTSIDE_CROP]
    assert reason[0] == Exclusion.MEASURED


@pytest.mark.parametrize("boxes", [torch.zeros(4), torch.zeros(2, 5), torch.tensor([[0.0, 0.0, math.nan, 1.0]])])
def test_boxes_that_are_none_are_refused(boxes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"box"):
        patch_mask(boxes, GRID, IMAGE)


def test_gamma_and_rho_agree_with_a_plain_loop() -> None:
    maps, masks = random_maps(40)
    for row, (value, hit) in enumerate(zip(gamma(maps, masks).tolist(), rho(maps, masks).tolist(), strict=True)):
        inside = total = 0.0
        best, best_inside = -math.inf, False
        for y in range(5):
            for x in range(7):
                entry = maps[row, y, x].item()
                total += max(entry, 0.0)
                inside += max(entry, 0.0) if masks[row, y, x] else 0.0
                if entry > best:
                    best, best_inside = entry, bool(masks[row, y, x])
        assert value == pytest.approx(inside / total, abs=1e-14)
        assert hit == best_inside


def test_the_attribution_of_a_box_is_the_sum_of_both_signs_inside_it() -> None:
    maps, masks = random_maps(40)
    for row, value in enumerate(box_attribution(maps, masks).tolist()):
        inside = [maps[row, y, x].item() for y in range(5) for x in range(7) if masks[row, y, x]]
        assert value == pytest.approx(math.fsum(inside), abs=1e-13)
    everything = box_attribution(maps, torch.ones_like(masks))
    torch.testing.assert_close(box_attribution(maps, masks) + box_attribution(maps, ~masks), everything)


def test_attributions_of_boxes_are_summed_in_double_precision_and_without_graph() -> None:
    maps = torch.tensor([[[1.0, 2.0**-12], [2.0**-12, -1.0]]], dtype=torch.float16).requires_grad_()
    total = box_attribution(maps, torch.ones(1, 2, 2).bool())
    assert total.tolist() == [2.0**-11]
    assert not total.requires_grad


def test_attributions_of_boxes_refuse_what_is_no_map() -> None:
    with pytest.raises(ValueError, match="not finite"):
        box_attribution(torch.tensor([[[math.nan]]]), torch.ones(1, 1, 1).bool())
    with pytest.raises(ValueError, match="bool masks"):
        box_attribution(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))


def test_gamma_does_not_change_when_the_map_is_scaled() -> None:
    maps, masks = random_maps(20)
    torch.testing.assert_close(gamma(maps * 2.0**-60, masks), gamma(maps, masks), rtol=0, atol=0)
    assert ((gamma(maps, masks) >= 0) & (gamma(maps, masks) <= 1)).all()


def test_gamma_of_a_uniform_map_is_the_share_of_the_area() -> None:
    _, masks = random_maps(20)
    uniform = torch.full(masks.shape, 0.1)
    torch.testing.assert_close(gamma(uniform, masks), masks.double().mean(dim=(1, 2)), rtol=0, atol=1e-15)


def test_a_box_around_everything_holds_everything() -> None:
    maps, masks = random_maps(20)
    everything = torch.ones_like(masks)
    assert gamma(maps, everything).tolist() == [1.0] * 20
    assert rho(maps, everything).all()
    assert gamma(maps, ~everything).tolist() == [0.0] * 20
    assert not rho(maps, ~everything).any()


def test_a_tie_is_a_hit_only_if_every_largest_entry_is_inside() -> None:
    maps = torch.tensor([[[5.0, 5.0, 1.0]]]).expand(3, 1, 3)
    masks = torch.tensor([[[True, True, False]], [[True, False, False]], [[False, True, True]]])
    assert rho(maps, masks).tolist() == [True, False, False]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_map_without_a_positive_entry_has_no_gamma_and_no_hit(value: float) -> None:
    maps, masks = torch.full((1, 2, 2), value), torch.ones(1, 2, 2, dtype=torch.bool)
    assert gamma(maps, masks).isnan().all()
    assert not rho(maps, masks).any()


@pytest.mark.parametrize("function", [gamma, rho])
def test_a_map_that_is_not_finite_is_refused(function: Any) -> None:
    maps = torch.ones(3, 2, 2)
    maps[1, 0, 0], maps[2, 1, 1] = math.nan, -math.inf
    with pytest.raises(ValueError, match=r"2 of 3 rows is not finite.*weights"):
        function(maps, torch.ones(3, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[R, H, W\]"):
        function(torch.ones(3, 2, 2), torch.ones(3, 2, 2))


def test_the_long_table_has_no_value_where_a_map_has_no_positive_entry() -> None:
    maps, masks = random_maps(3)
    maps[1] = -1
    found = grounding(PhraseTargets(maps, masks, signed=True))
    assert found["rho"].isnan().tolist() == found["gamma"].isnan().tolist() == [False, True, False]
    assert found["gamma"][0] == gamma(maps, masks)[0]
    assert found["rho"][0] == rho(maps, masks)[0]


def test_thresholds_are_strict_and_means_are_over_pairs_not_classes() -> None:
    metric = GroundingMetric(LABELS)
    values = torch.tensor([0.5, 0.8, 0.9, 0.2], dtype=torch.float64)
    hit = torch.tensor([True, False, True, True])
    metric.update(values, hit, torch.tensor([0, 0, 0, 1]), torch.zeros(4, dtype=torch.int64))
    summary = metric.compute()
    assert summary.gamma_mean == pytest.approx(0.6, abs=1e-12)
    assert (summary.gamma_above_50, summary.gamma_above_80, summary.rho, summary.targets) == (0.5, 0.25, 0.75, 4)
    dog, cat = summary.per_class["dog"], summary.per_class["cat"]
    assert (dog.targets, dog.gamma_above_50, dog.gamma_above_80, dog.rho) == (3, 2 / 3, 1 / 3, 2 / 3)
    assert dog.gamma_std == pytest.approx(statistics.stdev([0.5, 0.8, 0.9]), abs=1e-12)
    assert (cat.targets, cat.rho) == (1, 1)
    assert cat.gamma_mean == pytest.approx(0.2, abs=1e-12)
    assert math.isnan(cat.gamma_std)
    assert summary.per_class["unseen"].targets == 0


def test_the_summary_agrees_with_a_plain_loop() -> None:
    rows = random_rows(300)
    metric = GroundingMetric(LABELS)
    update(metric, rows)
    summary = metric.compute()
    kept = (rows["reason"] == Exclusion.MEASURED) & ~rows["gamma"].isnan()
    assert 100 < int(kept.sum()) < 250
    groups: list[tuple[GroundingSummary, Tensor]] = [(summary, kept)]
    groups += [(summary.per_class[name], kept & (rows["label"] == number)) for number, name in enumerate(LABELS[:3])]
    for group, mask in groups:
        values = rows["gamma"][mask].tolist()
        assert group.targets == len(values)
        assert group.gamma_mean == pytest.approx(statistics.fmean(values), abs=1e-12)
        assert group.gamma_std == pytest.approx(statistics.stdev(values), abs=1e-12)
        assert group.gamma_above_50 == sum(value > 0.5 for value in values) / len(values)
        assert group.gamma_above_80 == sum(value > 0.8 for value in values) / len(values)
        assert group.rho == sum(rows["hit"][mask].tolist()) / len(values)


def test_every_row_is_counted_once_by_its_reason() -> None:
    rows = random_rows(300)
    metric = GroundingMetric(LABELS)
    update(metric, rows)
    summary = metric.compute()
    without = (rows["reason"] == Exclusion.MEASURED) & rows["gamma"].isnan()
    for why in Exclusion:
        if why is not Exclusion.MEASURED:
            extra = int(without.sum()) if why is Exclusion.NO_POSITIVE else 0
            assert summary.excluded[why.name.lower()] == int((rows["reason"] == why).sum()) + extra
            of_classes = [of.excluded[why.name.lower()] for of in summary.per_class.values()]
            assert sum(of_classes) == summary.excluded[why.name.lower()]
            if why is not Exclusion.NO_POSITIVE:
                at = rows["label"][rows["reason"] == why]
                assert of_classes == [int((at == number).sum()) for number in range(len(of_classes))]
    assert "measured" not in summary.excluded
    assert summary.targets + sum(summary.excluded.values()) == 300


def test_excluded_rows_may_have_any_gamma_and_count_for_their_class() -> None:
    metric = GroundingMetric(LABELS)
    reason = torch.tensor([Exclusion.NOT_MENTIONED, Exclusion.MEASURED])
    metric.update(torch.tensor([7.0, 0.25]), torch.tensor([True, False]), torch.tensor([1, 2]), reason)
    summary = metric.compute()
    assert (summary.targets, summary.gamma_mean, summary.rho) == (1, 0.25, 0)
    not_mentioned = [of.excluded["not_mentioned"] for of in summary.per_class.values()]
    assert not_mentioned == [int(row == 1) for row in range(len(LABELS))]


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_the_result_of_one_to_the_last_bit_also_without_updates(size: int) -> None:
    rows = random_rows(120)
    metric = GroundingMetric(LABELS)
    update(metric, rows)
    nothing = GroundingMetric(LABELS)
    add_nothing(nothing)
    expected = [repr(metric.compute()), repr(metric.compute()), repr(nothing.compute())]
    for summaries in run_distributed(summaries_of_own_share, rows, world_size=size):
        assert summaries == expected


def test_equal_values_have_no_spread() -> None:
    metric = GroundingMetric(["dog"])
    count = 1000
    ones = torch.ones(count, dtype=torch.bool)
    metric.update(torch.full((count,), 0.3), ones, torch.zeros(count).long(), torch.zeros(count).long())
    assert metric.compute().gamma_std == 0


@pytest.mark.parametrize("labels", [LABELS, ()])
def test_an_empty_metric_has_the_same_keys_and_nan(labels: tuple[str, ...]) -> None:
    metric = GroundingMetric(labels)
    none = torch.zeros(0)
    metric.update(none, none.bool(), none.long(), none.long())
    summary = metric.compute()
    assert summary.targets == 0
    assert all(math.isnan(getattr(summary, score.name)) for score in SPEC.scores)
    assert set(summary.excluded.values()) == {0}
    assert tuple(summary.per_class) == labels


def test_a_reset_forgets_everything_and_a_pickle_nothing() -> None:
    metric = GroundingMetric(LABELS)
    update(metric, random_rows(50))
    copy = pickle.loads(pickle.dumps(metric))
    expected = repr(metric.compute())
    assert repr(copy.compute()) == expected
    metric.reset()
    add_nothing(metric)
    assert metric.compute().targets == 0
    update(metric, random_rows(50))
    assert repr(metric.compute()) == expected


def test_precision_changes_of_the_model_do_not_reach_the_values() -> None:
    expected, model = GroundingMetric(LABELS), torch.nn.Module()
    model.metric = metric = GroundingMetric(LABELS)
    rows = random_rows(50)
    update(expected, rows)
    for convert in (model.half, model.bfloat16, lambda: model.to(torch.bfloat16), lambda: metric.set_dtype(torch.half)):
        metric.reset()
        update(metric, rows, slice(25))
        convert()
        update(metric, rows, slice(25, None))
        assert repr(metric.compute()) == repr(expected.compute())


@pytest.mark.parametrize(("first", "second"), [("inference", "grad"), ("grad", "inference"), ("no_grad", "inference")])
def test_updates_work_in_every_gradient_mode(first: str, second: str) -> None:
    modes: dict[str, Any] = {"inference": torch.inference_mode, "grad": torch.enable_grad, "no_grad": torch.no_grad}
    metric, rows, expected = GroundingMetric(LABELS), random_rows(20), GroundingMetric(LABELS)
    update(expected, rows)
    with modes[first]():
        update(metric, rows, slice(10))
    with modes[second]():
        update(metric, rows, slice(10, None))
    assert repr(metric.compute()) == repr(expected.compute())
    metric.reset()
    add_nothing(metric)
    assert metric.compute().targets == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": torch.tensor([50.0, 0.5])}, r"\[0, 1\].*50.0, 0.5"),
        ({"label": torch.tensor([0, 4])}, "4 label names.*0 to 4"),
        ({"label": torch.tensor([-1, 0])}, "-1 to 0"),
        ({"reason": torch.tensor([0, 99])}, "99"),
        ({"hit": torch.tensor([True])}, r"each \[R\]"),
    ],
)
def test_rows_that_make_no_sense_are_refused_and_nothing_is_added(change: dict[str, Tensor], message: str) -> None:
    metric = GroundingMetric(LABELS)
    rows = {"gamma": torch.rand(2), "hit": torch.ones(2).bool(), "label": torch.zeros(2).long()}
    with pytest.raises(ValueError, match=message):
        metric.update(**{**rows, "reason": torch.zeros(2).long(), **change})
    assert len(metric.rows()) == 0


def test_a_label_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'dog'"):
        GroundingMetric(["dog", "cat", "dog"])
