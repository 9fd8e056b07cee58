"""M2IB: the part of each patch and token that has to pass for the pair to stay similar (M2IB paper, Eqs. 4-15).

A bottleneck after one block of a tower mixes its output f with noise, `z = h f + sigma (1 - h) eps` (Eq. 5), where
`h = sigmoid(lambda)` says how much of each feature is kept. For each pair and tower, lambda maximises (Eq. 15)

    mean over eps of cos(e_other, embed_from(z)) - beta * mean over tokens and features of KL,
    KL = KL(N(h f, sigma^2 (1 - h)^2) || N(0, 1)),

a fit less the price of what passes. The KL, in nats, bounds that: a token's attribution is its KL summed over features.

Where the paper leaves a choice, the published one is taken: lambda starts at 5, Adam, and a mean of the KL, not a sum;
beta is calibrated for that. What changes no number is dropped: earlier blocks and the other tower run once, not at
every step, and a caption's padding does not run at all. Nor does padding enter the mean over tokens.

Shape suffixes: B pairs, N noise samples, T tokens run (or positions of a feature map), D hidden width (or channels),
K embedding width, L tokens of a caption as given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid, pad

from lightning_xai.attribution.base import ImageComparison, check_finite
from lightning_xai.attribution.one_tower import AtLayerMethod, Input, Mapped
from lightning_xai.attribution.score import Score
from lightning_xai.models.at_layer import TowerAtLayer, UnsupportedTowerError, differentiable
from lightning_xai.models.encoder import TwoTowerEncoder

_START = 5.0  # lambda before the first step: 0.993 of every feature is kept


def capacity(features: Tensor, gates: Tensor, variance: float) -> Tensor:
    """The most that passes of each feature: KL(N(h f, variance (1 - h)^2) || N(0, 1)), h = sigmoid(gates).

    Args:
        features: f, of any shape.
        gates: lambda, of the same shape.
        variance: sigma squared.

    Returns:
        Nats, non-negative, of the same shape (the compression term of Eq. 8, for each feature).

    Example:
        >>> capacity(torch.tensor([0.0, 3.0]), torch.tensor([-40.0, -40.0]), 1.0).tolist()  # all is noise
        [0.0, 0.0]
    """
    # log(1 - h) = logsigmoid(-gates) stays finite where h is almost 1; expm1 keeps the digits where h is almost 0.
    log_variance = math.log(variance) + 2 * logsigmoid(-gates)
    return ((gates.sigmoid() * features).square() + log_variance.expm1() - log_variance) / 2


def bottleneck(features_BTD: Tensor, gates_BTD: Tensor, variance: float, noise_NTD: Tensor) -> Tensor:
    """Features mixed with noise, as Eq. 5 has it: h f + sigma (1 - h) eps, h = sigmoid(gates); [B, N, T, D]."""
    kept_BTD, deviation_BTD = gates_BTD.sigmoid() * features_BTD, math.sqrt(variance) * (-gates_BTD).sigmoid()
    return kept_BTD.unsqueeze(1) + deviation_BTD.unsqueeze(1) * noise_NTD


class M2IB(AtLayerMethod):
    """Multi-modal information bottleneck: nats that each patch and token passes on when all that is needless is gone.

    Maps are non-negative; more is more important. The image map sums the capacity of each patch over features, the text
    map that of each token, zero for padding that the model does not see. Prefix tokens such as CLS pass through the
    bottleneck too, and count in the compression, but have no place in the maps.

    For another target than the similarity, that takes the place of the cosine in the objective: what has to pass for
    the target to stay large.

    Every pair sees the same noise, drawn on the CPU again at each step.

    Args:
        encoder: the dual encoder to explain.
        beta: what a nat costs, in units of the similarity; larger compresses more.
        variance: sigma squared, the variance of the noise where nothing is kept.
        layer: the block whose *output* is compressed, counted as open_clip counts its blocks (negative from the end);
            one number for both towers, or one for the image tower and one for the text tower. None for three quarters
            of the way up, 9 of 12 blocks counted from 0 as published, and at least one block before the last. The last
            block itself serves in convolutional towers only.
        steps: values of lambda that are looked at, the first one included: the capacity is that after `steps - 1`
            updates, as published.
        samples: noise samples for each pair and step.
        lr: learning rate of Adam.
        seed: seed of the noise.
        internal_batch_size: pairs optimised at a time, None for all; bounds memory, changes no number.

    Raises:
        ValueError: beta, variance or lr is not positive, steps or samples less than one, a layer that the tower does
            not have or that nothing follows, an unsupported tower.
    """

    stochastic = True
    has_zero = False
    compares_images = True

    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        encoder: TwoTowerEncoder,
        *,
        beta: float = 0.1,
        variance: float = 1.0,
        layer: int | tuple[int | None, int | None] | None = None,
        steps: int = 10,
        samples: int = 10,
        lr: float = 1.0,
        seed: int = 0,
        internal_batch_size: int | None = None,
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        for name, number in (("beta", beta), ("variance", variance), ("lr", lr)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} has to be a positive number; got {number}")
        for name, count in (("steps", steps), ("samples", samples)):
            if count < 1:
                raise ValueError(f"{name} has to be at least 1; got {count}")
        image_layer, text_layer = layer if isinstance(layer, tuple) else (layer, layer)
        self.image = encoder.image_at_layer(_layer_after(image_layer, encoder.image_at_layer(), "image"))
        self.text = encoder.text_at_layer(_layer_after(text_layer, encoder.text_at_layer(), "text"))
        self.grid = self.image.grid
        self.beta, self.variance = beta, variance
        self.steps, self.samples, self.lr, self.seed = steps, samples, lr, seed

    def attribute_images(self, images: Tensor, others: Tensor, by: M2IB | None = None) -> ImageComparison:
        """Explain the similarity of two images, by a bottleneck in the image tower for each of them.

        Args:
            images: [B, 3, height, width].
            others: [B, 3, height, width]; other i is compared with image i.
            by: the method of an encoder that ends in the same space, if that is what the others are inputs of, such as
                sounds (appendix C of the paper). All of its options are taken for them.

        Raises:
            ValueError: shapes do not match, or a map is not finite.
        """
        by = by or self
        self._check_image_pair(images, others, by)
        with differentiable(self.encoder), differentiable(by.encoder):
            parts = [self._compare(images[rows], others[rows], by) for rows in self._chunks(len(images))]
        result = ImageComparison(*(torch.cat(part) for part in zip(*parts, strict=True)))
        for part, what in ((result.first, "first map"), (result.second, "second map")):
            check_finite(part, what, self.label)
        return result

    def _compare(self, images: Tensor, others: Tensor, by: M2IB) -> tuple[Tensor, Tensor, Tensor]:
        first, second = self._read_image(images), by._read_image(others)
        return (
            self._image_map(first, Score.cosine(second.embedding))[0],
            by._image_map(second, Score.cosine(first.embedding))[0],
            cosine_similarity(first.embedding, second.embedding, dim=1),
        )

    def _image_map(self, image: Input, score: Score) -> Mapped:
        hidden: Tensor = image.seen
        everything_BT = hidden.new_ones(len(hidden), self.image.count(hidden), dtype=torch.bool)
        return self.image.on_grid(self._nats(self.image, hidden, everything_BT, score)), None

    def _text_map(self, text: Input, score: Score) -> Mapped:
        tokens, hidden = text.batch, text.seen
        visible_BL = self.text.visible(tokens)
        # After the caption's own tokens there may be one that the tower adds, a class token: it is always seen.
        visible_BT = pad(visible_BL, (0, hidden.shape[1] - tokens.shape[1]), value=True)
        nats_BT = self._nats(self.text, hidden, visible_BT, score, tokens)
        return self.text.on_caption(nats_BT, tokens.shape[1]) * visible_BL, None

    def _nats(
        self, tower: TowerAtLayer, hidden: Tensor, visible_BT: Tensor, score: Score, tokens: Tensor | None = None
    ) -> Tensor:
        """The capacity of each token [B, T] after one tower's block, whose output is `hidden`."""
        features_BTD = hidden.flatten(2).mT if tower.is_feature_map else hidden
        # Half precision would lose Adam's small numbers.
        features_BTD = features_BTD.to(torch.promote_types(hidden.dtype, torch.float32))
        # The weight of a token's sum over features in the mean over visible tokens and features.
        weight_BT = visible_BT / (visible_BT.sum(dim=1, keepdim=True) * features_BTD.shape[2])
        length = features_BTD.shape[1]
        if tokens is not None:
            length = max(length, self.encoder.tokenizer.context_length)
        repeated = None if tokens is None else tokens.repeat_interleave(self.samples, dim=0)
        gates_BTD = torch.full_like(features_BTD, _START, requires_grad=True)
        optimizer = torch.optim.Adam([gates_BTD], lr=self.lr)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps - 1):
            # Drawn for the longest caption and shortened, so that a caption's noise does not depend on its neighbours'.
            noise_NTD = torch.randn(self.samples, length, features_BTD.shape[2], generator=generator)
            noise_NTD = noise_NTD[:, : features_BTD.shape[1]].to(features_BTD)
            passed = bottleneck(features_BTD, gates_BTD, self.variance, noise_NTD).flatten(0, 1).to(hidden.dtype)
            if tower.is_feature_map:
                passed = passed.mT.reshape(-1, *hidden.shape[1:])
            cost_BT = weight_BT * capacity(features_BTD, gates_BTD, self.variance).sum(dim=2)
            # A sum over pairs: each has its own gates, which Adam treats one by one.
            loss = self.beta * cost_BT.sum() - score(tower.embed_from(passed, repeated)).sum() / self.samples
            (gates_BTD.grad,) = torch.autograd.grad(loss, gates_BTD)
            optimizer.step()
        return capacity(features_BTD, gates_BTD.detach(), self.variance).sum(dim=2)


def _layer_after(layer: int | None, last: TowerAtLayer, tower: str) -> int:
    """The layer whose input is a block's output: the block's number (None: the default) and one more."""
    blocks = last.layers
    # After a transformer's last block there is no layer; after that of feature maps there is the head.
    followed = blocks if last.is_feature_map else blocks[:-1]
    if not followed:
        raise UnsupportedTowerError(
            f"M2IB needs a block after its bottleneck; the {tower} tower has {len(blocks)} only"
        )
    if layer is None:
        return blocks[max(0, min(3 * len(blocks) // 4, len(blocks) - 2))] + 1
    number = blocks.stop + layer if layer < 0 else layer
    if number not in followed:
        raise ValueError(
            f"layer is a block that another follows: {followed[0]} to {followed[-1]} of the {tower} tower's "
            f"{blocks[0]} to {blocks[-1]} (negative from the end); got {layer}"
        )
    return number + 1
