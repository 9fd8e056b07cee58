"""The options that choose a model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning_xai.model_options import ModelOptions

SENTENCES = "st:"
"""In front of a folder, it names a model of sentence-transformers."""
IMAGEBIND = "imagebind:"
"""In front of a file, it names weights of ImageBind."""

# No `if TYPE_CHECKING` in a module whose class holds options: the parser would import what stands there, and so torch.


@dataclass(frozen=True)
class ModelChoice(ModelOptions):
    """The model to use.

    Attributes:
        name: an open_clip name (ViT-B-32), a JSON model config, a .ckpt file that fit has written, an open_clip folder,
            hf-hub:OWNER/NAME, hf:FOLDER, a folder of Hugging Face's transformers (CLIP, SigLIP, CLAP and others),
            st:FOLDER, one of sentence-transformers, for two captions, or imagebind:FILE, weights of ImageBind, for
            images, sounds and captions.
        pretrained: a tag (openai; downloaded on first use) or a file of weights; left out: those that the name brings,
            random ones otherwise.
        device: cpu, cuda, cuda:1, ...; left out: a GPU where there is one.
        seed: of the weights, where they are random.
    """

    name: str
    pretrained: str | None = None
    device: str | None = None
    seed: int = 0

    @property
    def is_random(self) -> bool:
        """True if neither the name nor `pretrained` brings weights."""
        brings = self.name.endswith(".ckpt") or self.name.startswith(
            ("hf-hub:", "hf:", SENTENCES, IMAGEBIND, "local-dir:")
        )
        folder = any((Path(self.name) / name).is_file() for name in ("open_clip_config.json", "config.json"))
        return self.pretrained is None and not (brings or folder)

    @property
    def compares_texts_only(self) -> bool:
        """True for a sentence encoder, which has no image tower."""
        return self.name.startswith(SENTENCES)

    @property
    def options(self) -> dict[str, Any]:
        """The options of `load_dual_encoder` among these."""
        return {field.name: getattr(self, field.name) for field in fields(ModelOptions)}
