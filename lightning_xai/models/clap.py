"""CLAP, the dual encoder of sounds and texts (Wu et al., 2023), through Hugging Face's transformers.

CLAP's audio tower (HTS-AT, a Swin transformer) wants a square, so it folds the spectrogram into strips of time, one
below the other. `ClapAudioAtLayer` undoes that: hidden states, grids and maps lie on the spectrogram.

Shape suffixes as in `sound`, and D hidden width, K embedding width, H x W the grid of tokens on the spectrogram
(frequency x time), G x G the same tokens as the tower has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.architecture import FOLDER_CONFIG
from lightning_xai.models.at_layer import TextTowerAtLayer, TowerAtLayer, UnsupportedTowerError, resolve_layer
from lightning_xai.models.hugging_face import HuggingFaceText, transformers_maker
from lightning_xai.models.hugging_face_folder import check_folder, read_model
from lightning_xai.models.sound import INSTALL, SoundEncoder, features_of


class ClapEncoder(SoundEncoder):
    """CLAP as two towers: spectrograms [B, C, F, T], in decibels, take the place of images.

    Models with feature fusion get four channels, but hear no more than one clip: longer sounds are cut, not fused.

    Args:
        model: a `transformers.ClapModel`.
        tokenizer: of its text tower.
        extractor: its `transformers.ClapFeatureExtractor`.

    Raises:
        ValueError: the towers' output is not finite.

    Attributes:
        model: as given; its weights are the only parameters.
    """

    def __init__(self, model: Any, tokenizer: CaptionTokenizer, extractor: Any) -> None:
        super().__init__(extractor, extractor.nb_max_samples)
        self.model = model
        self.tokenizer = tokenizer
        config = model.config.text_config
        self._text_tower = HuggingFaceText(model.text_model, config, int(config.pad_token_id), self._embed_text)
        self.image_at_layer()
        self.text_at_layer()

    @property
    def name(self) -> str:
        """The model's type, and its folder where it came from one."""
        return " ".join(filter(None, ("CLAP", self.model.config.name_or_path)))

    @property
    def logit_scale(self) -> Tensor:
        """The learned logarithm of the factor on cosine similarities of sounds with texts, a scalar parameter."""
        scale: Tensor = self.model.logit_scale_a
        return scale

    @property
    def embedding_width(self) -> int:
        """K, the width of the shared space."""
        return int(self.model.config.projection_dim)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, mel bands, frames) of a spectrogram."""
        extractor = self._extractor
        channels = 4 if extractor.truncation == "fusion" else 1
        return channels, extractor.feature_size, extractor.nb_max_samples // extractor.hop_length + 1

    def decibels(self, spectrograms: Tensor) -> Tensor:
        """Spectrograms as they are."""
        return spectrograms

    def encode_image(self, images: Tensor) -> Tensor:
        """Spectrograms [B, C, F, T] -> embeddings [B, K], not normalised."""
        # Asked of the parts, as the model's own method normalises.
        longer = torch.zeros(len(images), 1, dtype=torch.bool, device=images.device)
        heard = self.model.audio_model(input_features=features_of(images), is_longer=longer).pooler_output
        embedding: Tensor = self.model.audio_projection(heard)
        return embedding

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, K], not normalised."""
        if not len(tokens):
            return self.logit_scale.new_zeros(0, self.embedding_width)
        return self._text_tower.encode(tokens)

    def _embed_text(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        # Asked of the parts, as the model's own method normalises.
        read = self.model.text_model(input_ids=tokens, attention_mask=mask).pooler_output
        embedding: Tensor = self.model.text_projection(read)
        return embedding

    def _image_at_layer(self, layer: int) -> TowerAtLayer:
        return ClapAudioAtLayer(self.model.audio_model.audio_encoder, self.model.audio_projection, layer)

    def _text_at_layer(self, layer: int) -> TextTowerAtLayer:
        return self._text_tower.at_layer(layer)

    @property
    def _maker(self) -> str:
        return transformers_maker()


class ClapAudioAtLayer(TowerAtLayer):
    """CLAP's audio tower at the input of a stage; hidden states are feature maps on the spectrogram [B, D, H, W].

    Args:
        encoder: `ClapModel.audio_model.audio_encoder`.
        projection: `ClapModel.audio_projection`.
        layer: the stage's number, from 0; one more than the last is the head.

    Raises:
        ValueError: no such layer.
        UnsupportedTowerError: a strip of the folded spectrogram is no whole number of tokens.
    """

    is_feature_map = True

    def __init__(self, encoder: Any, projection: nn.Module, layer: int) -> None:
        self._encoder = encoder
        self._projection = projection
        self._stages = encoder.layers
        self.layers = range(len(self._stages))
        self.layer = resolve_layer(layer, 0, len(self._stages), "image", head=True)
        self.block = self._stages[self.layer] if self.layer in self.layers else None
        self.last_block = self._stages[-1]
        self._strips = int(encoder.freq_ratio)
        # The last stage does not merge tokens, so that the head's are as many.
        side, _ = encoder.input_resolutions[min(self.layer, self.layers[-1])]
        if side % self._strips:
            raise UnsupportedTowerError(
                f"the audio tower folds a spectrogram into {self._strips} strips, which do not divide the {side} rows "
                f"of tokens at layer {self.layer}; take an earlier layer"
            )
        self.grid = (side // self._strips, side * self._strips)

    def features_before(self, inputs: Tensor) -> Tensor:
        """Spectrograms [B, C, F, T] -> feature maps [B, D, H, W]."""
        features_BCTF = features_of(inputs)
        # As in the tower: batch norm over mel bands, folding, patches; no sound is one of the long ones to be fused.
        normed = self._encoder.batch_norm(features_BCTF.transpose(1, 3)).transpose(1, 3)
        none_longer = torch.zeros(0, dtype=torch.long, device=inputs.device)
        tokens = self._encoder.patch_embed(self._encoder.reshape_mel2img(normed), none_longer)
        return self.captured(self._run(tokens, 0, self.layer))

    def captured(self, block_input: Tensor) -> Tensor:
        """A stage's input [B, G * G, D] on the spectrogram: [B, D, H, W]."""
        rows, columns = self.grid
        # Strip by strip from the top, each a span of time with its lowest frequency first.
        strips = block_input.mT.reshape(len(block_input), -1, self._strips, rows, columns // self._strips)
        return strips.transpose(2, 3).flip(2).flatten(3)

    def embed_from(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Feature maps [B, D, H, W] -> embeddings [B, K]."""
        strips = hidden.reshape(*hidden.shape[:3], self._strips, -1).flip(2).transpose(2, 3)
        tokens = self._run(strips.flatten(2).mT, self.layer, len(self._stages))
        # The tower sorts tokens by frequency before it averages all of them, which changes nothing.
        embedding: Tensor = self._projection(self._encoder.norm(tokens).mean(dim=1))
        return embedding

    def _run(self, tokens: Tensor, first: int, stop: int) -> Tensor:
        for number in range(first, stop):
            tokens = self._stages[number](tokens, self._encoder.input_resolutions[number])[0]
        return tokens


def is_clap(folder: Path) -> bool:
    """True for a folder that is neither one of open_clip's nor, by its config.json, of another model."""
    if (folder / FOLDER_CONFIG).is_file():
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # whose loading then says what it lacks
    return not isinstance(config, dict) or config.get("model_type") == "clap"


def load_clap(folder: str | Path, device: str | torch.device = "cpu", context_length: int = 77) -> ClapEncoder:
    """Load a CLAP model from a folder as `save_pretrained` writes it; nothing is downloaded, no code from it is run.

    Args:
        folder: with `config.json`, `model.safetensors`, `preprocessor_config.json` and the tokenizer's files, such as a
            clone of `laion/clap-htsat-unfused`.
        device: where to put the model.
        context_length: tokens that a text is cut or padded to.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a file is missing, or the model is no CLAP.
    """
    try:
        from transformers import ClapFeatureExtractor, ClapModel
    except ImportError as error:
        raise ImportError(INSTALL) from error
    folder = Path(folder)
    check_folder(folder, {"clap": "ClapModel"}, "a CLAP model", example="laion/clap-htsat-unfused")
    model = read_model(ClapModel, folder)
    extractor = ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)
    tokenizer = HFTokenizer(str(folder), context_length, local_files_only=True, trust_remote_code=False)
    return ClapEncoder(model, CaptionTokenizer(tokenizer), extractor).to(device)
