from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_xai.attribution import path_integral
from lightning_xai.attribution.path_integral import (
    Rule,
    embeddings_at,
    integrated_jvp,
    integrated_vjp,
    jvp_with_embedding,
    quadrature,
)
from lightning_xai.models.at_layer import PathWithDerivatives

RULES: tuple[Rule, ...] = ("right", "left", "midpoint", "trapezoid", "gauss_legendre")


@pytest.mark.parametrize("rule", RULES)
def test_weights_sum_to_one_and_points_lie_on_the_path(rule: Rule) -> None:
    cases: list[int] = [2, 3, 10, 49]
    for steps in cases:
        points, weights = quadrature(rule, steps)
        assert points.shape == weights.shape == (steps,)
        assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
        assert points.min() >= 0
        assert points.max() <= 1


def test_the_right_rule_is_the_papers_riemann_sum_for_every_n() -> None:
    # arange(1, 0, -1/N) gives N + 1 points for some N, 49 among them.
    for steps in (1, 3, 10, 49):
        assert quadrature("right", steps)[0].tolist() == pytest.approx([(steps - n) / steps for n in range(steps)])


def test_rules_are_exact_up_to_their_degree_and_no_further() -> None:
    degrees: dict[Rule, int] = {"right": 0, "left": 0, "midpoint": 1, "trapezoid": 1, "gauss_legendre": 9}
    for rule, degree in degrees.items():
        points, weights = quadrature(rule, 5)
        for power in range(degree + 1):
            assert float((weights * points**power).sum()) == pytest.approx(1 / (power + 1), abs=1e-12)
        assert abs(float((weights * points ** (degree + 1)).sum()) - 1 / (degree + 2)) > 1e-9


def test_too_few_steps_are_an_error_that_names_them() -> None:
    cases: list[tuple[Rule, int]] = [("right", 0), ("gauss_legendre", -1), ("trapezoid", 1)]
    for rule, steps in cases:
        with pytest.raises(ValueError, match=f"{rule} rule needs at least .* steps={steps}"):
            quadrature(rule, steps)


def test_an_unknown_rule_is_an_error_that_lists_the_rules() -> None:
    with pytest.raises(ValueError, match="gauss_legendre"):
        quadrature("simpson", 4)  # type: ignore[arg-type]  # what a config file could hold


@pytest.mark.parametrize("tokens_at_a_time", [1, 60, 8192])
def test_both_products_agree_with_full_jacobians_however_much_is_taken_together(
    monkeypatch: pytest.MonkeyPatch, tokens_at_a_time: int
) -> None:
    monkeypatch.setattr(path_integral, "_TOKENS_AT_A_TIME", tokens_at_a_time)  # of the 24 of a direction
    torch.manual_seed(0)
    batch, points_n, tokens, width = 2, 4, 3, 5
    weight = torch.randn(tokens, width, dtype=torch.float64)

    def path(alpha: Tensor) -> Tensor:
        return torch.sin(alpha @ weight) * alpha.sum(dim=2, keepdim=True)

    points, weights = quadrature("midpoint", points_n)
    alpha = points[None, :, None].expand(batch, -1, tokens).clone()
    jacobian_of: Any = torch.autograd.functional.jacobian
    full = jacobian_of(path, alpha)
    # Each input's embedding depends on its own alphas only: take the block diagonal, then integrate.
    jacobian = torch.einsum("n,bnkbnt->bkt", weights, full)
    directions = torch.randn(batch, 6, tokens, dtype=torch.float64)
    cotangents = torch.randn(batch, 6, width, dtype=torch.float64)
    expected_jvp = torch.einsum("bkt,bst->bsk", jacobian, directions)
    expected_vjp = torch.einsum("bkt,bsk->bst", jacobian, cotangents)
    torch.testing.assert_close(integrated_jvp(path, points, weights, directions), expected_jvp)
    torch.testing.assert_close(integrated_jvp(path, points, weights, directions[:, :1]), expected_jvp[:, :1])
    torch.testing.assert_close(integrated_vjp(path, points, weights, cotangents, tokens), expected_vjp)


def test_directions_and_cotangents_share_the_pass_along_the_path() -> None:
    calls = []

    def path(alpha: Tensor) -> Tensor:
        calls.append(len(alpha))
        return torch.sin(alpha)

    points, weights = quadrature("midpoint", 4)
    integrated_jvp(path, points, weights, torch.randn(2, 6, 3))
    integrated_vjp(path, points, weights, torch.randn(2, 6, 3), 3)
    torch.testing.assert_close(
        embeddings_at(path, (1.0, 0.0), 2, 3, points),
        torch.tensor([1.0, 0.0]).double().sin()[None, :, None].expand(2, -1, 3),
    )
    assert calls == [2, 2, 2]


class Waves(PathWithDerivatives):
    """Sines of what the tokens add up to; without derivatives at the end, if so asked."""

    def __init__(self, *, smooth: bool) -> None:
        self.smooth = smooth
        self.weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()

    def __call__(self, alpha_BNT: Tensor) -> Tensor:
        return torch.sin(alpha_BNT @ self.weight)

    def with_derivatives(self, alpha_BNT: Tensor, directions_BST: Tensor) -> Tensor:
        slope = torch.cos(alpha_BNT @ self.weight)[:, None] * (directions_BST @ self.weight)[:, :, None]
        lost = (alpha_BNT[:, None, :, :1] == 1) & (not self.smooth)
        return torch.cat([self(alpha_BNT)[:, None], slope.masked_fill(lost, math.nan)], dim=1)


@pytest.mark.parametrize("tokens_at_a_time", [1, 8192])
@pytest.mark.parametrize("rule", RULES)
def test_a_path_that_knows_its_derivatives_gives_the_embedding_too_whatever_they_are_there(
    monkeypatch: pytest.MonkeyPatch, rule: Rule, tokens_at_a_time: int
) -> None:
    monkeypatch.setattr(path_integral, "_TOKENS_AT_A_TIME", tokens_at_a_time)
    points, weights = quadrature(rule, 4)
    path = Waves(smooth=1 in points)
    directions = torch.randn(2, 6, 3).double()
    change, embedding = jvp_with_embedding(path, points, weights, directions)
    torch.testing.assert_close(embedding, path(torch.ones(2, 1, 3).double())[:, 0])
    torch.testing.assert_close(change, integrated_jvp(path.__call__, points, weights, directions))
    torch.testing.assert_close(change, integrated_jvp(path, points, weights, directions))
