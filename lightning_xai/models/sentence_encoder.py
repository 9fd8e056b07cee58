"""Sentence encoders: a text tower alone, to explain why two texts are similar.

Shape suffixes: B texts, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.at_layer import TextTowerAtLayer, TowerAtLayer, UnsupportedTowerError
from lightning_xai.models.encoder import TwoTowerEncoder
from lightning_xai.models.hugging_face import HuggingFaceText, transformers_maker

__all__ = ["SentenceEncoder"]


def _sum(hidden_BTD: Tensor, seen_BT1: Tensor) -> Tensor:
    return (hidden_BTD * seen_BT1).sum(dim=1)


_POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda hidden_BTD, _: hidden_BTD[:, 0],
    "max": lambda hidden_BTD, seen_BT1: hidden_BTD.masked_fill(seen_BT1 == 0, -torch.inf).amax(dim=1),
    "mean": lambda hidden_BTD, seen_BT1: _sum(hidden_BTD, seen_BT1) / seen_BT1.sum(dim=1),
    "mean_sqrt_len_tokens": lambda hidden_BTD, seen_BT1: _sum(hidden_BTD, seen_BT1) / seen_BT1.sum(dim=1).sqrt(),
}
"""Hidden states [B, T, D] and which of their tokens are no padding [B, T, 1] -> [B, D]."""


class SentenceEncoder(TwoTowerEncoder):
    """A text tower without an image tower: `FeaturePairAttribution(encoder).attribute_texts` explains two texts.

    All that needs images raises an `UnsupportedTowerError`. `load_sentence_encoder` makes it of a folder.

    Args:
        transformer: a model of transformers with a list of blocks, such as a `BertModel`.
        pooling: how tokens become one embedding: cls, max, mean, mean_sqrt_len_tokens, or several of them in a row.
        layers: all that follows on the pooled embedding, but for a normalisation at the end: cosine similarity is the
            same without.
        tokenizer: of the transformer.

    Raises:
        UnsupportedTowerError: another pooling, or a transformer without a list of blocks.
        ValueError: the output is not finite.

    Attributes:
        transformer: as given; with `layers` the only parameters.
        pooling: as given.
        layers: as given.
    """

    has_image_tower = False

    def __init__(
        self, transformer: Any, pooling: Sequence[str], layers: nn.Sequential, tokenizer: CaptionTokenizer
    ) -> None:
        super().__init__()
        unknown = [mode for mode in pooling if mode not in _POOLING]
        if unknown or not pooling:
            raise UnsupportedTowerError(
                f"a sentence encoder that pools by {', '.join(unknown) or 'nothing'} is not supported; those that pool "
                f"by {', '.join(_POOLING)} are"
            )
        self.transformer = transformer
        self.pooling = tuple(pooling)
        self.layers = layers
        self.tokenizer = tokenizer
        self._text_tower = HuggingFaceText(
            transformer, transformer.config, tokenizer.padding_id, self._embed, pools=self.pooling != ("cls",)
        )
        self.text_at_layer()

    @property
    def name(self) -> str:
        """The transformer's type, and its folder."""
        return " ".join(filter(None, (self.transformer.config.model_type, self.transformer.config.name_or_path)))

    @property
    def logit_scale(self) -> Tensor:
        """0, for a factor of 1: a sentence encoder's cosine similarities are used as they are."""
        return next(self.parameters()).new_zeros(())

    @property
    def embedding_width(self) -> int:
        """K, the width of an embedding."""
        widths = [layer.out_features for layer in self.layers.modules() if isinstance(layer, nn.Linear)]
        return widths[-1] if widths else len(self.pooling) * int(self.transformer.config.hidden_size)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, K], not normalised; only as many tokens are run as are needed."""
        if not len(tokens):  # which BERT cannot reshape
            return self.logit_scale.new_zeros(0, self.embedding_width)
        return self._text_tower.encode(self._text_tower.trim(tokens))

    def _embed(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        hidden_BTD = self.transformer(input_ids=tokens, attention_mask=mask).last_hidden_state
        seen_BT1 = self._text_tower.visible(tokens)[..., None].to(hidden_BTD)
        embedding: Tensor = self.layers(torch.cat([_POOLING[mode](hidden_BTD, seen_BT1) for mode in self.pooling], 1))
        return embedding

    def _text_at_layer(self, layer: int) -> TextTowerAtLayer:
        return self._text_tower.at_layer(layer)

    @property
    def _maker(self) -> str:
        return transformers_maker()

    # Without an image tower there is none of these.

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Raise an UnsupportedTowerError."""
        self._without_images()

    def black_image(self) -> Tensor:
        """Raise an UnsupportedTowerError."""
        self._without_images()

    def read(self, source: Path | Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Raise an UnsupportedTowerError."""
        self._without_images()

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Raise an UnsupportedTowerError."""
        self._without_images()

    def pictures(self, images: Tensor) -> Tensor:
        """Raise an UnsupportedTowerError."""
        self._without_images()

    def encode_image(self, images: Tensor) -> Tensor:
        """Raise an UnsupportedTowerError."""
        self._without_images()

    def _image_at_layer(self, layer: int) -> TowerAtLayer:
        self._without_images()

    def _without_images(self) -> NoReturn:
        raise UnsupportedTowerError(
            f"the sentence encoder {self.name} has no image tower: it compares two texts (explain --caption TEXT "
            "--other-caption TEXT, or FeaturePairAttribution(encoder).attribute_texts)"
        )
