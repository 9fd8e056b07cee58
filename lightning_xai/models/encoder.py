"""What attribution needs to know of a model: two towers that end in one space, each of which can be cut at a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.split import Split, TextSplit


class TwoTowerEncoder(nn.Module, ABC):
    """Two towers that embed a picture and a text in one space.

    The picture is an image, or whatever is laid out as one: the spectrogram of a sound. It is called image throughout.

    Attributes:
        tokenizer: captions -> token ids, characters -> tokens.
    """

    tokenizer: CaptionTokenizer

    @property
    @abstractmethod
    def logit_scale(self) -> Tensor:
        """The learned logarithm of the factor on cosine similarities, a scalar."""

    @property
    @abstractmethod
    def embedding_width(self) -> int:
        """K, the width of the shared space."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one input of the image tower."""

    @abstractmethod
    def black_image(self) -> Tensor:
        """What the image tower gets for a black image (a silent sound): [channels, height, width]."""

    @abstractmethod
    def pictures(self, images: Tensor) -> Tensor:
        """What a person is shown of images [B, channels, height, width]: colours in [0, 1], [B, 3, height, width]."""

    @abstractmethod
    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, channels, height, width] -> embeddings [B, K], not normalised."""

    @abstractmethod
    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, K], not normalised."""

    @abstractmethod
    def split_image(self, layer: int = -1) -> Split:
        """The image tower, cut at the input of block `layer`; negative numbers count from the end.

        Raises:
            ValueError: no such layer, or a tower of a kind that cannot be split.
        """

    @abstractmethod
    def split_text(self, layer: int = -1) -> TextSplit:
        """The text tower, likewise."""
