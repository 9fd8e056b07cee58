"""ImageBind (Girdhar et al., 2023): images, sounds and texts in one space, through the package that the user installs.

The package's model is wrapped as it is. Its licence, and that of its weights, forbids commercial use (CC BY-NC-SA 4.0).
Of its six towers three are explained. An encoder has two of them: images or sounds, and texts.

Sounds are heard as the package hears them, by the same spectrogram, but one clip of two seconds alone.

Shape suffixes as in `sound`, and L tokens as given, K embedding width, H x W the grid of patches.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import warnings
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.at_layer import TextTowerAtLayer, TowerAtLayer
from lightning_xai.models.block_list import BlockList, ImageBlocksAtLayer, TextBlocksAtLayer
from lightning_xai.models.encoder import TwoTowerEncoder
from lightning_xai.models.image_encoder import ImageEncoder
from lightning_xai.models.image_transform import ImageTransform
from lightning_xai.models.sound import INSTALL, SILENCE, SOUNDS, SoundEncoder
from lightning_xai.models.weights_file import read_weights

__all__ = ["ImageBindImages", "ImageBindSounds", "load_imagebind"]

_PACKAGE = "imagebind"
_INSTALL = (
    "ImageBind needs its package, whose licence forbids commercial use (CC BY-NC-SA 4.0): "
    "pip install 'lightning_xai[imagebind]'"
)
# What ImageBind was trained with; its constructor takes no other size of images.
_PIXELS = 224
_BANDS, _FRAMES, _RATE, _SECONDS = 128, 204, 16_000, 2
_MEAN, _DEVIATION = -4.268, 9.138
_DECIBELS = 10 / math.log(10)


class _ImageBind(TwoTowerEncoder):
    """One of the towers that take pictures, with that of texts.

    Attributes:
        model: an `ImageBindModel`; its weights are the only parameters.
    """

    _kind: ClassVar[str]
    """The tower, as the package calls it."""
    model: Any

    def _take(self, model: Any) -> None:
        if not hasattr(model, "modality_trunks"):
            raise TypeError(f"expected an ImageBindModel of the package {_PACKAGE}; got a {type(model).__name__}")
        self.model = model
        self.tokenizer = CaptionTokenizer(SimpleTokenizer())  # the vocabulary and the cleaning are OpenAI's CLIP's
        self.image_at_layer()
        self.text_at_layer()

    @property
    def name(self) -> str:
        """ImageBind, and the tower that takes the place of the image tower."""
        return f"ImageBind ({self._kind})"

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of the factor on cosine similarities with texts, a scalar: the sum of both towers'."""
        scale = next(self.parameters()).new_zeros(())
        for kind in (self._kind, "text"):
            for part in self.model.modality_postprocessors[kind].modules():
                if hasattr(part, "log_logit_scale"):
                    scale = scale + part.log_logit_scale.clamp(max=math.log(part.max_logit_scale))
        return scale

    @property
    def embedding_width(self) -> int:
        """K, the width of the shared space."""
        head = self.model.modality_heads["text"]
        return [int(part.out_features) for part in head.modules() if isinstance(part, nn.Linear)][-1]

    def reading(self, path: Path) -> TwoTowerEncoder:
        """This encoder, or that of the other kind, with the same weights: of sounds for .wav, .flac, .ogg and .mp3."""
        wanted = ImageBindSounds if path.suffix.lower() in SOUNDS else ImageBindImages
        return self if isinstance(self, wanted) else wanted(self.model).train(self.training)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images or spectrograms [B, C, height, width] -> embeddings [B, K], not normalised."""
        embedding: Tensor = self._picture_tower()(images)
        return embedding

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, K], not normalised; only as many tokens are run as are needed."""
        if not len(tokens):
            return self.logit_scale.new_zeros(0, self.embedding_width)
        return self._embed_text(tokens[:, : int(tokens.argmax(dim=1).max()) + 1])

    def _embed_text(self, tokens_BL: Tensor) -> Tensor:
        # No token sees those after it, and the end of text has the highest number. The package takes whole captions.
        length = tokens_BL.shape[1]
        given = self.model.modality_preprocessors["text"](
            text=pad(tokens_BL, (0, self.tokenizer.context_length - length))
        )
        tokens, mask = given["trunk"]["tokens"][:, :length], given["trunk"]["attn_mask"][:length, :length]
        hidden = self.model.modality_trunks["text"](tokens=tokens, attn_mask=mask)
        embedding: Tensor = self.model.modality_heads["text"](hidden, **given["head"])
        return embedding

    def _picture_tower(self) -> _PictureTower:
        return _PictureTower(self.model, self._kind)

    def _own_embedding(self, name: str, inputs: Tensor) -> Tensor:
        # The whole model, which then normalises and scales.
        kind = self._kind if name == "image" else "text"
        kept: list[Tensor] = []
        handle = self.model.modality_heads[kind].register_forward_hook(lambda *given: kept.append(given[2]))
        try:
            self.model({kind: _as_the_package(inputs, kind)})
        finally:
            handle.remove()
        return kept[0]

    def _image_at_layer(self, layer: int) -> TowerAtLayer:
        rows, columns = self.model.modality_preprocessors[self._kind].patches_layout[-2:]
        at_layer = _SoundBlocksAtLayer if self._kind == "audio" else ImageBlocksAtLayer
        return at_layer(self._picture_tower(), self._blocks(self._kind), self.image_shape, layer, (rows, columns))

    def _text_at_layer(self, layer: int) -> TextTowerAtLayer:
        def visible(tokens_BL: Tensor) -> Tensor:
            positions = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
            return positions <= tokens_BL.argmax(dim=1, keepdim=True)

        return TextBlocksAtLayer(self._embed_text, self._blocks("text"), layer, visible)

    def _blocks(self, kind: str) -> BlockList:
        return BlockList(self.model.modality_trunks[kind], "blocks", batch_first=False, prefix=int(kind != "text"))

    @property
    def _maker(self) -> str:
        names = packages_distributions().get(_PACKAGE, [_PACKAGE])
        try:
            return " ".join((names[0], version(names[0])))
        except PackageNotFoundError:  # a clone of the repository
            return names[0]


class ImageBindImages(_ImageBind, ImageEncoder):
    """ImageBind's image and text towers.

    Args:
        model: an `ImageBindModel` of the package; it may be shared with `ImageBindSounds`.

    Raises:
        TypeError: another model.
        ValueError: the towers' output is not finite.
    """

    _kind = "vision"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.image_transform = ImageTransform((_PIXELS, _PIXELS))
        self._take(model)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Size, mean, std, interpolation and resize mode."""
        names = ("size", "mean", "std", "interpolation", "resize_mode")
        return {name: getattr(self.image_transform, name) for name in names}


class ImageBindSounds(_ImageBind, SoundEncoder):
    """ImageBind's sound and text towers: spectrograms [B, 1, F, T] take the place of images.

    Their values are logarithms, shifted and scaled as the model takes them. A clip has two seconds: longer sounds are
    cut, shorter ones are filled up as the package does, with zeros in the spectrogram.

    Args:
        model: an `ImageBindModel` of the package; it may be shared with `ImageBindImages`.

    Raises:
        ImportError: transformers is not installed.
        TypeError: another model.
        ValueError: the towers' output is not finite.
    """

    _kind = "audio"

    def __init__(self, model: Any) -> None:
        super().__init__(_extractor(), _RATE * _SECONDS, window=_RATE // 40)
        self._take(model)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(1, mel bands, frames) of a spectrogram."""
        return 1, _BANDS, _FRAMES

    def decibels(self, spectrograms: Tensor) -> Tensor:
        """The loudness; frames that are the same in all bands hold nothing."""
        filled = spectrograms.amax(dim=2, keepdim=True) == spectrograms.amin(dim=2, keepdim=True)
        return ((spectrograms * _DEVIATION + _MEAN) * _DECIBELS).masked_fill(filled, SILENCE)


class _PictureTower(nn.Module):
    """A tower up to its head: images or spectrograms [B, C, height, width] -> embeddings [B, K], not normalised."""

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__()
        self._model, self._kind = model, kind

    def forward(self, pictures: Tensor) -> Tensor:
        given = self._model.modality_preprocessors[self._kind](**{self._kind: _as_the_package(pictures, self._kind)})
        embedding: Tensor = self._model.modality_heads[self._kind](
            self._model.modality_trunks[self._kind](**given["trunk"]), **given["head"]
        )
        return embedding


class _SoundBlocksAtLayer(ImageBlocksAtLayer):
    """The audio tower, whose rows of patches begin with the lowest frequency."""

    def on_grid(self, values: Tensor) -> Tensor:
        """Values of the image tokens [..., T] -> [..., H, W], the lowest frequency in the last row."""
        return super().on_grid(values).flip(-2)


def _as_the_package(inputs: Tensor, kind: str) -> Tensor:
    """Inputs as the package has them: spectrograms with the lowest frequency in the first row."""
    return inputs.flip(-2) if kind == "audio" else inputs


def _extractor() -> Any:
    """The spectrogram of AST (Gong et al., 2021), which ImageBind uses, with its own mean and deviation.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(INSTALL) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")  # as in the original
        make: Any = transformers.ASTFeatureExtractor
        return make(sampling_rate=_RATE, num_mel_bins=_BANDS, max_length=_FRAMES, mean=_MEAN, std=_DEVIATION / 2)


def load_imagebind(weights: str | Path, device: str | torch.device = "cpu") -> tuple[ImageBindImages, ImageBindSounds]:
    """Load ImageBind from the file that its authors publish, as an encoder of images and one of sounds.

    Both share the weights.

    Args:
        weights: `imagebind_huge.pth`; nothing is downloaded or unpickled.
        device: where to put the model.

    Raises:
        ImportError: the package imagebind, or transformers, is not installed.
        ValueError: a file that is missing or broken, or weights of another model.

    Example:
        >>> images, sounds = load_imagebind("imagebind_huge.pth")  # doctest: +SKIP
        >>> FeaturePairAttribution(sounds).attribute(spectrograms, tokens)  # doctest: +SKIP
    """
    package = _package()
    found = read_weights(Path(weights))
    model = package.imagebind_huge(pretrained=False)
    try:
        model.load_state_dict(found.state)
    except RuntimeError as error:
        raise ValueError(f"{weights} holds no weights of imagebind_huge: {error}") from error
    model.to(device)
    return ImageBindImages(model), ImageBindSounds(model)


def _package() -> Any:
    """The package's module of models.

    Raises:
        ImportError: it, or what it needs, is not installed.
    """
    name = f"{_PACKAGE}.models.imagebind_model"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.find_spec(_PACKAGE) if _PACKAGE not in sys.modules else None
    if found is not None:
        # Importing the package itself also imports its readers of files, and with them torchaudio and pytorchvideo, of
        # which no release goes with today's torchvision. The models need neither: a bare package leads to them.
        bare = ModuleType(_PACKAGE)
        bare.__path__ = list(found.submodule_search_locations or ())
        sys.modules[_PACKAGE] = bare
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{_INSTALL} ({error})") from error
    finally:
        if found is not None:
            del sys.modules[_PACKAGE]  # who imports the package later gets all of it
