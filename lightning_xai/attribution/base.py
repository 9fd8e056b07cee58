"""What every attribution method returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Attribution:
    """Contributions of caption tokens and image patches to the similarity of B image-caption pairs.

    Attributes:
        pairs: [B, L, H, W], signed: how much token and patch together add to the similarity; zero behind a caption's
            last token. Units of the similarity.
        prefix: [B, L], the same for the image's prefix token (CLS); zero where the tower has none.
        similarity: [B], the cosine similarity that is explained, in [-1, 1].
        completeness_error: [B], sum of all attributions, CLS included, minus what they should sum to
            (Eq. 2 of the feature-pair paper); goes to zero with the number of integration steps.
    """

    pairs: Tensor
    prefix: Tensor
    similarity: Tensor
    completeness_error: Tensor

    @property
    def image(self) -> Tensor:
        """[B, H, W]: contribution of each patch with the whole caption."""
        return self.pairs.sum(dim=1)

    @property
    def text(self) -> Tensor:
        """[B, L]: contribution of each token with all patches."""
        return self.pairs.sum(dim=(2, 3))
