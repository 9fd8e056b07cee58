"""Dual encoders of Hugging Face's transformers: CLIP, SigLIP and their kin, and what CLAP shares with them.

Every tower is a list of blocks (`block_list`). Its own forward pass, as transformers wrote it, runs around the blocks,
so that nothing here knows how an architecture is built inside; the encoder checks each layer on a probe.

Shape suffixes: B batch, L tokens of a caption, T tokens run, K embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.at_layer import TextTowerAtLayer, TowerAtLayer, UnsupportedTowerError, evaluating
from lightning_xai.models.block_list import BlockList, ImageBlocksAtLayer, TextBlocksAtLayer
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.models.processor_transform import ProcessorTransform

__all__ = ["HuggingFaceEncoder", "HuggingFaceText", "transformers_maker"]

_CAUSAL = ("clip_text_model", "metaclip_2_text_model")
"""Text towers in which no token sees those after it, read at the first mark of the end."""
_UNMASKED = ("siglip_text_model", "siglip2_text_model")
"""Text towers that see padding, and are read at the last token, whatever it is."""
_LISTS = ("layers", "layer", "blocks", "block", "stages")
"""Attributes under which transformers keeps a tower's list of blocks."""

INTERPOLATED = frozenset({"clip", "siglip", "chinese_clip", "altclip", "metaclip_2"})
"""Types of models that take images of any size, for which transformers interpolates their positions."""
SIZELESS = frozenset({"siglip2", "align"})
"""Types whose image tower knows no size."""


class HuggingFaceText:
    """A text tower of transformers, which knows what its embeddings depend on.

    Args:
        tower: the text model, around its list of blocks.
        config: its configuration.
        padding_id: the token that fills up short captions.
        embed: token ids [B, T] and a mask of what is no padding, where the tower takes one -> embeddings [B, K].
        pools: whether embeddings are made of several tokens, instead of one position.
    """

    def __init__(
        self,
        tower: nn.Module,
        config: Any,
        padding_id: int,
        embed: Callable[[Tensor, Tensor | None], Tensor],
        *,
        pools: bool = False,
    ) -> None:
        self._tower, self._config, self._padding_id, self._embed = tower, config, padding_id, embed
        self._pools = pools
        self._causal, self._unmasked = (config.model_type in kinds for kinds in (_CAUSAL, _UNMASKED))

    def visible(self, tokens_BL: Tensor) -> Tensor:
        """The tokens that an embedding can depend on: bool [B, L]."""
        if self._unmasked:
            return torch.ones_like(tokens_BL, dtype=torch.bool)
        if not self._causal:
            return tokens_BL != self._padding_id
        positions = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        return positions <= self._read_at(tokens_BL)[:, None]

    def _read_at(self, tokens_BL: Tensor) -> Tensor:
        end = int(self._config.eos_token_id)
        if end == 2 and self._config.model_type == "clip_text_model":
            # Configurations from before the end's number was known; transformers reads these at the highest number.
            return tokens_BL.argmax(dim=1)
        return tokens_BL.eq(end).int().argmax(dim=1)

    def trim(self, tokens_BL: Tensor) -> Tensor:
        """The tokens [B, T] of [B, L] that are needed for this batch."""
        seen = self.visible(tokens_BL).any(dim=0).nonzero()
        return tokens_BL[:, : int(seen.max()) + 1] if len(seen) else tokens_BL[:, :1]

    def encode(self, tokens_BL: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, K], not normalised; all tokens are run, so `trim` them before."""
        masked = not (self._causal or self._unmasked)
        return self._embed(tokens_BL, self.visible(tokens_BL).long() if masked else None)

    def at_layer(self, layer: int) -> TextTowerAtLayer:
        """The tower at the input of a block; of its head where tokens are pooled."""
        blocks = _block_list(self._tower, "text")
        return TextBlocksAtLayer(
            self.encode,
            blocks,
            layer,
            self.visible,
            trims=not self._unmasked,
            causal=self._causal,
            pools=self._pools,
        )


class HuggingFaceEncoder(DualEncoder):
    """A dual encoder of transformers that carries tokenizer, image transform and architecture.

    `load_dual_encoder("hf:FOLDER")` makes it.

    Args:
        model: such as a `transformers.CLIPModel` or a `transformers.SiglipModel`.
        tokenizer: of its text tower.
        architecture: name, model and preprocessing configuration; plain values.
        transform: as its image processor.

    Raises:
        ValueError: a tower's output is not finite, or of another width than the other's.
    """

    image_transform: ProcessorTransform
    _text_tower: HuggingFaceText

    def __init__(
        self, model: Any, tokenizer: CaptionTokenizer, architecture: Mapping[str, Any], transform: ProcessorTransform
    ) -> None:
        self._image_tokens: int | None = None  # before the first block, found out once; 0 for feature maps
        super().__init__(model, tokenizer, architecture, transform)

    def _trimming_text_tower(self) -> HuggingFaceText:
        config = self.model.config.text_config
        return HuggingFaceText(self.model.text_model, config, self.tokenizer.padding_id, self._embed_text)

    @property
    def logit_scale(self) -> Tensor:
        """The learned logarithm of the factor on cosine similarities, a scalar."""
        if hasattr(self.model, "temperature"):  # ALIGN divides by it
            return -torch.log(self.model.temperature)
        return super().logit_scale.reshape(())

    def clamp_logit_scale(self, most: float) -> None:
        """Keep the factor on similarities between 1 and `most`, in place."""
        if not hasattr(self.model, "temperature"):
            super().clamp_logit_scale(most)
            return
        with torch.no_grad():
            self.model.temperature.clamp_(1 / most, 1.0)

    @property
    def embedding_width(self) -> int:
        """K, the width of the shared space."""
        config = self.model.config
        width = getattr(config, "projection_dim", None) or getattr(config.text_config, "projection_size", None)
        return int(width or config.text_config.hidden_size)

    def _enable_checkpointing(self) -> None:
        for name, tower in (("image", self.model.vision_model), ("text", self.model.text_model)):
            # In earlier releases of transformers not all towers are models on their own.
            owner = tower if hasattr(tower, "gradient_checkpointing_enable") else self.model
            if owner.supports_gradient_checkpointing:
                owner.gradient_checkpointing_enable({"use_reentrant": False})
            if not any(getattr(child, "gradient_checkpointing", False) for child in tower.modules()):
                raise UnsupportedTowerError(
                    f"the {name} tower, a {type(tower).__name__}, has no gradient checkpointing: set "
                    "gradient_checkpointing to false; chunk_size saves more memory than it does"
                )

    def _own_embedding(self, tower: str, inputs: Tensor) -> Tensor:
        return self._embed_image(inputs) if tower == "image" else self._text_tower.encode(inputs)

    def _embed_image(self, images: Tensor) -> Tensor:
        kind, own = self.model.config.model_type, getattr(self.model.config.vision_config, "image_size", None)
        if kind != "siglip2":
            more = {"interpolate_pos_encoding": True} if kind in INTERPOLATED and images.shape[2:] != (own, own) else {}
            return _features(self.model.get_image_features(pixel_values=images, **more))
        patches, grid = _patches(images, int(self.model.config.vision_config.patch_size))
        shapes = torch.tensor([grid], device=images.device).expand(len(images), -1)
        # No patch is padding, so that no mask is needed.
        return _features(
            self.model.get_image_features(pixel_values=patches, pixel_attention_mask=None, spatial_shapes=shapes)
        )

    def _embed_text(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return _features(self.model.get_text_features(input_ids=tokens, attention_mask=mask))

    def _image_at_layer(self, layer: int) -> TowerAtLayer:
        tower, blocks = _ImageTower(self), _block_list(self.model.vision_model, "image")
        size = self.image_transform.size
        if self._image_tokens is None:
            blank = next(self.parameters()).new_zeros(1, *self.image_shape)
            with torch.no_grad(), evaluating(self):
                hidden = blocks.reach(0, lambda: tower(blank))
            self._image_tokens = 0 if hidden.ndim == 4 else hidden.shape[1]
        if self._image_tokens == 0:
            return ImageBlocksAtLayer(tower, blocks, self.image_shape, layer, None)
        patch = getattr(self.model.config.vision_config, "patch_size", None)
        if patch is None:
            raise UnsupportedTowerError(
                f"an image tower of type {type(self.model.vision_model).__name__} is not supported: it has tokens, but "
                "no patch_size in its configuration that says where they are"
            )
        rows, columns = (
            pixels // step
            for pixels, step in zip(size, (patch, patch) if isinstance(patch, int) else patch, strict=True)
        )
        blocks = replace(blocks, prefix=self._image_tokens - rows * columns)
        return ImageBlocksAtLayer(tower, blocks, self.image_shape, layer, (rows, columns))

    def _text_at_layer(self, layer: int) -> TextTowerAtLayer:
        return self._text_tower.at_layer(layer)

    @property
    def _maker(self) -> str:
        return transformers_maker()


class _ImageTower(nn.Module):
    """An encoder as a module of images alone."""

    def __init__(self, encoder: HuggingFaceEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.encode_image(images)


def transformers_maker() -> str:
    """The library with its version, for messages."""
    return f"transformers {version('transformers')}"


def _features(output: Any) -> Tensor:
    """Embeddings of what `get_image_features` returns: before transformers 5 a tensor, then in an object."""
    embedding: Tensor = getattr(output, "pooler_output", output)
    return embedding


def _patches(images: Tensor, size: int) -> tuple[Tensor, tuple[int, int]]:
    """Images [B, 3, height, width] as rows of patches [B, T, size * size * 3], channels last, and their grid."""
    batch, channels, height, width = images.shape
    rows, columns = height // size, width // size
    cut = images.reshape(batch, channels, rows, size, columns, size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1), (rows, columns)


def _block_list(tower: nn.Module, name: str) -> BlockList:
    """The first list of blocks in a tower, from the outside.

    Raises:
        UnsupportedTowerError: there is none.
    """
    for parent in tower.modules():
        for attribute in _LISTS:
            if isinstance(getattr(parent, attribute, None), (nn.ModuleList, nn.Sequential)):
                return BlockList(parent, attribute)
    raise UnsupportedTowerError(
        f"an {name} tower of type {type(tower).__name__} is not supported: it has no list of {', '.join(_LISTS)}"
    )
