"""CLAP, the dual encoder of sounds and texts (Wu et al., 2023), through Hugging Face's transformers.

The picture of a sound is its log-mel spectrogram, laid out as a person reads it: frequency upwards, time to the right.
CLAP's audio tower (HTS-AT, a Swin transformer) wants a square, so it folds the spectrogram into strips of time, one
below the other. `ClapAudioAtLayer` undoes that: hidden states, grids and maps lie on the spectrogram.

Shape suffixes: B sounds, C channels of a spectrogram, F mel bands, T frames, D hidden width, K embedding width,
H x W the grid of tokens on the spectrogram (frequency x time), G x G the same tokens as the tower has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.architecture import FOLDER_CONFIG
from lightning_xai.models.at_layer import TextTowerAtLayer, TowerAtLayer, UnsupportedTowerError, resolve_layer
from lightning_xai.models.encoder import TwoTowerEncoder
from lightning_xai.models.hugging_face import HuggingFaceText, transformers_maker
from lightning_xai.models.hugging_face_folder import check_folder, read_model

_INSTALL = "CLAP needs transformers and soundfile: pip install 'lightning_xai[audio]'"
_DYNAMIC_RANGE = 80.0
"""How many decibels below its loudest place a picture of a sound is black."""
_SILENCE = -100.0
"""The feature extractor's value for no sound at all, in decibels."""


class ClapEncoder(TwoTowerEncoder):
    """CLAP as two towers: spectrograms take the place of images.

    Spectrograms are [B, C, F, T] in decibels, lowest frequency at the bottom (the last row), as `spectrogram` makes
    them. References and masks of attribution methods are silence: zeros would be a loud noise.

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
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self._extractor = extractor
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

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Settings of the model's feature extractor."""
        settings = self._extractor.to_dict()
        return {name: value for name, value in settings.items() if isinstance(value, (str, int, float))}

    @property
    def sampling_rate(self) -> int:
        """The samples per second that `spectrogram` takes."""
        return int(self._extractor.sampling_rate)

    def black_image(self) -> Tensor:
        """The spectrogram of silence: [C, F, T]."""
        return self.spectrogram(np.zeros(self._extractor.nb_max_samples), self.sampling_rate)

    def neutral_image(self) -> Tensor:
        """Silence: zeros would be a loud noise."""
        return self.black_image()

    def read(self, path: Path) -> tuple[Tensor, tuple[int, int]]:
        """The spectrogram [C, F, T] of a sound file, and its (width, height): frames and mel bands."""
        spectrogram = self.spectrogram(read_sound(path, self.sampling_rate), self.sampling_rate)
        _, bands, frames = self.image_shape
        return spectrogram, (frames, bands)

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes on the spectrogram, in frames and mel bands from the top left corner, cut to it."""
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        return corners.clamp(min=0).minimum(torch.tensor([*size, *size]).to(corners))

    def spectrogram(self, waveform: ArrayLike | Tensor, rate: int) -> Tensor:
        """The log-mel spectrogram of a sound, always the same for the same sound.

        Shorter sounds than the model's clip are repeated or padded as its feature extractor is set, longer ones cut.

        Args:
            waveform: samples of one channel, in [-1, 1].
            rate: samples per second; has to be `sampling_rate` (`read_sound` resamples).

        Returns:
            [C, F, T] in decibels, the lowest frequency in the last row.

        Raises:
            ValueError: no samples, several channels, samples that are not finite, or another rate.
        """
        samples = np.asarray(waveform, dtype=np.float64)
        if samples.ndim != 1 or not samples.size:
            raise ValueError(f"expected the samples of one channel, at least one; got shape {[*samples.shape]}")
        if not np.isfinite(samples).all():
            raise ValueError("the waveform holds NaN or infinity")
        if rate != self.sampling_rate:
            raise ValueError(
                f"this model listens to {self.sampling_rate} samples per second, got {rate}; resample the sound, "
                "as read_sound does"
            )
        with _numpy_random_state_kept():  # transformers draws which sound of a batch it calls a long one
            features = self._extractor(
                samples[: self._extractor.nb_max_samples], sampling_rate=rate, return_tensors="pt"
            )["input_features"]
        spectrogram_CFT: Tensor = _as_picture(features[0].float())
        return spectrogram_CFT

    def pictures(self, images: Tensor) -> Tensor:
        """Spectrograms [B, C, F, T] as grey pictures [B, 3, F, T]: the loudest is white, 80 dB below it is black."""
        decibels_B1FT = images[:, :1]
        loudest_B111 = decibels_B1FT.amax(dim=(2, 3), keepdim=True)
        darkest_B111 = (loudest_B111 - _DYNAMIC_RANGE).clamp(min=_SILENCE)
        span_B111 = (loudest_B111 - darkest_B111).clamp(min=1e-6)
        return ((decibels_B1FT - darkest_B111) / span_B111).clamp(0, 1).expand(-1, 3, -1, -1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Spectrograms [B, C, F, T] -> embeddings [B, K], not normalised."""
        # Asked of the parts, as the model's own method normalises.
        longer = torch.zeros(len(images), 1, dtype=torch.bool, device=images.device)
        heard = self.model.audio_model(input_features=_as_features(images), is_longer=longer).pooler_output
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
        features_BCTF = _as_features(inputs)
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


def _as_picture(features: Tensor) -> Tensor:
    """From transformers' [..., T, F] to [..., F, T] with the lowest frequency in the last row.

    Example:
        >>> _as_picture(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).tolist()  # three frames of two bands
        [[2.0, 4.0, 6.0], [1.0, 3.0, 5.0]]
    """
    return features.mT.flip(-2)


def _as_features(picture: Tensor) -> Tensor:
    """The reverse of `_as_picture`."""
    return picture.flip(-2).mT


@contextmanager
def _numpy_random_state_kept() -> Iterator[None]:
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


def read_sound(path: str | Path, rate: int) -> np.ndarray:
    """Read a sound file (WAV, FLAC, OGG, MP3): samples of all channels' mean, resampled to `rate` per second.

    Raises:
        ImportError: soundfile or scipy is not installed.
        ValueError: the file is missing, broken, or holds no samples.
    """
    try:
        import soundfile
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    try:
        samples, own_rate = soundfile.read(path, always_2d=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a sound: {error}") from error
    if not len(samples):
        raise ValueError(f"{path} holds no samples")
    mono: np.ndarray = samples.mean(axis=1)
    return mono if own_rate == rate else np.asarray(resample_poly(mono, rate, own_rate))


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
        raise ImportError(_INSTALL) from error
    folder = Path(folder)
    check_folder(folder, {"clap": "ClapModel"}, "a CLAP model", example="laion/clap-htsat-unfused")
    model = read_model(ClapModel, folder)
    extractor = ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)
    tokenizer = HFTokenizer(str(folder), context_length, local_files_only=True, trust_remote_code=False)
    return ClapEncoder(model, CaptionTokenizer(tokenizer), extractor).to(device)
