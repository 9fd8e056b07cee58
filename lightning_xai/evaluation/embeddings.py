"""A model's embeddings of a batch, and of parts of its images and captions, which all methods of an item share.

Shape suffixes: B images, C captions, N parts (coalitions), F patches or tokens, H x W the patch grid, L tokens, K
embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_xai.attribution.coalitions import Coalitions, embed_without_tokens, masked_images
from lightning_xai.attribution.perturbation import wide_dtype
from lightning_xai.data.batch import Batch
from lightning_xai.models.encoder import TwoTowerEncoder

__all__ = ["EmbeddedCoalitions", "Embeddings"]

_OTHER_SEED = 2**31  # what a method is measured with is nothing that it has drawn itself from a seed of that number
_Chunks = Callable[[int], Iterator[slice]]


@dataclass(frozen=True)
class EmbeddedCoalitions:
    """Random parts of the images, or of the captions, of a batch, the empty one first, and their unit embeddings.

    Attributes:
        present: the patches that show of each image, [B, N, H, W] bool, the same ones of each; or the tokens that stay
            of each caption, [C, N, L] bool, of which those that are no words always do.
        embeddings: [B, N, K] or [C, N, K].
    """

    present: Tensor
    embeddings: Tensor


@dataclass(frozen=True)
class Embeddings:
    """A model's embeddings of a batch, to compare with those of what is kept of it.

    Attributes:
        encoder: the model.
        image_BK: of the images.
        text_CK: of the captions.
    """

    encoder: TwoTowerEncoder
    image_BK: Tensor
    text_CK: Tensor
    _coalitions: dict[object, EmbeddedCoalitions] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, encoder: TwoTowerEncoder, batch: Batch) -> Embeddings:
        """Embed a batch."""
        return cls(encoder, encoder.encode_image(batch.images), encoder.encode_text(batch.tokens))

    @torch.no_grad()
    def of_parts(self, item: Tensor, present: Tensor, chunks: _Chunks) -> Tensor:
        """Unit embeddings [N, K] of parts of one image or caption.

        Args:
            item: image [channels, height, width], or token ids [L].
            present: the patches that show [N, H, W], others being zero after normalisation; or the tokens that stay
                [N, L], others being padding.
            chunks: a number of things -> slices of them that pass through a tower at a time.
        """
        embeddings_NK = torch.cat([self._masked(item, present[rows]) for rows in chunks(len(present))])
        return normalize(embeddings_NK.to(wide_dtype(embeddings_NK)), dim=1)

    def _masked(self, item: Tensor, present: Tensor) -> Tensor:
        if item.ndim == 1:
            return embed_without_tokens(self.encoder, item, present, "padding")
        return self.encoder.encode_image(masked_images(self.encoder, item, present, "zeros"))

    def image_coalitions(
        self, batch: Batch, grid: tuple[int, int], count: int, p: float, seed: int, chunks: _Chunks
    ) -> EmbeddedCoalitions:
        """Draw and embed coalitions of patches; the same ones for all metrics and methods on one grid.

        Args:
            batch: that these embeddings are of; it has captions.
            grid: rows and columns of patches.
            count: of coalitions.
            p: the probability that a patch is present.
            seed: of the draws.
            chunks: as for `of_parts`.
        """

        def embed() -> EmbeddedCoalitions:
            shown_NF = Coalitions.sample(grid[0] * grid[1], count, p, _OTHER_SEED + seed).present
            shown_NHW = torch.cat([torch.zeros_like(shown_NF[:1]), shown_NF]).reshape(-1, *grid)
            shown_NHW = shown_NHW.to(batch.images.device)
            found = torch.stack([self.of_parts(image, shown_NHW, chunks) for image in batch.images])
            return EmbeddedCoalitions(shown_NHW.expand(len(found), -1, -1, -1), found)

        return self._once(("image", grid, count, p, seed), embed)

    def text_coalitions(self, batch: Batch, count: int, p: float, seed: int, chunks: _Chunks) -> EmbeddedCoalitions:
        """Draw and embed coalitions of tokens; the same ones for all metrics and methods. See `image_coalitions`."""

        def embed() -> EmbeddedCoalitions:
            content_CL = self.encoder.tokenizer.content_mask(batch.tokens)
            said_CNL = (~content_CL).unsqueeze(1).repeat(1, 1 + count, 1)
            for caption, content_L in enumerate(content_CL):
                drawn = Coalitions.sample(int(content_L.sum()), count, p, _OTHER_SEED + seed).present
                said_CNL[caption, 1:, content_L] = drawn.to(content_L.device)
            parts = zip(batch.tokens, said_CNL, strict=True)
            return EmbeddedCoalitions(
                said_CNL, torch.stack([self.of_parts(tokens, said, chunks) for tokens, said in parts])
            )

        return self._once(("text", count, p, seed), embed)

    def _once(self, asked: object, embed: Callable[[], EmbeddedCoalitions]) -> EmbeddedCoalitions:
        if asked not in self._coalitions:
            self._coalitions[asked] = embed()
        return self._coalitions[asked]
