"""What objectives that compare phrases with patches share: both in the joint space, patches from the training pass.

Shapes: B rows on this rank, R phrases, P = H x W patches, L tokens, K embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_xai.data.batch import Batch
from lightning_xai.data.needs import BatchNeeds
from lightning_xai.data.phrases import Phrases
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.loss import gather_uneven_rows
from lightning_xai.models.at_layer import UnsupportedTowerError, differentiable, evaluating
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.training.objectives.base import Objective, Step, zero_with_graph

__all__ = ["PatchObjective", "text_numbers", "whole"]


class PatchObjective(Objective):
    """An objective that compares phrases, each a separate caption, with the patches of the training pass.

    A patch is embedded as if the head read it alone (`TowerAtLayer.embed_each`): by the final norm and the projection,
    or by the way of the values of an attention pool. No image is run twice.

    Phrases are further texts of the training pass, each text once. Their tokens within the caption would cost nothing,
    but a causal tower has mixed into them all the words before, so that the position in the caption could be learned
    instead of the phrase; and no tower was trained to be read there.
    """

    needs = BatchNeeds(phrase_tokens=True)
    listens = True

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self._hidden: list[Tensor] = []

    def prepare(self, encoder: DualEncoder) -> None:
        """Find the last block, and embed the patches of a black image.

        Raises:
            UnsupportedTowerError: the image tower's patches have no embedding of their own.
        """
        self._image = encoder.image_at_layer(-1)
        if self._image.is_feature_map:
            raise UnsupportedTowerError(
                f"the objective {self.name} compares phrases with patches of the joint space; the image tower of "
                f"{encoder.name} passes on feature maps, which only become a point of it as a whole: take a ViT, or "
                "the objective Grounding"
            )
        dropped = next((name for name, part in encoder.named_modules() if _drops_patches(part)), None)
        if dropped is not None:
            raise UnsupportedTowerError(
                f"{encoder.name} leaves patches out in training ({dropped}), so that boxes have no patches: set "
                f"patch_dropout to 0, or leave out the objective {self.name}"
            )
        images = encoder.black_image()[None].to(encoder.logit_scale)
        with torch.no_grad(), evaluating(encoder):
            with self.listening():
                encoder.encode_image(images)
            self._patches(encoder)

    @contextmanager
    def listening(self) -> Iterator[Any]:
        """Keep what the last block of the image tower passes on, with its graph."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: object, output: Any) -> None:
            # Blocks of transformers before version 5 return a tuple.
            kept.append(self._image.captured(output[0] if isinstance(output, tuple) else output))

        assert self._image.block is not None, "checked before"
        handle = self._image.block.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
        self._hidden = kept

    def _patches(self, encoder: DualEncoder) -> Tensor:
        """Embeddings [B, P, K], at least float32 and not normalised, of the patches of the pass that was listened to.

        Computed as in evaluation, in the precision of the weights.
        """
        hidden, self._hidden = torch.cat(self._hidden), []
        graph = torch.is_grad_enabled()
        with differentiable(encoder), torch.set_grad_enabled(graph):
            patches = hidden[:, self._image.prefix_tokens :].to(next(encoder.parameters()).dtype)
            embedded = self._image.embed_each(patches)
            return embedded.to(torch.promote_types(embedded.dtype, torch.float32))

    def extra_tokens(self, batch: Batch) -> Tensor:
        """Return the batch's phrases, each text once.

        Raises:
            ValueError: the batch was made without phrases.
        """
        texts: Tensor = torch.unique(self._tokens(_named(batch)), dim=0)
        return texts

    def _phrases(self, step: Step) -> tuple[Phrases, Tensor]:
        """The phrases that captions name, R, and their embeddings [R, K], which have a graph on every rank."""
        phrases = _named(step.batch)
        which = torch.unique(self._tokens(phrases), dim=0, return_inverse=True)[1]
        return phrases, step.extra[self.name][which] + zero_with_graph(step)

    def _tokens(self, phrases: Phrases) -> Tensor:
        if phrases.tokens is None:
            raise ValueError(
                f"the objective {self.name} needs phrases as separate captions, which the training batches lack: "
                "take ShardDataModule, or make them by TrainingCollate(..., needs=task.batch_needs)"
            )
        return phrases.tokens


def _named(batch: Batch) -> Phrases:
    """The phrases of a batch without the rows of objects that no caption names."""
    return batch.phrases.only((batch.phrases.caption_row >= 0).nonzero()[:, 0])


def text_numbers(tokens: Tensor) -> Tensor:
    """A number for each text [R, L] of all ranks, in rank order, that equal texts share: [G] int64.

    L has to be the same on every rank.
    """
    numbers: Tensor = torch.unique(gather_uneven_rows(tokens)[0], dim=0, return_inverse=True)[1]
    return numbers


def whole(tokens: Tensor, tokenizer: CaptionTokenizer) -> Tensor:
    """Trimmed texts [R, T] in the tokenizer's own length [R, L], the same on every rank."""
    return pad(tokens, (0, tokenizer.context_length - tokens.shape[1]), value=tokenizer.padding_id)


def _drops_patches(part: nn.Module) -> bool:
    """Whether a part is open_clip's or timm's patch dropout, and on."""
    return type(part).__name__.startswith("PatchDropout") and bool(getattr(part, "prob", 0))
