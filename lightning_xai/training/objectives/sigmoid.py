"""SigLIP's objective: every pair of the global batch is judged alone (Zhai et al. 2023, Eq. 1).

Shapes: B rows on this rank, W ranks, K embedding width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lightning_xai.loss import (
    check_features,
    gather_rows,
    known_features,
    own_is_largest,
    rank_and_world,
    sum_over_ranks,
)
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.models.hugging_face import HuggingFaceEncoder
from lightning_xai.training.objectives.base import Objective, Step, Term

__all__ = ["Sigmoid", "sigmoid_loss"]

_LINEAR = 50.0  # logits above it are their own softplus, exactly in float64; torch's 20 is off by 2e-9


def sigmoid_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Judge each pair of the images and captions of all ranks: `-log sigmoid(z (scale * cos + bias))`.

    z is 1 for an image with its own caption and -1 elsewhere. Each rank compares its images with all captions, so that
    its memory grows with B x W * B. As for `global_contrastive_loss`, averaged gradients are those of one process that
    has all rows, and invalid rows are neither examples nor negatives.

    Args:
        image_features: [B, K], unit length; the same B on every rank (pad with invalid rows).
        text_features: [B, K], unit length.
        logit_scale: scalar factor of the cosine similarities (the exponential already taken).
        logit_bias: scalar, added to each logit.
        valid: [B] bool.

    Returns:
        The loss in nats (lower is better), summed over all pairs and divided by the number of valid rows, the same on
        every rank; and the accuracy in [0, 1] (higher is better, no gradient): the share of valid images whose own
        caption is more similar than every other one. Without any valid row a zero that has a graph, and NaN.

    Raises:
        ValueError: the shapes do not fit each other.

    Example:
        >>> features = torch.eye(2)
        >>> loss, accuracy = sigmoid_loss(
        ...     features, features, torch.tensor(10.0), torch.tensor(-5.0), torch.tensor([True, True])
        ... )
        >>> round(loss.item(), 6), accuracy.item()  # 2 log(1 + exp(-5))
        (0.013431, 1.0)
    """
    valid = check_features(image_features, text_features, valid)
    rank, _ = rank_and_world()
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = known_features(image_features, text_features, valid)
        rows = gather_rows(torch.cat([text, valid[:, None].to(text.dtype)], dim=1))
        texts, everyone = rows[:, :-1], rows[:, -1].detach() > 0.5
        # One matrix is changed in place up to the softplus, which is all that keeps it for the backward pass.
        logits = torch.addmm(logit_bias.to(image.dtype).reshape(()), logit_scale.to(image.dtype) * image, texts.T)
        logits.masked_fill_(~(valid[:, None] & everyone[None]), -torch.inf)
        first = rank * len(valid)
        right = own_is_largest(logits.detach(), first + torch.arange(len(valid), device=valid.device)) & valid
        # -log sigmoid(x) of an image with its caption is softplus(-x). Where there is no image, softplus(-inf) is zero.
        logits.diagonal(first).neg_().masked_fill_(~valid, -torch.inf)
        loss = softplus(logits, threshold=_LINEAR).sum()
        loss, hits = sum_over_ranks(torch.stack([loss, right.sum().to(loss.dtype)]))
        count = everyone.sum()
        return loss / count.clamp(min=1), hits.detach() / count


class Sigmoid(Objective):
    """Judge every pair of an image and a caption of the global batch by itself (SigLIP, Zhai et al. 2023).

    See `sigmoid_loss`; also logs `train/accuracy` (of images among captions) and `train/logit_bias`. Validation's
    `val/loss` stays the softmax's, so that runs compare.

    A model without a `logit_bias` was not trained with this objective: it gets one, and starts with the bias and the
    scale that are given here. One that has a bias keeps both.

    Args:
        weight: factor on the term in the loss.
        initial_bias: of a model that has none.
        initial_scale: factor on similarities, of a model without a bias; null: as the model brings it.

    Raises:
        ValueError: a weight or a scale that is not positive; in `prepare`: a model that cannot get a bias.
    """

    name = "sigmoid"
    trains_logit_bias = True

    def __init__(self, *, weight: float = 1.0, initial_bias: float = -10.0, initial_scale: float | None = 10.0) -> None:
        super().__init__(weight=weight)
        if not math.isfinite(initial_bias) or not 0 < (1.0 if initial_scale is None else initial_scale) < math.inf:
            raise ValueError(
                "initial_bias has to be finite and initial_scale positive and finite, or null; got "
                f"{initial_bias} and {initial_scale}"
            )
        self.initial_bias = initial_bias
        self.initial_scale = initial_scale

    def prepare(self, encoder: DualEncoder) -> None:
        """Give a model of open_clip a bias, if it has none."""
        if encoder.logit_bias is not None:
            return
        if isinstance(encoder, HuggingFaceEncoder) or "embed_dim" not in encoder.architecture["model_cfg"]:
            raise ValueError(
                f"{encoder.name} has no logit_bias, which the objective sigmoid trains, and its class has no place for "
                "one: take a SiglipModel or a model of open_clip, or the objective Softmax"
            )
        scale = encoder.logit_scale
        encoder.model.logit_bias = nn.Parameter(torch.full_like(scale.detach(), self.initial_bias))
        # So that checkpoints and exports are built with a bias.
        encoder.architecture["model_cfg"]["init_logit_bias"] = self.initial_bias
        if self.initial_scale is not None:
            with torch.no_grad():
                scale.fill_(math.log(self.initial_scale))

    def __call__(self, step: Step) -> Term:
        """Compute the loss in nats and the accuracy in [0, 1]."""
        bias = step.encoder.logit_bias
        assert bias is not None, "prepare has given the model one"
        loss, accuracy = sigmoid_loss(step.image, step.text, step.scale, bias, step.batch.valid)
        return Term(loss, {"accuracy": accuracy, "logit_bias": bias.detach().reshape(())})
