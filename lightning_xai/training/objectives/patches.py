"""What objectives that compare phrases with patches share: both in the joint space, patches from the training pass.

Shapes: B rows on this rank, R phrases, P = H x W patches, L tokens, K embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xai.loss import gather_uneven_rows
from lightning_xai.models.at_layer import UnsupportedTowerError, differentiable, evaluating
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.training.objectives.base import Objective, Step, zero_with_graph

__all__ = ["PatchObjective", "text_numbers"]


class PatchObjective(Objective):
    """An objective that compares phrases, each a caption of its own, with the patches of the training pass.

    A patch is embedded as if the head read it alone (`TowerAtLayer.embed_each`): by the final norm and the projection,
    or by the way of the values of an attention pool. No image is run twice.

    Phrases are embedded by a text pass of their own, once for each text. A phrase's tokens within its caption would
    save that pass, but a causal tower has mixed into them all the words before, so that the position in the caption
    could be learned instead of the phrase; and no tower was trained to be read there.
    """

    needs_targets = True
    needs_phrase_tokens = True
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
            return _at_least_float32(self._image.embed_each(patches))

    @staticmethod
    def _embedded(step: Step, tokens: Tensor) -> Tensor:
        """Embeddings [R, K], at least float32 and not normalised, of phrases [R, L] as captions of their own.

        They have a graph and take one text pass on every rank, also on one without phrases.
        """
        nothing = step.encoder.tokenizer.padding_caption()[None].to(tokens)
        texts, which = torch.unique(torch.cat([tokens, nothing]), dim=0, return_inverse=True)
        return _at_least_float32(step.encoder.encode_text(texts))[which[:-1]] + zero_with_graph(step)


def text_numbers(tokens: Tensor) -> Tensor:
    """A number for each text [R, L] of all ranks, in rank order, that equal texts share: [G] int64.

    L has to be the same on every rank.
    """
    numbers: Tensor = torch.unique(gather_uneven_rows(tokens)[0], dim=0, return_inverse=True)[1]
    return numbers


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _drops_patches(part: nn.Module) -> bool:
    """Whether a part is open_clip's or timm's patch dropout, and on."""
    return type(part).__name__.startswith("PatchDropout") and bool(getattr(part, "prob", 0))
