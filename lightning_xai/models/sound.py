"""Sounds in the place of images: a spectrogram, laid out as a person reads it, frequency upwards, time to the right.

What CLAP and ImageBind share. Each has a feature extractor of transformers, which makes the numbers.

Shape suffixes: B sounds, C channels of a spectrogram, F mel bands, T frames.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from lightning_xai.models.encoder import TwoTowerEncoder

__all__ = ["INSTALL", "SILENCE", "SOUNDS", "SoundEncoder", "features_of", "read_sound"]

INSTALL = "models of sounds need transformers and soundfile: pip install 'lightning_xai[audio]'"
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
"""How the names of sound files end."""
SILENCE = -100.0
"""No sound at all, in decibels."""
_DYNAMIC_RANGE = 80.0
"""How many decibels below its loudest place a picture of a sound is black."""


class SoundEncoder(TwoTowerEncoder):
    """Two towers of sounds and texts: spectrograms take the place of images.

    Spectrograms are [B, C, F, T], lowest frequency at the bottom (the last row), as `spectrogram` makes them.
    References and masks of attribution methods are silence: zeros would be a loud noise.

    Models hear no more than one clip: longer sounds are cut.

    Args:
        extractor: the model's feature extractor, of transformers: samples -> features [1, C, T, F] or [1, T, F].
        samples: length of a clip.
        window: samples that make one frame: the least that a sound may have.
    """

    def __init__(self, extractor: Any, samples: int, window: int = 1) -> None:
        super().__init__()
        self._extractor = extractor
        self._samples, self._window = samples, window

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
        return self.spectrogram(np.zeros(self._samples), self.sampling_rate)

    def neutral_image(self) -> Tensor:
        """Silence: zeros would be a loud noise."""
        return self.black_image()

    def read(self, source: Path | Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """The spectrogram [C, F, T] of a sound file, and (width, height): frames of all of the sound, and mel bands."""
        if not isinstance(source, Path):
            raise ValueError(f"{self.name} is a model of sounds: give the path of a sound file, not an image")
        samples = read_sound(source, self.sampling_rate)
        _, bands, frames = self.image_shape
        whole = round(frames * max(1.0, len(samples) / self._samples))
        return self.spectrogram(samples, self.sampling_rate), (whole, bands)

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes on the spectrogram, in frames and mel bands from the top left corner, cut to what the model hears."""
        _, bands, frames = self.image_shape
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        return corners.clamp(min=0).minimum(torch.tensor([frames, bands] * 2).to(corners))

    def seen(self, size: tuple[int, int]) -> float:
        """The share of a sound that is heard."""
        return min(1.0, self.image_shape[2] / size[0])

    def spectrogram(self, waveform: ArrayLike | Tensor, rate: int) -> Tensor:
        """The log-mel spectrogram of a sound, always the same for the same sound.

        Shorter sounds than the model's clip are repeated or padded as its feature extractor is set, longer ones cut.

        Args:
            waveform: samples of one channel, in [-1, 1].
            rate: samples per second; has to be `sampling_rate` (`read_sound` resamples).

        Returns:
            [C, F, T], the lowest frequency in the last row.

        Raises:
            ValueError: no samples, several channels, samples that are not finite, or another rate.
        """
        samples = np.asarray(waveform, dtype=np.float64)
        if samples.ndim != 1 or not samples.size:
            raise ValueError(f"expected the samples of one channel, at least one; got shape {[*samples.shape]}")
        if len(samples) < self._window:
            raise ValueError(f"a sound has to have {self._window} samples for one frame; got {len(samples)}")
        if not np.isfinite(samples).all():
            raise ValueError("the waveform holds NaN or infinity")
        if rate != self.sampling_rate:
            raise ValueError(
                f"this model listens to {self.sampling_rate} samples per second, got {rate}; resample the sound, "
                "as read_sound does"
            )
        with _numpy_random_state_kept():  # transformers draws which sound of a batch it calls a long one
            made = self._extractor(samples[: self._samples], sampling_rate=rate, return_tensors="pt")
        features: Tensor = made[self._extractor.model_input_names[0]][0].float()
        return _as_picture(features if features.ndim == 3 else features[None])

    @abstractmethod
    def decibels(self, spectrograms: Tensor) -> Tensor:
        """The loudness [B, C, F, T] of spectrograms [B, C, F, T], in decibels; `SILENCE` where there is no sound."""

    def pictures(self, images: Tensor) -> Tensor:
        """Spectrograms [B, C, F, T] as grey pictures [B, 3, F, T]: the loudest is white, 80 dB below it is black."""
        decibels_B1FT = self.decibels(images[:, :1])
        loudest_B111 = decibels_B1FT.amax(dim=(2, 3), keepdim=True)
        darkest_B111 = (loudest_B111 - _DYNAMIC_RANGE).clamp(min=SILENCE)
        span_B111 = (loudest_B111 - darkest_B111).clamp(min=1e-6)
        return ((decibels_B1FT - darkest_B111) / span_B111).clamp(0, 1).expand(-1, 3, -1, -1)


def _as_picture(features: Tensor) -> Tensor:
    """From transformers' [..., T, F] to [..., F, T] with the lowest frequency in the last row.

    Example:
        >>> _as_picture(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).tolist()  # three frames of two bands
        [[2.0, 4.0, 6.0], [1.0, 3.0, 5.0]]
    """
    return features.mT.flip(-2)


def features_of(picture: Tensor) -> Tensor:
    """Features [..., T, F], as transformers has them, of a spectrogram [..., F, T]."""
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
        raise ImportError(INSTALL) from error
    try:
        samples, own_rate = soundfile.read(path, always_2d=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a sound: {error}") from error
    if not len(samples):
        raise ValueError(f"{path} holds no samples")
    mono: np.ndarray = samples.mean(axis=1)
    return mono if own_rate == rate else np.asarray(resample_poly(mono, rate, own_rate))
