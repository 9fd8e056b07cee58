"""Maps that know nothing of what the model sees: any real method has to beat them.

Shape suffixes: B pairs, L tokens, H x W the patch grid.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_xai.attribution.base import Attribution, AttributionMethod
from lightning_xai.models.encoder import TwoTowerEncoder


class RandomMap(AttributionMethod):
    """Uniform noise in [0, 1) for each patch and each content token; other tokens are zero.

    The noise is drawn from the pair's own image and caption and from `seed`, so that a pair gets the same map in any
    batch, and other pairs get others.

    Args:
        encoder: the model whose patches and tokens are meant.
        seed: another seed, other maps.
        internal_batch_size: images and captions that pass through a tower at a time (for the similarity), None for all.

    Raises:
        ValueError: an image tower that cannot be split.
    """

    stochastic = True
    baseline = True

    def __init__(self, encoder: TwoTowerEncoder, *, seed: int = 0, internal_batch_size: int | None = None) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        self.grid = encoder.image_at_layer().grid
        self._seed = seed

    def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        image_BK, text_BK = self._embeddings(images, tokens)
        content_BL = self.encoder.tokenizer.content_mask(tokens)
        image, text = image_BK.new_zeros(len(images), *self.grid), image_BK.new_zeros(tokens.shape)
        for row, content_L in enumerate(content_BL):
            generator = self._generator(images[row], tokens[row, content_L])
            image[row] = torch.rand(self.grid, generator=generator)
            text[row, content_L] = torch.rand(int(content_L.sum()), generator=generator).to(text)
        return Attribution(image, text, cosine_similarity(image_BK, text_BK))

    def _generator(self, image: Tensor, content: Tensor) -> torch.Generator:
        """A generator that the seed and the pair's content determine."""
        checksum = 0
        for part in (torch.tensor(self._seed), content, image.float()):
            checksum = zlib.crc32(part.cpu().numpy().tobytes(), checksum)
        return torch.Generator().manual_seed(checksum)


class CentredGaussian(AttributionMethod):
    """A Gaussian around the middle, the same for all images: what photographers' habits alone explain.

    The image map is isotropic in pixels and 1 in the exact centre; the text map is centred on the middle of the
    caption's content tokens and zero for other tokens.

    Args:
        encoder: the model whose patches and tokens are meant.
        width: standard deviation, as a part of the image's shorter side, and of the number of content tokens.
        internal_batch_size: images and captions that pass through a tower at a time (for the similarity), None for all.

    Raises:
        ValueError: a width that is not positive, or an image tower that cannot be split.
    """

    baseline = True

    def __init__(
        self, encoder: TwoTowerEncoder, *, width: float = 0.25, internal_batch_size: int | None = None
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        if not width > 0:
            raise ValueError(f"width has to be positive; got {width}")
        self.grid = encoder.image_at_layer().grid
        self._width = width

    def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        image_BK, text_BK = self._embeddings(images, tokens)
        image = self._image_map(images).to(image_BK).expand(len(images), -1, -1)
        return Attribution(image, self._text_maps(tokens).to(image_BK), cosine_similarity(image_BK, text_BK))

    def _image_map(self, images: Tensor) -> Tensor:
        sides = images.shape[2:]
        sigma = self._width * min(sides)
        rows_H, columns_W = (
            # Distances of the patches' centres from the middle, in pixels.
            torch.exp(-((((torch.arange(count) + 0.5) / count - 0.5) * side / sigma) ** 2) / 2)
            for count, side in zip(self.grid, sides, strict=True)
        )
        return torch.outer(rows_H, columns_W)

    def _text_maps(self, tokens: Tensor) -> Tensor:
        content_BL = self.encoder.tokenizer.content_mask(tokens)
        count_B1 = content_BL.sum(dim=1, keepdim=True).clamp(min=1)
        place_BL = content_BL.cumsum(dim=1) - 1
        distance_BL = (place_BL - (count_B1 - 1) / 2) / (self._width * count_B1)
        return content_BL * torch.exp(-(distance_BL**2) / 2)
