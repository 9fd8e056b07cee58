"""Images that stand for "nothing to see": methods compare an image with them, or show them in place of its parts."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_xai.models.encoder import TwoTowerEncoder

ImageReference = Literal["zeros", "black"]
"""Zero after normalisation, which is the mean colour of the training images; or black pixels. Silence for sounds."""


def reference_image(encoder: TwoTowerEncoder, reference: ImageReference) -> Tensor:
    """The reference as the encoder takes it: [channels, height, width], of its weights' type and device.

    Raises:
        ValueError: an unknown reference.
    """
    weight = next(encoder.parameters())
    if reference == "zeros":
        return encoder.neutral_image().to(weight)
    if reference == "black":
        return encoder.black_image().to(weight)
    raise ValueError(f"image_reference is 'zeros' or 'black'; got {reference!r}")
