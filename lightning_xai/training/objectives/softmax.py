"""CLIP's objective: a softmax over the global batch, in both directions."""

from __future__ import annotations

from lightning_xai.loss import global_contrastive_loss
from lightning_xai.training.objectives.base import Objective, Step, Term

__all__ = ["Softmax"]


class Softmax(Objective):
    """Match every image to its caption and every caption to its image among those of all ranks (Radford et al. 2021).

    See `global_contrastive_loss`; also logs `train/accuracy`.
    """

    name = "softmax"

    def __call__(self, step: Step) -> Term:
        """Compute the loss in nats and the accuracy in [0, 1]."""
        loss, accuracy = global_contrastive_loss(step.image, step.text, step.scale, step.batch.valid)
        return Term(loss, {"accuracy": accuracy})
