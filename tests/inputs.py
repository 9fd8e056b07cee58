"""Pairs of an image and a caption for tests of attribution methods."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_xai.models.encoder import TwoTowerEncoder

CAPTIONS = ("a dog on a red mat", "two cats", "one very long caption of eleven or more tokens here")


def random_pairs(encoder: TwoTowerEncoder, captions: Sequence[str] = CAPTIONS) -> tuple[Tensor, Tensor]:
    """One image of noise for each caption: images [B, channels, height, width] and tokens [B, L]."""
    weight = next(encoder.parameters())
    images = torch.randn(len(captions), *encoder.image_shape, generator=torch.Generator().manual_seed(1)).to(weight)
    return images, encoder.tokenizer.encode(list(captions))


def batch_sizes(encoder: TwoTowerEncoder, encode: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that fills up with the number of inputs of each call of the encoder's method of that name."""
    sizes: list[int] = []
    plain = getattr(encoder, encode)

    def recorded(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        embedding: Tensor = plain(batch)
        return embedding

    monkeypatch.setattr(encoder, encode, recorded)
    return sizes
