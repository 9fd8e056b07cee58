"""Files of weights: read without unpickling anything but tensors and plain values, and written for open_clip."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_xai.models.architecture import check_architecture
from lightning_xai.models.dual_encoder import CHECKPOINT_KEY, DualEncoder

__all__ = ["Weights", "read_weights", "save_open_clip"]

_STATE_PREFIX = "encoder.model."


@dataclass(frozen=True)
class Weights:
    """A state dict of an open_clip model read from a file, and the architecture the file names, if any."""

    path: Path
    state: dict[str, Tensor]
    architecture: dict[str, Any] | None


def read_weights(path: Path) -> Weights:
    """Read a state dict without unpickling anything but tensors and plain values.

    Raises:
        ValueError: the file is missing, broken, or holds other objects.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    state, recorded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"checkpoint {path} holds no state dict (names and tensors); save the model's state_dict alone"
        )
    if not state:
        raise ValueError(f"checkpoint {path} holds no weights")
    return Weights(path, state, None if recorded is None else check_architecture(recorded, path))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    try:
        with safe_open(path, framework="pt") as opened:
            recorded = (opened.metadata() or {}).get(CHECKPOINT_KEY)
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} is no readable safetensors file: {error}") from error
    try:
        return state, None if recorded is None else json.loads(recorded)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} has broken JSON in its metadata {CHECKPOINT_KEY!r}: {error}") from error


def _read_pickle(path: Path) -> tuple[Any, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle raises whatever its bytes happen to ask for
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"checkpoint {path} cannot be read as plain tensors ({reason}); it is broken, or holds Python objects, "
            "which are never loaded: save its state_dict alone"
        ) from error
    if not isinstance(checkpoint, dict):
        return checkpoint, None
    recorded, state = checkpoint.get(CHECKPOINT_KEY), checkpoint.get("state_dict", checkpoint)
    if isinstance(state, dict):
        prefix, only = ("module.", "") if recorded is None else (_STATE_PREFIX, _STATE_PREFIX)
        state = {str(key).removeprefix(prefix): value for key, value in state.items() if str(key).startswith(only)}
    return state, recorded


def save_open_clip(encoder: DualEncoder, path: Path) -> None:
    """Write weights that `open_clip.create_model(name, pretrained=path)` loads.

    A `.safetensors` file also carries the architecture in its metadata; `<name>.json` next to the file holds the
    model config, so that models that open_clip has no name for can be built as well.

    Raises:
        ValueError: a suffix other than `.safetensors` or `.pt`.
    """
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"export writes .safetensors or .pt, not {path.suffix or 'a file without suffix'}: {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in encoder.model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={CHECKPOINT_KEY: json.dumps(encoder.architecture)})
    else:
        torch.save(state, path)
    path.with_suffix(".json").write_text(
        json.dumps(encoder.architecture["model_cfg"], indent=2) + "\n", encoding="utf-8"
    )
