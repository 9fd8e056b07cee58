"""The options that choose a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# No `if TYPE_CHECKING` in a module whose class holds options: the parser would import what stands there, and so torch.


@dataclass
class ModelChoice:
    """The model to use.

    Attributes:
        name: an open_clip name (ViT-B-32), a JSON model config, a .ckpt file that fit has written, or the folder of a
            CLAP model.
        pretrained: a tag (openai; downloaded on first use) or a file of weights; left out: those of the .ckpt file,
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
        return self.pretrained is None and not (self.name.endswith(".ckpt") or Path(self.name).is_dir())
