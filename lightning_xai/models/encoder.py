"""The model as attribution sees it: two towers that end in one space, each of which can be taken at a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, pad

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.at_layer import (
    TextTowerAtLayer,
    TowerAtLayer,
    UnsupportedTowerError,
    differentiable,
    evaluating,
    foreign_hooks,
    module_without_gradient,
)
from lightning_xai.models.block_list import ImageBlocksAtLayer, TextBlocksAtLayer
from lightning_xai.photo import PhotoGeometry


class TwoTowerEncoder(nn.Module, ABC):
    """Two towers that embed a picture and a text in one space.

    The picture is an image, or whatever is laid out as one: the spectrogram of a sound. It is called image throughout.

    Attributes:
        tokenizer: captions -> token ids, characters -> tokens.
        has_image_tower: False for an encoder of texts alone, where all that needs images raises an
            `UnsupportedTowerError`.
    """

    tokenizer: CaptionTokenizer
    has_image_tower: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        # Towers at a layer that agreed with the model, while it had this structure.
        self._checked: set[tuple[str, int]] = set()
        self._structure: list[tuple[int, int]] = []

    @property
    @abstractmethod
    def name(self) -> str:
        """The architecture, as its library calls it."""

    @property
    @abstractmethod
    def logit_scale(self) -> Tensor:
        """The learned logarithm of the factor on cosine similarities, a scalar."""

    @property
    @abstractmethod
    def embedding_width(self) -> int:
        """K, the width of the shared space."""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """All that decides which input is made of a file, as plain values; empty where nothing is known of it."""
        return {}

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one input of the image tower."""

    @abstractmethod
    def black_image(self) -> Tensor:
        """The image tower's input for a black image (a silent sound): [channels, height, width]."""

    def neutral_image(self) -> Tensor:
        """The input that says least, [channels, height, width]: zeros, the mean colour, unless a tower knows better."""
        return torch.zeros(self.image_shape)

    @abstractmethod
    def read(self, source: Path | Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """One input [channels, height, width] from a file, and the (width, height) in which its boxes are given.

        Args:
            source: the file, or for encoders of images an image.

        Raises:
            OSError: the file cannot be read.
            ValueError: it does not decode, or is of a kind that the model does not take.
        """

    def reading(self, path: Path) -> TwoTowerEncoder:
        """The encoder that reads a file: this one, unless the model has another image tower for files of its kind."""
        return self

    @abstractmethod
    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes in the coordinates of an input.

        Args:
            boxes: [N, 4] as (x, y, width, height), as `read` gives their `size`.
            size: (width, height).

        Returns:
            [N, 4] as (x0, y0, x1, y1) in the input's pixels, clipped to the visible part; of area 0 if nothing is left.
        """

    def geometry(self, size: tuple[int, int]) -> PhotoGeometry | None:
        """Where an input lies on a file's picture of (width, height); None for files that are no pictures."""
        return None

    def seen(self, size: tuple[int, int]) -> float:
        """The share, in (0, 1], of a file's picture of (width, height) that an input holds; 1 if nothing is cut."""
        geometry = self.geometry(size)
        return 1.0 if geometry is None else geometry.seen

    @abstractmethod
    def pictures(self, images: Tensor) -> Tensor:
        """Images [B, channels, height, width] as a person sees them: colours in [0, 1], [B, 3, height, width]."""

    @abstractmethod
    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, channels, height, width] -> embeddings [B, K], not normalised."""

    @abstractmethod
    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, K], not normalised."""

    def image_at_layer(self, layer: int = -1) -> TowerAtLayer:
        """The image tower at the input of block `layer`, counted as its library counts them; -1 is the last.

        Raises:
            ValueError: no such layer, an unsupported tower, or one whose layers do not give its own output again.
        """
        tower = self._image_at_layer(layer)
        self._hand_out("image", tower)
        return tower

    def text_at_layer(self, layer: int = -1) -> TextTowerAtLayer:
        """The text tower, likewise."""
        tower = self._text_at_layer(layer)
        self._hand_out("text", tower)
        return tower

    @torch.no_grad()
    def own_similarity(self, images: Tensor, tokens: Tensor) -> Tensor:
        """The cosine similarity [B] of B images and captions by the model's own functions, wrapped as they may be."""
        # They take captions of the full length only.
        missing = max(0, self.tokenizer.context_length - tokens.shape[1])
        whole = pad(tokens, (0, missing), value=self.tokenizer.padding_id) if missing else tokens
        return cosine_similarity(self._own_embedding("image", images), self._own_embedding("text", whole))

    def structure(self) -> list[tuple[int, int]]:
        """What changes where modules or hooks are added, replaced or removed; weights may change."""
        return [(id(module), len(foreign_hooks(module))) for module in self.modules()]

    def check_tower(self, tower: TowerAtLayer) -> None:
        """Compare a tower that was taken from this encoder with the model as it stands.

        Raises:
            ValueError: the model computes another function.
        """
        self._check("text" if isinstance(tower, TextTowerAtLayer) else "image", tower)

    def _hand_out(self, name: str, tower: TowerAtLayer) -> None:
        structure = self.structure()
        if structure != self._structure:
            self._checked.clear()
            self._structure = structure
        if (name, tower.layer) not in self._checked:
            self._check(name, tower)
            self._checked.add((name, tower.layer))

    @abstractmethod
    def _image_at_layer(self, layer: int) -> TowerAtLayer:
        """`image_at_layer`, not yet checked."""

    @abstractmethod
    def _text_at_layer(self, layer: int) -> TextTowerAtLayer:
        """`text_at_layer`, not yet checked."""

    @property
    @abstractmethod
    def _maker(self) -> str:
        """The library that built the towers, with its version."""

    def _own_embedding(self, name: str, inputs: Tensor) -> Tensor:
        """The embedding that `embed_from(features_before(x))` has to equal."""
        return self.encode_image(inputs) if name == "image" else self.encode_text(inputs)

    @torch.no_grad()
    def _probe(self, name: str) -> tuple[Tensor, Tensor]:
        """One input of a tower and its embedding, which has to be a point of the shared space."""
        weight = next(self.parameters())
        if name == "image":
            generator = torch.Generator().manual_seed(0)
            inputs = torch.randn(1, *self.image_shape, generator=generator).to(weight)
        else:
            inputs = self.tokenizer.encode(["a probe of two towers"]).to(weight.device)
        with evaluating(self):
            embedding = self._own_embedding(name, inputs)
        if embedding.shape[-1] != self.embedding_width:
            raise ValueError(
                f"the {name} tower ends in a space of width {embedding.shape[-1]}, but the model's embed_dim is "
                f"{self.embedding_width}; both towers have to end in one space, so set embed_dim to that width or let "
                "the tower end in a projection"
            )
        if not embedding.isfinite().all():
            raise ValueError(f"the {name} tower's output is not finite: its weights hold NaN or infinity")
        if not embedding.any():
            raise ValueError(f"the {name} tower's output is zero: its projection's weights are all zero")
        return inputs, embedding

    @torch.no_grad()
    def _check(self, name: str, at: TowerAtLayer) -> None:
        """Refuse a tower that is another one at this layer: attributions would explain another model."""
        if any(hasattr(parameter, "to_local") for parameter in self.parameters()):
            return  # sharded after it was checked: parts of it cannot run on their own, outside its forward pass
        inputs, embedding = self._probe(name)
        with evaluating(self):
            hidden = at.features_before(inputs)
            tokens, (rows, columns) = at.count(hidden), at.grid
            if name == "image" and tokens != at.prefix_tokens + rows * columns:
                raise UnsupportedTowerError(
                    f"the image tower passes on {tokens} tokens at layer {at.layer}, not {at.prefix_tokens} and "
                    f"a grid of {rows} x {columns}, so that no token has a place in the image"
                )
        with differentiable(self):
            stop = module_without_gradient(self, lambda leaf: at.embed_from(leaf, inputs), hidden)
        if stop is not None:
            kind = type(self.get_submodule(stop)).__name__
            raise UnsupportedTowerError(
                f"{stop or 'the model'}, a {kind} in the {name} tower, passes on no gradient, so nothing before it "
                "can be explained: load the model without it (an integer layer, or a part inside torch.no_grad())"
            )
        with evaluating(self):
            ends = hidden.new_ones(1, 1, tokens)
            rebuilt = {
                "embed_from(features_before(x))": at.embed_from(hidden, inputs),
                "path(1)": at.path(hidden, torch.zeros_like(hidden), inputs)(ends)[:, 0],
            }
        for what, other in rebuilt.items():
            error = float((other - embedding).norm() / embedding.norm())
            if not error <= (1e-3 if embedding.dtype in (torch.float32, torch.float64) else 5e-2):
                raise self._mismatch(f"{what} of the {name} tower", error, at)

    def _mismatch(self, what: str, error: float, at: TowerAtLayer) -> ValueError:
        differs = f"{what} differs from the encoder's own output by {error:.1e} (relative), at layer {at.layer}; "
        hooked = [name or "the encoder" for name, module in self.named_modules() if foreign_hooks(module)]
        if hooked:
            return UnsupportedTowerError(
                f"{differs}forward hooks change what the model computes ({', '.join(hooked[:3])}): remove them"
            )
        adapters = [name for name, module in self.named_modules() if type(module).__module__.startswith("peft.")]
        if adapters:
            return UnsupportedTowerError(
                f"{differs}its adapters ({adapters[0]}) are no part of what is explained: call merge_and_unload() first"
            )
        if isinstance(at, (ImageBlocksAtLayer, TextBlocksAtLayer)):
            return UnsupportedTowerError(
                f"{differs}its blocks depend on more than the hidden states they pass on, so that layer cannot be "
                "explained; open_clip's own VisionTransformer, ModifiedResNet and TextTransformer can be at every layer"
            )
        return ValueError(f"{differs}{self._maker} is not laid out as this release expects")
