"""Baselines: maps that ignore the model, which every real method has to beat.

Shape suffixes: B pairs, L tokens, H x W the patch grid.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_xai.attribution.base import Attribution
from lightning_xai.attribution.one_tower import Input, InputMethod, Mapped, OneTowerMethod, answer, similarities
from lightning_xai.attribution.score import Question, Score
from lightning_xai.models.encoder import TwoTowerEncoder


class RandomMap(InputMethod):
    """Uniform noise in [0, 1) for each patch and each content token; other tokens are zero.

    The noise is drawn from the pair's own image and caption and from `seed`, so that a pair gets the same map in any
    batch, and other pairs get others.

    Args:
        encoder: the model whose patches and tokens are meant.
        seed: another seed, other maps.
        internal_batch_size: images and captions that pass through a tower at a time (for the similarity), None for all.

    Raises:
        ValueError: an unsupported image tower.
    """

    stochastic = True
    baseline = True

    def __init__(self, encoder: TwoTowerEncoder, *, seed: int = 0, internal_batch_size: int | None = None) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        self.grid = encoder.image_at_layer().grid
        self._seed = seed

    def _explain(self, image: Input, texts: Sequence[Input], asked: Question) -> Attribution:
        maps_BHW = image.embedding.new_zeros(len(image.batch), *self.grid)
        text_maps = [image.embedding.new_zeros(text.batch.shape) for text in texts]
        for caption, (text, map_BL) in enumerate(zip(texts, text_maps, strict=True)):
            for row, content_L in enumerate(self.encoder.tokenizer.content_mask(text.batch)):
                generator = self._generator(image.batch[row], text.batch[row, content_L])
                image_HW = torch.rand(self.grid, generator=generator)
                if caption == 0:
                    maps_BHW[row] = image_HW
                map_BL[row, content_L] = torch.rand(int(content_L.sum()), generator=generator).to(map_BL)
        return answer(asked, similarities(image, texts), maps_BHW, text_maps)

    def _generator(self, image: Tensor, content: Tensor) -> torch.Generator:
        """A generator that the seed and the pair's content determine."""
        checksum = 0
        for part in (torch.tensor(self._seed), content, image.float()):
            checksum = zlib.crc32(part.cpu().numpy().tobytes(), checksum)
        return torch.Generator().manual_seed(checksum)


class CentredGaussian(OneTowerMethod):
    """A Gaussian around the middle, the same for all images: what photographers' habits alone explain.

    The image map is isotropic in pixels and 1 in the exact centre; the text map is centred on the middle of the
    caption's content tokens and zero for other tokens.

    Args:
        encoder: the model whose patches and tokens are meant.
        width: standard deviation, as a part of the image's shorter side, and of the number of content tokens.
        internal_batch_size: images and captions that pass through a tower at a time (for the similarity), None for all.

    Raises:
        ValueError: a width that is not positive, or an unsupported image tower.
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

    def _image_map(self, image: Input, score: Score) -> Mapped:
        sides = image.batch.shape[2:]
        sigma = self._width * min(sides)
        rows_H, columns_W = (
            # Distances of the patches' centres from the middle, in pixels.
            torch.exp(-((((torch.arange(count) + 0.5) / count - 0.5) * side / sigma) ** 2) / 2)
            for count, side in zip(self.grid, sides, strict=True)
        )
        map_HW = torch.outer(rows_H, columns_W).to(image.embedding)
        return map_HW.expand(len(image.batch), -1, -1), None

    def _text_map(self, text: Input, score: Score) -> Mapped:
        content_BL = self.encoder.tokenizer.content_mask(text.batch)
        count_B1 = content_BL.sum(dim=1, keepdim=True).clamp(min=1)
        place_BL = content_BL.cumsum(dim=1) - 1
        distance_BL = (place_BL - (count_B1 - 1) / 2) / (self._width * count_B1)
        return (content_BL * torch.exp(-(distance_BL**2) / 2)).to(text.embedding), None
