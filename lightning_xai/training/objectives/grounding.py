"""Train on gamma: attribution of a phrase should lie in the box of the object that it names.

Shapes: B rows on this rank, R phrases, H x W the patch grid, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_xai.attribution.pairwise import Captured, capture
from lightning_xai.attribution.path_integral import integrated_jvp, integrated_vjp, quadrature
from lightning_xai.attribution.reference import reference_image
from lightning_xai.data.needs import BatchNeeds
from lightning_xai.data.phrases import Phrases
from lightning_xai.exclusion import Exclusion
from lightning_xai.loss import sum_over_ranks
from lightning_xai.metrics.grounding import measurable, patch_mask
from lightning_xai.models.at_layer import differentiable, refuse_rewriting
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.training.objectives.base import Objective, Step, Term, zero_with_graph

__all__ = ["Grounding"]

_LEAST_GAMMA = 1e-3  # below it a phrase has no gradient: the logarithm's would be arbitrarily large


class Grounding(Objective):
    """Ask that the positive attribution of phrases lies in their boxes: `-log gamma`, the mean over the global batch.

    The attribution is `FeaturePairAttribution` of the phrase within its caption, with the midpoint rule, and is
    differentiated by the weights, those before the layers and the references included. It reads the hidden states of
    the training pass itself. Phrases that cannot be measured, by the rules of gamma, take no part; neither do those
    without any positive attribution, which are counted.

    Also logs `train/gamma`, the mean over phrases, `train/phrases`, their number, and `train/phrases_without_positive`.

    Args:
        weight: factor on the term in the loss.
        image_layer: layer of the image tower whose input is attributed to, as for `FeaturePairAttribution`.
        text_layer: likewise of the text tower.
        steps: integration points.
        penalty: `log` for `-log(max(gamma, 0.001))`, `share` for the share of the positive attribution outside the box.

    Raises:
        ValueError: an option outside its range; in `prepare`: towers without such layers.
    """

    name = "grounding"
    needs = BatchNeeds(phrases=True, boxes=True)
    listens = True

    def __init__(
        self,
        *,
        weight: float = 0.3,
        image_layer: int = -1,
        text_layer: int = -1,
        steps: int = 2,
        penalty: Literal["log", "share"] = "log",
    ) -> None:
        super().__init__(weight=weight)
        if penalty not in ("log", "share"):
            raise ValueError(f"penalty is log or share; got {penalty!r}")
        self._layers = image_layer, text_layer
        self._points, self._weights = quadrature("midpoint", steps)
        self.penalty = penalty
        self._captured = Captured()

    @property
    def trains_on(self) -> Mapping[str, Mapping[str, Any]]:
        """Feature-pair attribution at the layers."""
        image, text = self._layers
        return {"feature_pair": {"image_layer": image, "text_layer": text}}

    def prepare(self, encoder: DualEncoder) -> None:
        """Find the layers."""
        refuse_rewriting(encoder)
        self._image, self._text = encoder.image_at_layer(self._layers[0]), encoder.text_at_layer(self._layers[1])
        for tower in (self._image, self._text):
            if tower.block is None:
                raise ValueError(
                    f"layer {tower.layer} is the head, which has no block to listen to; take a layer before"
                )

    @contextmanager
    def listening(self) -> Iterator[Any]:
        """Keep what enters the layers, with its graph."""
        with capture(self._image, self._text, graph=True) as captured:
            yield
        self._captured = captured

    def __call__(self, step: Step) -> Term:
        """Compute the term; a zero with a graph where no phrase of any rank can be measured."""
        captured, self._captured = self._captured, Captured()
        with differentiable(step.encoder):
            hidden = torch.cat(captured.image), torch.cat(captured.text)
            phrases, masks = self._measurable(step)
            maps = self._maps(step, phrases, *hidden)
            positive = maps.clamp(min=0)
            total, inside = positive.sum(dim=(1, 2)), (positive * masks).sum(dim=(1, 2))
            some = total.detach() > 0
            gamma = inside[some] / total[some]
            penalty = -gamma.clamp(min=_LEAST_GAMMA).log() if self.penalty == "log" else 1 - gamma
            sums = torch.stack(
                [penalty.sum() + zero_with_graph(step), gamma.detach().sum(), *_counts(some).to(penalty)]
            )
        loss, gammas, count, without = sum_over_ranks(sums)
        count = count.detach()
        logged = {"gamma": gammas.detach() / count, "phrases": count, "phrases_without_positive": without.detach()}
        return Term(loss / count.clamp(min=1), logged)

    def _measurable(self, step: Step) -> tuple[Phrases, Tensor]:
        """The phrases of the batch that gamma is measured on, and the patches of their boxes [R, H, W]."""
        phrases, size = step.batch.phrases, step.encoder.image_shape[1:]
        reason = measurable(phrases.reason, phrases.boxes, self._image.grid, size)
        kept = phrases.only((reason == Exclusion.MEASURED).nonzero()[:, 0])
        return kept, patch_mask(kept.boxes, self._image.grid, size)

    def _maps(self, step: Step, phrases: Phrases, image: Tensor, text: Tensor) -> Tensor:
        """Maps [R, H, W] of phrases, up to a positive factor each, with a graph to all weights."""
        dtype = next(step.encoder.parameters()).dtype
        rows, tokens = phrases.caption_row, step.batch.tokens[phrases.caption_row]
        if not len(rows):
            return image.new_zeros(0, *self._image.grid, dtype=dtype)
        image, text = image[phrases.image_row].to(dtype), text[rows].to(dtype)
        nothing = reference_image(step.encoder, "zeros").to(image)[None]
        said_nothing = step.encoder.tokenizer.padding_caption()[None].to(tokens.device)
        image_path = self._image.path(image, self._image.features_before(nothing))
        text_path = self._text.path(text, self._text.features_before(said_nothing, text.shape[1]), tokens)
        span = self._text.on_caption(phrases.span_mask[:, None].to(text), text.shape[1])
        change = integrated_jvp(text_path, self._points, self._weights, span, create_graph=True)
        places = self._image.count(image)
        return self._image.on_grid(
            integrated_vjp(image_path, self._points, self._weights, change, places, create_graph=True)[:, 0]
        )


def _counts(some: Tensor) -> Tensor:
    """The number of maps with a positive value, and of those without."""
    return torch.stack([some.sum(), (~some).sum()])
