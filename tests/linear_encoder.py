"""An encoder whose cosine similarity is known in closed form, to hold attribution methods to.

Images and captions become unit vectors (s, sqrt(1 - s^2), 0) and (t, 0, sqrt(1 - t^2)), so that their cosine
similarity is s * t, where s is linear in the pixels and t in the token embeddings.
"""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.at_layer import TextTowerAtLayer, TowerAtLayer
from lightning_xai.models.encoder import TwoTowerEncoder


class _ImageAtLayer(TowerAtLayer):
    layer = 0
    block = None

    def __init__(self, encoder: LinearEncoder) -> None:
        self.grid = encoder.grid

    def features_before(self, inputs: Tensor) -> Tensor:
        return inputs

    def embed_from(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class _TextAtLayer(TextTowerAtLayer):
    layer = 0
    block = None

    def __init__(self, encoder: LinearEncoder) -> None:
        self._encoder = encoder

    def features_before(self, inputs: Tensor, length: int | None = None) -> Tensor:
        hidden: Tensor = self._encoder.token_embedding(inputs[:, :length])
        return hidden

    def embed_from(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        assert inputs is not None
        return self._encoder.embed_caption(hidden, inputs)

    def visible(self, tokens: Tensor) -> Tensor:
        return self._encoder.tokenizer.content_mask(tokens)


class LinearEncoder(TwoTowerEncoder):
    """s = <image_weight, pixels>; t = sum over content tokens of <text_weight, embedding>; others embed to zero."""

    def __init__(self, size: tuple[int, int] = (8, 12), grid: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        self.grid = grid
        self.tokenizer = CaptionTokenizer(open_clip.SimpleTokenizer(context_length=16))
        generator = torch.Generator().manual_seed(0)
        pixels, width = 3 * size[0] * size[1], 4
        self.image_weight = nn.Parameter(torch.randn(3, *size, generator=generator).double() / (10 * pixels**0.5))
        self.text_weight = nn.Parameter(torch.randn(width, generator=generator).double() / 40)
        self.token_embedding = nn.Embedding(49408, width, padding_idx=0).double()
        with torch.no_grad():
            self.token_embedding.weight.copy_(torch.randn(49408, width, generator=generator))
            start, end = self.tokenizer.encode(["a"])[0, [0, 2]].tolist()
            self.token_embedding.weight[[start, end, self.tokenizer.padding_id]] = 0

    @property
    def name(self) -> str:
        return "linear"

    @property
    def _maker(self) -> str:
        return "this file"

    def read(self, source: Path | Image.Image) -> tuple[Tensor, tuple[int, int]]:
        raise AssertionError("no test reads a file")

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        return boxes

    @property
    def logit_scale(self) -> Tensor:
        return self.image_weight.new_zeros(())

    @property
    def embedding_width(self) -> int:
        return 3

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.image_weight.shape
        return channels, height, width

    def black_image(self) -> Tensor:
        return torch.full(self.image_shape, -1.0)

    def pictures(self, images: Tensor) -> Tensor:
        return images

    def encode_image(self, images: Tensor) -> Tensor:
        s = (images * self.image_weight).sum(dim=(1, 2, 3))
        return torch.stack([s, (1 - s**2).sqrt(), torch.zeros_like(s)], dim=1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.embed_caption(self.token_embedding(tokens), tokens)

    def embed_caption(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        content = self.tokenizer.content_mask(tokens)[:, : hidden.shape[1]]
        t = ((hidden * self.text_weight).sum(dim=2) * content).sum(dim=1)
        return torch.stack([t, torch.zeros_like(t), (1 - t**2).sqrt()], dim=1)

    def _image_at_layer(self, layer: int) -> TowerAtLayer:
        return _ImageAtLayer(self)

    def _check(self, name: str, at: TowerAtLayer) -> None:
        """The similarity is defined for small inputs only, which the probe of a tower is not."""

    def _text_at_layer(self, layer: int) -> TextTowerAtLayer:
        return _TextAtLayer(self)

    def image_terms(self, images: Tensor) -> Tensor:
        """Each pixel's part of s [B, 3, height, width]."""
        return (images * self.image_weight).detach()

    def text_terms(self, tokens: Tensor) -> Tensor:
        """Each token's part of t [B, L]."""
        terms: Tensor = (self.token_embedding(tokens) * self.text_weight).sum(dim=2)
        return (terms * self.tokenizer.content_mask(tokens)).detach()
