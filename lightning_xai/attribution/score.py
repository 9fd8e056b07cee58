"""A target as a function of one embedding, of the image or of a caption, with all others as they are.

Shape suffixes: B pairs, N embeddings for each, C captions (the pair's own first), M others, L tokens,
J directions: all captions for an image, the image for a caption; K embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from lightning_xai.attribution.targets import SIMILARITY, PairSimilarities, Similarity, Target
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.encoder import TwoTowerEncoder

__all__ = ["Question", "Score"]


@dataclass(frozen=True)
class Score:
    """The target by one embedding of each pair; see `Question.score_of_image` and `score_of_caption`.

    Attributes:
        target: what is explained.
        directions: [B, J, K] what the embedding is compared with, not normalised.
        pair: similarities as they are, [B, C].
        caption: the place of the caption whose embedding it is; None for the image's, on which all depend.
        sign: -1 for the target's negative.
    """

    target: Target
    directions: Tensor
    pair: PairSimilarities
    caption: int | None = None
    sign: int = 1

    @classmethod
    def cosine(cls, other_BK: Tensor) -> Score:
        """The cosine similarity with one embedding for each pair."""
        one = other_BK.new_ones(len(other_BK), 1)
        return cls(SIMILARITY, other_BK[:, None], PairSimilarities(one, one.bool(), one.new_ones(())))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """The target [B * N] of embeddings [B * N, K], N in a row for each pair."""
        return self.each(embeddings.reshape(len(self.directions), -1, embeddings.shape[1])).flatten()

    def each(self, embeddings_BNK: Tensor) -> Tensor:
        """The target [B, N] of each embedding."""
        embeddings_BNK = embeddings_BNK.to(self.directions)
        return self.of(cosine_similarity(embeddings_BNK[:, :, None], self.directions[:, None], dim=3))

    def of(self, cosines_BNJ: Tensor) -> Tensor:
        """The target [B, N] of cosines with the directions."""
        pair = replace(self.pair, values=self.pair.values[:, None], counted=self.pair.counted[:, None])
        if self.caption is not None:
            fixed = pair.values.to(cosines_BNJ).expand(-1, cosines_BNJ.shape[1], -1)
            before, after = fixed[..., : self.caption], fixed[..., self.caption + 1 :]
            cosines_BNJ = torch.cat([before, cosines_BNJ, after], dim=2)
        return self.sign * self.target.value(cosines_BNJ, pair)

    def __getitem__(self, rows: slice | Tensor) -> Score:
        """Of some pairs, in any order."""
        pair = replace(self.pair, values=self.pair.values[rows], counted=self.pair.counted[rows])
        return replace(self, directions=self.directions[rows], pair=pair)


@dataclass(frozen=True)
class Question:
    """What is asked of B pairs: the target, and the captions that it compares.

    Attributes:
        target: what is explained.
        tokens: [B, L] the pairs' own captions.
        others: [B, M, L'] the other captions; None for a target that has none.
        counted: [B, C] bool; see `PairSimilarities`.
        scale: the model's factor on similarities, a scalar.
    """

    target: Target
    tokens: Tensor
    others: Tensor | None
    counted: Tensor
    scale: Tensor

    @classmethod
    def of(cls, target: Target, encoder: TwoTowerEncoder, tokens: Tensor) -> Question:
        """Read a target's captions as the model does.

        Raises:
            ValueError: another caption has no token, or is the pair's own to the model.
        """
        others, counted = None, tokens.new_ones(len(tokens), 1, dtype=torch.bool)
        if len(target.others):
            others, counted = _encoded(target, encoder.tokenizer, tokens)
        return cls(target, tokens, others, counted, encoder.logit_scale.detach().exp())

    @property
    def is_similarity(self) -> bool:
        """True for the similarity alone, which every method explains."""
        return type(self.target) is Similarity

    @property
    def captions(self) -> list[Tensor]:
        """Token ids [B, L] of the pairs' own captions, then [B, L'] of each other one."""
        return [self.tokens, *(() if self.others is None else self.others.unbind(dim=1))]

    def __getitem__(self, rows: slice) -> Question:
        others = None if self.others is None else self.others[rows]
        return replace(self, tokens=self.tokens[rows], others=others, counted=self.counted[rows])

    def pair(self, similarities_BC: Tensor) -> PairSimilarities:
        """The similarities with all captions, as they are."""
        return PairSimilarities(similarities_BC.detach(), self.counted, self.scale)

    def coefficients(self, similarities_BC: Tensor) -> Tensor:
        """What a linear target is made of: the factor [B, C] of each similarity."""
        pair = self.pair(similarities_BC)
        unit = torch.eye(similarities_BC.shape[1]).to(similarities_BC).expand(len(similarities_BC), -1, -1)
        every = replace(pair, values=pair.values[:, None], counted=pair.counted[:, None])
        return self.target.value(unit, every)

    def score_of_image(self, texts: Sequence[Tensor], pair: PairSimilarities) -> Score:
        """The target by the image's embedding; texts are embeddings [B, K] of `captions`."""
        return Score(self.target, torch.stack(list(texts), dim=1), pair)

    def score_of_caption(self, image_BK: Tensor, pair: PairSimilarities, caption: int, *, signed: bool) -> Score:
        """The target by a caption's embedding.

        For a method that knows no sign and another caption than the pair's own, its negative: what speaks for the other
        caption speaks against the target.
        """
        return Score(self.target, image_BK[:, None], pair, caption, -1 if caption and not signed else 1)


def _encoded(target: Target, tokenizer: CaptionTokenizer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [B, M, L'] of the other captions of each pair, and what counts [B, C]."""
    kept: list[Tensor] = []
    for row, captions in enumerate(target.of_pairs(len(tokens))):
        ids = tokenizer.encode(captions).to(tokens.device)
        same = (ids == _of_length(tokens[row], ids.shape[1], tokenizer.padding_id)).all(dim=1)
        empty = ~tokenizer.content_mask(ids).any(dim=1)
        for caption, is_same, is_empty in zip(captions, same.tolist(), empty.tolist(), strict=True):
            if is_empty:
                raise ValueError(f"nothing of the other caption {caption!r} is left by the tokenizer")
            if is_same and not target.may_hold_caption:
                raise ValueError(
                    f"the other caption {caption!r} of pair {row} is the same as its own to the model, which reads "
                    f"{tokenizer.context_length} tokens: give another one, or one that differs in its first words"
                )
        if bool(same.all()):
            raise ValueError(f"the only candidate of pair {row} is its own caption: give at least one other")
        kept.append(ids[~same])
    most = max(map(len, kept))
    # What fills up is any caption; it does not count.
    others = torch.stack([torch.cat([ids, ids[:1].expand(most - len(ids), -1)]) for ids in kept])
    counts = torch.tensor([1 + len(ids) for ids in kept], device=tokens.device)
    return others, torch.arange(1 + most, device=tokens.device) < counts[:, None]


def _of_length(ids: Tensor, length: int, padding_id: int) -> Tensor:
    """Token ids of a caption [L], with as much padding as that makes it."""
    return pad(ids[:length], (0, length - len(ids[:length])), value=padding_id)
