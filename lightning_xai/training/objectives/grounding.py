"""Train on gamma: attribution of a phrase should lie in the box of the object that it names.

Shapes: B rows on this rank, R phrases, H x W the patch grid, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
from lightning_xai.models.at_layer import batch_statistics, constant, differentiable, refuse_rewriting
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.models.sharding import gather_blocks
from lightning_xai.training.objectives.base import Objective, Step, Term, zero_with_graph

__all__ = ["Grounding"]

_NUMBERS = ("gamma", "phrases", "without_positive")  # logged as train/NAME_gamma and so on
_LEAST_GAMMA = 1e-3  # below it a phrase has no gradient: the logarithm's would be arbitrarily large


class Grounding(Objective):
    """Ask that the positive attribution of phrases lies in their boxes: `-log gamma`, the mean over the global batch.

    The attribution is `FeaturePairAttribution` of the phrase within its caption, with the midpoint rule, and is
    differentiated by the weights, those before the layers and the references included. It reads the hidden states of
    the training pass itself. Phrases that cannot be measured, by the rules of gamma, take no part; neither do those
    without any positive attribution, which are counted.

    Also logs, of the global batch, `train/NAME_gamma`, the mean over phrases, `train/NAME_phrases`, their number, and
    `train/NAME_without_positive`.

    Args:
        weight: factor on the term in the loss.
        image_layer: layer of the image tower whose input is attributed to, as for `FeaturePairAttribution`.
        text_layer: likewise of the text tower.
        steps: integration points.
        penalty: `log` for `-log(max(gamma, 0.001))`, `share` for the share of the positive attribution outside the box.
        towers: which towers the term trains: `both`, or `image` or `text` alone. The attribution and the value of the
            term are the same for all three; a tower that is not trained by it is a constant.
        name: of the term, as it is logged: `grounding`, or for a second term `grounding_` and a word, such as
            `grounding_inputs`.

    Raises:
        ValueError: an option outside its range; in `prepare`: towers without such layers, or with batch statistics.
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
        towers: Literal["both", "image", "text"] = "both",
        name: str = "grounding",
    ) -> None:
        word = name.removeprefix("grounding_")
        if name != "grounding" and (word == name or not word.isidentifier() or word in _NUMBERS):
            raise ValueError(
                "name is grounding, or grounding_ and a word that is none of the term's numbers "
                f"({', '.join(_NUMBERS)}), such as grounding_inputs; got {name!r}"
            )
        self.name = name
        super().__init__(weight=weight)
        if penalty not in ("log", "share"):
            raise ValueError(f"penalty is log or share; got {penalty!r}")
        if towers not in ("both", "image", "text"):
            raise ValueError(f"towers is both, image or text; got {towers!r}")
        self._layers = image_layer, text_layer
        self._points, self._weights = quadrature("midpoint", steps)
        self.penalty = penalty
        self.towers = towers
        self._captured = Captured()

    @property
    def trains_on(self) -> Mapping[str, Mapping[str, Any]]:
        """Feature-pair attribution at the layers."""
        image, text = self._layers
        return {"feature_pair": {"image_layer": image, "text_layer": text}}

    def prepare(self, encoder: DualEncoder) -> None:
        """Find the layers."""
        refuse_rewriting(encoder)
        found = batch_statistics(encoder.model)
        if found is not None:
            raise ValueError(
                f"{encoder.name} has batch statistics ({found}): a training pass takes them from its batch, an "
                "attribution takes their running averages; take a model without BatchNorm, such as a ViT, for the "
                "objective grounding"
            )
        self._image, self._text = encoder.image_at_layer(self._layers[0]), encoder.text_at_layer(self._layers[1])
        for tower in (self._image, self._text):
            if tower.block is None:
                raise ValueError(f"layer {tower.layer} is the head: the objective grounding takes a layer before it")

    def check_towers(self, trained: Collection[str]) -> None:
        """Refuse frozen towers: the term has nothing else to train, not even the logit scale."""
        super().check_towers(trained)
        if not trained:
            raise ValueError(
                f"the objective {self.name} trains the towers, which are both frozen: leave it out, or train some of a "
                "tower (freeze_image, freeze_text, lora)"
            )

    def check_sharding(self) -> None:
        """Refuse layers whose blocks would be called within derivatives, where FSDP cannot gather parameters."""
        if self._image.calls_blocks or self._text.calls_blocks:
            raise ValueError(
                "the objective grounding goes with ModelParallelStrategy only at the last blocks of open_clip's own "
                "transformers: leave image_layer and text_layer at -1 and take such a model, or take the strategy ddp"
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
        gather_blocks([*self._image.blocks_on(), *self._text.blocks_on()])
        with differentiable(step.encoder):
            hidden = torch.cat(captured.image), torch.cat(captured.text)
            references = self._references(step, hidden[1].shape[1])
            phrases, masks = self._measurable(step)
            maps = self._maps(step, phrases, hidden, references)
            positive = maps.clamp(min=0)
            total, inside = positive.sum(dim=(1, 2)), (positive * masks).sum(dim=(1, 2))
            # A map that is not a number is no map without positive value: the loss has to say so.
            some = ~(total.detach() <= torch.finfo(total.dtype).tiny)
            gamma = inside[some] / total[some]
            penalty = -gamma.clamp(min=_LEAST_GAMMA).log() if self.penalty == "log" else 1 - gamma
            # Every rank has a graph to run backwards, phrases or not, and all of it, where parameters are spread.
            nothing = zero_with_graph(step) + 0 * sum(reference.sum() for reference in references)
            sums = torch.stack([penalty.sum() + nothing, gamma.detach().sum(), *_counts(some).to(penalty)])
        loss, gammas, count, without = sum_over_ranks(sums)
        count = count.detach()
        numbers = dict(zip(_NUMBERS, (gammas.detach() / count, count, without.detach()), strict=True))
        return Term(loss / count.clamp(min=1), {f"{self.name}_{name}": value for name, value in numbers.items()})

    def _measurable(self, step: Step) -> tuple[Phrases, Tensor]:
        """The phrases of the batch that gamma is measured on, and the patches of their boxes [R, H, W]."""
        phrases, size = step.batch.phrases, step.encoder.image_shape[1:]
        reason = measurable(phrases.reason, phrases.boxes, self._image.grid, size)
        kept = phrases.only((reason == Exclusion.MEASURED).nonzero()[:, 0])
        return kept, patch_mask(kept.boxes, self._image.grid, size)

    def _references(self, step: Step, length: int) -> tuple[Tensor, Tensor]:
        """Hidden states [1, ...] of an image and a caption of `length` tokens that say nothing."""
        tokens = step.encoder.tokenizer.padding_caption()[None].to(step.batch.tokens.device)
        with torch.set_grad_enabled(self.towers != "text"):
            image = self._image.features_before(reference_image(step.encoder, "zeros")[None])
        with torch.set_grad_enabled(self.towers != "image"):
            return image, self._text.features_before(tokens, length)

    def _maps(
        self, step: Step, phrases: Phrases, hidden: tuple[Tensor, Tensor], references: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Maps [R, H, W] of phrases, up to a positive factor each, with a graph to the weights that are trained.

        Args:
            step: of the training.
            phrases: R of them.
            hidden: what enters the layers, of all images and of all captions.
            references: what enters them where nothing is shown or said.
        """
        dtype = references[0].dtype
        if not len(phrases):
            return references[0].new_zeros(0, *self._image.grid)
        rows = phrases.image_row, phrases.caption_row
        image, text = (states[row].to(dtype) for states, row in zip(hidden, rows, strict=True))
        with constant(step.encoder) if self.towers == "image" else nullcontext():
            tokens = step.batch.tokens[phrases.caption_row]
            path = self._text.path(text.detach() if self.towers == "image" else text, references[1], tokens)
            span = self._text.on_caption(phrases.span_mask[:, None].to(text), text.shape[1])
            change = integrated_jvp(path, self._points, self._weights, span, create_graph=True)
        with constant(step.encoder) if self.towers == "text" else nullcontext():
            path = self._image.path(image.detach() if self.towers == "text" else image, references[0])
            places = self._image.count(image)
            maps = integrated_vjp(path, self._points, self._weights, change, places, create_graph=True)
        return self._image.on_grid(maps[:, 0])


def _counts(some: Tensor) -> Tensor:
    """The number of maps with a positive value, and of those without."""
    return torch.stack([some.sum(), (~some).sum()])
