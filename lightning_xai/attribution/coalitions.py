"""Coalitions of patches and of tokens: which are shown, how likely each coalition is, and what stands for the absent.

Shape suffixes: N coalitions, F players (patches or tokens), L tokens, H x W the patch grid, h x w pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from lightning_xai.attribution.patch_grid import PatchGrid
from lightning_xai.attribution.perturbation import only_tokens
from lightning_xai.models.at_layer import UnsupportedTowerError
from lightning_xai.models.encoder import TwoTowerEncoder

__all__ = ["Coalitions", "ImageMasking", "TextMasking", "embed_without_tokens", "masked_images"]

ImageMasking = Literal["zeros", "mean", "blur"]
"""What absent patches show: zero after normalisation (silence for sounds), the image's mean colour, or it blurred."""
TextMasking = Literal["padding", "removed"]
"""Absent tokens are the padding token, or no token attends to them; the others keep their positions."""


@dataclass(frozen=True)
class Coalitions:
    """Weighted coalitions of players, each of which is present with probability p, independently.

    Attributes:
        present: [N, F] bool.
        weights: [N] float64, of sum 1: the coalitions' probabilities where all are listed, else equal.

    Example:
        >>> coalitions = Coalitions.draw(players=1, samples=2, p=0.25)
        >>> coalitions.present.tolist(), coalitions.weights.tolist()
        ([[False], [True]], [0.75, 0.25])
    """

    present: Tensor
    weights: Tensor

    @classmethod
    def draw(cls, players: int, samples: int, p: float, seed: int = 0) -> Coalitions:
        """All coalitions with their probabilities, where they are no more than `samples`, else so many drawn at random.

        Raises:
            ValueError: p is not between 0 and 1.
        """
        _check_probability(p)
        if players < 32 and 2**players <= samples:
            numbers = torch.arange(2**players)
            present = (numbers[:, None] >> torch.arange(players) & 1).bool()
            sizes = present.sum(dim=1).double()
            return cls(present, p**sizes * (1 - p) ** (players - sizes))
        return cls.sample(players, samples, p, seed)

    @classmethod
    def sample(cls, players: int, samples: int, p: float, seed: int = 0) -> Coalitions:
        """Coalitions that are drawn at random, also where there are few.

        Raises:
            ValueError: p is not between 0 and 1.
        """
        _check_probability(p)
        generator = torch.Generator().manual_seed(seed)
        present = torch.rand(samples, players, generator=generator) < p
        return cls(present, torch.full((samples,), 1 / samples, dtype=torch.float64))

    def regression(self, unit: str, option: str) -> Tensor:
        """The matrix [1 + F, N], float64, that takes values of the coalitions to their weighted least-squares fit.

        Row 0 gives the constant, row 1 + i the coefficient of player i: `(X' W X)^-1 X' W` with X the coalitions as
        zeros and ones after a column of ones.

        Args:
            unit: of players, for messages: "patches".
            option: the samples' name there: "image_samples".

        Raises:
            ValueError: the coalitions do not determine the coefficients.
        """
        samples, players = self.present.shape
        if samples < 1 + players:
            raise ValueError(
                f"{samples} coalitions do not determine the {1 + players} unknowns of {players} {unit}: raise {option} "
                f"to at least {1 + players}, better several times as many"
            )
        root_N1 = self.weights.sqrt().unsqueeze(1)
        design = torch.cat([torch.ones(samples, 1, dtype=torch.float64), self.present.double()], dim=1) * root_N1
        basis, triangle = torch.linalg.qr(design)
        pivots = triangle.diagonal().abs()
        if float(pivots.min()) < 1e-10 * float(pivots.max()):
            raise ValueError(
                f"{samples} coalitions of {players} {unit} leave some unknowns open, since a part is present, or "
                f"absent, in all of them: raise {option}, or take p nearer to 0.5"
            )
        solution: Tensor = torch.linalg.solve_triangular(triangle, basis.mT, upper=True)
        return solution * root_N1.mT


def _check_probability(p: float) -> None:
    if not 0 < p < 1:
        raise ValueError(f"p is the probability that a patch or token is present, between 0 and 1; got {p}")


def masked_images(encoder: TwoTowerEncoder, image: Tensor, present: Tensor, masking: ImageMasking) -> Tensor:
    """One image with some of its patches masked, [N, C, h, w].

    Args:
        encoder: of the image; it knows what no image looks like.
        image: [C, h, w].
        present: [N, H, W] bool, the patches that show.
        masking: what the others show.

    Raises:
        ValueError: an unknown masking.
    """
    rows, columns = grid = tuple(present.shape[1:])
    if masking == "zeros":
        absent = encoder.neutral_image().to(image)
    elif masking == "mean":
        absent = image.mean(dim=(1, 2), keepdim=True)
    elif masking == "blur":
        absent = _blurred(image, (image.shape[1] / rows, image.shape[2] / columns))
    else:
        raise ValueError(f"patches are masked by 'zeros', 'mean' or 'blur'; got {masking!r}")
    shown = PatchGrid((grid[0], grid[1])).spread(present.to(image.device), (image.shape[1], image.shape[2]))
    return torch.where(shown.unsqueeze(1), image, absent)


def _blurred(image: Tensor, patch: tuple[float, float]) -> Tensor:
    """The image under a Gaussian as wide as a patch, which leaves of a patch little but its colour."""
    # The kernel ends at two standard deviations, or where its mirrored borders would leave the image.
    sizes = [2 * min(math.ceil(2 * side), length - 1) + 1 for side, length in zip(patch, image.shape[1:], strict=True)]
    blurred: Tensor = gaussian_blur(image, [sizes[1], sizes[0]], [patch[1], patch[0]])
    return blurred


def embed_without_tokens(encoder: TwoTowerEncoder, tokens: Tensor, present: Tensor, masking: TextMasking) -> Tensor:
    """Embeddings [N, K] of one caption without some of its tokens.

    Args:
        encoder: the model.
        tokens: [L] token ids.
        present: [N, L] bool, the tokens that stay.
        masking: what becomes of the others.

    Raises:
        ValueError: an unknown masking.
        UnsupportedTowerError: a tower whose tokens cannot be removed from the attention.
    """
    masked = only_tokens(tokens, present, encoder.tokenizer.padding_id)
    if masking == "padding":
        return encoder.encode_text(masked)
    if masking != "removed":
        raise ValueError(f"tokens are masked by 'padding' or 'removed'; got {masking!r}")
    tower = encoder.text_at_layer(0)
    hidden_1TD = tower.features_before(tokens[None])
    present, masked = present[:, : hidden_1TD.shape[1]], masked[:, : hidden_1TD.shape[1]]
    if tower.causal:
        # Those that stay move together, with their positions; what follows the end is read by no token.
        order = (~present).to(torch.int64).argsort(dim=1, stable=True)
        return tower.embed_from(hidden_1TD[0][order], masked.gather(1, order))
    if bool((tower.visible(masked) & ~present).any()):
        raise UnsupportedTowerError(
            "this text tower attends to all positions, padding included, so that tokens cannot be removed: mask them "
            "by 'padding'"
        )
    return tower.embed_from(hidden_1TD.expand(len(masked), -1, -1), masked)
